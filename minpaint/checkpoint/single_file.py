"""Checkpoints in one file, in latent diffusion's own names (CompVis, runwayml, Stability AI).

A file's tensors are sorted into the three models and given their official names. Without
configuration files the architecture is told from the shapes.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from minpaint.checkpoint.configs import Configs, parse_configs
from minpaint.checkpoint.tensorfile import Directory, Stored, read_directory, some
from minpaint.errors import CheckpointError, MinpaintWarning

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# What training left in the files: averaged weights, the noise schedule's buffers, counters.
IGNORED = re.compile(
    r"model_ema\..*|betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_alphas_cumprod"
    r"|posterior_.*|lvlb_weights|logvar|scale_factor|global_step"
    rf"|cond_stage_model\..*position_ids|{re.escape(OPEN_CLIP)}attn_mask"
)
# What CLIP needs to compare texts with pictures: one number, and a square matrix.
COMPARING = re.compile(r"cond_stage_model\.(model\.|transformer\.)?(logit_scale|text_projection(\.weight)?)")

# For each prefix the parts of the names that follow it, as regular expressions, and the official
# names. `_split` sees to the numbers of blocks. Sources: latent-diffusion, modules/diffusionmodules,
# openaimodel.py and model.py; open_clip, src/open_clip/transformer.py.
NAMES = {
    UNET: {
        r"^time_embed\.0\.": "time_embedding.linear_1.",
        r"^time_embed\.2\.": "time_embedding.linear_2.",
        r"^input_blocks\.0\.0\.": "conv_in.",
        r"^middle_block\.0\.": "mid_block.resnets.0.",
        r"^middle_block\.1\.": "mid_block.attentions.0.",
        r"^middle_block\.2\.": "mid_block.resnets.1.",
        r"^out\.0\.": "conv_norm_out.",
        r"^out\.2\.": "conv_out.",
        r"\.in_layers\.0\.": ".norm1.",
        r"\.in_layers\.2\.": ".conv1.",
        r"\.emb_layers\.1\.": ".time_emb_proj.",
        r"\.out_layers\.0\.": ".norm2.",
        r"\.out_layers\.3\.": ".conv2.",
        r"\.skip_connection\.": ".conv_shortcut.",
    },
    VAE: {
        r"\.nin_shortcut\.": ".conv_shortcut.",
        r"\.norm_out\.": ".conv_norm_out.",
        r"\.mid\.block_1\.": ".mid_block.resnets.0.",
        r"\.mid\.block_2\.": ".mid_block.resnets.1.",
        r"\.mid\.attn_1\.norm\.": ".mid_block.attentions.0.group_norm.",
        r"\.mid\.attn_1\.([qkv])\.": r".mid_block.attentions.0.to_\1.",
        r"\.mid\.attn_1\.proj_out\.": ".mid_block.attentions.0.to_out.0.",
        r"^encoder\.down\.(\d+)\.block\.": r"encoder.down_blocks.\1.resnets.",
        r"^encoder\.down\.(\d+)\.downsample\.": r"encoder.down_blocks.\1.downsamplers.0.",
        r"^decoder\.up\.(\d{1,3})\.block\.": r"decoder.up_blocks.\1.resnets.",
        r"^decoder\.up\.(\d{1,3})\.upsample\.": r"decoder.up_blocks.\1.upsamplers.0.",
    },
    CLIP: {r"^text_model\.": ""},  # the rest is official already
    OPEN_CLIP: {
        r"^positional_embedding$": "embeddings.position_embedding.weight",
        r"^token_embedding\.": "embeddings.token_embedding.",
        r"^ln_final\.": "final_layer_norm.",
        r"^transformer\.resblocks\.": "encoder.layers.",
        r"\.ln_([12])\.": r".layer_norm\1.",
        r"\.mlp\.c_fc\.": ".mlp.fc1.",
        r"\.mlp\.c_proj\.": ".mlp.fc2.",
        r"\.attn\.out_proj\.": ".self_attn.out_proj.",
        r"\.attn\.in_proj_(weight|bias)$": r".self_attn.qkv_proj.\1",  # which `_split` divides in three
    },
}
SCHEDULER = {  # of the official files
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


Parts = dict[str, dict[str, Stored]]  # "unet", "vae", "text_encoder": each tensor by its official name


@dataclass(frozen=True)
class SingleFile:
    """What is in a file: the configurations and tensors of the models, and the keys that are none of theirs.

    open_clip: whether the text encoder is SD 2's.
    """

    configs: Configs
    parts: Parts
    ignored: tuple[str, ...]
    open_clip: bool


def open_single_file(path: Path, configs: Configs | None, vae: Directory | None = None) -> SingleFile:
    """The configurations and tensors of a single file.

    Configurations that are not given are told from the tensors' shapes. vae: the tensors of
    another one than the file's. CheckpointError if the file cannot be read, is no single file, or
    holds tensors of no part of the model.
    """
    directory = read_directory(path)
    if not any(key.startswith(UNET) for key in directory):
        averaged = any(key.startswith("model_ema.") for key in directory)
        raise CheckpointError(
            f"{path}: holds the averaged weights of a training only, without their names; get a file with {UNET}*"
            if averaged
            else f"{path}: not a whole checkpoint in latent diffusion's names (no {UNET}*); "
            f"for a part of one in diffusers layout give the folder"
        )
    open_clip = any(key.startswith(OPEN_CLIP) for key in directory)
    parts, ignored = _split(directory, path)
    parts["vae"] = parts["vae"] if vae is None else dict(vae)
    if not parts["vae"]:
        raise CheckpointError(f"{path}: holds no VAE (no {VAE}*); name one with --vae, a file, a folder or a hub id")
    if configs is None:
        configs = _tell_configs(parts, open_clip, path)
    if open_clip:  # SD 2 never runs the last layer, which most files hold nevertheless
        last = f"encoder.layers.{configs.text.num_hidden_layers}."
        parts["text_encoder"] = {k: stored for k, stored in parts["text_encoder"].items() if not k.startswith(last)}
    return SingleFile(configs, parts, ignored, open_clip)


def open_vae_file(path: Path) -> Directory:
    """The tensors of the VAE in a file: that of a whole checkpoint, or one alone, in either kind of names."""
    directory = read_directory(path)
    if any(key.startswith(VAE) for key in directory):
        directory = {key: stored for key, stored in directory.items() if key.startswith(VAE)}
    elif any(key.startswith(("encoder.down.", "decoder.up.")) for key in directory):
        directory = {VAE + key: stored for key, stored in directory.items()}
    else:
        return directory
    return _split(directory, path)[0]["vae"]


def _split(directory: Directory, path: Path) -> tuple[Parts, tuple[str, ...]]:
    """Every tensor of a model under its official name; and the keys that are ignored, all averaged weights as one."""
    parts: Parts = {"unet": {}, "vae": {}, "text_encoder": {}}
    strangers, ignored = [], Counter[str]()
    keys = "\n".join(directory)
    # The first block that reduces the size ends the first level; a UNet of one level has none.
    reducing = map(int, re.findall(r"\.input_blocks\.(\d{1,3})\.0\.op\.", keys))
    blocks = map(int, re.findall(r"\.input_blocks\.(\d{1,3})\.", keys))
    layers = max(min(reducing, default=1 + max(blocks, default=0)) - 1, 0)
    levels = 1 + max(map(int, re.findall(r"\.decoder\.up\.(\d{1,3})\.", keys)), default=0)
    for key, stored in directory.items():
        if IGNORED.fullmatch(key) or (COMPARING.fullmatch(key) and len(set(stored.shape)) <= 1):
            ignored[re.sub(r"^model_ema\..*", "model_ema.*", key)] += 1
            continue
        prefix = next((prefix for prefix in NAMES if key.startswith(prefix)), None)
        if prefix is None:
            strangers.append(key)
            continue
        component = {UNET: "unet", VAE: "vae"}.get(prefix, "text_encoder")
        name = key.removeprefix(prefix)
        for old, new in NAMES[prefix].items():
            name = re.sub(old, new, name)
        pieces = {name: stored}
        if component == "unet":
            pieces = {_number_unet_block(name, layers): stored}
        elif name.startswith("decoder.up_blocks."):  # latent diffusion counts from the top, not in the order of use
            pieces = {re.sub(r"\d{1,3}", lambda match: str(levels - 1 - int(match[0])), name, count=1): stored}
        elif ".attentions." in name and stored.shape[2:] == (1, 1):  # once 1x1 convolutions, now linear
            pieces = {name: replace(stored, shape=stored.shape[:2])}
        elif ".qkv_proj." in name:
            pieces = {name.replace("qkv", letter): stored.part(index, 3) for index, letter in enumerate("qkv")}
        if twice := parts[component].keys() & pieces.keys():
            raise CheckpointError(
                f"{component} ({path.name}): {min(twice)} is stored under two names; get another copy"
            )
        parts[component].update(pieces)
    if strangers:
        raise CheckpointError(f"{path}: tensors that belong to no part of the model: {some(strangers)}")
    return parts, tuple(f"{key} ({count} tensors)" if count > 1 else key for key, count in ignored.items())


def _number_unet_block(name: str, layers: int) -> str:
    """The official name of what is in a numbered block.

    Latent diffusion counts through all levels. A level has `layers` residual blocks and a
    downsampling on the way in, `layers` + 1 residual blocks on the way out.
    """
    match = re.match(r"(in|out)put_blocks\.(\d{1,3})\.(\d)\.(op\.|conv\.)?", name)
    if match is None:
        return name
    level, index = divmod(int(match[2]) - (match[1] == "in"), layers + 1)
    side = "down" if match[1] == "in" else "up"
    kind = f"resnets.{index}." if match[3] == "0" else f"attentions.{index}."
    kind = {"op.": "downsamplers.0.conv.", "conv.": "upsamplers.0.conv."}.get(match[4], kind)
    return f"{side}_blocks.{level}.{kind}{name[match.end() :]}"


def _tell_configs(parts: Parts, open_clip: bool, path: Path) -> Configs:
    """The configurations of a single file from its tensors' shapes.

    What shapes cannot tell is taken from the official files of the family: 32 groups, heads
    of 64 channels (SD 2) or 8 heads (SD 1), the scheduler. SD 2's 4-channel models exist with
    both predictions; epsilon is assumed for them, with a warning.
    """
    unet, text = parts["unet"], parts["text_encoder"]
    try:
        linear = len(unet["mid_block.attentions.0.proj_in.weight"].shape) == 2
        channels = [stored.shape[0] for stored in _numbered(unet, "down_blocks.{}.resnets.0.conv2.weight")]

        def block_types(side: str) -> list[str]:
            attentions = [f"{side.lower()}_blocks.{n}.attentions.0.norm.weight" for n in range(len(channels))]
            return [f"CrossAttn{side}Block2D" if name in unet else f"{side}Block2D" for name in attentions]

        unet_json = {
            "in_channels": unet["conv_in.weight"].shape[1],
            "block_out_channels": channels,
            "layers_per_block": len(_numbered(unet, "down_blocks.0.resnets.{}.conv2.weight")),
            "down_block_types": block_types("Down"),
            "up_block_types": block_types("Up"),
            "attention_head_dim": [max(width // 64, 1) for width in channels] if linear else 8,
            "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "use_linear_projection": linear,
        }
        tokens, width = text["embeddings.token_embedding.weight"].shape
        layers = _numbered(text, "encoder.layers.{}.mlp.fc1.weight")
        # OpenCLIP's ViT-H has 24 layers, of which SD 2 runs 23; diffusers'
        # scripts/convert_diffusers_to_original_stable_diffusion.py leaves the last one out.
        unused = 1 if open_clip and len(layers) != 23 else 0
        text_json = {
            "hidden_act": "gelu" if open_clip else "quick_gelu",
            "hidden_size": width,
            "intermediate_size": layers[0].shape[0],
            "max_position_embeddings": text["embeddings.position_embedding.weight"].shape[0],
            "num_attention_heads": max(width // 64, 1),
            "num_hidden_layers": len(layers) - unused,
            "vocab_size": tokens,
        }
    except (KeyError, IndexError, ValueError):
        raise CheckpointError(
            f"{path}: the architecture cannot be told from its tensors; is it a Stable Diffusion 1 or 2 "
            f"checkpoint? A folder of configuration files can be given with --config"
        ) from None
    kind = "PNDMScheduler" if open_clip or unet_json["in_channels"] == 4 else "DDIMScheduler"
    if linear and unet_json["in_channels"] == 4:
        warnings.warn(
            f"{path.name}: nothing in the file tells epsilon from v-prediction; epsilon is assumed "
            f"(a 768-v model needs --config)",
            MinpaintWarning,
            stacklevel=2,
        )
    return parse_configs(unet_json, _tell_vae(parts["vae"], path), text_json, SCHEDULER | {"_class_name": kind})


def _tell_vae(vae: Directory, path: Path) -> dict[str, Any]:
    """A VAE's configuration from its tensors' shapes."""
    first = _numbered(vae, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [stored.shape[0] for stored in first if stored.shape]
    if not widths:
        raise CheckpointError(f"{path}: no VAE can be told from its tensors; get a VAE of Stable Diffusion 1 or 2")
    return {
        "block_out_channels": widths,
        "layers_per_block": len(_numbered(vae, "encoder.down_blocks.0.resnets.{}.conv1.weight")),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def _numbered(part: Directory, name: str) -> list[Stored]:
    """The tensors called `name` with the number 0, 1, ... in place of {}."""
    return [part[key] for key in takewhile(part.__contains__, map(name.format, count()))]
