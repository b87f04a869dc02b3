"""The painter page: `python -m minpaint ui`."""
