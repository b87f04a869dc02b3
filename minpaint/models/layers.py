"""The convolutional pieces that the UNet and the VAE share. Feature maps are [b, c, y, x]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to their input (He et al. 2016), with a time embedding.

    `time_dim`: width of the embedding [b, time_dim] added between the two; None for the VAE.
    """

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1)
        self.widens = channels != out_channels

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = (self.conv_shortcut(x) if self.widens else x) + h
        return out


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution, an odd size rounded up.

    `one_sided`: pad the bottom and the right only, as the VAE's encoder was trained
    (latent-diffusion, ldm/modules/diffusionmodules/model.py, Downsample).
    """

    def __init__(self, channels: int, one_sided: bool = False) -> None:
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, then a 3x3 convolution.

    `size` (y, x) is that of the feature map to be joined next, which for an odd size is not
    the double; without it the size doubles.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        out: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return out
