"""Runs of `paint` that are killed or stopped at random moments: the old file or the new one, never half, nothing left.

    python -m tests.bad_luck --kills 200 --stops 50 --seed 1

A killed process (SIGKILL) can leave unfinished files, which the next run that writes there must clear. One that is
stopped (SIGINT, SIGTERM) must leave nothing, say one line, and end with the exit code that shells expect. Every other
moment lies within the writing of the picture. The large version is run by hand; the tests run a few moments.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from minpaint.picture.saving import UNFINISHED

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
INPUTS = {"photo.png", "mask.png"}
SIDE = 700  # pixels of grain, which take a while to be written as PNG


class Victim:
    """A folder with a picture, in which the same run of `paint` is started again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, folder / "out.png"
        grain = torch.randint(0, 256, (SIDE * SIDE * 3,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        Image.frombytes("RGB", (SIDE, SIDE), bytes(grain.tolist())).save(folder / "photo.png")
        Image.new("L", (SIDE, SIDE)).save(folder / "mask.png")
        with Image.open(folder / "mask.png") as mask:
            mask.paste(255, (300, 300, 330, 330))
            mask.save(folder / "mask.png")
        started = time.monotonic()
        with self.start() as run:
            _, said = run.communicate()
        self.seconds = time.monotonic() - started
        assert run.returncode == 0, said
        self.new, self.old = self.target.read_bytes(), b"the old file"

    def start(self) -> subprocess.Popen[str]:
        files = ["--image", "photo.png", "--mask", "mask.png", "-o", "out.png"]
        words = ["paint", *files, "--prompt", "a tree", "--steps", "2", "--overwrite"]
        return subprocess.Popen(
            [sys.executable, "-m", "minpaint", *words],
            cwd=self.folder,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def unfinished(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - INPUTS - {self.target.name}

    def strike(self, number: int, rng: random.Random, while_writing: bool) -> str:
        """Start a run, send it a signal at a random moment, and check what it leaves; says how it ended."""
        self.target.write_bytes(self.old)
        before = self.unfinished()
        with self.start() as run:
            assert run.stderr is not None
            said = run.stderr.readline()  # from here on signals are the program's to answer
            deadline = time.monotonic() + rng.random() * self.seconds
            while run.poll() is None and time.monotonic() < (deadline if not while_writing else deadline + 600):
                if while_writing and self.unfinished() - before:
                    time.sleep(0.3 * rng.random() ** 2)
                    break
                time.sleep(0.0005)
            run.send_signal(number)
            said += run.communicate(timeout=60)[1]
        content = self.target.read_bytes()
        assert content in (self.old, self.new), f"half a file, {len(content)} bytes of {len(self.new)}"
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            pass
        else:
            raise AssertionError("a child is left")
        if run.returncode == 0:
            assert content == self.new
            return "done before"
        if number == signal.SIGKILL:
            assert run.returncode == -signal.SIGKILL, (run.returncode, said)
            return "new" if content == self.new else "old, unfinished" if self.unfinished() - before else "old"
        assert run.returncode == 128 + number, (run.returncode, said)
        assert said.splitlines()[-1] == "minpaint: error: stopped; nothing half-written is left", said
        assert "Traceback" not in said, said
        assert not self.unfinished(), self.unfinished()
        return "new" if content == self.new else "old"

    def finish(self) -> None:
        """A whole run, after which nothing unfinished is left."""
        with self.start() as run:
            _, said = run.communicate()
        assert run.returncode == 0, said
        assert self.target.read_bytes() == self.new
        assert not self.unfinished(), self.unfinished()


def strikes(folder: Path, times: dict[signal.Signals, int], seed: int) -> Iterator[str]:
    """So many runs struck by each signal, every other one while it writes; and a whole run at the end."""
    victim, rng = Victim(folder), random.Random(seed)
    for number, moments in times.items():
        ends = Counter(victim.strike(number, rng, while_writing=moment % 2 == 0) for moment in range(moments))
        yield f"{number.name} at {moments} moments: {dict(ends)}"
    left = victim.unfinished()
    assert all(name.endswith(UNFINISHED) for name in left)
    victim.finish()
    yield f"the next run cleared what was left ({len(left)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    times = {signal.SIGTERM: options.stops, signal.SIGINT: options.stops, signal.SIGKILL: options.kills}
    with tempfile.TemporaryDirectory() as folder:
        for told in strikes(Path(folder), times, options.seed):
            print(told, flush=True)


if __name__ == "__main__":
    main()
