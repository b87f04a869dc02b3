"""Checkpoints to models: a catalogue name, a hub id, a folder in diffusers layout or one file.

Three steps: `find` reads configurations and headers only; `match` makes the models on the meta
device and settles which tensor goes where, both ways; `build` readies them for their weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minpaint.checkpoint import hub
from minpaint.checkpoint import single_file as ldm
from minpaint.checkpoint.architecture import Architecture, blank_models, split_vae
from minpaint.checkpoint.configs import Json, read_json, scheduler_config, text_config, unet_config, vae_config
from minpaint.checkpoint.tensorfile import (
    FLOATS,
    Directory,
    Stored,
    assign,
    read_directory,
    read_shards,
    refuse_disguise,
    some,
)
from minpaint.errors import CheckpointError, InputError, MinpaintWarning, ModelNotFoundError
from minpaint.models.config import UNetConfig, VAEConfig
from minpaint.models.text import load_tokenizer
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE
from minpaint.schedule import SchedulerConfig

FILE_ORDER = ("unet", "encoder", "decoder", "text_encoder")  # of the files, in records
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")  # of files, not of hub ids like owner/sd-2.1
TINY = "tiny"  # the checkpoint that comes with the program
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# diffusers/models/autoencoders/autoencoder_kl.py: attention names before version 0.12
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Found:
    """What there is of a checkpoint: configurations, and headers by model."""

    name: str
    configs: _Configs
    parts: dict[str, Directory]
    tokenizer: Callable[[], Any]


@dataclass(frozen=True)
class Description:
    """Everything about a checkpoint but its weights; the models are those it was held against."""

    architecture: Architecture
    models: dict[str, Any]
    scheduler_config: SchedulerConfig
    tokenizer: Callable[[], Any]


@dataclass(frozen=True)
class Checkpoint:
    """The models, on the meta device until their weights are brought in (residency.Part)."""

    architecture: Architecture
    scheduler_config: SchedulerConfig
    unet: UNet
    vae: VAE
    text_encoder: nn.Module
    tokenizer: Any

    @property
    def files(self) -> tuple[Path, ...]:
        """Where the weights are."""
        parts = self.architecture.directories
        return tuple(dict.fromkeys(stored.file for part in FILE_ORDER for stored in parts[part].values()))


def describe(model: str | Path, half: bool = False, config: str | Path | None = None) -> Description:
    """`find` and `match`."""
    return match(find(model, half, config))


def find(model: str | Path, half: bool = False, config: str | Path | None = None) -> Found:
    """Find a checkpoint and read its configurations and headers.

    `half`: prefer a file in half precision where there are both.

    Raises:
        InputError: an unknown model. CheckpointError: anything wrong with what was found.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise InputError(f"model {model!r} is not a name, a hub id, a folder or a file")
    path = _expand(model)
    if config is not None and not path.is_file():
        raise InputError(f"config {config}: describes a model in a single file, and {model} is none; leave it out")
    if place := _place_in_hub(str(model)):
        repository, revision, known = place
        return _find_folder(hub.fetch(repository, revision, half, known), str(model), half)
    if str(model) == TINY:
        return _find_folder(hub.weights_folder() / TINY, TINY, half)
    if path.is_dir():
        return _find_folder(path, str(model), half)
    if path.exists():
        return _find_file(path, str(model), config)
    raise ModelNotFoundError(
        f"model {str(model)!r} is unknown: no such file or folder; "
        f"use {', '.join((TINY, *hub.catalogue()))}, owner/name of the hub, a folder or a .safetensors file"
    )


def outline(model: str | Path, half: bool = False, config: str | Path | None = None) -> Architecture:
    """What `describe` says of memory; of a repository of the hub only the configurations are fetched."""
    place = _place_in_hub(str(model)) if config is None else None
    if place is None:
        return describe(model, half, config).architecture
    configs = _read_configs(hub.fetch_configs(*place[:2]))
    kind, directories = "F16" if half else "F32", {}
    for component, blank in blank_models(configs.unet, configs.vae, configs.text).items():
        shapes = {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}
        directories[component] = {name: Stored(Path(), name, shape, kind, 0, 0) for name, shape in shapes.items()}
    return Architecture(str(model), configs.unet, configs.vae, configs.text, split_vae(directories))


