"""Checkpoints to models: a catalogue name, a hub id, a folder in diffusers layout or one file.

`describe` finds a checkpoint, reads its configurations and the headers of its files, makes the
models without weights and says where each of their tensors is stored. `build` makes these models
ready for an engine that loads the weights when they are needed; `load_checkpoint` loads them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minpaint.checkpoint import hub
from minpaint.checkpoint.architecture import POSITIONS, Architecture, blank_models, match_component, split_vae
from minpaint.checkpoint.configs import Configs, read_configs, vae_config
from minpaint.checkpoint.lora import add_lora, split_weight
from minpaint.checkpoint.safety import SafetyChecker
from minpaint.checkpoint.single_file import open_single_file, open_vae_file
from minpaint.checkpoint.tensorfile import (
    Directory,
    Stored,
    assign,
    piece_buffer,
    read_directory,
    read_into,
    read_json,
    read_shards,
    refuse_changed,
)
from minpaint.checkpoint.tokenizer import load_tokenizer
from minpaint.errors import CheckpointError, InputError, ModelNotFoundError
from minpaint.models.config import VAEConfig
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE
from minpaint.schedule import SchedulerConfig

FILE_ORDER = ("unet", "encoder", "decoder", "text_encoder")  # of the files, in records
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")  # of files, not of hub ids like owner/sd-2.1
TINY = "tiny"  # the checkpoint that comes with the program
HUB_ID = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+?)(/(?P<file>[^@]+\.safetensors))?(@(?P<revision>[\w./-]+))?",
)
LORA_FILE = "pytorch_lora_weights.safetensors"  # of a LoRA's repository
PROJECTION = "text_projection.weight"  # what CLIP needs to compare texts with pictures
LoRAs = str | Path | Iterable[str | Path] | None  # each "FILE[:WEIGHT]"


class OneVAE(NamedTuple):
    """A VAE that takes the place of a checkpoint's own; one without a configuration must be built like that."""

    config: VAEConfig | None
    directory: Directory


class Place(NamedTuple):
    """Where a model is in the hub: in a repository, or in one file there. known: its entry in the catalogue."""

    repository: str
    revision: str | None
    file: str | None = None
    known: hub.Known | None = None


class Found(NamedTuple):
    """What a checkpoint's files hold, before it is known whether that fits the models."""

    configs: Configs
    parts: Mapping[str, Directory]
    tokenizer: Callable[[], Any]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """The models of a checkpoint. From `load_checkpoint` they are complete, before that on the meta device.

    tokenizer: from `describe` a function that loads the tokenizer, from `build` the tokenizer.
    ignored: the keys in the files that no model has a use for. loras: the files of what is added
    to the weights.
    """

    architecture: Architecture
    scheduler_config: SchedulerConfig
    unet: UNet
    vae: VAE
    text_encoder: nn.Module
    tokenizer: Any
    ignored: tuple[str, ...]
    loras: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Where the weights are, but for what is added to them."""
        return tuple(dict.fromkeys(stored.file for stored in self._stored()))

    def refuse_changed(self) -> None:
        """CheckpointError if a file was written to since it was described: weights mapped from it are others now."""
        factors = [
            factor for stored in self._stored() for change in stored.added for factor in (change.up, change.down)
        ]
        refuse_changed({stored.file: stored.version for stored in (*self._stored(), *factors)})

    def _stored(self) -> list[Stored]:
        parts = self.architecture.directories
        return [stored for part in FILE_ORDER for stored in parts[part].values()]


def load_checkpoint(model: str | Path, **options: Any) -> Checkpoint:
    """The plain modules of a checkpoint with all their weights, on the CPU in float32, for reading and studying.

    model, options: as for `describe`. The modules are in eval mode and ask for no gradients.

    Raises:
        InputError: an unknown model. CheckpointError: files or configurations that are missing,
            damaged or not supported, or a weight that is NaN or infinite.
    """
    checkpoint = build(describe(model, **options), torch.device("cpu"))
    models = {"unet": checkpoint.unet, "text_encoder": checkpoint.text_encoder}
    for part, directory in checkpoint.architecture.directories.items():
        buffer = piece_buffer(directory.values(), torch.float32)
        for name, stored in directory.items():
            weight = torch.empty(stored.shape)
            read_into(stored, weight, buffer)
            if not bool(weight.isfinite().all()):
                raise CheckpointError(f"{part} ({stored.file.name}): {stored.key} holds NaN or infinity in float32")
            assign(models.get(part, checkpoint.vae), name, weight)
    return checkpoint


def describe(
    model: str | Path,
    half: bool = False,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    lora: LoRAs = None,
) -> Checkpoint:
    """Find a checkpoint, read its configurations and headers, make blank models, and say where each tensor is stored.

    half: prefer a file in half precision where there are both. config: a folder in diffusers
    layout that describes a model in a single file. vae: a file, a folder or a hub id to take the
    VAE from instead. lora: "FILE[:WEIGHT]", or several, to be added to the weights.

    Raises:
        InputError: an unknown model. CheckpointError: anything wrong with what was found.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise InputError(f"model {model!r} is not a name, a hub id, a folder or a file")
    name, place = str(model), _place_in_hub(str(model))
    path = hub.weights_folder() / TINY if name == TINY else _expand(model)
    if config is not None and not (path.is_file() or (place and place.file)):
        raise InputError(f"config {config}: describes a model in a single file, and {model} is none; leave it out")
    one_vae = _open_vae(vae, half)
    if place and place.file:
        path = hub.fetch_file(place.repository, place.revision, place.file)
    elif place:
        path = hub.fetch(place.repository, place.revision, half, place.known)
    if path.is_dir():
        return _match(name, _open_folder(path, half, one_vae), one_vae, lora)
    if not path.exists():
        raise ModelNotFoundError(
            f"model {name!r} is unknown: no such file or folder; "
            f"use {', '.join((TINY, *hub.catalogue()))}, owner/name of the hub, a folder or a .safetensors file"
        )
    found = _open_file(path, config, one_vae)
    try:
        return _match(name, found, one_vae, lora)
    except CheckpointError as error:
        if config is not None or lora:
            raise
        told = f"{error}; a model that is not built like Stable Diffusion 1 or 2 needs --config"
        raise CheckpointError(told) from None


