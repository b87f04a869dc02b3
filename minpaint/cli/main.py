"""The command line: `python -m minpaint VERB`, where each verb is a function in a module beside this one.

Exit codes: 0 done; 2 bad usage or bad input; 3 the budget cannot hold; 1 anything else.
Messages go to stderr; stdout is for what plan, info and --json print, and nothing else.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pkgutil import resolve_name

from minpaint.cli.options import Note, parse
from minpaint.errors import BudgetError, CheckpointError, InputError, MinpaintWarning, one_line

VERBS = {None: "demo:demo", "paint": "paint:paint", "plan": "plan:plan", "info": "paint:info"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line with these arguments, or the process's own; returns the exit code."""
    try:
        started = time.perf_counter()
        options = parse(arguments)
        options.started, quiet = started, getattr(options, "quiet", False)
        note: Note = (lambda line: None) if quiet else _say
        if options.verb == "paint" and options.model is None:
            note("no --model given: using tiny, the bundled toy model")
        # the libraries read these variables when they are imported, and then keep their own messages to themselves
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        if quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with warnings.catch_warnings():  # our own warnings become one line each, and no others are shown
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", MinpaintWarning)
            warnings.showwarning = lambda message, *_: note(f"note: {message}")
            # imported only now: the libraries take seconds, which --help and bad usage need not wait for
            resolve_name(f"minpaint.cli.{VERBS[options.verb]}")(options, note)
        return 0
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        message, code = "stopped; nothing half-written is left", 1
    except Exception as error:
        message = one_line(str(error)) or type(error).__name__
        code = 3 if isinstance(error, BudgetError) else 2 if isinstance(error, (InputError, CheckpointError)) else 1
    _say(f"error: {message}")
    return code


def _say(line: str) -> None:
    print(f"minpaint: {line}", file=sys.stderr, flush=True)
