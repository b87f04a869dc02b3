"""What the supported checkpoints differ in, read from their JSON files.

A field exists only if two supported checkpoints differ in it. Every other key of the
reference's configurations must have the one value this code implements; any other value is
refused by name, so that no checkpoint is ever run as something it is not. Keys that start
with an underscore are notes of the program that wrote the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minpaint.errors import CheckpointError
from minpaint.models.config import UNetConfig, VAEConfig
from minpaint.schedule import SAMPLER_OF_CLASS, SchedulerConfig

Json = Mapping[str, Any]

LARGEST = 2**20  # of any count; beyond, shapes overflow before they are compared with the file's

ATTENTION_BLOCKS = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}

# diffusers/models/unets/unet_2d_condition.py, __init__: the values that the official
# configurations use, which for most keys is the default.
UNET_FIXED: Json = {
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "addition_embed_type_num_heads": 64,  # of an embedding that is itself refused
}
# Fused attention accumulates in float32 whether or not SD 2.1 asks for it.
UNET_WITHOUT_EFFECT = {"upcast_attention"}

# diffusers/models/autoencoders/autoencoder_kl.py, __init__
VAE_FIXED: Json = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# A size the training used, and a hint to pipelines of other models.
VAE_WITHOUT_EFFECT = {"sample_size", "force_upcast"}

# diffusers/schedulers/scheduling_{ddim,pndm,dpmsolver_multistep}.py, __init__
NOISE_FIXED: Json = {"trained_betas": None, "rescale_betas_zero_snr": False}  # whatever the class
SCHEDULER_FIXED: Json = {
    "thresholding": False,
    "solver_order": 2,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "variance_type": None,
    "lambda_min_clipped": float("-inf"),
}
# Settings of features refused above, and two that a final sigma of zero decides already.
SCHEDULER_WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "lower_order_final",
    "euler_at_final",
    "flow_shift",
    "time_shift_type",
}


class _Keys:
    """One JSON object, read key by key so that what is left unread can be refused."""

    def __init__(self, source: Json, file: str) -> None:
        self.left = {key: value for key, value in source.items() if not key.startswith("_")}
        self.file = file

    def refuse(self, key: str, value: object, supported: str) -> CheckpointError:
        shown = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
        return CheckpointError(f"{self.file}: {key} {shown} is not supported ({supported})")

    def take(self, key: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        value = self.left.pop(key, None)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.file}: {key} is missing")
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in wanted):
            raise self.refuse(key, value, "wrong type")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default, int)
        if not 1 <= value <= LARGEST:
            raise self.refuse(key, value, f"must be 1 to {LARGEST}")
        return int(value)

    def counts(self, key: str, levels: int | None, default: Any = None) -> tuple[int, ...]:
        """A list of positive numbers, one a level; a single number stands for all levels."""
        value = self.take(key, default, (int, list, tuple))
        values = (value,) * levels if levels and isinstance(value, int) else value
        if not isinstance(values, (list, tuple)) or not values or len(values) != (levels or len(values)):
            raise self.refuse(key, value, f"{levels or 'some'} levels" if levels else "a list")
        if any(not isinstance(v, int) or isinstance(v, bool) or not 1 <= v <= LARGEST for v in values):
            raise self.refuse(key, value, "positive whole numbers")
        return tuple(values)

    def choice(self, key: str, default: str | None, supported: tuple[str, ...]) -> str:
        value = self.take(key, default, str)
        if value not in supported:
            raise self.refuse(key, value, f"only {', '.join(supported)}")
        return str(value)

    def number(self, key: str, default: float) -> float:
        value = float(self.take(key, default, (int, float)))
        if not 0 < value < float("inf"):
            raise self.refuse(key, value, "must be positive")
        return value

    def fixed(self, only: Json, without_effect: set[str]) -> None:
        """Check the keys that can have one value only, and forget those without effect."""
        for key, value in only.items():
            found = self.left.pop(key, value)
            # null asks for the default, and a list of the value says it once a level
            alike = found if isinstance(found, list) and found else [found]
            if any(entry is not None and entry != value for entry in alike):
                raise self.refuse(key, found, f"only {value!r}")
        for key in without_effect:
            self.left.pop(key, None)

    def nothing_else(self) -> None:
        """Refuse keys this code does not know, unless they ask for nothing."""
        for key, value in self.left.items():
            if value is not None and value is not False:
                raise self.refuse(key, value, "a key this version does not know")


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing in {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def unet_config(source: Json, file: str = "unet/config.json") -> UNetConfig:
    """UNetConfig from the reference's JSON; CheckpointError names a key that is not supported."""
    keys = _Keys(source, file)
    channels = keys.counts("block_out_channels", None)
    levels = len(channels)
    attention = {}
    for key, kind in (("down_block_types", "Down"), ("up_block_types", "Up")):
        types = keys.take(key, None, (list, tuple))
        supported = (f"CrossAttn{kind}Block2D", f"{kind}Block2D")
        if len(types) != levels or any(name not in supported for name in types):
            raise keys.refuse(key, types, f"{levels} levels of {' or '.join(supported)}")
        attention[kind] = tuple(name in ATTENTION_BLOCKS for name in types)
    in_channels = keys.count("in_channels", 4)
    if in_channels not in (4, 9):
        raise keys.refuse("in_channels", in_channels, "only 4 and 9")
    config = UNetConfig(
        in_channels=in_channels,
        channels=channels,
        layers=keys.count("layers_per_block", 2),
        down_attention=attention["Down"],
        up_attention=attention["Up"],
        # The reference's name is historical: the number is how many heads there are.
        heads=keys.counts("attention_head_dim", levels, 8),
        context_dim=keys.count("cross_attention_dim", 1280),
        linear_projection=keys.take("use_linear_projection", False, bool),
        norm_groups=keys.count("norm_num_groups", 32),
        sample_size=keys.count("sample_size", 64),
    )
    for level, (width, heads) in enumerate(zip(channels, config.heads, strict=True)):
        attends = config.down_attention[level] or config.up_attention[levels - 1 - level]
        if width % heads and (attends or level == levels - 1):
            raise keys.refuse("attention_head_dim", heads, f"must divide {width} channels")
        if width % config.norm_groups:
            raise keys.refuse("norm_num_groups", config.norm_groups, f"must divide {width} channels")
    if config.channels[0] % 2:
        raise keys.refuse("block_out_channels", channels, "the first must be even")
    keys.fixed(UNET_FIXED, UNET_WITHOUT_EFFECT)
    keys.nothing_else()
    return config