def outline(model: str | Path, half: bool = False, config: str | Path | None = None, **more: Any) -> Architecture:
    """The architecture that `describe` finds; of a repository of the hub only the configurations are fetched.

    more: `vae` and `lora`, whose files are needed.
    """
    place = _place_in_hub(str(model)) if config is None else None
    if place is None or place.file:
        return describe(model, half, config, **more).architecture
    configs = read_configs(hub.fetch_configs(place.repository, place.revision))
    kind, parts = "F16" if half else "F32", {}
    for component, blank in blank_models(configs.unet, configs.vae, configs.text).items():
        shapes = {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}
        parts[component] = {name: Stored(Path(), name, shape, kind, 0, 0) for name, shape in shapes.items()}
    found = Found(configs, parts, lambda: None)
    return _match(str(model), found, _open_vae(more.get("vae"), half), more.get("lora")).architecture


def open_safety_checker(model: str | Path) -> SafetyChecker:
    """The safety checker of a checkpoint in diffusers layout, without its weights; InputError if it has none."""
    folder, place = _expand(model), _place_in_hub(str(model))
    if place and not place.file:
        folder = hub.fetch_safety_checker(place.repository, place.revision)
    return SafetyChecker(folder / "safety_checker")


def build(description: Checkpoint, device: torch.device) -> Checkpoint:
    """The checkpoint with its tokenizer, still without weights; what is computed instead of stored is on `device`."""
    for name, buffer in list(description.text_encoder.named_buffers()):
        if name.endswith(POSITIONS):
            assign(description.text_encoder, name, torch.arange(buffer.shape[-1], device=device)[None])
    return replace(description, tokenizer=description.tokenizer())


def _place_in_hub(model: str) -> Place | None:
    """Where a model is in the hub; None if it is not the hub's."""
    if known := hub.catalogue().get(model):
        return Place(known.repository, known.revision, known=known)
    match, path = HUB_ID.fullmatch(model), _expand(model)
    if not match or path.exists() or model.startswith((".", "~", "/")):
        return None
    if path.parent.is_dir() if match["file"] else path.suffix in WEIGHT_SUFFIXES:
        return None  # a file here whose name is mistyped
    return Place(match["repository"], match["revision"], match["file"])


def _expand(path: str | Path) -> Path:
    """A path with ~ expanded; InputError where the system cannot take it."""
    try:
        expanded = Path(path).expanduser()
        expanded.is_dir()
    except (OSError, RuntimeError, TypeError) as error:
        raise InputError(f"path {str(path)[:200]!r} cannot be used ({str(error)[:200]})") from None
    return expanded


