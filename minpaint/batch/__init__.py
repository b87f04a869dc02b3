"""Many pictures: `python -m minpaint batch`."""
