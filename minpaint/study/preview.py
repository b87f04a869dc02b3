"""Latents seen without the VAE's decoder: the linear map to colours that fits a checkpoint's autoencoder best.

pairs = [pair(painter.vae_config.scaling_factor * painter.vae.encode(pixels)[0], pixels)]
to_rgb = fit_rgb(pairs)
for step in painter.steps(image, mask, "two dogs on a bench"):
    preview(step.x0, to_rgb)[0].show()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minpaint.picture.image import to_image

SAMPLE = 4096  # latent cells of a picture that the map to colours is fitted to, at most

Pair = tuple[Tensor, Tensor]


def pair(latents: Tensor, pixels: Tensor) -> Pair:
    """Of latents [n, 4, y, x], scaled, and their pixels [n, 3, Y, X]: cells [m, 4] and mean colours [m, 3].

    m is at most about SAMPLE.
    """
    colours = F.adaptive_avg_pool2d(pixels.float().cpu(), (latents.shape[2], latents.shape[3]))
    flat = [x.float().cpu().permute(0, 2, 3, 1).flatten(0, 2) for x in (latents, colours)]
    every = -(-len(flat[0]) // SAMPLE)
    return flat[0][::every], flat[1][::every]


def fit_rgb(pairs: Sequence[Pair]) -> Tensor:
    """The linear map [5, 3] from latents and a 1 to colours with the least squared error, from what the VAE did."""
    latents, colours = (torch.cat(each).double() for each in zip(*pairs, strict=True))
    system = torch.cat([latents, torch.ones(len(latents), 1, dtype=torch.float64)], dim=1)
    # a little of Tikhonov's, so that latents that are all alike have a solution too
    square = system.T @ system + 1e-6 * len(system) * torch.eye(system.shape[1], dtype=torch.float64)
    fitted: Tensor = torch.linalg.solve(square, system.T @ colours)
    return fitted.float()


def colours(latents: Tensor, to_rgb: Tensor) -> Tensor:
    """Latents [n, 4, y, x], scaled -> about the picture they stand for, [n, 3, y, x] in [-1, 1], a pixel a cell."""
    weights, constant = to_rgb[:-1], to_rgb[-1]
    return torch.einsum("n c y x, c r -> n r y x", latents.float().cpu(), weights) + constant[:, None, None]


def preview(latents: Tensor, to_rgb: Tensor) -> list[Image.Image]:
    """The same as small pictures: of a step's x0, what the network takes the finished picture for."""
    return [to_image(each) for each in colours(latents, to_rgb)]
