"""What the supported checkpoints' networks differ in.

A field of the UNet or the VAE exists only if two supported checkpoints differ in it;
checkpoint/configs.py refuses every other value of the reference's configurations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """The conditional UNet. `heads` counts attention heads at each level, top first."""

    in_channels: int
    channels: tuple[int, ...]
    layers: int
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    heads: tuple[int, ...]
    context_dim: int
    linear_projection: bool
    norm_groups: int
    sample_size: int


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder. `factor` is pixels per latent cell along an axis, 8 for SD."""

    channels: tuple[int, ...]
    layers: int
    norm_groups: int
    scaling_factor: float

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class TextConfig:
    """The text encoder, under the names of transformers' CLIPTextConfig."""

    hidden_act: str
    hidden_size: int
    intermediate_size: int
    layer_norm_eps: float
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    use_attention_mask: bool


def least_cells(unet: UNetConfig, vae: VAEConfig) -> int:
    """How many latent cells a picture must have along an axis for every group norm to have two numbers.

    A group of a single channel has one number on a map of a single cell, which PyTorch refuses. The
    first norm of a level still has the channels of the level before.
    """
    last = len(unet.channels) - 1
    sizes = [2 ** min(level + 1, last) for level, width in enumerate(unet.channels) if width == unet.norm_groups]
    sizes += [1 for width in vae.channels[-2:] if width == vae.norm_groups]
    return max(sizes, default=0) + 1
