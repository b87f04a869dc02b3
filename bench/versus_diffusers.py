"""minpaint beside diffusers on the same random weights: import, load and a whole run.

    python -m bench.versus_diffusers                       # full-size SD 1.5 at 512 x 512, on the CPU
    python -m bench.versus_diffusers --device cuda --dtype fp16 --steps 50
    python -m bench.versus_diffusers --family small-sd1    # seconds, to see that it works

The two take turns (A B A B ...) in one process, the run after a warm-up each; imports are timed
in processes of their own. Every row gives both medians, the median of the ratios pair by pair,
and the difference of the results. The table goes to stdout, one JSON line to bench/results/.
Needs the test extra (diffusers) and, for a full-size family in float32, 10 GB of memory and 2 GB
of disk for the time of the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image, ImageDraw

import minpaint
from minpaint.engine.memory import choose_device, choose_dtype
from weights.random_checkpoint import FAMILIES, write_checkpoint

RESULTS = Path(__file__).parent / "results" / "versus_diffusers.jsonl"
IMPORTS = {
    "bare Python": ("pass", "pass"),
    "paint --help": ("from minpaint.cli.main import _parser; _parser().format_help()", "pass"),
    "import": (
        "import minpaint.painter; from transformers import CLIPTextModel, CLIPTokenizer",
        "from diffusers import StableDiffusionInpaintPipeline",
    ),
}
PROMPT, NEGATIVE = "two dogs on a bench", "blurry"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a piece of work, the device's share of it included."""
    gc.collect()
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Median seconds of both and of their ratio over A B A B ..., and the last results."""
    times: tuple[list[float], list[float]] = ([], [])
    results: list[Any] = [None, None]
    for _ in range(rounds):
        for side, work in enumerate((ours, theirs)):
            results[side] = None  # never two of one side in memory
            seconds, results[side] = timed(work)
            times[side].append(seconds)
    medians = {"ours": statistics.median(times[0]), "diffusers": statistics.median(times[1])}
    return medians | compare(*times) | {"results": results}


def compare(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The median ratio of two lists of seconds, pair by pair, and the least and the largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}


def in_a_process(code: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)

    return run


def make_input(size: int) -> tuple[Image.Image, Image.Image]:
    image = Image.effect_noise((size, size), 60).convert("RGB")
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).ellipse((size // 4, size // 4, size * 3 // 4, size * 3 // 4), fill=255)
    return image, mask


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


def run_pipe(
    pipe: Any,
    image: Image.Image,
    mask: Image.Image,
    size: int,
    steps: int,
    count: int = 1,
    on_step: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """The final latents of diffusers' pipeline for the first seeds: [count, 4, y, x]."""
    latents: list[torch.Tensor] = []

    def look(_pipe: object, _i: int, _t: object, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        latents[:] = [values["latents"]]
        return values

    pipe(
        PROMPT,
        image,
        mask,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        num_images_per_prompt=count,
        height=size,
        width=size,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
        callback_on_step_end=look,
    )
    return latents[0]


def append(results: Path, figures: dict[str, Any]) -> None:
    """One JSON line more: the figures, and when and where they were taken."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    machine = f"{platform.machine()}, {os.cpu_count()} cores{gpu}"
    results.parent.mkdir(exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        record = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "torch": torch.__version__, **figures}
        file.write(json.dumps(record) + "\n")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """All rows, by name."""
    rows = {name: alternate(in_a_process(a), in_a_process(b), options.rounds) for name, (a, b) in IMPORTS.items()}

    from diffusers import StableDiffusionInpaintPipeline

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    variant = "fp16" if options.family in ("sd15", "sd2") else None
    stored = torch.float16 if variant else torch.float32
    write_checkpoint(folder, FAMILIES[options.family], dtype=stored, variant=variant)

    def load_ours() -> Any:
        return minpaint.load(folder, device, dtype)

    def load_theirs() -> Any:
        pipe: Any = StableDiffusionInpaintPipeline.from_pretrained(folder, torch_dtype=dtype, variant=variant)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)

    rows["load"] = alternate(load_ours, load_theirs, options.rounds)
    painter, pipe = rows["load"]["results"]
    image, mask = make_input(options.size)

    def run_ours() -> torch.Tensor:
        [painting] = painter(
            image, mask, PROMPT, negative_prompt=NEGATIVE, steps=options.steps, profile="diffusers", seed=0
        )
        latents: torch.Tensor = painting.latents
        return latents

    def run_theirs() -> torch.Tensor:
        return run_pipe(pipe, image, mask, options.size, options.steps)[0]

    run_ours(), run_theirs()
    name = f"run {options.size}x{options.size}, {options.steps} steps"
    rows[name] = alternate(run_ours, run_theirs, options.rounds)
    rows[name]["difference"] = relative(*rows[name]["results"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--size", type=int, default=None, help="default: the family's own")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    options = parser.parse_args()
    options.size = options.size or 8 * FAMILIES[options.family]["unet"]["sample_size"]

    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))

    print(f"{'':28} {'minpaint s':>11} {'diffusers s':>11} {'ratio':>7}   {'min..max':>12}   latents differ by")
    for name, row in rows.items():
        del row["results"]
        spread = "{:.2f}..{:.2f}".format(*row["spread"])
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        figures = f"{row['ours']:11.3f} {row['diffusers']:11.3f} {row['ratio']:7.2f}"
        print(f"{name:28} {figures}   {spread:>12}   {difference}")
    append(RESULTS, vars(options) | {"rows": rows})


if __name__ == "__main__":
    main()
