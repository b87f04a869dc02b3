"""What the supported checkpoints differ in, read from their JSON files.

For each file a table says which key becomes which field, and what it may be. Every other key of
the reference's configurations must have the one value that this code implements; any other value
is refused by name, so that no checkpoint is ever run as something it is not. Keys that start
with an underscore are notes of the program that wrote the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpaint.checkpoint.tensorfile import read_json
from minpaint.errors import CheckpointError
from minpaint.models.config import TextConfig, UNetConfig, VAEConfig
from minpaint.schedule import SAMPLER_OF_CLASS, SchedulerConfig

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
FILES = (UNET, VAE, TEXT, SCHEDULER)
# The most of each that a file may ask for: more than any checkpoint has, and blank models are still made in seconds.
LEVELS, LAYERS, TEXT_LAYERS, WIDTH, ENTRIES = 8, 16, 256, 2**16, 2**20
REQUIRED = object()  # as a default: the file must say it
ANY = object()  # as the one value of a key: whatever the file says changes nothing

Json = Mapping[str, Any]
Row = tuple[str, Any, Callable[[Any], bool], str]  # a key, its default, a check of its value, what the check wants


def _count(key: str, default: Any, most: int = WIDTH, least: int = 1) -> Row:
    return key, default, lambda n: type(n) is int and least <= n <= most, f"must be {least} to {most}"


def _counts(key: str, default: Any) -> Row:
    """A list of counts, one a level; with a default that is one count, also one count for all levels."""

    def check(value: Any) -> bool:
        entries = [value] if isinstance(default, int) and not isinstance(value, list) else value
        return isinstance(entries, list) and 0 < len(entries) <= LEVELS and all(map(_count(key, 1)[2], entries))

    return key, default, check, f"must be counts of 1 to {WIDTH}, one for each of 1 to {LEVELS} levels"


def _number(key: str, default: float, limit: float = 1e6) -> Row:
    wanted = f"must be more than 0 and less than {limit:g}"
    return key, default, lambda x: type(x) in (int, float) and 0 < x < limit, wanted


def _choice(key: str, default: Any, *supported: Any) -> Row:
    alike = [(type(value), value) for value in supported]  # 1 and 1.0 and true are three values
    return key, default, lambda x: (type(x), x) in alike, f"only {', '.join(map(str, supported))}"


def _flag(key: str, default: bool | None) -> Row:
    return _choice(key, default, False, True)


def _types(key: str, default: Any, *supported: str) -> Row:
    wanted = f"must be a list of {' or '.join(supported)}"
    return key, default, lambda x: isinstance(x, list) and all(name in supported for name in x), wanted


UNET_FIELDS = {
    "in_channels": _choice("in_channels", 4, 4, 9),
    "channels": _counts("block_out_channels", REQUIRED),
    "layers": _count("layers_per_block", 2, LAYERS),
    "down_attention": _types("down_block_types", REQUIRED, "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_attention": _types("up_block_types", REQUIRED, "CrossAttnUpBlock2D", "UpBlock2D"),
    # The reference's name is historical: the number is how many heads there are.
    "heads": _counts("attention_head_dim", 8),
    "context_dim": _count("cross_attention_dim", 1280),
    "linear_projection": _flag("use_linear_projection", False),
    "norm_groups": _count("norm_num_groups", 32),
    "sample_size": _count("sample_size", 64),
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
}

VAE_FIELDS = {
    "channels": _counts("block_out_channels", REQUIRED),
    "layers": _count("layers_per_block", 1, LAYERS),
    "norm_groups": _count("norm_num_groups", 32),
    "scaling_factor": _number("scaling_factor", 0.18215),
    "down": _types("down_block_types", REQUIRED, "DownEncoderBlock2D"),
    "up": _types("up_block_types", REQUIRED, "UpDecoderBlock2D"),
}
# diffusers/models/autoencoders/autoencoder_kl.py, __init__
VAE_FIXED: Json = {
    **dict.fromkeys(("in_channels", "out_channels"), 3),
    "latent_channels": 4,
    "act_fn": "silu",
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), True),
    **dict.fromkeys(("sample_size", "force_upcast"), ANY),  # of the training, and a hint to pipelines of other models
}

TEXT_FIELDS = {
    "hidden_act": _choice("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
    "hidden_size": _count("hidden_size", 512),
    "intermediate_size": _count("intermediate_size", 2048),
    "layer_norm_eps": _number("layer_norm_eps", 1e-5),
    "max_position_embeddings": _count("max_position_embeddings", 77),
    "num_attention_heads": _count("num_attention_heads", 8),
    "num_hidden_layers": _count("num_hidden_layers", 12, TEXT_LAYERS),
    "vocab_size": _count("vocab_size", 49408, ENTRIES),
    "use_attention_mask": _flag("use_attention_mask", False),
    "classes": _types("architectures", ["CLIPTextModel"], "CLIPTextModel"),
    "model_type": _choice("model_type", "clip_text_model", "clip_text_model"),
}

# The reference's classes share these defaults; SD's own files state all of them. A file without
# `steps_offset` or `skip_prk_steps` gets what the reference's pipeline puts there, 1 and true
# (pipeline_stable_diffusion_inpaint.py, __init__); a value that the file states is kept.
SCHEDULER_FIELDS = {
    "train_steps": _count("num_train_timesteps", 1000, most=2 * WIDTH),
    "beta_start": _number("beta_start", 0.0001, limit=1),
    "beta_end": _number("beta_end", 0.02, limit=1),
    "beta_schedule": _choice("beta_schedule", "linear", "linear", "scaled_linear"),
    "prediction": _choice("prediction_type", "epsilon", "epsilon", "v_prediction"),
    "steps_offset": _count("steps_offset", 1, least=0),
    "spacing": _choice("timestep_spacing", None, "leading", "trailing", "linspace"),
    "set_alpha_to_one": _flag("set_alpha_to_one", None),
    "clip_sample": _flag("clip_sample", None),
    "clip_sample_range": _number("clip_sample_range", 1.0),
    "skip_prk_steps": _flag("skip_prk_steps", True),
}
# diffusers/schedulers/scheduling_{ddim,pndm,dpmsolver_multistep}.py, __init__
NOISE_FIXED: Json = {"trained_betas": None, "rescale_betas_zero_snr": False}  # whatever the class
SCHEDULER_FIXED: Json = {
    **NOISE_FIXED,
    "solver_order": 2,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": float("-inf"),
    # settings of features that are refused, and two that a final sigma of zero decides already
    **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"), ANY),
    **dict.fromkeys(("lower_order_final", "euler_at_final"), ANY),
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
    for width, number, places in zip(channels, heads, attends, strict=True):
        fits = not any(places) or width % number == 0
        _check(fits, UNET, "attention_head_dim", number, f"must divide {width} channels")
    _check(channels[0] % 2 == 0, UNET, "block_out_channels", channels, "the first must be even")
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
    values = _read(TEXT, source, TEXT_FIELDS, {}, others=True)
    del values["classes"], values["model_type"]
    values["layer_norm_eps"] = float(values["layer_norm_eps"])  # transformers takes no 1 for 1.0
    width, heads = values["hidden_size"], values["num_attention_heads"]
    _check(width % heads == 0, TEXT, "num_attention_heads", heads, "must divide hidden_size")
    return TextConfig(**values)


def scheduler_config(source: Json) -> SchedulerConfig:
    """SchedulerConfig from the reference's JSON; CheckpointError names a key that is not supported."""
    class_name = source.get("_class_name")
    if not isinstance(class_name, str):
        raise CheckpointError(f"{SCHEDULER}: _class_name is missing; fetch the file again")
    if class_name in SAMPLER_OF_CLASS:
        values = _read(SCHEDULER, source, SCHEDULER_FIELDS, SCHEDULER_FIXED)
    else:  # its other keys concern a sampler that is not here
        values = _read(SCHEDULER, source, SCHEDULER_FIELDS, NOISE_FIXED, others=True)
    return SchedulerConfig(class_name=class_name, **values)


