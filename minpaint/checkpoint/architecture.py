"""A checkpoint without its weights: configurations, blank models, and where each tensor is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minpaint.checkpoint.tensorfile import FLOATS, Directory, Stored, some
from minpaint.errors import CheckpointError
from minpaint.models.config import TextConfig, UNetConfig, VAEConfig
from minpaint.models.text import build_text_encoder
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE

POSITIONS = "embeddings.position_ids"  # 0, 1, 2, ..., which CLIP's files store although they are computed
# What names hold in some files, and hold here. diffusers before 0.12 named the VAE's attention differently
# (models/autoencoders/autoencoder_kl.py); older transformers wrap CLIP's text model in one more module.
OLD_NAMES = {
    "unet": {},
    "vae": {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."},
    "text_encoder": {"text_model.": ""},
}
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


def match_component(component: str, directory: Directory, model: nn.Module) -> dict[str, Stored]:
    """Where each tensor of a model is stored, by the model's own names."""
    stored: dict[str, Stored] = {}
    for key, entry in directory.items():
        name = _common_name(component, key)
        if name in stored:
            raise CheckpointError(
                f"{component} ({entry.file.name}): {name} is stored under two names; get another copy"
            )
        if not name.endswith(POSITIONS):
            stored[name] = entry
    state = model.state_dict()
    wanted = {_common_name(component, key): key for key in state if not key.endswith(POSITIONS)}
    shapes = {name: tuple(state[key].shape) for name, key in wanted.items()}
    there = [name for name in wanted if name in stored]
    faults = {
        "missing": [name for name in wanted if name not in stored],
        "surplus": [name for name in stored if name not in wanted],
        "misshapen": [
            f"{name} {list(stored[name].shape)} instead of {list(shapes[name])}"
            for name in there
            if stored[name].shape != shapes[name]
        ],
        "not of a floating-point kind": [f"{n} {stored[n].kind}" for n in there if stored[n].kind not in FLOATS],
    }
    if told := [f"{fault}: {some(names)}" for fault, names in faults.items() if names]:
        file = next(iter(stored.values())).file.name if stored else "weights"
        raise CheckpointError(
            f"{component} ({file}): tensors do not fit the configuration, get both from one place; {'; '.join(told)}"
        )
    return {key: stored[name] for name, key in wanted.items()}


def _common_name(component: str, key: str) -> str:
    """One name for a tensor that versions of the reference name differently."""
    for old, new in OLD_NAMES[component].items():
        key = key.replace(old, new)
    return key
