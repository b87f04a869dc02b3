"""The memory of one run of `batch` over many rows, which must not grow with them.

python -m tests.batch_memory 1000
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from minpaint.cli.main import main
from tests.batch_kills import write_rows

PAGE, ALLOWED = 4096, 24 * 2**20  # bytes that the process may grow by between the tenth of the rows and the last


def resident() -> int:
    """Bytes of this process that are in memory."""
    return PAGE * int(Path("/proc/self/statm").read_text().split()[1])


def growth(rows: int) -> tuple[list[int], int]:
    """Resident bytes whenever another tenth of the rows has been saved, and by how much the last exceeds the first."""
    import minpaint.cli.batch as verb

    sizes, before = list[int](), verb.run_here
    with tempfile.TemporaryDirectory() as place:
        manifest = write_rows(Path(place), rows, 64)

        def watched(*given):  # type: ignore[no-untyped-def]
            done = 0
            for finished in before(*given):
                done += len(finished)
                if done * 10 // rows > len(sizes):
                    sizes.append(resident())
                yield finished

        verb.run_here = watched
        assert main(["batch", str(manifest), "-o", f"{place}/out", "--steps", "1", "--quiet"]) == 0
        assert len(list(Path(place, "out").glob("*.png"))) == rows
    return sizes, max(sizes[1:]) - sizes[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=int)
    torch.set_num_threads(1)
    found, grown = growth(parser.parse_args().rows)
    print("MiB after each tenth:", *(f"{size / 2**20:.1f}" for size in found))
    assert grown < ALLOWED, f"it grew by {grown / 2**20:.1f} MiB"
