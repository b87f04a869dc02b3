"""What the supported checkpoints' networks differ in.

A field exists only if two supported checkpoints differ in it; checkpoint/configs.py refuses every
other value of the reference's configurations.
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
