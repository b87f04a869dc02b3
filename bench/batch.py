"""Rows of one manifest: `batch` beside a loop that calls the painter, beside `paint` once a picture, beside diffusers.

    python -m bench.batch --rows 16 --steps 10 --rounds 3

All load the model, open pictures and masks, paint whole pictures, and write PNGs; `paint` starts a process for each
picture. diffusers paints four pictures in a batch. The ratios are of whole times, in turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import minpaint
from bench.common import alternate, append, load_pipe, machine, make_input, make_parser, write_model
from minpaint.cli.main import main

BATCH, PROMPT = 4, "two dogs on a bench"


def compare_rows(family: str, rows: int, steps: int, rounds: int, size: int) -> dict[str, Any]:
    """Seconds and ratios (others' time by that of `batch`) for a checkpoint of random weights."""
    found: dict[str, Any] = {"family": family, "rows": rows, "steps": steps, "size": size}
    with tempfile.TemporaryDirectory() as place:
        folder, turn = Path(place), iter(range(10**6))
        model = write_model(folder / "model", family, half=False)
        picture, mask = make_input(size)
        mask.save(folder / "mask.png")
        with (folder / "rows.jsonl").open("w") as manifest:
            for row in range(rows):
                picture.save(folder / f"{row}.png")
                manifest.write(json.dumps({"image": f"{row}.png", "mask": "mask.png", "prompt": PROMPT, "seed": row}))
                manifest.write("\n")
        common = ["--model", str(model), "--device", "cpu", "--steps", str(steps), "--context", "whole", "--quiet"]

        def batch() -> None:
            if main(["batch", str(folder / "rows.jsonl"), "-o", str(folder / f"out{next(turn)}"), *common]):
                raise RuntimeError("batch failed")

        def loop() -> None:
            painter = minpaint.load(model, device="cpu")
            for row in range(rows):
                files = folder / f"{row}.png", folder / "mask.png"
                painter(*files, PROMPT, steps=steps, seed=row, context="whole")[0].image.save(folder / "one.png")

        def paint() -> None:
            for row in range(rows):
                files = ["--image", str(folder / f"{row}.png"), "--mask", str(folder / "mask.png"), "--overwrite"]
                words = ["paint", *files, "--prompt", PROMPT, "--seed", str(row), "-o", str(folder / "one.png")]
                subprocess.run([sys.executable, "-m", "minpaint", *words, *common], check=True)

        def diffusers() -> None:
            pipe = load_pipe(model, torch.float32, half=False)
            for start in range(0, rows, BATCH):
                numbers = range(start, min(start + BATCH, rows))
                images = [Image.open(folder / f"{row}.png").convert("RGB") for row in numbers]
                masks = [Image.open(folder / "mask.png") for _ in numbers]
                seeds = [torch.Generator().manual_seed(row) for row in numbers]
                prompts = [PROMPT] * len(images)
                made = pipe(
                    prompts, images, masks, num_inference_steps=steps, generator=seeds, height=size, width=size
                ).images
                for image in made:
                    image.save(folder / "one.png")

        for first in (batch, diffusers):  # what the first call of each imports is not measured
            first()
        for name, other in (("loop", loop), ("diffusers", diffusers), ("paint", paint)):
            figures = alternate(batch, other, rounds)
            seconds = {"batch": figures["ours"], name: figures["diffusers"]}
            found[name] = {"seconds": seconds, "ratio": 1 / figures["ratio"]}
            print(
                f"{name:10} {seconds[name]:7.2f} s, batch {seconds['batch']:7.2f} s: {1 / figures['ratio']:.2f} times"
            )
    return found


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--family", default="small-sd1")
    for option, default in (("--rows", 16), ("--steps", 10), ("--rounds", 3), ("--size", 128)):
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    append("batch", machine() | compare_rows(**vars(options)))
