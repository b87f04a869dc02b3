"""Everything that waits for a GPU, in one command of at most eight minutes, with one file of results.

    python -m bench.gpu                                     # all parts, most important first
    python -m bench.gpu --minutes 4 --parts agreement,memory
    python -m bench.gpu --device cpu --family small-sd1 --minutes 3     # without a GPU, to see that it works

tests: tests/test_cuda.py. agreement: the same seed on the GPU and on the CPU in float32, and the plain form
beside the fast one in half precision, in turns. memory, speed, start: bench.memory, bench.speed and
bench.cold_start with few steps. Each part is a process of its own and gets what time is left; one that
does not end in time is stopped, and the file says so. It is written anew after every part:
bench/results/gpu-CARD.json, with the card, the driver, the versions, and what each part printed and measured.
Needs the test extra, 2 GB of disk, and no network: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import minpaint
from bench import common
from minpaint.engine.device import choose_device, is_present
from weights.random_checkpoint import FAMILIES

ROOT = Path(__file__).parent.parent
LEAST = 20  # seconds that are left for a part to begin


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What each part runs, after the Python interpreter."""
    device, family = ["--device", options.device], options.family
    small = ["--rounds", "2", "--steps", "10"]
    return {
        "tests": ["-m", "pytest", "-q", "tests/test_cuda.py"],
        "agreement": ["-m", "bench.gpu", "--agreement", *device, "--family", family],
        "memory": ["-m", "bench.memory", *device, "--family", family, "--steps", "8"],
        "speed": ["-m", "bench.speed", *device, "--families", family, "--batches", "1", *small, "--no-compiled"],
        "start": ["-m", "bench.cold_start", *device, "--families", family, "--rounds", "2"],
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Card, driver and versions."""
    found: dict[str, Any] = common.machine() | {"python": sys.version.split()[0], "minpaint": minpaint.__version__}
    found |= {"card": str(device), "cuda": torch.version.cuda, "rocm": torch.version.hip}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory": properties.total_memory}
        found["capability"] = f"{properties.major}.{properties.minor}"
        try:
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            found["driver"] = None
    return found


def run_part(command: list[str], seconds: float) -> dict[str, Any]:
    """What a part printed and measured, and how it ended."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as results:
        environment = os.environ | {"MINPAINT_RESULTS": results}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            printed, ended = process.communicate(timeout=seconds)[0], None
        except subprocess.TimeoutExpired:
            process.kill()
            printed, ended = process.communicate()[0], f"stopped after {seconds:.0f} s"
        measured = [json.loads(line) for file in Path(results).glob("*.jsonl") for line in file.open(encoding="utf-8")]
    ended = ended or ("done" if process.returncode == 0 else f"failed with exit code {process.returncode}")
    taken = round(time.perf_counter() - started, 1)
    return {"command": " ".join(command), "ended": ended, "seconds": taken, "printed": printed, "measured": measured}


def agree(options: argparse.Namespace) -> None:
    """Compare the GPU with the CPU, and its fast form with the plain one; prints a line and writes one for each."""
    device, rows = choose_device(options.device), []
    with tempfile.TemporaryDirectory() as name:
        small = common.write_model(Path(name) / "small", "small-sd1", half=False)
        pictures = common.make_input(common.native_size("small-sd1"))
        for sampler in ("ddim", "pndm", "dpmpp"):
            ours, reference = (
                common.run_painter(minpaint.load(small, place, "fp32"), pictures, 10, sampler=sampler)
                for place in (device, "cpu")
            )
            rows.append({"row": f"{sampler}, fp32, beside the CPU", "differ by": common.relative(ours, reference)})
        folder = common.write_model(Path(name) / "full", options.family)
        pictures = common.make_input(common.native_size(options.family))
        dtype = "fp32" if device.type == "cpu" else "fp16"
        plain, fast = (minpaint.load(folder, device, dtype, fast=asked) for asked in (False, True))
        latents = [common.run_painter(painter, pictures, 4) for painter in (plain, fast)]  # a warm-up
        taken = common.alternate(
            lambda: common.run_painter(plain, pictures, 10), lambda: common.run_painter(fast, pictures, 10), 3
        )
        rows.append({"row": "plain beside fast", "differ by": common.relative(*latents), **taken})
    for row in rows:
        print(f"{row['row']:32} differ by {row['differ by']:.1e}" + (f", {row['ratio']:.2f}" if "ratio" in row else ""))
    common.append("agreement", {"rows": rows})


def main() -> int:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--family", choices=FAMILIES, default="sd15")
    add("--minutes", type=float, default=8.0)
    known = ("tests", "agreement", "memory", "speed", "start")
    add("--parts", type=common.names(known), default=[*known], help=f"default: {','.join(known)}")
    add("--agreement", action="store_true", help="run that part alone (for this program's own use)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if not is_present(device):
        print(f"{device}: PyTorch {torch.__version__} sees no such device", file=sys.stderr)
        return 2
    if options.agreement:
        agree(options)
        return 0
    end = time.monotonic() + 60 * options.minutes
    found = describe(device) | {"parts": {}}
    file = common.RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', found['card'].lower())}.json"
    for number, name in enumerate(options.parts):
        left = end - time.monotonic()
        if left < LEAST:
            found["parts"][name] = {"ended": "left out: no time was left"}
        else:
            # the tests and the agreement matter most; of the others each leaves a share for those behind it
            share = left if number < 2 else left / (len(options.parts) - number) * 1.5
            found["parts"][name] = run_part(commands(options)[name], min(share, left))
        part = found["parts"][name]
        print(f"{name}: {part['ended']} ({part.get('seconds', 0)} s)\n{part.get('printed', '')}", flush=True)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {file}")
    return 0 if all(part["ended"] == "done" for part in found["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
