"""The VAE equals diffusers' on the same weights: same keys, same moments, same pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKL

from minpaint.checkpoint.configs import vae_config
from minpaint.models.vae import VAE
from weights.random_checkpoint import SMALL_VAE, randomise

TOLERANCE = 2e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "four levels": SMALL_VAE,
    "two layers": SMALL_VAE | {"layers_per_block": 2},
    "two levels": SMALL_VAE
    | {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "one level": SMALL_VAE
    | {"block_out_channels": [16], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference_at_any_size(layout: str) -> None:
    reference = AutoencoderKL.from_config(LAYOUTS[layout]).eval()
    reference.load_state_dict(randomise(reference, seed=3))
    ours = VAE(vae_config(LAYOUTS[layout])).eval()
    ours.load_state_dict(reference.state_dict())
    generator = torch.Generator().manual_seed(4)
    for height, width in ((64, 64), (8, 8), (40, 72), (16, 8)):
        pixels = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
        latents = torch.randn(1, 4, height // 8, width // 8, generator=generator)
        with torch.inference_mode():
            mean, logvar = ours.encode(pixels)
            expected = reference.encode(pixels).latent_dist
            assert relative_error(mean, expected.mean) < TOLERANCE
            assert relative_error(logvar, expected.logvar) < TOLERANCE
            assert relative_error(ours.decode(latents), reference.decode(latents).sample) < TOLERANCE


def test_log_variance_is_held_to_the_reference_bounds() -> None:
    ours = VAE(vae_config(SMALL_VAE)).eval()
    torch.nn.init.constant_(ours.quant_conv.bias, 1e4)
    with torch.inference_mode():
        _, logvar = ours.encode(torch.zeros(1, 3, 16, 16))
    assert float(logvar.max()) == 20.0
