"""Checkpoints in one file, in latent diffusion's own names (CompVis, runwayml, Stability AI).

`split` sorts a file's tensors into the three models and gives them their official names.
Without configuration files `tell_configuration` tells the architecture from the shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpaint.checkpoint.tensorfile import Directory, Stored, some
from minpaint.errors import CheckpointError
from minpaint.models.config import UNetConfig, VAEConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# What training left in the files: averaged weights, the noise schedule's buffers, counters.
IGNORED = re.compile(
    r"model_ema\..*|betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_alphas_cumprod"
    r"|posterior_.*|lvlb_weights|logvar|scale_factor|global_step"
    r"|cond_stage_model\..*position_ids"
    rf"|{re.escape(OPEN_CLIP)}(logit_scale|text_projection|attn_mask)"
)

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class SingleFile:
    """The three models' directories under their official names, and whether it is SD 2."""

    unet: Directory
    vae: Directory
    text_encoder: Directory
    open_clip: bool


def is_single_file(directory: Directory) -> bool:
    return any(key.startswith(UNET) for key in directory)


def split(directory: Directory, unet: UNetConfig, vae: VAEConfig, text_layers: int, path: Path) -> SingleFile:
    """The parts of a single file under official names; CheckpointError for keys of no part."""
    left = {key: stored for key, stored in directory.items() if not IGNORED.fullmatch(key)}
    unet_names = _unet_names(unet)
    parts: dict[str, dict[str, Stored]] = {"unet": {}, "vae": {}}
    for key in list(left):
        if key.startswith(UNET):
            name = _translate(key.removeprefix(UNET), unet_names, RESIDUAL)
            parts["unet"][name] = left.pop(key)
        elif key.startswith(VAE):
            name, stored = _vae_name(key.removeprefix(VAE), len(vae.channels)), left.pop(key)
            square = ".attentions." in name and len(stored.shape) == 4  # 1x1 convolutions of old
            parts["vae"][name] = stored.squeezed(stored.shape[:2]) if square else stored
    open_clip = any(key.startswith(OPEN_CLIP) for key in left)
    text = _open_clip(left, text_layers) if open_clip else _clip(left)
    if left:
        raise CheckpointError(f"{path}: tensors that belong to no part of the model: {some(list(left))}")
    return SingleFile(parts["unet"], parts["vae"], text, open_clip)


def _translate(key: str, places: dict[str, str], inner: dict[str, str]) -> str:
    """An LDM key to its official name: longest known place first, then the layer inside it."""
    for length in range(key.count("."), 0, -1):
        place = ".".join(key.split(".")[:length])
        if place in places:
            rest = key[len(place) :]
            for official, ldm in inner.items():
                if rest.startswith(f".{ldm}."):
                    rest = f".{official}{rest[len(ldm) + 1 :]}"
                    break
            return places[place] + rest
    return key


def _unet_names(config: UNetConfig) -> dict[str, str]:
    """LDM module -> official module (latent-diffusion, modules/diffusionmodules/openaimodel.py)."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    levels = len(config.channels)
    number = 1
    for level in range(levels):
        for j in range(config.layers):
            names[f"input_blocks.{number}.0"] = f"down_blocks.{level}.resnets.{j}"
            names[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{j}"
            number += 1
        if level < levels - 1:
            names[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    number = 0
    for level in range(levels):
        for j in range(config.layers + 1):
            names[f"output_blocks.{number}.0"] = f"up_blocks.{level}.resnets.{j}"
            names[f"output_blocks.{number}.1"] = f"up_blocks.{level}.attentions.{j}"
            # the enlargement comes after the attention, if there is one
            after = 2 if config.up_attention[level] else 1
            if j == config.layers and level < levels - 1:
                names[f"output_blocks.{number}.{after}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            number += 1
    return names


def _vae_name(key: str, levels: int) -> str:
    """LDM key -> official key (latent-diffusion, modules/diffusionmodules/model.py)."""
    key = key.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    key = key.replace("mid.block_1", "mid_block.resnets.0").replace("mid.block_2", "mid_block.resnets.1")
    for official, ldm in VAE_ATTENTION.items():
        key = key.replace(f"mid.attn_1.{ldm}.", f"mid_block.attentions.0.{official}.")
    key = re.sub(r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", key)
    key = re.sub(r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", key)
    up = re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", key)
    if up:  # LDM counts these levels from the top, the official names in the order of use
        inside = "resnets." if up[2] == "block" else "upsamplers.0."
        key = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{inside}{up[3]}"
    return key


def _clip(left: dict[str, Stored]) -> dict[str, Stored]:
    """Take SD 1's text encoder, already in transformers' names."""
    return {key.removeprefix(CLIP): left.pop(key) for key in list(left) if key.startswith(CLIP)}


def _open_clip(left: dict[str, Stored], layers: int) -> dict[str, Stored]:
    """Take SD 2's text encoder: split fused q/k/v, and drop the last layer, which SD 2 never ran."""
    places = {
        "positional_embedding": "embeddings.position_embedding.weight",
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    text: dict[str, Stored] = {}
    for key in [key for key in left if key.startswith(OPEN_CLIP)]:
        name = key.removeprefix(OPEN_CLIP)
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.*)", name)
        if name in places:
            text[places[name]] = left.pop(key)
        elif layer and int(layer[1]) == layers:
            left.pop(key)
        elif layer:
            stored, place = left.pop(key), f"encoder.layers.{layer[1]}"
            fused = re.fullmatch(r"attn\.in_proj_(weight|bias)", layer[2])
            if fused:
                for index, letter in enumerate("qkv"):
                    text[f"{place}.self_attn.{letter}_proj.{fused[1]}"] = stored.part(index, 3)
            else:
                text[_translate(f"{place}.{layer[2]}", {place: place}, OPEN_CLIP_LAYER)] = stored
    return text


