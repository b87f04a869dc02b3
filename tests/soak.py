"""Many paintings in one process, by changing models, in changing sizes, samplers and budgets: nothing may pile up.

    python tests/soak.py 1000

Paints with small random models and the tiny one, and writes a line every 20 paintings, for which
all painters are let go of: what is left then belongs to the process.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import make_mask, make_picture

import minpaint
from minpaint.engine.budget import release_cached, used_memory
from minpaint.engine.plan import Planner
from minpaint.painter import Painter, open_painter
from minpaint.picture.frame import open_frame
from minpaint.settings import SAMPLERS, Settings
from weights.random_checkpoint import FAMILIES, write_checkpoint

# width, height, count, guidance
REQUESTS = ((64, 64, 1, 7.5), (24, 40, 2, 7.5), (72, 48, 2, 1.0), (96, 96, 1, 7.5))
DTYPES = ("fp32", "bf16")
EVERY = 20  # paintings from line to line


class Left(NamedTuple):
    """What is left in the process after so many paintings. memory: its resident set in MiB."""

    paintings: int
    memory: float
    objects: int
    tensors: int
    threads: int
    files: int


def look(paintings: int) -> Left:
    """Collect garbage, and count what is left."""
    gc.collect()
    release_cached(torch.device("cpu"))
    objects = gc.get_objects()
    tensors = sum(issubclass(type(each), torch.Tensor) and not each.is_meta for each in objects)
    files = len(os.listdir("/proc/self/fd"))
    memory = used_memory(torch.device("cpu")) / 2**20
    return Left(paintings, round(memory, 1), len(objects), tensors, threading.active_count(), files)


def paint_once(painter: Painter, draw: random.Random) -> None:
    """One painting, or one of the ways in which a painting ends early."""
    *size, count, guidance = draw.choice(REQUESTS)
    options = {
        "steps": draw.randint(1, 3),
        "count": count,
        "sampler": draw.choice((*SAMPLERS, None)),
        "guidance": guidance,
        "seed": draw.randrange(2**32),
        "eta": draw.choice((0.0, 0.5)),
    }
    settings = Settings("a red tower", **options)  # type: ignore[arg-type]
    frame = open_frame(make_picture(*size), make_mask(*size), settings)
    request = painter.request(frame, settings, painter.views(frame, settings))
    base, planner = painter.engine.base, painter.engine.planner()
    least = planner.least(request, base) + 8 * 2**20  # what planning itself adds to the process
    painter.engine.budget = draw.choice((2**40, least, base + int(1.5 * (least - base))))
    end = draw.randrange(10)
    if end == 0:
        painter.engine.budget = 2**20
        try:
            painter.paint(frame, settings)
        except minpaint.BudgetError:
            return
        raise AssertionError("a megabyte is no budget")
    if end == 1:  # steps that nobody finishes
        next(iter(painter.steps(make_picture(*size), make_mask(*size), "a red tower", **options)))
    elif end == 2:
        try:
            painter.paint(frame, settings, lambda step: 1 // 0)
        except ZeroDivisionError:
            return
        raise AssertionError("the error was lost")
    else:
        painter.paint(frame, settings)


def soak(count: int, folder: Path, tell: Callable[[Left], object] = lambda left: None) -> list[Left]:
    """Paint so many times; what was left every 20 paintings."""
    draw = random.Random(count)
    models = ["tiny"]
    for family in ("small-sd1", "small-sd2", "small-sd1-4ch", "small-v"):
        models.append(str(write_checkpoint(folder / family, FAMILIES[family])))

    def plans(model: str, dtype: str) -> dict[torch.dtype, Planner]:
        engine = open_painter(model, "cpu", dtype, None, None).engine
        _ = engine.planner().networks  # many objects, which stay
        return engine.planners

    planners = {pair: plans(*pair) for pair in product(models, DTYPES)}  # shared: planning would take most of the time

    def open_one(model: str, dtype: str) -> Painter:
        painter = open_painter(model, "cpu", dtype, None, None)
        painter.engine.planners = planners[model, dtype]
        if draw.random() < 0.5:
            painter.engine.keep_loaded()
        return painter

    def turns() -> Iterator[Left]:
        for start in range(0, count, EVERY):
            painters: list[Painter] = []
            for number in range(min(EVERY, count - start)):
                if number % 5 == 0:  # two painters at a time, the older one let go of
                    model = models[(number // 5 + start // EVERY) % len(models)]
                    painters = [*painters[-1:], open_one(model, draw.choice(DTYPES))]
                paint_once(draw.choice(painters), draw)
            painters.clear()
            left = look(start + EVERY)
            tell(left)
            yield left

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(turns())


def check(lines: list[Left], memory: float, objects: int) -> None:
    """Nothing has piled up since a first part, in which libraries and planners make what they keep.

    memory, objects: the MiB and the number by which they may vary.
    """
    warm, after = lines[: max(len(lines) // 4, 1)], lines[-1]
    assert after.threads <= max(left.threads for left in warm), (warm, after)
    assert after.files <= max(left.files for left in warm), (warm, after)
    assert after.tensors <= max(left.tensors for left in warm), (warm, after)
    assert after.objects <= max(left.objects for left in warm) + objects, (warm, after)
    assert after.memory <= max(left.memory for left in warm) + memory, (warm, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = soak(options.count, Path(folder), lambda left: print(left, flush=True))
    check(lines, memory=32, objects=1000)


if __name__ == "__main__":
    main()