def vae_config(source: Json, file: str = "vae/config.json") -> VAEConfig:
    """VAEConfig from the reference's JSON; CheckpointError names a key that is not supported."""
    keys = _Keys(source, file)
    channels = keys.counts("block_out_channels", None)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = keys.take(key, None, (list, tuple))
        if list(types) != [kind] * len(channels):
            raise keys.refuse(key, types, f"{len(channels)} levels of {kind}")
    config = VAEConfig(
        channels=channels,
        layers=keys.count("layers_per_block", 1),
        norm_groups=keys.count("norm_num_groups", 32),
        scaling_factor=keys.number("scaling_factor", 0.18215),
    )
    for width in channels:
        if width % config.norm_groups:
            raise keys.refuse("norm_num_groups", config.norm_groups, f"must divide {width} channels")
    keys.fixed(VAE_FIXED, VAE_WITHOUT_EFFECT)
    keys.nothing_else()
    return config


def text_config(source: Json, file: str = "text_encoder/config.json") -> dict[str, Any]:
    """The settings of transformers' CLIPTextModel; CheckpointError names a key that is not supported.

    The other keys of the file concern training and other models (transformers/models/clip).
    """
    keys = _Keys(source, file)
    kinds = keys.take("architectures", ["CLIPTextModel"], list) or ["CLIPTextModel"]
    if "CLIPTextModel" not in kinds:
        raise keys.refuse("architectures", kinds, "only CLIPTextModel")
    keys.choice("model_type", "clip_text_model", ("clip_text_model",))
    config = {
        "hidden_act": keys.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        "hidden_size": keys.count("hidden_size", 512),
        "intermediate_size": keys.count("intermediate_size", 2048),
        "layer_norm_eps": keys.number("layer_norm_eps", 1e-5),
        "max_position_embeddings": keys.count("max_position_embeddings", 77),
        "num_attention_heads": keys.count("num_attention_heads", 8),
        "num_hidden_layers": keys.count("num_hidden_layers", 12),
        "vocab_size": keys.count("vocab_size", 49408),
        "use_attention_mask": keys.take("use_attention_mask", False, bool),
    }
    if config["hidden_size"] % config["num_attention_heads"]:
        raise keys.refuse("num_attention_heads", config["num_attention_heads"], "must divide hidden_size")
    return config


def scheduler_config(source: Json, file: str = "scheduler/scheduler_config.json") -> SchedulerConfig:
    """SchedulerConfig from the reference's JSON; CheckpointError names an unsupported key.

    A file without `steps_offset` or `skip_prk_steps` gets what the reference's pipeline puts
    there, 1 and true (pipeline_stable_diffusion_inpaint.py, __init__); a value that the file
    states is kept.
    """
    keys = _Keys(source, file)
    class_name = source.get("_class_name")
    if not isinstance(class_name, str):
        raise CheckpointError(f"{file}: _class_name is missing")
    # The reference's classes share these defaults; SD's own files state all of them.
    config = SchedulerConfig(
        class_name=class_name,
        train_steps=keys.count("num_train_timesteps", 1000),
        beta_start=keys.number("beta_start", 0.0001),
        beta_end=keys.number("beta_end", 0.02),
        beta_schedule=keys.choice("beta_schedule", "linear", ("linear", "scaled_linear")),
        prediction=keys.choice("prediction_type", "epsilon", ("epsilon", "v_prediction")),
        steps_offset=keys.take("steps_offset", 1, int),
        spacing=_optional(keys, "timestep_spacing", str),
        set_alpha_to_one=_optional(keys, "set_alpha_to_one", bool),
        clip_sample=_optional(keys, "clip_sample", bool),
        clip_sample_range=keys.number("clip_sample_range", 1.0),
        skip_prk_steps=keys.take("skip_prk_steps", True, bool),
    )
    if config.spacing not in (None, "leading", "trailing", "linspace"):
        raise keys.refuse("timestep_spacing", config.spacing, "only leading, trailing, linspace")
    if config.steps_offset < 0:
        raise keys.refuse("steps_offset", config.steps_offset, "must not be negative")
    if config.beta_end >= 1:
        raise keys.refuse("beta_end", config.beta_end, "must be under 1")
    keys.fixed(NOISE_FIXED, set())
    if class_name in SAMPLER_OF_CLASS:  # keys of other classes concern samplers that are not here
        keys.fixed(SCHEDULER_FIXED, SCHEDULER_WITHOUT_EFFECT)
        keys.nothing_else()
    return config


def _optional(keys: _Keys, key: str, kind: type) -> Any:
    return keys.take(key, None, kind) if keys.left.get(key) is not None else None
