"""Runs of `batch` that are killed at random moments, and started again until they are done.

    python -m tests.batch_kills 200 --seed 1

After each SIGKILL every output that can be seen must be whole, and equal to that of a run that nobody disturbed; once
a run has come to its end, none may be missing and nothing else left. The runs are forks of one process, which has
imported everything; half of the moments are those in which a file appears. The tests kill a few times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from minpaint.cli.main import main
from minpaint.picture.saving import UNFINISHED

ROWS, SIDE = 8, 64


def write_rows(folder: Path, rows: int = ROWS, side: int = SIDE) -> Path:
    """A manifest of pictures of grain, each with a seed of its own; one in five is wider than the others."""
    with (folder / "rows.jsonl").open("w") as manifest:
        for row in range(rows):
            width = side + 16 * (row % 5 == 4)
            grain = torch.randint(0, 256, (3 * side * width,), generator=torch.Generator().manual_seed(row))
            Image.frombytes("RGB", (width, side), bytes(grain.tolist())).save(folder / f"{row}.png")
            mask = Image.new("L", (width, side))
            mask.paste(255, (row % 8, 8, 24 + row % 8, 40))
            mask.save(folder / f"{row}_mask.png")
            values = {"image": f"{row}.png", "mask": f"{row}_mask.png", "prompt": "a red tower", "seed": row}
            manifest.write(json.dumps(values) + "\n")
    return folder / "rows.jsonl"


def start(manifest: Path, output: Path, *more: str) -> int:
    """The number of a process that paints the manifest."""
    words = ["batch", str(manifest), "-o", str(output), "--steps", "2", "--quiet", *more]
    if child := os.fork():
        return child
    code = 1
    try:
        code = main(words)
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outputs(folder: Path) -> dict[str, bytes]:
    """What a user sees in a folder."""
    found = folder.iterdir() if folder.exists() else ()
    return {path.name: path.read_bytes() for path in found if not path.name.startswith(".")}


def _wait_for_a_file(folder: Path, seconds: float) -> None:
    """Until another name is there than now, hidden ones too, or for so long."""

    def names() -> set[str]:
        return {path.name for path in folder.iterdir()} if folder.exists() else set()

    before, until = names(), time.monotonic() + seconds
    while names() <= before and time.monotonic() < until:
        time.sleep(0.0005)


def strike(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill so many runs, each time checking what is left; says how often what was seen."""
    rng, counts, output = random.Random(seed), Counter[str](), folder / "out"
    manifest = write_rows(folder)
    began = time.monotonic()
    assert finish(start(manifest, folder / "undisturbed")) == 0
    seconds, expected = time.monotonic() - began, outputs(folder / "undisturbed")
    assert len(expected) == ROWS
    while counts["killed"] < kills or counts["running"]:
        counts["running"] = 1
        child = start(manifest, output)
        if rng.random() < 0.5:
            time.sleep(rng.random() * seconds)
        else:  # while it writes
            _wait_for_a_file(output, seconds)
            time.sleep(rng.random() * 0.02)
        if counts["killed"] < kills:
            os.kill(child, signal.SIGKILL)
        code = finish(child)
        seen = outputs(output)
        assert seen.items() <= expected.items(), "an output is half, or another than it should be"
        parts = list(output.glob(f".*{UNFINISHED}")) if output.exists() else []
        if code == -signal.SIGKILL:
            counts["killed"] += 1
            counts["killed with some done" if seen else "killed with none done"] += 1
            counts["left an unfinished file"] += bool(parts)
            continue
        assert code == 0, f"exit code {code}"
        assert seen == expected, "an output is missing"
        assert not parts, "an unfinished file is left"
        counts["came to its end"] += 1
        counts["running"] = 0
        for file in output.iterdir():
            file.unlink()
        output.rmdir()
    del counts["running"]
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for what, times in strike(Path(place), options.kills, options.seed).items():
            print(f"{what}: {times}")
