"""The VAE in bands and attention over query rows: the numbers of the whole, for any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from minpaint.checkpoint.configs import vae_config
from minpaint.engine.banded import set_attention_slices, set_bands, sliced_attend
from minpaint.engine.measure import measure
from minpaint.models.attention import Attention, attend
from minpaint.models.vae import VAE
from weights.random_checkpoint import FAMILIES, randomise

TOLERANCE = 1e-4


def blank_vae(family: str) -> VAE:
    with torch.device("meta"):
        return VAE(vae_config(FAMILIES[family]["vae"])).requires_grad_(False)


def make_vae(family: str, dtype: torch.dtype = torch.float32) -> VAE:
    vae = blank_vae(family)
    vae.load_state_dict(randomise(vae, seed=3), assign=True)
    return vae.to(dtype).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def vae() -> VAE:
    return make_vae("small-sd1")


def both(vae: VAE, bands: int | None, height: int, width: int, batch: int = 1) -> list[Tensor]:
    """Mean and log variance of a picture with a bright corner, and the pixels of other latents."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    dtype = vae.quant_conv.weight.dtype
    pixels = torch.rand(batch, 3, 8 * height, 8 * width, generator=generator) * 0.2
    pixels[:, :, : 4 * height] += 0.7  # the statistics of the halves are far apart
    latents = torch.randn(batch, 4, height, width, generator=generator)
    set_bands(vae, bands)
    try:
        return [*vae.encode(pixels.to(dtype)), vae.decode(latents.to(dtype))]
    finally:
        set_bands(vae, None)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 12), bands=st.integers(1, 80), batch=st.integers(1, 2))
@pytest.mark.slow
def test_bands_give_the_numbers_of_the_whole(vae: VAE, height: int, width: int, bands: int, batch: int) -> None:
    whole, banded = both(vae, None, height, width, batch), both(vae, bands, height, width, batch)
    assert [x.shape for x in whole] == [x.shape for x in banded]
    assert max(relative_error(a, b) for a, b in zip(banded, whole, strict=True)) < TOLERANCE


def test_tiles_with_statistics_of_their_own_would_fail() -> None:
    """The control: the tolerance is far below what a group norm per band does to the same picture."""
    vae = make_vae("small-sd1")
    latents = torch.randn(1, 4, 32, 8)
    latents[:, :, :16] *= 3
    whole = vae.decode(latents)
    tiles = torch.cat([vae.decode(half) for half in latents.chunk(2, dim=2)], dim=2)
    assert relative_error(tiles, whole) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bands_in_half_precision_are_no_farther_from_float32_than_the_whole(dtype: torch.dtype) -> None:
    exact = both(make_vae("small-sd1"), None, 24, 16)
    half = make_vae("small-sd1", dtype)
    for whole, banded, true in zip(both(half, None, 24, 16), both(half, 16, 24, 16), exact, strict=True):
        assert banded.dtype == dtype
        assert relative_error(banded, true) < 1.2 * relative_error(whole, true)


def test_bands_hold_one_feature_map_and_the_whole_several() -> None:
    vae = blank_vae("sd15").half()
    latents = torch.empty(1, 4, 128, 128, dtype=torch.half, device="meta")
    largest = 128 * 1024 * 1024 * 2  # bytes of 128 channels at full size
    whole = measure(lambda: vae.decode(latents)).live
    set_bands(vae, 64)
    banded = measure(lambda: vae.decode(latents)).live
    assert banded < 2 * largest < whole / 2


def test_some_bands_take_the_memory_of_all(vae: VAE) -> None:
    """Planning, on the meta device, computes few bands only; what it finds is what all of them take."""
    found = []
    for each in (blank_vae("small-sd1"), vae):
        set_bands(each, 16)
        device = each.quant_conv.weight.device
        decoded = measure(lambda each=each, device=device: each.decode(torch.zeros(1, 4, 64, 64, device=device)))
        encoded = measure(lambda each=each, device=device: each.encode(torch.zeros(1, 3, 512, 512, device=device)))
        found.append((decoded, encoded))
        set_bands(each, None)
    assert found[0] == found[1]


@given(n=st.integers(1, 70), m=st.integers(1, 40), rows=st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_query_rows_do_not_change_attention(n: int, m: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator) for length in (n, m, m))
    assert relative_error(sliced_attend(rows, q, k, v), attend(q, k, v)) < 1e-6


def test_query_rows_reach_every_attention_and_bound_its_scores() -> None:
    vae = blank_vae("sd15")
    features = torch.empty(1, 512, 64, 64, device="meta")
    scores = 4096 * 4096 * 4  # bytes
    assert measure(lambda: vae.decoder.mid_block(features), fused=False).live > scores
    set_attention_slices(vae, 128)
    attentions = [module for module in vae.modules() if isinstance(module, Attention)]
    assert all(module.attend is not attend for module in attentions)
    assert measure(lambda: vae.decoder.mid_block(features), fused=False).live < scores
    set_attention_slices(vae, None)
    assert all(module.attend is attend for module in attentions)


class CountAttention(TorchFunctionMode):
    """Counts calls of attention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [96, 1000, 4096])
def test_one_slice_of_attention_takes_the_memory_of_all(tokens: int) -> None:
    """A plan for attention that keeps its scores, which would otherwise go through thousands of slices."""
    q, k, v = (torch.empty(2, 4, tokens, 40, device="meta", dtype=torch.float16) for _ in range(3))

    def every_slice() -> torch.Tensor:
        return torch.cat([attend(part, k, v) for part in torch.split(q, 128, dim=2)], dim=2)

    planned, taken = (measure(work, fused=False).live for work in (lambda: sliced_attend(128, q, k, v), every_slice))
    with CountAttention() as counter:
        assert sliced_attend(128, q, k, v).shape == q.shape
    assert counter.calls == 1
    assert taken <= planned <= 1.1 * taken
