"""Run the command line again and again, each time in a fresh process, and tell the largest resident set of each.

    python -m tests.in_budget < calls.json      # a list of argument lists; one JSON line for each on stdout

The processes are forked from this one, which has imported everything and computed nothing: a fork begins
where a process of its own is after its imports, some seconds earlier. Its peak is counted from its beginning.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer

import minpaint.cli.paint
import minpaint.cli.plan
from minpaint.cli.main import main
from minpaint.engine.budget import peak_memory, reset_peak
from minpaint.engine.run import Run

CPU = torch.device("cpu")
WARM = (CLIPTextModel, CLIPTokenizer, minpaint.cli.paint, minpaint.cli.plan)


def run(arguments: list[str]) -> dict[str, Any]:
    """What one call gives: its exit code, output, and the largest resident set in bytes.

    A run starts a count of its own when it is planned, so the count until then is kept.
    """
    peaks, init = [], Run.__init__

    def planned(*given: Any) -> None:
        peaks.append(peak_memory(CPU))
        init(*given)

    Run.__init__ = planned  # type: ignore[method-assign]
    reset_peak(CPU)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    peaks.append(peak_memory(CPU))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "peak": max(peaks)}


def limit(size: int) -> None:
    """Refuse this process more address space than it has and so many bytes."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))


def each(calls: list[list[str]]) -> None:
    for arguments in calls:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            if arguments[0].startswith("limit="):
                limit(int(arguments.pop(0).partition("=")[2]))
            print(json.dumps(run(arguments)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            print(json.dumps({"code": -1, "out": "", "err": "the process died", "peak": 0}), flush=True)


if __name__ == "__main__":
    each(json.load(sys.stdin))
