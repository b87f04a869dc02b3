"""The command line: `python -m minpaint VERB`, where each verb is a function in a module beside this one.

Exit codes: 0 done; 2 bad usage or bad input; 3 the budget cannot hold; 1 anything else.
Messages go to stderr; stdout is for what plan, info and --json print, and nothing else.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import warnings
from pkgutil import resolve_name

from minpaint.cli.options import STREAM, Note, parse
from minpaint.errors import BudgetError, CheckpointError, InputError, MinpaintWarning, one_line

VERBS = {None: "demo:demo", "paint": "paint:paint", "plan": "plan:plan", "info": "paint:info"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line with these arguments, or the process's own; returns the exit code."""
    try:
        _run(arguments, time.perf_counter())
        code, message = 0, ""
    except BrokenPipeError:
        code, message = 1, ""  # whoever read stdout has seen enough
    except KeyboardInterrupt as stop:  # 128 and the signal's number is what shells say of a process that it ended
        code, message = 128 + (stop.args or (signal.SIGINT,))[0], "stopped; nothing half-written is left"
    except Exception as error:
        message = one_line(str(error)) or type(error).__name__
        code = 3 if isinstance(error, BudgetError) else 2 if isinstance(error, (InputError, CheckpointError)) else 1
    if message:
        _say(f"error: {message}")
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # what it could not take must not be tried again when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(arguments: list[str] | None, started: float) -> None:
    """Run a verb; `started` is the time its duration is counted from."""
    options = parse(arguments)
    options.started, quiet = started, options.verb == "paint" and options.quiet
    note: Note = (lambda line: None) if quiet else _say
    if options.verb == "paint" and options.model is None:
        note("no --model given: using tiny, the bundled toy model")
    given = vars(options)
    answers = options.verb in ("plan", "info") or given.get("json") or given.get("output") == STREAM
    if sys.stdout is None and answers:
        raise InputError("stdout is closed, and what should be printed has no place to go; open it, or name a file")
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


def run_process() -> int:
    """What `python -m minpaint` does: `main` with the signals, the streams and the garbage of a process of its own."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)  # so that all that cleans up after itself does

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job in the background
            signal.signal(number, stop)
    for stream in range(3):  # a file that is opened later must not get the place of a stream that is closed
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # Nearly all objects that importing and loading make are there to stay, so looking for garbage among
    # them is a tenth of the start's time for nothing; `cli.paint` turns it on at the first step.
    gc.disable()
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # all is done but the interpreter's own end
    return code


def _say(line: str) -> None:
    print(f"minpaint: {line}", file=sys.stderr, flush=True)
