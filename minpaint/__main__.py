"""`python -m minpaint`: the command line, which lives in `cli`."""

import gc
import sys

from minpaint.cli.main import main

if __name__ == "__main__":
    # Nearly all objects that importing and loading make are there to stay, so looking for garbage among
    # them is a tenth of the start's time for nothing; `cli.paint` turns it on at the first step.
    gc.disable()
    sys.exit(main())
