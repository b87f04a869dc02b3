"""The command line: `python -m minpaint VERB`, where each verb is a function in a module beside this one.

Exit codes: 0 done; 2 bad usage or bad input; 3 the budget cannot hold; 4 a painting is flagged by --safety; 130 stopped
by Ctrl-C, 143 by SIGTERM; 1 anything else, and what parity compares differs.
Messages go to stderr; stdout is for what plan, info, parity, ui and --json print, and nothing else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from pkgutil import resolve_name

from minpaint.cli.options import STREAM, Note, parse
from minpaint.errors import (
    BudgetError,
    CheckpointError,
    InputError,
    MinpaintError,
    MinpaintWarning,
    SafetyError,
    one_line,
)

STOPPED = "stopped; nothing half-written is left"
VERBS = {
    None: "demo:demo",
    "paint": "paint:paint",
    "plan": "plan:plan",
    "info": "paint:info",
    "trace": "study:trace",
    "compare": "study:compare",
    "parity": "parity:parity",
    "ui": "ui:ui",
    "batch": "batch:batch",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line with these arguments, or the process's own; returns the exit code."""
    before, code, message = {}, 0, ""
    try:
        with suppress(ValueError):  # only the main thread may
            before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
        code = _run(arguments, stoppable=bool(before))
    except BrokenPipeError:  # whoever read stdout has seen enough
        code = 1
    except KeyboardInterrupt as stop:
        code, message = 128 + (stop.args or (signal.SIGINT,))[0], STOPPED
    except Exception as error:
        message = str(error) if isinstance(error, MinpaintError) else one_line(str(error)) or type(error).__name__
        codes = {BudgetError: 3, SafetyError: 4, InputError: 2, CheckpointError: 2}
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
    finally:
        for number, handler in before.items():  # the process's own run has ended, and what it says now holds
            signal.signal(number, signal.SIG_IGN if arguments is None else handler)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:  # and so that the interpreter does not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = code or 1, message or ("" if isinstance(error, BrokenPipeError) else f"stdout: {error}")
    if message:
        _say(f"error: {message}")
    return code


class _Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    A plain KeyboardInterrupt that passes through code made from text lets `python -m` end by SIGINT, even if caught.
    """


def _leave(number: int, frame: object) -> None:
    """End at Ctrl-C or SIGTERM while libraries are imported: nothing needs tidying, and torch aborts if that fails."""
    _say(f"error: {STOPPED}")
    os._exit(128 + number)


def _stop(number: int, frame: object) -> None:
    """Stop a verb at Ctrl-C or SIGTERM, and let it tidy up; another signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise _Stopped(number)


def _run(arguments: list[str] | None, stoppable: bool) -> int:
    started = time.perf_counter()
    if None in (sys.stdin, sys.stdout, sys.stderr):  # a file opened now would get the number of a closed stream
        while os.open(os.devnull, os.O_RDWR) <= 2:
            pass
        sys.stderr = sys.stderr or os.fdopen(2, "w")
    options = parse(arguments)
    options.started, quiet = started, getattr(options, "quiet", False)
    printed = options.verb in ("plan", "info", "parity", "ui") or getattr(options, "json", False)
    if sys.stdout is None and (printed or getattr(options, "output", None) == STREAM):
        raise InputError("stdout is closed, where the result is to be written; leave it open")
    note: Note = (lambda line: None) if quiet else _say
    if options.verb in ("paint", "trace") and options.model is None:
        note("no --model given: using tiny, the bundled toy model")
    # the libraries read these variables when they are imported, and then keep their own messages to themselves
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for library in ("PIL", "matplotlib"):
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():  # our own warnings become one line each, and no others are shown
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MinpaintWarning)
        warnings.showwarning = lambda message, *_: note(f"note: {message}")
        # imported only now: the libraries take seconds, which --help and bad usage need not wait for
        verb = resolve_name(f"minpaint.cli.{VERBS[options.verb]}")
        for number in (signal.SIGINT, signal.SIGTERM) if stoppable else ():
            signal.signal(number, _stop)
        return int(verb(options, note) or 0)


def _say(line: str) -> None:
    print(f"minpaint: {line}", file=sys.stderr, flush=True)