def _place_in_hub(model: str) -> tuple[str, str | None, hub.Known | None] | None:
    """Repository, revision and entry of the catalogue; None if a model is not the hub's."""
    if known := hub.catalogue().get(model):
        return known.repository, known.revision, known
    match, path = HUB_ID.fullmatch(model), _expand(model)
    if not match or path.exists() or path.suffix in WEIGHT_SUFFIXES or model.startswith((".", "~", "/")):
        return None
    return match["repository"], match["revision"], None


def build(description: Description, device: torch.device) -> Checkpoint:
    """The one checkpoint of a description, without weights."""
    text_encoder = description.models["text_encoder"]
    for name, buffer in list(text_encoder.named_buffers()):
        if _is_counter(name):  # 0, 1, 2, ...: computed, not learned
            assign(text_encoder, name, torch.arange(buffer.shape[-1], device=device)[None])
    tokenizer = description.tokenizer()
    return Checkpoint(description.architecture, description.scheduler_config, **description.models, tokenizer=tokenizer)


def _expand(path: str | Path) -> Path:
    """A path with ~ expanded; InputError where the system cannot take it."""
    try:
        expanded = Path(path).expanduser()
        expanded.is_dir()
    except (OSError, RuntimeError, TypeError) as error:
        raise InputError(f"path {str(path)[:200]!r} cannot be used ({str(error)[:200]})") from None
    return expanded


def _find_folder(folder: Path, name: str, half: bool) -> Found:
    configs = _read_configs(folder)
    names = hub.file_names(folder)
    parts = {component: _open_component(folder, component, names, half) for component in hub.COMPONENTS}
    tokenizer = folder / "tokenizer"
    return Found(name, configs, parts, lambda: load_tokenizer(tokenizer))