def _read_levels(file: str, source: Json, rows: Mapping[str, Row], fixed: Json) -> dict[str, Any]:
    """What `_read` finds for a network of levels; CheckpointError too if lists disagree or norm groups do not fit."""
    values = _read(file, source, rows, fixed)
    levels, groups = len(values["channels"]), values["norm_groups"]
    for field, (key, *_) in rows.items():
        found = values[field]
        _check(not isinstance(found, tuple) or len(found) == levels, file, key, found, f"must have {levels} levels")
    for width in values["channels"]:
        _check(width % groups == 0, file, "norm_num_groups", groups, f"must divide {width} channels")
    return values


def _read(file: str, source: Json, rows: Mapping[str, Row], fixed: Json, others: bool = False) -> dict[str, Any]:
    """The value of each field, lists as tuples; CheckpointError names a missing key or an unsupported value.

    fixed: the keys that can have one value only. others: whether keys beside these are allowed;
    otherwise one is refused unless it is null or false, and so asks for nothing.
    """
    values = {}
    for field, (key, default, check, wanted) in rows.items():
        value = default if source.get(key) is None else source[key]
        if value is REQUIRED:
            raise CheckpointError(f"{file}: {key} is missing; fetch the file again")
        _check(value is None or check(value), file, key, value, wanted)
        values[field] = tuple(value) if isinstance(value, list) else value
    known = {key for key, *_ in rows.values()}
    for key, found in source.items():
        if key in fixed:
            # null asks for the default, and a list of the value says it once a level
            entries = found if isinstance(found, list) and found else [found]
            alike = fixed[key] is ANY or all(entry is None or entry == fixed[key] for entry in entries)
            _check(alike, file, key, found, f"only {fixed[key]!r}")
        elif not others and key not in known and not key.startswith("_"):
            _check(found is None or found is False, file, key, found, "a setting this version does not know")
    return values


def _check(supported: bool, file: str, key: str, value: object, wanted: str) -> None:
    if not supported:
        shown = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
        raise CheckpointError(f"{file}: {key} {shown} is not supported ({wanted})")
