"""The same rows on a cluster: Ray Data hands blocks of them to actors, each with a model of its own."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from minpaint.batch.run import Outcome, Task, run_here
from minpaint.errors import InputError, MinpaintError
from minpaint.painter import open_painter


class Actor:
    """A process of the cluster that paints blocks. chosen: the arguments of open_painter."""

    def __init__(self, chosen: tuple[Any, ...], blocks: list[list[Task]], folder: str) -> None:
        os.chdir(folder)  # files are named relative to where the run was started
        self.blocks, self.painter = blocks, open_painter(*chosen)
        self.painter.engine.keep_loaded()

    def __call__(self, item: dict[str, int]) -> dict[str, str]:
        [outcomes] = run_here(self.painter, [self.blocks[item["block"]]])
        return {"outcomes": json.dumps(outcomes)}


def run_on_ray(address: str, chosen: tuple[Any, ...], blocks: list[list[Task]]) -> Iterator[list[Outcome]]:
    """Paint blocks on a Ray cluster, whose nodes must see the same files; "local" starts one here.

    They come back in any order. One whose actor dies is painted again by another.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise InputError(f"--ray needs Ray ({error}): pip install 'minpaint[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):  # where Ray says that an actor has died, some of it only as it shuts down
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
            there = ray.cluster_resources()
            gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
            items = [{"block": number} for number in range(len(blocks))]
            painted = ray.data.from_items(items, override_num_blocks=len(blocks)).map(
                Actor,
                fn_constructor_args=(chosen, blocks, os.getcwd()),
                concurrency=(1, min(gpus or max(cpus, 1), len(blocks))),
                **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
            )
            for row in painted.iter_rows():
                yield json.loads(row["outcomes"])
        except (ConnectionError, RuntimeError) as error:
            raise MinpaintError(f"ray {address}: {error}; the same command goes on from here") from None
        finally:
            ray.shutdown()
