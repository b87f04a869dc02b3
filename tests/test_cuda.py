"""On a GPU: the same picture as on the CPU, in the plain way and in the fast one. Skipped where PyTorch sees none.

A fast way that fails is made up for by the plain one, with a warning; here the warning is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL_FAMILIES, largest_level_difference, relative_error
from PIL import Image

import minpaint
from minpaint.engine.budget import capped, is_out_of_memory, release_cached, used_memory
from minpaint.engine.cuda import Buffer
from minpaint.engine.residency import split_weights
from minpaint.painter import Painter, open_painter
from minpaint.picture.frame import open_frame
from minpaint.settings import Settings

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
    pytest.mark.filterwarnings("error::minpaint.errors.MinpaintWarning"),
]
WAYS = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


@pytest.fixture(autouse=True)
def _whole_float32() -> Iterator[None]:
    """Convolutions in float32 proper: PyTorch rounds their inputs to TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@WAYS
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "dpmpp"])
@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_a_seed_gives_the_cpus_picture(
    checkpoint: Callable[[str], Path],
    painter: Callable[[str], Painter],
    picture: Image.Image,
    mask: Image.Image,
    family: str,
    sampler: str,
    fast: bool,
) -> None:
    on_gpu = minpaint.load(checkpoint(family), device="cuda", dtype="fp32", fast=fast)
    [a] = on_gpu(picture, mask, "a dog", steps=6, sampler=sampler, seed=3)
    [b] = painter(family)(picture, mask, "a dog", steps=6, sampler=sampler, seed=3)
    assert relative_error(a.latents, b.latents) < 1e-4
    assert largest_level_difference(a.image, b.image) <= 1


@WAYS
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_half_precision_stays_near_the_cpus_float32(
    checkpoint: Callable[[str], Path],
    painter: Callable[[str], Painter],
    picture: Image.Image,
    mask: Image.Image,
    dtype: str,
    fast: bool,
) -> None:
    on_gpu = minpaint.load(checkpoint("small-sd1"), device="cuda", dtype=dtype, fast=fast)
    assert next(on_gpu.unet.parameters()).device.type == "cuda"
    assert on_gpu.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == fast
    [a] = on_gpu(picture, mask, "a dog", steps=6, eta=0.5)
    [b] = painter("small-sd1")(picture, mask, "a dog", steps=6, eta=0.5)
    assert on_gpu.last_run is not None
    assert on_gpu.last_run.plan.phases["denoise"].strategy.fast == fast
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


@WAYS
def test_any_budget_is_kept_and_gives_the_same_picture(
    checkpoint: Callable[[str], Path], picture: Image.Image, mask: Image.Image, fast: bool
) -> None:
    settings = Settings("a dog", steps=4, eta=0.5, count=2)
    frame, seen = open_frame(picture, mask, settings), {}
    probe = open_painter(checkpoint("small-sd2"), "cuda", "fp16", None, None, fast)
    request, base = probe.request(frame, settings, probe.views(frame, settings)), probe.engine.base
    least = probe.engine.planner().least(request, base)
    most = probe.engine.planner().choose(request, 2**50, base).peak
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1, 100):
        budget = int(least + share * (most - least))
        ours = open_painter(checkpoint("small-sd2"), "cuda", "fp16", budget, None, fast)
        images = [painting.image for painting in ours.paint(frame, settings)]
        assert ours.last_run is not None
        assert ours.last_run.measured <= ours.last_run.plan.peak <= budget
        seen[tuple(phase.how for phase in ours.last_run.plan.phases.values())] = images
    assert len(seen) >= 4
    assert any("streamed" in how for hows in seen for how in hows)
    *_, unlimited = seen.values()
    for images in seen.values():
        assert max(map(largest_level_difference, images, unlimited)) <= 2


def test_the_allocator_refuses_to_go_beyond_the_budget() -> None:
    device = torch.device("cuda")
    release_cached(device)
    with capped(device, used_memory(device) + 64 * 2**20), pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
    assert is_out_of_memory(caught.value)
    torch.empty(128 * 2**20, dtype=torch.uint8, device=device)  # and afterwards it may again


@pytest.mark.parametrize("aside", [True, False], ids=["beside the computing", "between it"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_streamed_weights_are_the_files(checkpoint: Callable[[str], Path], dtype: str, aside: bool) -> None:
    resident = minpaint.load(checkpoint("small-sd2"), "cuda", dtype)
    streamed = open_painter(checkpoint("small-sd2"), "cuda", dtype, None, None)
    weights = streamed.engine.weights["unet"]
    split = split_weights(weights.directory, weights.dtype, streamed.engine.planner().order("unet"), 0)
    assert split.chunks
    weights.new_buffer = partial(Buffer, aside=aside)
    weights.load(split)
    x, context = (torch.randn(size, device="cuda", dtype=weights.dtype) for size in ((2, 9, 32, 32), (2, 77, 64)))
    t = torch.tensor([5, 9], device="cuda")
    with torch.inference_mode():
        expected = resident.unet(x, t, context)
        for _ in range(10):
            assert torch.equal(streamed.unet(x, t, context), expected)
