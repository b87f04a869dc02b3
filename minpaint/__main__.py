"""`python -m minpaint`: the command line, which lives in `cli`."""

import gc
import os

from minpaint.cli.main import main

if __name__ == "__main__":
    # Nearly all objects that importing and loading make stay to the end. Looking for garbage among them is a tenth of
    # the start's time (`cli.paint` begins at the first step); freeing them one by one, with all written, is as much.
    gc.disable()
    os._exit(main())
