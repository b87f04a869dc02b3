"""`python -m minpaint`: the command line, which lives in `cli`."""

import gc
import os

from minpaint.cli.main import main

if __name__ == "__main__":
    # Nearly all objects that importing and loading make are there to stay, so looking for garbage among
    # them is a tenth of the start's time for nothing; `cli.paint` turns it on at the first step.
    gc.disable()
    # Nor are they taken down one by one at the end, which takes as long again. All is written by then.
    os._exit(main())