def _open_clip_layers(directory: Directory) -> int:
    """Layers that are used: one less than there are, but 23 where a converter wrote only those.

    OpenCLIP's ViT-H has 24; diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py
    leaves the last one out.
    """
    numbers = re.findall(rf"{re.escape(OPEN_CLIP)}transformer\.resblocks\.(\d+)\.", "\n".join(directory))
    last = max(map(int, numbers), default=0)
    return 23 if last == 22 else last


@dataclass(frozen=True)
class Told:
    """Configurations told from shapes, as the reference's JSON would say them."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    sure_of_prediction: bool


def tell_configuration(directory: Directory, path: Path) -> Told:
    """The architecture of a single file from its tensors' shapes.

    What shapes cannot tell is taken from the official files of the family: 32 groups, heads
    of 64 channels (SD 2) or 8 heads (SD 1), the scheduler. SD 2's 4-channel models exist with
    both predictions, so `sure_of_prediction` is false for them.
    """
    try:
        unet, linear = _tell_unet(directory)
        open_clip = any(key.startswith(OPEN_CLIP) for key in directory)
        text = _tell_open_clip(directory) if open_clip else _tell_clip(directory)
        vae = _tell_vae(directory)
    except (KeyError, IndexError, ValueError):
        raise CheckpointError(
            f"{path}: the architecture cannot be told from its tensors; is it a Stable Diffusion 1 or 2 "
            f"checkpoint? A folder of configuration files can be given with --config"
        ) from None
    scheduler = {
        "_class_name": "PNDMScheduler" if open_clip or unet["in_channels"] == 4 else "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    return Told(unet, vae, text, scheduler, not (linear and unet["in_channels"] == 4))


def _tell_unet(directory: Directory) -> tuple[dict[str, Any], bool]:
    first = directory[f"{UNET}input_blocks.0.0.weight"].shape
    channels, attends, layers = [first[0]], [False], 0
    number = 1
    while any(key.startswith(f"{UNET}input_blocks.{number}.") for key in directory):
        block = f"{UNET}input_blocks.{number}"
        if f"{block}.0.op.weight" in directory:
            channels.append(channels[-1])
            attends.append(False)
        else:
            channels[-1] = directory[f"{block}.0.out_layers.3.weight"].shape[0]
            attends[-1] = f"{block}.1.norm.weight" in directory
            layers += len(channels) == 1
        number += 1
    per_level = layers + 1
    up_attends = [f"{UNET}output_blocks.{i * per_level}.1.norm.weight" in directory for i in range(len(channels))]
    middle = f"{UNET}middle_block.1"
    linear = len(directory[f"{middle}.proj_in.weight"].shape) == 2
    return {
        "in_channels": first[1],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in up_attends],
        "attention_head_dim": [max(c // 64, 1) for c in channels] if linear else 8,
        "cross_attention_dim": directory[f"{middle}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": linear,
        "sample_size": 64,
    }, linear


def _tell_vae(directory: Directory) -> dict[str, Any]:
    channels: list[int] = []
    while f"{VAE}encoder.down.{len(channels)}.block.0.conv1.weight" in directory:
        channels.append(directory[f"{VAE}encoder.down.{len(channels)}.block.0.conv1.weight"].shape[0])
    layers = 0
    while f"{VAE}encoder.down.0.block.{layers}.conv1.weight" in directory:
        layers += 1
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def _tell_clip(directory: Directory) -> dict[str, Any]:
    keys = {re.sub(r"\.text_model\.", ".", key): stored for key, stored in directory.items() if key.startswith(CLIP)}
    tokens, width = keys[f"{CLIP}embeddings.token_embedding.weight"].shape
    layers = 0
    while f"{CLIP}encoder.layers.{layers}.mlp.fc1.weight" in keys:
        layers += 1
    return {
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": keys[f"{CLIP}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "max_position_embeddings": keys[f"{CLIP}embeddings.position_embedding.weight"].shape[0],
        "num_attention_heads": max(width // 64, 1),
        "num_hidden_layers": layers,
        "vocab_size": tokens,
    }


def _tell_open_clip(directory: Directory) -> dict[str, Any]:
    tokens, width = directory[f"{OPEN_CLIP}token_embedding.weight"].shape
    return {
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": directory[f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "max_position_embeddings": directory[f"{OPEN_CLIP}positional_embedding"].shape[0],
        "num_attention_heads": max(width // 64, 1),
        "num_hidden_layers": _open_clip_layers(directory),
        "vocab_size": tokens,
    }
