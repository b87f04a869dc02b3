"""`python -m minpaint`: the command line, which lives in `cli`."""

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

    from minpaint.cli.main import run_process

    sys.exit(run_process())
