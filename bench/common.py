"""What the benches share: models to measure, clocks, processes, peaks, tables and result files.

Two programs are always compared in turns (A B A B ...), so that a machine that slows down slows
both, and by the median of their ratios pair by pair.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minpaint.engine.budget import format_size, release_cached
from minpaint.engine.device import GPUS, choose_device, choose_dtype, gpu_module
from weights.random_checkpoint import FAMILIES, write_checkpoint

RESULTS = Path(os.environ.get("MINPAINT_RESULTS") or Path(__file__).parent / "results")
FULL_SIZE = ("sd15", "sd2")
OURS, THEIRS = "minpaint", "diffusers"
PROMPT, NEGATIVE = "two dogs on a bench", "blurry"
HEADER = (
    f"{'':40} {'beside':18} {'minpaint s':>10} {'other s':>10} {'ratio':>6} {'min..max':>12} {'differ by':>9}"
    f"  {'peaks':>21}  {'shares':>11}  {'from fp32':>15}"
)


# Options -----------------------------------------------------------------------------------------


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes its program by the first line of the program's docstring."""
    return argparse.ArgumentParser(description=(doc or "").splitlines()[0])


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of the known words, with commas between them."""
    known = tuple(known)

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: unknown; use {', '.join(known)}")
        return words

    return parse


def numbers(text: str) -> list[int]:
    """The type of an option that takes whole numbers with commas between them."""
    return [int(word) for word in text.split(",")]


def place(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the number format that the options --device and --dtype name."""
    device = choose_device(options.device)
    return device, choose_dtype(options.dtype, device)


# Models and inputs -------------------------------------------------------------------------------


def native_size(family: str) -> int:
    """The side in pixels of the pictures that a family's UNet was made for."""
    return int(8 * FAMILIES[family]["unet"]["sample_size"])


def write_model(folder: Path, family: str, half: bool = True) -> Path:
    """A checkpoint of random weights; in half precision, as the official files are, or in float32.

    If $MINPAINT_MODELS names a folder, it is kept there for the next program, and `folder` is left empty.
    """
    dtype, variant = (torch.float16, "fp16") if half else (torch.float32, None)
    if kept := os.environ.get("MINPAINT_MODELS"):
        folder = Path(kept) / f"{family}-{variant}"
        if (folder / "model_index.json").exists():  # which is written last
            return folder
    return write_checkpoint(folder, FAMILIES[family], dtype=dtype, variant=variant)


def import_pipeline() -> Any:
    """diffusers' class; the first call imports it, which takes seconds."""
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline


