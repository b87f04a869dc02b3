"""`python -m minpaint`: the command line, which lives in `cli`."""

import sys

from minpaint.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
