"""What the supported checkpoints differ in, read from their JSON files.

For each file a table says which key becomes which field, and what it may be. Every other key of
the reference's configurations must have the one value that this code implements; any other value
is refused by name, so that no checkpoint is ever run as something it is not. Keys that start
with an underscore are notes of the program that wrote the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpaint.checkpoint.rows import (
    ANY,
    ENTRIES,
    LAYERS,
    REQUIRED,
    TEXT_LAYERS,
    Json,
    Row,
    check,
    choice,
    count,
    counts,
    flag,
    number,
    read_rows,
    types,
)
from minpaint.checkpoint.scheduler import SCHEDULER, scheduler_config
from minpaint.checkpoint.tensorfile import read_json
from minpaint.models.config import TextConfig, UNetConfig, VAEConfig
from minpaint.schedule import SchedulerConfig

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
FILES = (UNET, VAE, TEXT, SCHEDULER)
UNET_FIELDS = {
    "in_channels": choice("in_channels", 4, 4, 9),
    "channels": counts("block_out_channels", REQUIRED),
    "layers": count("layers_per_block", 2, LAYERS),
    "down_attention": types("down_block_types", REQUIRED, "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_attention": types("up_block_types", REQUIRED, "CrossAttnUpBlock2D", "UpBlock2D"),
    # The reference's name is historical: the number is how many heads there are.
    "heads": counts("attention_head_dim", 8),
    "context_dim": count("cross_attention_dim", 1280),
    "linear_projection": flag("use_linear_projection", False),
    "norm_groups": count("norm_num_groups", 32),
    "sample_size": count("sample_size", 64),
}
# diffusers/models/unets/unet_2d_condition.py, __init__: the values that the official
# configurations use, which for most keys is the default.
UNET_FIXED: Json = {
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
    "only_cross_attention": False,
    **dict.fromkeys(("freq_shift", "dropout"), 0),
    **dict.fromkeys(("downsample_padding", "mid_block_scale_factor", "resnet_out_scale_factor"), 1),
    "transformer_layers_per_block": 1,
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), 3),
    "out_channels": 4,
    **dict.fromkeys(("resnet_time_scale_shift", "attention_type"), "default"),
    "addition_embed_type_num_heads": 64,  # of an embedding that is itself refused
    "upcast_attention": ANY,  # fused attention accumulates in float32 whether or not SD 2.1 asks for it
    **dict.fromkeys(("torch_dtype", "dtype"), ANY),  # of the files
}

VAE_FIELDS = {
    "channels": counts("block_out_channels", REQUIRED),
    "layers": count("layers_per_block", 1, LAYERS),
    "norm_groups": count("norm_num_groups", 32),
    "scaling_factor": number("scaling_factor", 0.18215),
    "down": types("down_block_types", REQUIRED, "DownEncoderBlock2D"),
    "up": types("up_block_types", REQUIRED, "UpDecoderBlock2D"),
}
# diffusers/models/autoencoders/autoencoder_kl.py, __init__
VAE_FIXED: Json = {
    **dict.fromkeys(("in_channels", "out_channels"), 3),
    "latent_channels": 4,
    "act_fn": "silu",
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), True),
    **dict.fromkeys(("sample_size", "force_upcast"), ANY),  # of the training, and a hint to pipelines of other models
    **dict.fromkeys(("torch_dtype", "dtype"), ANY),  # of the files
}

TEXT_FIELDS = {
    "hidden_act": choice("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
    "hidden_size": count("hidden_size", 512),
    "intermediate_size": count("intermediate_size", 2048),
    "layer_norm_eps": number("layer_norm_eps", 1e-5),
    "max_position_embeddings": count("max_position_embeddings", 77),
    "num_attention_heads": count("num_attention_heads", 8),
    "num_hidden_layers": count("num_hidden_layers", 12, TEXT_LAYERS),
    "vocab_size": count("vocab_size", 49408, ENTRIES),
    "use_attention_mask": flag("use_attention_mask", False),
    "classes": types("architectures", ["CLIPTextModel"], "CLIPTextModel", "CLIPTextModelWithProjection"),
    "model_type": choice("model_type", "clip_text_model", "clip_text_model", "clip"),
}


@dataclass(frozen=True)
class Configs:
    """The four configurations of a checkpoint, complete and checked."""

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    scheduler: SchedulerConfig


def parse_configs(unet: Json, vae: Json, text: Json, scheduler: Json) -> Configs:
    """The configurations from the reference's JSON; CheckpointError names a key that is not supported."""
    return Configs(unet_config(unet), vae_config(vae), text_config(text), scheduler_config(scheduler))


def read_configs(folder: Path) -> Configs:
    """The configurations of a folder in diffusers layout; CheckpointError names what is wrong with one."""
    return parse_configs(*(read_json(folder / file, file) for file in FILES))


def unet_config(source: Json) -> UNetConfig:
    """UNetConfig from the reference's JSON; CheckpointError names a key that is not supported."""
    values = _read_levels(UNET, source, UNET_FIELDS, UNET_FIXED)
    channels, heads = values["channels"], values["heads"]
    values["heads"] = heads = (heads,) * len(channels) if isinstance(heads, int) else heads
    for field in ("down_attention", "up_attention"):
        values[field] = tuple(name.startswith("CrossAttn") for name in values[field])
    in_the_middle = [False] * (len(channels) - 1) + [True]  # has the width of the last level, and always attends
    attends = zip(values["down_attention"], values["up_attention"][::-1], in_the_middle, strict=True)
    for width, divisor, places in zip(channels, heads, attends, strict=True):
        fits = not any(places) or width % divisor == 0
        check(fits, UNET, "attention_head_dim", divisor, f"must divide {width} channels")
    check(channels[0] % 2 == 0, UNET, "block_out_channels", channels, "the first must be even")
    return UNetConfig(**values)


def vae_config(source: Json) -> VAEConfig:
    """VAEConfig from the reference's JSON; CheckpointError names a key that is not supported."""
    values = _read_levels(VAE, source, VAE_FIELDS, VAE_FIXED)
    del values["down"], values["up"]
    return VAEConfig(**values)


def text_config(source: Json) -> TextConfig:
    """TextConfig from transformers' JSON; CheckpointError names a key that is not supported.

    The other keys of the file concern training and other models (transformers/models/clip).
    """
    values = read_rows(TEXT, source, TEXT_FIELDS, {"text_config": None}, others=True)
    del values["classes"], values["model_type"]
    values["layer_norm_eps"] = float(values["layer_norm_eps"])  # transformers takes no 1 for 1.0
    width, heads = values["hidden_size"], values["num_attention_heads"]
    check(width % heads == 0, TEXT, "num_attention_heads", heads, "must divide hidden_size")
    return TextConfig(**values)


def _read_levels(file: str, source: Json, rows: Mapping[str, Row], fixed: Json) -> dict[str, Any]:
    """What `_read` finds for a network of levels; CheckpointError too if lists disagree or norm groups do not fit."""
    values = read_rows(file, source, rows, fixed)
    levels, groups = len(values["channels"]), values["norm_groups"]
    for field, (key, *_) in rows.items():
        found = values[field]
        check(not isinstance(found, tuple) or len(found) == levels, file, key, found, f"must have {levels} levels")
    for width in values["channels"]:
        check(width % groups == 0, file, "norm_num_groups", groups, f"must divide {width} channels")
    return values
