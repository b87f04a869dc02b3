"""The command line: `python -m minpaint`."""
