"""Everything that waits for a GPU, in one command of at most eight minutes, with one file of results.

    python -m bench.gpu                                     # all parts, most important first
    python -m bench.gpu --minutes 4 --parts agreement,memory
    python -m bench.gpu --device cpu --family small-sd1 --results /tmp    # without a GPU, to see that it works

tests: tests/test_cuda.py. agreement: a seed on the GPU and on the CPU in float32, and the plain way beside the fast
one. memory, speed, start: bench.memory, bench.speed and bench.cold_start with few steps; speed has the plain way,
the fast one and diffusers in turns. Each part is a process of its own with a deadline of its own: what the parts
before it have left over is shared. One that does not end in time is stopped; the rows it has measured are kept,
and the file says so. It is written anew after every part: bench/results/gpu-CARD.json, with card, driver, versions,
and what each part printed and measured. Exit codes: 0 all parts done, 1 not all, 2 there is no such device.
Needs the test extra, 5 GB of disk, and no network: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minpaint
from bench import common
from minpaint.engine.calls import Request
from minpaint.engine.device import choose_device, gpu_module
from minpaint.errors import InputError, MinpaintWarning
from minpaint.painter import open_painter
from weights.random_checkpoint import FAMILIES

ROOT = Path(__file__).parent.parent
# the parts, most important first, and the share of the time that each gets if all the others need theirs
SHARES = {"tests": 0.25, "agreement": 0.25, "memory": 0.2, "speed": 0.2, "start": 0.1}
LEAST = 5  # seconds; a part that would get less is left out


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What each part runs, after the Python interpreter."""
    device, family, on_gpu = ["--device", options.device], options.family, options.device != "cpu"
    size, rounds = str(common.native_size(family)), "2" if on_gpu else "1"
    speed = ["--sizes", size, "--batches", "1", "--rounds", rounds, "--steps", "10" if on_gpu else "2"]
    return {
        "tests": ["-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "tests/test_cuda.py"],
        "agreement": ["-m", "bench.gpu", "--agreement", *device, "--family", family],
        "memory": ["-m", "bench.memory", *device, "--family", family, "--steps", "8" if on_gpu else "2"]
        + ([] if on_gpu else ["--budgets", "1GiB", "--modes", "plain"]),
        "speed": ["-m", "bench.speed", *device, "--families", family, *speed, "--fast", "--peers", "none"],
        "start": ["-m", "bench.cold_start", *device, "--families", family, "--sizes", size, "--rounds", rounds],
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Card, driver and versions."""
    found: dict[str, Any] = common.machine() | {"python": sys.version.split()[0], "minpaint": minpaint.__version__}
    found |= {"device": str(device), "card": device.type, "cuda": torch.version.cuda, "rocm": torch.version.hip}
    gpu = gpu_module(device)
    if hasattr(gpu, "get_device_properties"):
        properties = gpu.get_device_properties(device)
        found |= {"card": properties.name, "memory": properties.total_memory}
        found |= {"driver": getattr(properties, "driver_version", None)}  # Intel's says it
    if device.type == "cuda":
        found["capability"] = list(torch.cuda.get_device_capability(device))
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            printed = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout
            found["driver"] = printed.splitlines()[0].strip()
        with suppress(OSError):
            found["driver"] = found["driver"] or Path("/sys/module/amdgpu/version").read_text().strip()
    return found


def run_part(command: list[str], seconds: float, models: Path) -> dict[str, Any]:
    """What a part printed and measured, and how it ended; at its deadline it is stopped, with all that it has started.

    models: the folder in which the parts keep the random weights for one another.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, (Path(name) / "printed").open("w+") as printed:
        rows = Path(name) / "rows"
        environment = {"MINPAINT_RESULTS": name, "MINPAINT_ROWS": str(rows), "MINPAINT_MODELS": str(models)}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            ended = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            stop(process)
        printed.seek(0)
        text = printed.read().splitlines()
        # the last line is half written, if the part was stopped while it wrote
        kept = rows.read_text(encoding="utf-8").split("\n")[:-1] if rows.exists() else []
    taken = round(time.perf_counter() - started, 1)
    measured = [json.loads(line) for line in kept]
    return {"command": " ".join(command), "ended": ended, "seconds": taken, "rows": measured, "printed": text}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a part and all processes of its session."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def run_parts(options: argparse.Namespace, device: torch.device) -> bool:
    """Run the parts one by one, write the file after each, and say what was left out; whether all are done."""
    end, found = time.monotonic() + 60 * options.minutes, describe(device) | {"parts": {}}
    file = options.results / f"gpu-{re.sub('[^a-z0-9]+', '-', found['card'].lower()).strip('-')}.json"
    options.results.mkdir(parents=True, exist_ok=True)
    parts = found["parts"]
    with tempfile.TemporaryDirectory() as models:
        for number, name in enumerate(options.parts):
            left = max(end - time.monotonic(), 0.0)
            seconds = left * SHARES[name] / sum(SHARES[later] for later in options.parts[number:])
            if seconds < LEAST:
                parts[name] = {"ended": "left out, as no time was left", "seconds": 0.0, "rows": [], "printed": []}
            else:
                parts[name] = run_part(commands(options)[name], seconds, Path(models))
            part, complete = parts[name], file.with_suffix(".part")
            complete.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            complete.replace(file)
            print(f"{name}: {part['ended']} ({part['seconds']} s)", *part["printed"], "", sep="\n", flush=True)
    print(f"wrote {file}", *(f"{name}: {part['ended']}" for name, part in parts.items()), sep="\n")
    return all(part["ended"] == "done" for part in parts.values())


def agree(options: argparse.Namespace) -> None:
    """Compare the GPU with the CPU, and its fast way with the plain one: each row is kept and printed as it comes."""
    device = choose_device(options.device)

    def latents(folder: Path, place: torch.device, dtype: str, steps: int, fast: bool = False, **more: Any) -> Tensor:
        common.free_unused(device)
        pictures = common.make_input(common.native_size(folder.name.rpartition("-")[0]))
        return common.run_painter(minpaint.load(folder, place, dtype, fast=fast), pictures, steps, **more)

    def add(name: str, ours: Tensor, theirs: Tensor) -> None:
        said = [str(each.message) for each in warned]
        warned.clear()
        row = {"row": name, "differ by": common.relative(ours, theirs), "said": said}
        common.keep(row)
        print(f"{name:48} differ by {row['differ by']:.1e}", *said, sep="\n  ", flush=True)

    cpu, half = torch.device("cpu"), "fp32" if device.type == "cpu" else "fp16"
    with tempfile.TemporaryDirectory() as models, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", MinpaintWarning)
        os.environ.setdefault("MINPAINT_MODELS", models)
        small, full = (common.write_model(Path(), family) for family in ("small-sd1", options.family))
        for sampler in ("ddim", "pndm", "dpmpp"):
            ours, theirs = (latents(small, place, "fp32", 10, sampler=sampler) for place in (device, cpu))
            add(f"small-sd1, {sampler}, fp32, beside the CPU", ours, theirs)
        plain = latents(full, device, half, 4)
        add(f"{options.family}, {half}, --fast beside plain", latents(full, device, half, 4, fast=True), plain)
        add(f"{options.family}, {half}, streamed beside plain", latents_within(full, device, half), plain)
        ours, theirs = (latents(full, place, "fp32", 2) for place in (device, cpu))
        add(f"{options.family}, fp32, beside the CPU", ours, theirs)


def latents_within(folder: Path, device: torch.device, dtype: str) -> Tensor:
    """What is painted within little memory: on a GPU in the smallest budget there is, with streamed weights."""
    size = common.native_size(folder.name.rpartition("-")[0])
    painter = open_painter(folder, device, dtype, None, None)
    if device.type != "cpu":
        painter.engine.budget = painter.engine.planner().least(Request(size, size), painter.engine.base)
    return common.run_painter(painter, common.make_input(size), 4)


def main(arguments: list[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="default: the first GPU there is; cpu makes a dry run")
    add("--family", choices=FAMILIES, default="sd15")
    add("--minutes", type=float, default=8.0)
    add("--parts", type=common.names(SHARES), default=[*SHARES], help=f"default: {','.join(SHARES)}")
    add("--results", type=Path, default=common.RESULTS, metavar="FOLDER", help="default: bench/results")
    add("--agreement", action="store_true", help="run that part alone (for this program's own use)")
    options = parser.parse_args(arguments)
    try:
        device = choose_device(options.device)
    except InputError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    if device.type == "cpu" and options.device != "cpu":
        print("bench.gpu: PyTorch sees no GPU here; --device cpu --family small-sd1 makes a dry run", file=sys.stderr)
        return 2
    options.device = str(device)
    if options.agreement:
        agree(options)
        return 0
    return 0 if run_parts(options, device) else 1


if __name__ == "__main__":
    sys.exit(main())