def _open_vae(vae: str | Path | None, half: bool) -> OneVAE | None:
    """The VAE in a file, or in a folder or a repository that holds it alone or with a whole checkpoint."""
    if vae is None:
        return None
    path, place = _expand(vae), _place_in_hub(str(vae))
    if place and place.file:
        path = hub.fetch_file(place.repository, place.revision, place.file)
    elif place:
        path = hub.fetch_vae(place.repository, place.revision)
    if path.is_file():
        return OneVAE(None, open_vae_file(path))
    if not path.is_dir():
        raise InputError(f"vae {vae}: no such file or folder; name one, or owner/name of the hub")
    folder = path / "vae" if (path / "vae").is_dir() else path
    config = vae_config(read_json(folder / "config.json", "config.json"))
    return OneVAE(config, _open_component(folder, "vae", half))


def _open_lora(entry: str | Path) -> tuple[Path, float]:
    """The file and the weight of a LoRA; FILE may also be one of a repository of the hub."""
    name, weight = split_weight(str(_expand(entry)))
    path, place = _expand(name), _place_in_hub(name)
    if place:
        path = hub.fetch_file(place.repository, place.revision, place.file or LORA_FILE)
    if not path.is_file():
        raise InputError(f"lora {name}: no such file; name one, or owner/name[/file.safetensors] of the hub")
    return path, weight


def _open_folder(folder: Path, half: bool, vae: OneVAE | None) -> Found:
    components = [component for component in hub.COMPONENTS if component != "vae" or vae is None]
    parts = {component: _open_component(folder / component, component, half) for component in components}
    return Found(read_configs(folder), parts, lambda: load_tokenizer(folder / "tokenizer"))


def _open_file(path: Path, config: str | Path | None, vae: OneVAE | None) -> Found:
    folder = None if config is None else _expand(config)
    if folder and not folder.is_dir():
        raise InputError(f"config {folder}: no such folder")
    file = open_single_file(path, read_configs(folder) if folder else None, vae and vae.directory)
    places = [folder / "tokenizer"] if folder else []
    places += [path.parent / "tokenizer", path.parent]

    def tokenizer() -> Any:
        found = [place for place in places if (place / "vocab.json").is_file() or (place / "tokenizer.json").is_file()]
        # OpenCLIP pads with zeros, and 0 is "!"
        return load_tokenizer(found[0] if found else hub.fetch_tokenizer(), "!" if file.open_clip else None)

    return Found(file.configs, file.parts, tokenizer, file.ignored)


def _open_component(folder: Path, component: str, half: bool) -> Directory:
    """The directory of one component's weights, whichever files of its folder hold them."""
    names = {f"{component}/{path.name}" for path in folder.glob("*") if path.is_file()}
    name = hub.choose_weights(names, component, half)
    if name is None:
        pickles = sorted(Path(name).name for name in names if name.endswith(WEIGHT_SUFFIXES[1:]))
        there = f"only pickles, which are never opened: {', '.join(pickles)}" if pickles else "none found"
        raise CheckpointError(f"{folder}: safetensors weights are missing ({there})")
    path = folder / Path(name).name
    return read_shards(path) if path.suffix == ".json" else read_directory(path)


def _match(name: str, found: Found, vae: OneVAE | None, lora: LoRAs) -> Checkpoint:
    """The blank checkpoint, if exactly the tensors of its models are stored; CheckpointError says what differs."""
    configs, directories = found.configs, dict(found.parts)
    if vae is not None:
        configs, directories["vae"] = replace(configs, vae=vae.config or configs.vae), vae.directory
    models = blank_models(configs.unet, configs.vae, configs.text)
    if configs.unet.context_dim != configs.text.hidden_size:
        raise CheckpointError(
            f"unet/config.json: cross_attention_dim {configs.unet.context_dim} does not fit the text encoder's "
            f"hidden_size {configs.text.hidden_size}; take both from one checkpoint"
        )
    text, useless = dict(directories["text_encoder"]), []
    if PROJECTION in text and text[PROJECTION].shape[1:] == (configs.text.hidden_size,):
        useless.append(f"text_encoder/{PROJECTION}")
        del text[PROJECTION]
    directories["text_encoder"] = text
    parts = {
        component: match_component(component, directories[component], model) for component, model in models.items()
    }
    entries = [lora] if isinstance(lora, (str, Path)) else lora or ()
    if not isinstance(entries, Iterable):
        raise InputError(f"lora {lora!r} is neither a file nor a list of files")
    loras = [_open_lora(entry) for entry in entries]
    for path, weight in loras:
        parts = add_lora(parts, path, weight)
    return Checkpoint(
        Architecture(name, configs.unet, configs.vae, configs.text, split_vae(parts)),
        configs.scheduler,
        **models,
        tokenizer=found.tokenizer,
        ignored=(*found.ignored, *useless),
        loras=tuple(path for path, _ in loras),
    )