def load_pipe(folder: Path, dtype: torch.dtype, half: bool = True) -> Any:
    """diffusers' pipeline on the CPU, from a folder whose files are in half precision or not."""
    variant = "fp16" if half else None
    pipe = import_pipeline().from_pretrained(folder, torch_dtype=dtype, variant=variant, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_input(size: int) -> tuple[Image.Image, Image.Image]:
    """A square picture of noise, always the same, and a mask with a disc in its middle."""
    noise = 128 + 60 * torch.randn(size * size, generator=torch.Generator().manual_seed(size))
    image = Image.frombytes("L", (size, size), bytes(noise.clamp(0, 255).byte().tolist())).convert("RGB")
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).ellipse((size // 4, size // 4, size * 3 // 4, size * 3 // 4), fill=255)
    return image, mask


def run_painter(
    painter: Any, pictures: tuple[Image.Image, Image.Image], steps: int, count: int = 1, **options: Any
) -> Tensor:
    """The final latents of minpaint for the first seeds, as diffusers would paint: [count, 4, y, x]."""
    call = {"negative_prompt": NEGATIVE, "steps": steps, "count": count, "profile": "diffusers", **options}
    return torch.stack([painting.latents for painting in painter(*pictures, PROMPT, **call)])


def run_pipe(
    pipe: Any,
    pictures: tuple[Image.Image, Image.Image],
    steps: int,
    count: int = 1,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The final latents of diffusers' pipeline for the first seeds: [count, 4, y, x]."""
    latents: list[Tensor] = []

    def look(_pipe: object, _i: int, _t: object, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        latents[:] = [values["latents"]]
        return values

    pipe(
        PROMPT,
        *pictures,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        num_images_per_prompt=count,
        height=pictures[0].height,
        width=pictures[0].width,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
        callback_on_step_end=look,
    )
    return latents[0]


def relative(a: Tensor, b: Tensor) -> float:
    """The distance of two results, relative to the second."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


# Clocks ------------------------------------------------------------------------------------------


def wait_for_gpu() -> None:
    """A GPU computes while the program goes on; a clock is read when it has finished."""
    for kind in GPUS:
        if (gpu := gpu_module(torch.device(kind))) is not None:
            gpu.synchronize()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a piece of work, until the GPU has finished it."""
    gc.collect()
    started = time.perf_counter()
    result = work()
    wait_for_gpu()
    return time.perf_counter() - started, result


class StepClock:
    """Notes when each step of a run ends; it is passed as the run's `on_step`."""

    def __init__(self, wait: bool = False) -> None:
        self.wait, self.ends = wait, list[float]()

    def __call__(self, *_: object) -> None:
        if self.wait:
            wait_for_gpu()
        self.ends.append(time.perf_counter())

    @property
    def median(self) -> float | None:
        """Seconds a step, the first one left out; None where there is no other."""
        steps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(steps) if steps else None


def compare(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The median ratio of two lists of seconds, pair by pair, and the least and the largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}


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


def add_ratios(sides: dict[str, dict[str, Any]]) -> None:
    """Add to every other side how minpaint's times and results compare with it; results are dropped then."""
    ours = sides[OURS]
    for name, side in sides.items():
        if name != OURS and "error" not in ours and "error" not in side:
            side |= compare(ours["times"], side["times"])
            if "result" in side:
                side["difference"] = relative(ours["result"], side["result"])
    for side in sides.values():
        side.pop("result", None)


# Processes and memory ----------------------------------------------------------------------------


def in_own_process(*arguments: str) -> str:
    """What a fresh Python prints; RuntimeError with the last line of its errors if it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    return done.stdout


def make_pool() -> ProcessPoolExecutor:
    """A process of one thread for each core, started afresh, as threads do not survive a fork."""
    return ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,))


def free_unused(device: torch.device) -> None:
    """Give memory that nobody uses back to the system, so that a peak counts from there."""
    gc.collect()
    release_cached(device)


# Tables and files --------------------------------------------------------------------------------


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A row of the table under HEADER: minpaint beside each other side."""
    sides, name = dict(row["sides"]), row["name"]
    ours = sides.pop(OURS)
    for other, side in sides.items():
        if "error" in ours or "error" in side:
            told = f"{OURS}: {ours['error']}" if "error" in ours else side["error"]
            yield f"{name:40} {other:18} {told}"
            continue
        spread = "{:.2f}..{:.2f}".format(*side["spread"])
        figures = f"{ours['seconds']:10.4f} {side['seconds']:10.4f} {side['ratio']:6.2f} {spread:>12}"
        pairs = [
            f"{side['difference']:9.1e}" if "difference" in side else "",
            f"{format_size(ours['peak']):>10} {format_size(side['peak']):>10}" if side.get("peak") else f"{'':21}",
            f"{ours['share']:5.2f} {side['share']:5.2f}" if "share" in side else "",
            f"{ours['from_fp32']:7.1e} {side['from_fp32']:7.1e}" if side.get("from_fp32") is not None else "",
        ]
        yield f"{name:40} {other:18} {figures} {'  '.join(pairs)}".rstrip()


def measure_families(
    families: list[str], measure: Callable[[Path, str], Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Measure every family from a folder of its own: rows to stderr as they come, the table to stdout."""
    rows = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(write_model(Path(folder), family), family):
                rows.append(row)
                keep(row)
                print(*lines(row), sep="\n", file=sys.stderr, flush=True)
    print(HEADER, *(line for row in rows for line in lines(row)), sep="\n")
    return rows


def machine() -> dict[str, str]:
    """When and where figures are taken."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    described = f"{platform.machine()}, {os.cpu_count()} cores{gpu}"
    return {"date": time.strftime("%Y-%m-%d"), "machine": described, "torch": torch.__version__}


def keep(row: dict[str, Any]) -> None:
    """Write a row at once to the file that $MINPAINT_ROWS names, if any: nothing is lost if a program is stopped."""
    if name := os.environ.get("MINPAINT_ROWS"):
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def append(name: str, figures: dict[str, Any]) -> None:
    """Add the figures as one JSON line to bench/results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
