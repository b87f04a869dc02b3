"""The official weights beside the numbers that diffusers publishes for them.

Runs only where the weights of `sd15` are in the hub's cache and the two test pictures are at
hand: MINPAINT_OFFICIAL names a folder with input_bench_image.png and input_bench_mask.png of
the dataset diffusers/test-arrays (folder stable_diffusion_inpaint). The slices are those of
tests/pipelines/stable_diffusion/test_stable_diffusion_inpaint.py in diffusers, computed there
in float32 from the float32 weights. Here the weights are the fp16 files, the only safetensors
that are left of them, and the picture has 8 bits: hence the tolerance.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import minpaint
from minpaint.checkpoint.hub import catalogue
from minpaint.painter import Painter
from minpaint.picture.image import to_unit

PROMPT = "Face of a yellow cat, high resolution, sitting on a park bench"
TOLERANCE = 1e-2
# sampler -> blue channel of rows and columns 253 to 255 after 3 steps from seed 0
SLICES = {
    "ddim": [0.0427, 0.0460, 0.0483, 0.0460, 0.0584, 0.0521, 0.1549, 0.1695, 0.1794],
    "pndm": [0.0425, 0.0273, 0.0344, 0.1694, 0.1727, 0.1812, 0.3256, 0.3311, 0.3272],
}


@pytest.fixture(scope="module")
def pictures() -> tuple[Path, Path]:
    image = Path(os.environ.get("MINPAINT_OFFICIAL", "")) / "input_bench_image.png"
    if not os.environ.get("MINPAINT_OFFICIAL") or not image.is_file():
        pytest.skip("MINPAINT_OFFICIAL names no folder with diffusers' test pictures")
    return image, image.with_name("input_bench_mask.png")


@pytest.fixture(scope="module")
def sd15() -> Painter:
    from huggingface_hub import try_to_load_from_cache

    known = catalogue()["sd15"]
    unet = "unet/diffusion_pytorch_model.fp16.safetensors"
    if not isinstance(try_to_load_from_cache(known.repository, unet, revision=known.revision), str):
        pytest.skip("the official sd15 weights are not in the hub's cache (python -m minpaint paint --model sd15)")
    return minpaint.load("sd15", dtype="fp32")


@pytest.mark.parametrize("sampler", SLICES)
def test_the_published_slices(pictures: tuple[Path, Path], sd15: Painter, sampler: str) -> None:
    [painting] = sd15(*pictures, PROMPT, steps=3, seed=0, sampler=sampler, profile="diffusers")
    assert painting.image.size == (512, 512)
    found = to_unit(painting.image)[0, 2, 253:256, 253:256].flatten()
    assert float((found - torch.tensor(SLICES[sampler])).abs().max()) < TOLERANCE
