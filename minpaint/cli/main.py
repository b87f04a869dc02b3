"""The command line: `python -m minpaint VERB`, where each verb is a module beside this one.

Exit codes: 0 done; 2 bad usage or bad input; 3 the budget cannot hold; 1 anything else.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module

from minpaint.cli.options import parse
from minpaint.cli.terminal import Note, fail, hush_libraries, note, warnings_as_notes
from minpaint.errors import BudgetError, CheckpointError, InputError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line with these arguments, or the process's own; returns the exit code."""
    started = time.perf_counter()
    try:
        _run(arguments, started)
    except BudgetError as error:
        return fail(error, 3)
    except (InputError, CheckpointError) as error:
        return fail(error, 2)
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return fail("stopped; nothing half-written is left", 1)
    except Exception as error:
        return fail(str(error) or type(error).__name__, 1)
    return 0


def _run(arguments: list[str] | None, started: float) -> None:
    options = parse(arguments)
    options.started = started
    quiet = getattr(options, "quiet", False)
    say: Note = (lambda line: None) if quiet else note
    if options.verb == "paint" and options.model is None:
        say("no --model given: using tiny, the bundled toy model")
    hush_libraries(quiet)
    with warnings_as_notes(say):
        # imported only now: the libraries take seconds, which --help and bad usage need not wait for
        import_module(f"minpaint.cli.{options.verb or 'demo'}").run(options, say)
