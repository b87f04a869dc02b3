"""`python -m minpaint`: the command line, which lives in `cli`."""

import gc
import os

from minpaint.cli.main import main

if __name__ == "__main__":
    # Nearly all objects that importing and loading make are there to stay. Looking for garbage among them is a tenth
    # of the start's time (`cli.paint` turns it on at the first step), and taking them down at the end as much again.
    gc.disable()
    os._exit(main())
