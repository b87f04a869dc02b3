"""Checkpoints to models: a catalogue name, a hub id, a folder in diffusers layout or one file.

`describe` finds a checkpoint, reads its configurations and the headers of its files, makes the
models without weights and says where each of their tensors is stored. `build` makes these models
ready for an engine that loads the weights when they are needed; `load_checkpoint` loads them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minpaint.checkpoint import hub
from minpaint.checkpoint.architecture import Architecture, blank_models, split_vae
from minpaint.checkpoint.configs import Configs, read_configs
from minpaint.checkpoint.single_file import open_single_file
from minpaint.checkpoint.tensorfile import (
    FLOATS,
    Directory,
    Stored,
    assign,
    read_directory,
    read_shards,
    read_tensors,
    refuse_changed,
    some,
)
from minpaint.checkpoint.tokenizer import load_tokenizer
from minpaint.errors import CheckpointError, InputError, ModelNotFoundError
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE
from minpaint.schedule import SchedulerConfig

FILE_ORDER = ("unet", "encoder", "decoder", "text_encoder")  # of the files, in records
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")  # of files, not of hub ids like owner/sd-2.1
TINY = "tiny"  # the checkpoint that comes with the program
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
POSITIONS = "embeddings.position_ids"  # 0, 1, 2, ..., which CLIP's files store although they are computed
# What names hold in some files, and hold here. diffusers before 0.12 named the VAE's attention differently
# (models/autoencoders/autoencoder_kl.py); older transformers wrap CLIP's text model in one more module.
OLD_NAMES = {
    "unet": {},
    "vae": {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."},
    "text_encoder": {"text_model.": ""},
}


@dataclass(frozen=True)
class Checkpoint:
    """The models of a checkpoint. From `load_checkpoint` they are complete, before that on the meta device.

    tokenizer: from `describe` a function that loads the tokenizer, from `build` the tokenizer.
    """

    architecture: Architecture
    scheduler_config: SchedulerConfig
    unet: UNet
    vae: VAE
    text_encoder: nn.Module
    tokenizer: Any

    @property
    def files(self) -> tuple[Path, ...]:
        """Where the weights are."""
        return tuple(self._versions())

    def refuse_changed(self) -> None:
        """CheckpointError if a file was written to since it was described: weights mapped from it are others now."""
        refuse_changed(self._versions())

    def _versions(self) -> dict[Path, tuple[int, ...]]:
        parts = self.architecture.directories
        return {stored.file: stored.version for part in FILE_ORDER for stored in parts[part].values()}


def load_checkpoint(model: str | Path, config: str | Path | None = None) -> Checkpoint:
    """The plain modules of a checkpoint with all their weights, on the CPU in float32, for reading and studying.

    model, config: as for `minpaint.load`. The modules are in eval mode and ask for no gradients.

    Raises:
        InputError: an unknown model. CheckpointError: files or configurations that are missing,
            damaged or not supported, or a weight that is NaN or infinite.
    """
    checkpoint = build(describe(model, config=config), torch.device("cpu"))
    models = {"unet": checkpoint.unet, "text_encoder": checkpoint.text_encoder}
    for part, directory in checkpoint.architecture.directories.items():
        for name, stored in read_tensors(directory):
            weight = torch.empty(stored.shape).copy_(stored)  # converts, and leaves the mapped file
            if not bool(weight.isfinite().all()):
                place = directory[name]
                raise CheckpointError(f"{part} ({place.file.name}): {place.key} holds NaN or infinity in float32")
            assign(models.get(part, checkpoint.vae), name, weight)
    return checkpoint


def describe(model: str | Path, half: bool = False, config: str | Path | None = None) -> Checkpoint:
    """Find a checkpoint, read its configurations and headers, make blank models, and say where each tensor is stored.

    half: prefer a file in half precision where there are both. config: a folder in diffusers
    layout that describes a model in a single file.

    Raises:
        InputError: an unknown model. CheckpointError: anything wrong with what was found.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise InputError(f"model {model!r} is not a name, a hub id, a folder or a file")
    name = str(model)
    path = hub.weights_folder() / TINY if name == TINY else _expand(model)
    if config is not None and not path.is_file():
        raise InputError(f"config {config}: describes a model in a single file, and {model} is none; leave it out")
    if place := _place_in_hub(name):
        repository, revision, known = place
        return _describe_folder(hub.fetch(repository, revision, half, known), name, half)
    if path.is_dir():
        return _describe_folder(path, name, half)
    if path.exists():
        return _describe_file(path, name, config)
    raise ModelNotFoundError(
        f"model {name!r} is unknown: no such file or folder; "
        f"use {', '.join((TINY, *hub.catalogue()))}, owner/name of the hub, a folder or a .safetensors file"
    )


