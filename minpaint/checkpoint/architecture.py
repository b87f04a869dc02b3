"""A checkpoint without its weights: configurations, blank models, and where each tensor is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minpaint.checkpoint.tensorfile import Directory, Stored
from minpaint.models.config import TextConfig, UNetConfig, VAEConfig
from minpaint.models.text import build_text_encoder
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE

ENCODER = ("encoder.", "quant_conv.")  # names of the VAE's tensors that encoding needs


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's memory depends on.

    directories: where each tensor of "text_encoder", "encoder", "unet" and "decoder" is stored.
    """

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    directories: dict[str, Directory]


def blank_models(unet: UNetConfig, vae: VAEConfig, text: TextConfig) -> dict[str, Any]:
    """The three models on the meta device: shapes without numbers."""
    with torch.device("meta"):
        models = {"unet": UNet(unet), "vae": VAE(vae), "text_encoder": build_text_encoder(text)}
    return {name: model.requires_grad_(False).eval() for name, model in models.items()}


def split_vae(directories: dict[str, dict[str, Stored]]) -> dict[str, Directory]:
    """The directories of an `Architecture`, from those of "unet", "vae" and "text_encoder"."""
    encoder = {name: stored for name, stored in directories["vae"].items() if name.startswith(ENCODER)}
    decoder = {name: stored for name, stored in directories["vae"].items() if name not in encoder}
    return {
        "text_encoder": directories["text_encoder"],
        "encoder": encoder,
        "unet": directories["unet"],
        "decoder": decoder,
    }
