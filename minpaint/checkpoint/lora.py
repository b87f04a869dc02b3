"""LoRA: small changes of a checkpoint's weights, added whenever these are read (Hu et al. 2021, arXiv:2106.09685).

A file holds two thin matrices for each weight that it changes, under names of kohya's scripts, of PEFT or of
diffusers, and perhaps a number alpha. The change is  alpha / rank * up @ down,  times the weight the user gives it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from minpaint.checkpoint.tensorfile import FLOATS, LowRank, Stored, read_directory, read_json, read_tensors, some
from minpaint.errors import CheckpointError, InputError

# "lora_unet_down_blocks_0_..._to_q.lora_down.weight" (kohya), "unet.down_blocks.0...to_q.lora_A.weight" and the same
# after "base_model.model." (PEFT), "...processor.to_q_lora.down.weight", "...to_q.lora.down.weight" and, in a text
# encoder, "...q_proj.lora_linear_layer.down.weight" (diffusers)
KEY = re.compile(
    r"(base_model\.model\.)?((?P<part>unet|text_encoder|lora_unet|lora_te)[._])?(?P<module>.+?)"
    r"(_lora|\.lora|\.lora_linear_layer)?[._](?P<role>alpha|down|up|A|B)(\.(?!weight)\w+)?(\.weight)?"
)
PARTS = {"unet": "unet", "lora_unet": "unet", "text_encoder": "text_encoder", "lora_te": "text_encoder"}
ROLES = {"A": "down", "B": "up"}
OTHER_KINDS = {"dora_scale": "DoRA", "magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon"}

Parts = Mapping[str, Mapping[str, Stored]]  # "unet", "text_encoder": where each tensor of the model is stored


def split_weight(entry: str) -> tuple[str, float]:
    """The file and the weight of "FILE[:WEIGHT]"; InputError for a weight that is no finite number."""
    file, _, tail = entry.rpartition(":")
    if not file or Path(entry).exists() or "/" in tail or tail.endswith(".safetensors"):
        return entry, 1.0
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"lora {entry!r}: its weight {tail!r} is not a number; write it like {file}:0.8")
    return file, weight


def add_lora(parts: Parts, path: Path, weight: float) -> dict[str, dict[str, Stored]]:
    """The parts of a checkpoint with a LoRA added to each weight that it changes.

    Raises:
        CheckpointError: a key that belongs to no weight, or whose shape does not fit it, half of a
            pair, a kind of change that is not supported, or a damaged file.
    """
    name, directory = path.name, read_directory(path)
    peft = _peft_settings(path)
    places = {
        _plain(key.removesuffix(".weight")): (part, key)
        for part in ("unet", "text_encoder")
        for key in parts[part]
        if key.endswith(".weight")
    }
    pairs: dict[tuple[str, str], dict[str, Stored]] = {}
    strangers = []
    for key, stored in directory.items():
        if kind := next((kind for mark, kind in OTHER_KINDS.items() if mark in key), None):
            raise CheckpointError(f"lora {name}: {key} makes it a {kind}, which is not supported; only plain LoRA is")
        match = KEY.fullmatch(key)
        place = places.get(_plain(match["module"])) if match else None
        if match is None or place is None or PARTS.get(match["part"], place[0]) != place[0]:
            strangers.append(key)
            continue
        if stored.kind not in FLOATS:
            raise CheckpointError(f"lora {name}: {key} is of kind {stored.kind}, which is no floating-point kind")
        role = ROLES.get(match["role"], match["role"])
        if role in pairs.setdefault(place, {}):
            raise CheckpointError(f"lora {name}: {key} is stored under two names; get another copy")
        pairs[place][role] = stored
    if strangers:
        raise CheckpointError(
            f"lora {name}: keys that belong to no weight of this checkpoint: {some(strangers)}; "
            f"is it for another family, such as SDXL?"
        )
    alphas = dict(read_tensors({key: pair["alpha"] for (_, key), pair in pairs.items() if "alpha" in pair}))
    if long := [key for key, alpha in alphas.items() if alpha.numel() != 1]:
        raise CheckpointError(f"lora {name}: an alpha is more than one number: {some(long)}; get another copy")
    changed = {part: dict(stored) for part, stored in parts.items()}
    for (part, key), pair in pairs.items():
        module = key.removesuffix(".weight")
        if not {"up", "down"} <= pair.keys():
            raise CheckpointError(f"lora {name}: half of the change of {module} is missing; get another copy")
        stored, up, down = parts[part][key], pair["up"], pair["down"]
        rank = down.shape[0] if down.shape else 0
        wanted = stored.shape[:1], rank * stored.shape[0], stored.count * rank
        if (up.shape[:1], up.count, down.count * stored.shape[0]) != wanted or len(stored.shape) < 2:
            raise CheckpointError(
                f"lora {name}: {pair['up'].key} {list(up.shape)} and its down {list(down.shape)} do not fit "
                f"{part}'s {module} {list(stored.shape)}; it is for another family of checkpoints"
            )
        alpha = float(alphas[key]) if key in alphas else _peft_alpha(name, peft, part, module, rank)
        if not math.isfinite(alpha):
            raise CheckpointError(f"lora {name}: alpha {alpha} of {module} is not finite; get another copy")
        change = LowRank(up, down, weight * alpha / rank)
        changed[part][key] = replace(stored, added=(*stored.added, change))
    return changed


def _plain(module: str) -> str:
    """One name for a module that kinds of files name differently."""
    name = module.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")
    return f"{name}_0" if name.endswith("_to_out") else name


def _peft_settings(path: Path) -> dict[str, Any]:
    """PEFT's settings, from the file beside an adapter or, with "unet." before each key, from diffusers' header."""
    beside = path.parent / "adapter_config.json"
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json(beside, beside.name)
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"lora {path.name}: its lora_adapter_metadata cannot be read; get another copy")
    return settings


def _peft_alpha(name: str, settings: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """The alpha of a module that has none in the file; its rank, and so a scale of 1, if nothing says it."""
    own = {key.removeprefix(f"{part}."): value for key, value in settings.items()}
    alpha, patterns = own.get("lora_alpha", rank), own.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if f".{module}".endswith(f".{pattern}"):
            alpha = value
    if own.get("use_dora") or type(alpha) not in (int, float) or not isinstance(patterns, dict):
        told = f"PEFT's settings with use_dora, alpha_pattern {patterns!r} or lora_alpha {alpha!r} are not supported"
        raise CheckpointError(f"lora {name}: {told}")
    return float(alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1.0)
