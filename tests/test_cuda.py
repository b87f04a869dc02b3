"""On a GPU: the same picture as on the CPU. Skipped where PyTorch sees none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL_FAMILIES, largest_level_difference, relative_error
from PIL import Image

import minpaint
from minpaint.inpaint import Painter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


@pytest.fixture(autouse=True)
def _whole_float32() -> Iterator[None]:
    """Convolutions in float32 proper: PyTorch rounds their inputs to TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "dpmpp"])
@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_a_seed_gives_the_cpus_picture(
    checkpoint: Callable[[str], Path],
    painter: Callable[[str], Painter],
    picture: Image.Image,
    mask: Image.Image,
    family: str,
    sampler: str,
) -> None:
    on_gpu = minpaint.load(checkpoint(family), device="cuda", dtype="fp32")
    [a] = on_gpu(picture, mask, "a dog", steps=6, sampler=sampler, seed=3)
    [b] = painter(family)(picture, mask, "a dog", steps=6, sampler=sampler, seed=3)
    assert relative_error(a.latents, b.latents) < 1e-4
    assert largest_level_difference(a.image, b.image) <= 1


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_half_precision_stays_near_the_cpus_float32(
    checkpoint: Callable[[str], Path],
    painter: Callable[[str], Painter],
    picture: Image.Image,
    mask: Image.Image,
    dtype: str,
) -> None:
    on_gpu = minpaint.load(checkpoint("small-sd1"), device="cuda", dtype=dtype)
    assert next(on_gpu.unet.parameters()).device.type == "cuda"
    [a] = on_gpu(picture, mask, "a dog", steps=6, eta=0.5)
    [b] = painter("small-sd1")(picture, mask, "a dog", steps=6, eta=0.5)
    assert a.latents.device.type == "cpu"
    assert a.latents.dtype == torch.float32
    assert relative_error(a.latents, b.latents) < (0.05 if dtype == "bf16" else 0.01)


def test_nan_is_noticed_at_the_end_of_the_loop(
    checkpoint: Callable[[str], Path], picture: Image.Image, mask: Image.Image
) -> None:
    ours = minpaint.load(checkpoint("small-sd1"), device="cuda")
    ours.unet.conv_out.bias.data = torch.full_like(ours.unet.conv_out.bias, float("nan"))
    with pytest.raises(minpaint.MinpaintError, match="UNet gave NaN"):
        ours(picture, mask, "a dog", steps=2)
