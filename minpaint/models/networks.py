"""The four calls that the algorithm makes, and the plainest way to answer them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from minpaint.models.text import encode_prompt
from minpaint.models.vae import VAE


class Networks(Protocol):
    """What inpaint.inpaint asks of a checkpoint's networks.

    Whoever answers may do so in any number format and in any way; what goes in and comes out is
    float32, but for the embeddings, which only the UNet sees.
    """

    def embed(self, prompt: str) -> Tensor:
        """A prompt's embeddings [1, tokens, D], to be given to `unet` as (a part of) its context."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [n, 3, Y, X] in [-1, 1] -> mean and log variance of the latents, [n, 4, y, x], unscaled."""

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x [b, 4 or 9, y, x], timesteps [b], context [b, tokens, D] -> prediction [b, 4, y, x]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [n, 4, y, x] -> pixels [n, 3, Y, X], about [-1, 1] and not clamped."""


@dataclass(frozen=True)
class PlainNetworks:
    """The modules of a checkpoint, simply called.

    text_encoder, tokenizer: transformers' CLIPTextModel and CLIPTokenizer.
    """

    unet: nn.Module
    vae: VAE
    text_encoder: nn.Module
    tokenizer: Any

    def embed(self, prompt: str) -> Tensor:
        return encode_prompt(self.tokenizer, self.text_encoder, prompt)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)
