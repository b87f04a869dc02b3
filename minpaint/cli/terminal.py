"""What the command line says on stderr; stdout is for what plan, info and --json print, and nothing else."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from minpaint.errors import MinpaintWarning

if TYPE_CHECKING:
    from tqdm import tqdm

    from minpaint.samplers import Step

Note = Callable[[str], None]  # says one line; with --quiet it says nothing


def note(line: str) -> None:
    print(f"minpaint: {line}", file=sys.stderr, flush=True)


def fail(error: object, code: int) -> int:
    """Say what went wrong in one line; returns the exit code."""
    note(f"error: {' '.join(str(error).split())}")
    return code


def hush_libraries(quiet: bool) -> None:
    """Keep the libraries' own messages off the terminal; they read these variables when they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def warnings_as_notes(note: Note) -> Iterator[None]:
    """Show our own warnings as one line each, and no others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MinpaintWarning)
        warnings.showwarning = lambda message, *_: note(f"note: {message}")
        yield


class Progress:
    """A bar on stderr with a tick for each network call; nothing if stderr is no terminal."""

    def __init__(self, quiet: bool) -> None:
        self.silent = quiet or not sys.stderr.isatty()
        self.bar: tqdm[NoReturn] | None = None

    def __call__(self, step: Step) -> None:
        from tqdm import tqdm

        if self.bar is None or step.i == 0:  # each part of the picture has a bar of its own
            self.close()
            self.bar = tqdm(total=step.total, unit="step", disable=self.silent, leave=False)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
