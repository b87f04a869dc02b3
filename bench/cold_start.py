"""How long it takes from the start of the process to the first denoising step, beside diffusers.

    python -m bench.cold_start                              # full-size SD 1.5 and 2 at 512 x 512, on the CPU
    python -m bench.cold_start --families small-sd1         # a minute, to see that it works

Each start is a process of its own. `python -m minpaint paint`, unchanged, takes turns with a program
of few lines that calls diffusers' pipeline. Both have the same random weights in half-precision
files, the same picture, mask and prompts. A first start of each is not counted: it leaves files in
the system's memory and compiled Python behind. The table goes to stdout, one JSON line to bench/results/,
the lines as they come to stderr. Needs the test extra and, for a full-size family, 2 GB of disk.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import common
from bench.common import OURS, THEIRS
from weights.random_checkpoint import FAMILIES

PREFACE = """
import os, sys, time
def watched(call, on_gpu):
    def now():
        if on_gpu:
            import torch
            torch.cuda.synchronize()
        return time.time()
    def look(*args, **kwargs):
        if any(getattr(arg, "is_meta", False) for arg in args):
            return call(*args, **kwargs)  # a plan is being made
        began = now()
        call(*args, **kwargs)
        print("step", began, now(), flush=True)
        os._exit(0)
    return look
"""
# The unchanged program. When it imports minpaint.models.unet, the UNet's call is wrapped by a clock.
START_OURS = """
import importlib.abc, importlib.util, runpy
class Look(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "minpaint.models.unet":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def load_and_look(module):
            load(module)
            module.UNet.forward = watched(module.UNet.forward, on_gpu)
        spec.loader.exec_module = load_and_look
        return spec
folder, device, dtype, image, mask, prompt, negative, steps, output = sys.argv[1:]
on_gpu = device.startswith("cuda")
sys.meta_path.insert(0, Look())
sys.argv = ["minpaint", "paint", "--model", folder, "--device", device, "--dtype", dtype, "--image", image,
    "--mask", mask, "--prompt", prompt, "--negative-prompt", negative, "--steps", steps, "-o", output,
    "--profile", "diffusers"]
runpy.run_module("minpaint", run_name="__main__", alter_sys=True)
"""
START_THEIRS = """
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
folder, device, dtype, image, mask, prompt, negative, steps, output = sys.argv[1:]
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
pipe = StableDiffusionInpaintPipeline.from_pretrained(folder, torch_dtype=dtype, variant="fp16").to(device)
pipe.set_progress_bar_config(disable=True)
pipe.unet.forward = watched(pipe.unet.forward, device.startswith("cuda"))
image, mask = Image.open(image).convert("RGB"), Image.open(mask)
pipe(prompt, image, mask, negative_prompt=negative, num_inference_steps=int(steps), height=image.height,
    width=image.width)[0][0].save(output)
"""


def start(program: str, words: list[str]) -> tuple[float, float]:
    """Seconds from the start of a process to the beginning and to the end of its first denoising step."""
    before = time.time()
    for line in common.in_own_process("-c", PREFACE + program, *words).splitlines():
        if line.startswith("step "):
            _, begin, end = line.split()
            return float(begin) - before, float(end) - before
    raise RuntimeError("no step was seen")


def measure_start(options: argparse.Namespace, folder: Path, family: str) -> Iterator[dict[str, Any]]:
    """The rows of one family, one by one."""
    programs = {OURS: START_OURS, THEIRS: START_THEIRS}
    for size in options.sizes or [common.native_size(family)]:
        words = [str(folder), options.device, options.dtype]
        for name, picture in zip(("image", "mask"), common.make_input(size), strict=True):
            picture.save(folder / f"{name}.png")
            words.append(str(folder / f"{name}.png"))
        words += [common.PROMPT, common.NEGATIVE, "2", str(folder / "out.png")]
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for turn in range(-1, options.rounds):
            for name, program in programs.items():
                times = start(program, words)
                if turn >= 0:  # the one before leaves files in the system's memory and compiled Python behind
                    seen[name].append(times)
        for end, row in enumerate(("first step begins", "first step ends")):
            sides: dict[str, dict[str, Any]] = {}
            for name, pairs in seen.items():
                seconds = [pair[end] for pair in pairs]
                sides[name] = {"times": seconds, "seconds": statistics.median(seconds)}
            common.add_ratios(sides)
            name = f"{family} {size}: {row}"
            yield {"name": name, "family": family, "size": size, "row": row, "sides": sides}


def main() -> None:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--families", type=common.names(FAMILIES), default=[*common.FULL_SIZE], help="default: sd15,sd2")
    add("--sizes", type=common.numbers, default=None, help="default: 512; of a small family its own")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu")
    add("--dtype", default=None, help="default: fp16 on a GPU, fp32 on the CPU")
    options = parser.parse_args()
    options.dtype = options.dtype or ("fp16" if options.device != "cpu" else "fp32")
    rows = common.measure_families(options.families, partial(measure_start, options))
    common.append("cold_start", common.machine() | vars(options) | {"rows": rows})


if __name__ == "__main__":
    main()
