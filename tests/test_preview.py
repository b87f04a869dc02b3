"""The preview: a linear map from latents to colours, fitted to what the VAE did."""

from __future__ import annotations

import torch

from minpaint.study.preview import fit_rgb, pair, preview


def test_a_linear_autoencoder_is_seen_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, constant = torch.randn(4, 3, generator=generator) * 0.2, torch.tensor([0.1, -0.2, 0.0])
    latents = torch.randn(2, 4, 6, 9, generator=generator)
    pixels = torch.einsum("n c y x, c r -> n r y x", latents, weights) + constant[:, None, None]
    large = pixels.repeat_interleave(8, 2).repeat_interleave(8, 3)
    to_rgb = fit_rgb([pair(latents, large)])
    assert torch.allclose(to_rgb, torch.cat([weights, constant[None]]), atol=1e-4)
    pictures = preview(latents, to_rgb)
    assert [picture.size for picture in pictures] == [(9, 6), (9, 6)]
    level = round(float(pixels[1, 2, 3, 4].clamp(-1, 1) * 0.5 + 0.5) * 255)
    seen = pictures[1].getpixel((4, 3))
    assert isinstance(seen, tuple)
    assert abs(seen[2] - level) <= 1