def outline(model: str | Path, half: bool = False, config: str | Path | None = None) -> Architecture:
    """The architecture that `describe` finds; of a repository of the hub only the configurations are fetched."""
    place = _place_in_hub(str(model)) if config is None else None
    if place is None:
        return describe(model, half, config).architecture
    configs = read_configs(hub.fetch_configs(*place[:2]))
    kind, directories = "F16" if half else "F32", {}
    for component, blank in blank_models(configs.unet, configs.vae, configs.text).items():
        shapes = {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}
        directories[component] = {name: Stored(Path(), name, shape, kind, 0, 0) for name, shape in shapes.items()}
    return Architecture(str(model), configs.unet, configs.vae, configs.text, split_vae(directories))


def build(description: Checkpoint, device: torch.device) -> Checkpoint:
    """The checkpoint with its tokenizer, still without weights; what is computed instead of stored is on `device`."""
    for name, buffer in list(description.text_encoder.named_buffers()):
        if name.endswith(POSITIONS):
            assign(description.text_encoder, name, torch.arange(buffer.shape[-1], device=device)[None])
    return replace(description, tokenizer=description.tokenizer())


def _place_in_hub(model: str) -> tuple[str, str | None, hub.Known | None] | None:
    """Repository, revision and entry of the catalogue; None if a model is not the hub's."""
    if known := hub.catalogue().get(model):
        return known.repository, known.revision, known
    match, path = HUB_ID.fullmatch(model), _expand(model)
    if not match or path.exists() or path.suffix in WEIGHT_SUFFIXES or model.startswith((".", "~", "/")):
        return None
    return match["repository"], match["revision"], None


def _expand(path: str | Path) -> Path:
    """A path with ~ expanded; InputError where the system cannot take it."""
    try:
        expanded = Path(path).expanduser()
        expanded.is_dir()
    except (OSError, RuntimeError, TypeError) as error:
        raise InputError(f"path {str(path)[:200]!r} cannot be used ({str(error)[:200]})") from None
    return expanded


def _describe_folder(folder: Path, name: str, half: bool) -> Checkpoint:
    configs, names = read_configs(folder), hub.file_names(folder)
    parts = {component: _open_component(folder, component, names, half) for component in hub.COMPONENTS}
    return _match(name, configs, parts, lambda: load_tokenizer(folder / "tokenizer"))


def _describe_file(path: Path, name: str, config: str | Path | None) -> Checkpoint:
    folder = None if config is None else _expand(config)
    if folder and not folder.is_dir():
        raise InputError(f"config {folder}: no such folder")
    configs, parts, open_clip = open_single_file(path, read_configs(folder) if folder else None)
    places = [folder / "tokenizer"] if folder else []
    places += [path.parent / "tokenizer", path.parent]

    def tokenizer() -> Any:
        found = [place for place in places if (place / "vocab.json").is_file() or (place / "tokenizer.json").is_file()]
        # OpenCLIP pads with zeros, and 0 is "!"
        return load_tokenizer(found[0] if found else hub.fetch_tokenizer(), "!" if open_clip else None)

    try:
        return _match(name, configs, parts, tokenizer)
    except CheckpointError as error:
        if folder:
            raise
        told = f"{error}; a model that is not built like Stable Diffusion 1 or 2 needs --config"
        raise CheckpointError(told) from None


def _open_component(folder: Path, component: str, names: set[str], half: bool) -> Directory:
    """The directory of one component's weights, whichever files hold them."""
    name = hub.choose_weights(names, component, half)
    if name is None:
        inside = sorted(n for n in names if n.startswith(f"{component}/") and not n.endswith(".json"))
        pickles = [Path(n).name for n in inside if n.endswith(WEIGHT_SUFFIXES[1:])]
        there = f"only pickles, which are never opened: {', '.join(pickles)}" if pickles else "none found"
        raise CheckpointError(f"{folder / component}: safetensors weights are missing ({there})")
    path = folder / name
    return read_shards(path) if path.suffix == ".json" else read_directory(path)


def _match(name: str, configs: Configs, parts: Mapping[str, Directory], tokenizer: Callable[[], Any]) -> Checkpoint:
    """The blank checkpoint, if exactly the tensors of its models are stored; CheckpointError says what differs."""
    models = blank_models(configs.unet, configs.vae, configs.text)
    if configs.unet.context_dim != configs.text.hidden_size:
        raise CheckpointError(
            f"unet/config.json: cross_attention_dim {configs.unet.context_dim} does not fit the text encoder's "
            f"hidden_size {configs.text.hidden_size}; take both from one checkpoint"
        )
    matched = {component: _match_component(component, parts[component], model) for component, model in models.items()}
    architecture = Architecture(name, configs.unet, configs.vae, configs.text, split_vae(matched))
    return Checkpoint(architecture, configs.scheduler, **models, tokenizer=tokenizer)


def _match_component(component: str, directory: Directory, model: nn.Module) -> dict[str, Stored]:
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
