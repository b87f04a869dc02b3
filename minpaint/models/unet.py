"""The conditional UNet of latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

SD 1.5 inpainting on a 512 x 512 picture, channels x height x width:

    input      9 x 64 x 64   (4 noisy latents, 1 mask, 4 latents of the masked picture)
    conv_in  320 x 64 x 64 --------------------------------------------------+
    down 0   320 x 64 x 64 --+ attention                                     |
    down 1   640 x 32 x 32 --|--+ attention                                  | every output on
    down 2  1280 x 16 x 16 --|--|--+ attention                               | the way down is
    down 3  1280 x  8 x  8 --|--|--|--+                                      | joined to an input
    mid     1280 x  8 x  8   |  |  |  |  attention                           | on the way up
    up 0    1280 x  8 x  8 <-|--|--|--+                                      |
    up 1    1280 x 16 x 16 <-|--|--+ attention                               |
    up 2     640 x 32 x 32 <-|--+ attention                                  |
    up 3     320 x 64 x 64 <-+ attention <-----------------------------------+
    output     4 x 64 x 64   (the noise, or v)

Parameter names are the official ones (diffusers/models/unets/unet_2d_condition.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minpaint.models.attention import SpatialTransformer
from minpaint.models.config import UNetConfig
from minpaint.models.layers import Downsample, ResidualBlock, Upsample

NORM_EPS = 1e-5


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: [b] -> [b, dim] float32.

    Vaswani et al. 2017, section 3.5, in the order of diffusers/models/embeddings.py with
    flip_sin_to_cos and no frequency shift.
    """
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * exponents.exp()[None, :]  # [b, half]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """[b, dim] -> [b, 4 dim]."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class Level(nn.Module):
    """Residual blocks, the first `transformers` of them followed by a transformer: every block has these."""

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], heads: int, transformers: int) -> None:
        super().__init__()
        time_dim = 4 * config.channels[0]
        self.resnets = nn.ModuleList(
            ResidualBlock(width, out, config.norm_groups, NORM_EPS, time_dim) for width, out in widths
        )
        if transformers:
            self.attentions = nn.ModuleList(
                SpatialTransformer(out, heads, config.context_dim, config.norm_groups, config.linear_projection)
                for _, out in widths[:transformers]
            )
        self.attends = transformers > 0


class DownBlock(Level):
    """Residual blocks with or without transformers, then half the size unless it is the last."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        width, out = config.channels[max(level - 1, 0)], config.channels[level]
        widths = [(width if j == 0 else out, out) for j in range(config.layers)]
        super().__init__(config, widths, config.heads[level], len(widths) * config.down_attention[level])
        self.last = level == len(config.channels) - 1
        if not self.last:
            self.downsamplers = nn.ModuleList([Downsample(out)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attends:
                x = self.attentions[j](x, context)
            skips.append(x)
        if not self.last:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class MidBlock(Level):
    """Residual block, transformer, residual block at the smallest size."""

    def __init__(self, config: UNetConfig) -> None:
        width = config.channels[-1]
        super().__init__(config, [(width, width), (width, width)], config.heads[-1], transformers=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        out: Tensor = self.resnets[1](x, time)
        return out


class UpBlock(Level):
    """Residual blocks, each joined by a skip, then the next skip's size unless it is the last."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        # Counted from the top like the way down; this is up_blocks[levels - 1 - level].
        position = len(config.channels) - 1 - level
        out, below = config.channels[level], config.channels[min(level + 1, len(config.channels) - 1)]
        above = config.channels[max(level - 1, 0)]
        widths = []
        for j in range(config.layers + 1):
            skip = above if j == config.layers else out
            widths.append(((below if j == 0 else out) + skip, out))
        super().__init__(config, widths, config.heads[level], len(widths) * config.up_attention[position])
        self.last = level == 0
        if not self.last:
            self.upsamplers = nn.ModuleList([Upsample(out)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attends:
                x = self.attentions[j](x, context)
        if not self.last:
            height, width = skips[-1].shape[2:]
            x = self.upsamplers[0](x, (height, width))
        return x


class UNet(nn.Module):
    """x [b, 4 or 9, y, x], t [b], context [b, tokens, context_dim] -> prediction [b, 4, y, x]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        top, levels = config.channels[0], range(len(config.channels))
        self.time_channels = top
        self.time_embedding = TimeEmbedding(top, 4 * top)
        self.conv_in = nn.Conv2d(config.in_channels, top, 3, padding=1)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, top, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(top, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        time = self.time_embedding(timestep_embedding(t, self.time_channels).to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, context, skips)
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, time, context, skips)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out