def _find_file(path: Path, name: str, config: str | Path | None) -> Found:
    if path.suffix != ".safetensors":
        refuse_disguise(path)
        raise CheckpointError(f"{path}: not a .safetensors file, the only kind of weights that is opened")
    directory = read_directory(path)
    if not ldm.is_single_file(directory):
        raise CheckpointError(
            f"{path}: not a whole checkpoint in latent diffusion's names (no {ldm.UNET}*); "
            f"for a part of one in diffusers layout give the folder"
        )
    places = [path.parent / "tokenizer", path.parent]
    if config is not None:
        folder = _expand(config)
        if not folder.is_dir():
            raise InputError(f"config {folder}: no such folder")
        configs = _read_configs(folder)
        places.insert(0, folder / "tokenizer")
    else:
        told = ldm.tell_configuration(directory, path)
        if not told.sure_of_prediction:
            warnings.warn(
                f"{path.name}: nothing in the file tells epsilon from v-prediction; epsilon is assumed "
                f"(a 768-v model needs --config)",
                MinpaintWarning,
                stacklevel=2,
            )
        configs = _parse_configs(told.unet, told.vae, told.text_encoder, told.scheduler)
    parts = ldm.split(directory, configs.unet, configs.vae, configs.text["num_hidden_layers"], path)
    pad = "!" if parts.open_clip else None  # OpenCLIP pads with zeros, and 0 is "!"

    def tokenizer() -> Any:
        found = [
            place for place in places if any((place / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        ]
        return load_tokenizer(found[0] if found else hub.fetch_tokenizer(), pad)

    directories = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text_encoder}
    return Found(name, configs, directories, tokenizer)


@dataclass(frozen=True)
class _Configs:
    unet: UNetConfig
    vae: VAEConfig
    text: Json  # complete and checked
    scheduler: SchedulerConfig


def _read_configs(folder: Path) -> _Configs:
    return _parse_configs(*(read_json(folder / file, file) for file in hub.CONFIGS))


def _parse_configs(unet: Json, vae: Json, text: Json, scheduler: Json) -> _Configs:
    return _Configs(unet_config(unet), vae_config(vae), text_config(text), scheduler_config(scheduler))


def _open_component(folder: Path, component: str, names: set[str], half: bool) -> Directory:
    """The directory of one component's weights, whichever files hold them."""
    name = hub.choose_weights(names, component, half)
    if name is None:
        inside = sorted(n for n in names if n.startswith(f"{component}/") and not n.endswith(".json"))
        pickles = [Path(n).name for n in inside if n.endswith(WEIGHT_SUFFIXES[1:])]
        there = f"only pickles, which are never opened: {', '.join(pickles)}" if pickles else "none found"
        raise CheckpointError(f"{folder / component}: safetensors weights are missing ({there})")
    path = folder / name
    return read_shards(path, read_json(path, name)) if path.suffix == ".json" else read_directory(path)


def match(found: Found) -> Description:
    """Rename what needs it and hold every tensor against the models, both ways; CheckpointError if one does not fit."""
    configs = found.configs
    models = blank_models(configs.unet, configs.vae, configs.text)
    if configs.unet.context_dim != configs.text["hidden_size"]:
        raise CheckpointError(
            f"unet/config.json: cross_attention_dim {configs.unet.context_dim} does not fit the text encoder's "
            f"hidden_size {configs.text['hidden_size']}"
        )
    renames: dict[str, Callable[[str], str]] = {"unet": str, "vae": _new_vae_name, "text_encoder": _plain_text_name}
    matched = {}
    for component, model in models.items():
        rename = renames[component]
        stored: dict[str, Stored] = {}
        for key, entry in found.parts[component].items():
            if rename(key) in stored:
                raise CheckpointError(f"{component} ({entry.file.name}): {rename(key)} is stored under two names")
            if not _is_counter(key):
                stored[rename(key)] = entry
        wanted = {rename(key): key for key in model.state_dict() if not _is_counter(key)}
        matched[component] = _hold_against(component, stored, wanted, model.state_dict())
    architecture = Architecture(found.name, configs.unet, configs.vae, configs.text, split_vae(matched))
    return Description(architecture, models, configs.scheduler, found.tokenizer)


def _hold_against(
    component: str, stored: Directory, wanted: dict[str, str], shapes: dict[str, Tensor]
) -> dict[str, Stored]:
    """Stored tensors by the model's names; CheckpointError lists all that do not fit."""
    file = next(iter(stored.values())).file.name if stored else "weights"
    faults = []
    if missing := [key for key in wanted if key not in stored]:
        faults.append(f"missing: {some(missing)}")
    if surplus := [key for key in stored if key not in wanted]:
        faults.append(f"surplus: {some(surplus)}")
    misshapen = [
        f"{key} {list(stored[key].shape)} instead of {list(shapes[name].shape)}"
        for key, name in wanted.items()
        if key in stored and stored[key].shape != tuple(shapes[name].shape)
    ]
    if misshapen:
        faults.append(f"misshapen: {some(misshapen)}")
    if other := [f"{key} {stored[key].kind}" for key in wanted if key in stored and stored[key].kind not in FLOATS]:
        faults.append(f"not of a floating-point kind: {some(other)}")
    if faults:
        raise CheckpointError(f"{component} ({file}): tensors do not fit the configuration; {'; '.join(faults)}")
    return {name: stored[key] for key, name in wanted.items()}


def _is_counter(key: str) -> bool:
    """Positions stored as a tensor in CLIP's files although they are no parameter."""
    return key.endswith("embeddings.position_ids")


def _plain_text_name(key: str) -> str:
    """Older transformers wrap CLIP's text model in one more module, and the official files too."""
    return key.removeprefix("text_model.")


def _new_vae_name(key: str) -> str:
    place, _, leaf = key.rpartition(".")
    parent, _, old = place.rpartition(".")
    if parent.endswith("mid_block.attentions.0") and old in OLD_VAE_ATTENTION:
        return f"{parent}.{OLD_VAE_ATTENTION[old]}.{leaf}"
    return key
