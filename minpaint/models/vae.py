"""The autoencoder between pixels and latents (Rombach et al. 2022, section 3.1; VQGAN's layout).

SD on a 512 x 512 picture, channels x height x width:

    encoder   3 x 512 x 512 -> 128 x 512 -> 256 x 256 -> 512 x 128 -> 512 x 64 -> mid -> 8 x 64
    decoder   4 x  64 x  64 -> mid -> 512 x 64 -> 512 x 128 -> 256 x 256 -> 128 x 512 -> 3 x 512

The eight channels of the encoder are the mean and the log variance of a normal distribution.
Parameter names are the official ones (diffusers/models/autoencoders/autoencoder_kl.py).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minpaint.models.attention import SpatialSelfAttention
from minpaint.models.config import VAEConfig
from minpaint.models.layers import Downsample, ResidualBlock, Upsample

NORM_EPS = 1e-6
LATENT_CHANNELS = 4


def _residual_blocks(config: VAEConfig, width: int, out: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResidualBlock(width if j == 0 else out, out, config.norm_groups, NORM_EPS) for j in range(count)
    )


class EncoderBlock(nn.Module):
    """Residual blocks, then half the size unless it is the last."""

    def __init__(self, config: VAEConfig, level: int) -> None:
        super().__init__()
        width, out = config.channels[max(level - 1, 0)], config.channels[level]
        self.resnets = _residual_blocks(config, width, out, config.layers)
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out, one_sided=True)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        return x


class DecoderBlock(nn.Module):
    """Residual blocks, then double the size unless it is the last."""

    def __init__(self, config: VAEConfig, level: int) -> None:
        super().__init__()
        width, out = config.channels[min(level + 1, len(config.channels) - 1)], config.channels[level]
        self.resnets = _residual_blocks(config, width, out, config.layers + 1)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(out)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.upsamplers):
            x = module(x)
        return x


class MidBlock(nn.Module):
    """Residual block, self-attention, residual block at the smallest size."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = _residual_blocks(config, width, width, 2)
        self.attentions = nn.ModuleList([SpatialSelfAttention(width, config.norm_groups, NORM_EPS)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Pixels [b, 3, Y, X] -> moments [b, 8, Y / factor, X / factor]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        top, bottom = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(3, top, 3, padding=1)
        self.down_blocks = nn.ModuleList(EncoderBlock(config, level) for level in range(len(config.channels)))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, bottom, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(bottom, 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for module in (*self.down_blocks, self.mid_block):
            x = module(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Decoder(nn.Module):
    """Latents [b, 4, y, x] -> pixels [b, 3, y * factor, x * factor]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        top, bottom = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, bottom, 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(DecoderBlock(config, level) for level in reversed(range(len(config.channels))))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, top, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(top, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for module in (self.mid_block, *self.up_blocks):
            x = module(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class VAE(nn.Module):
    """Latents here are unscaled; the UNet's are these times the configuration's scaling factor."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, Y, X] in [-1, 1], sizes multiples of the factor -> (mean, logvar).

        Both are [b, 4, y, x]; the log variance is clamped to [-30, 20] as in the reference
        (diffusers/models/autoencoders/vae.py, DiagonalGaussianDistribution).
        """
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, 4, y, x] -> pixels [b, 3, Y, X], about [-1, 1] and not clamped."""
        out: Tensor = self.decoder(self.post_quant_conv(latents))
        return out
