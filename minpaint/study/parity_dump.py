"""One side's tensors in a folder, so that an implementation can be checked where it is not installed.

    parity.json            what was computed, and the layers of every stage
    text.safetensors       the tensors of a stage; likewise encode, unet-0, unet-1, decode, run

parity.json is one object:

    "format": 1            "side": who made it, for people       "case": see parity_sides.Case
    "model": the shapes of the networks (models/config.py); may be left out
    "stages": [{"name": "unet 0", "file": "unet-0.safetensors", "floors": {},
                "layers": [{"name": "unet.conv_in", "inputs": {"x": "KEY"}, "output": "KEY", "floor": null}, ...]}]

A layer is a module under its official name (that of its parameters in diffusers' files) behind its component:
text_encoder, unet or vae. Layers stand in the order in which they finish, the whole network last: text_encoder,
vae.encode, unet, vae.decode. Any layer may be left out but these, and so may any stage. KEY names a tensor of the
stage's file; layers may share one. Inputs by their roles, of which a layer has those that its module takes:

    x        what the layer works on: tokens [1, 77] of the prompt, pixels [1, 3, Y, X], latents [.., .., y, x], ...
    time     time embedding [2, 4 c], c the UNet's first width       t: timesteps [2] (whole UNet)
    context  embeddings [2, 77, D], of the negative prompt and the prompt
    skips    of a block on the way up a list of KEYs: the feature maps that it joins, the last first taken

output: x changed by the layer; of vae.encode [1, 8, y, x], means and clamped log variances of the latents, unscaled.
floor: relative error of the layer against itself under rounding, or null: then minpaint measures its own.

The stage "run" has no layers. Its tensors, k counting steps and pictures from 0, n being 2 with guidance:

    embeddings [2, 77, D]                        as context
    draw.k [1, 4, y, x]                          normal noise in the order in which minpaint asks for it; needed only
                                                 if "noise" of the case is not "torch"
    encode.k.pixels [1, 3, Y, X], encode.k.mean, encode.k.logvar [1, 4, y, x]    every picture that was encoded
    step.k.x [n, 4 or 9, y, x], step.k.t [1], step.k.context [n, 77, D]          what the UNet was called with
    step.k.output [n, 4, y, x], step.k.guided [1, 4, y, x]                       its output; after guidance
    step.k.latents [1, 4, y, x]                                                  where the step led
    picture [1, 3, Y, X] in [0, 1]                                               the end, rounded to 8 bits

Tensors may be float32, bfloat16 or float16 (tokens and t also int64). Whoever writes a dump best begins with one of
minpaint's, which has all inputs: compute the same from them, and write outputs of your own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minpaint.checkpoint.architecture import Architecture
from minpaint.engine.device import DTYPES
from minpaint.errors import InputError, MinpaintError
from minpaint.study.parity_record import Layer, Stage
from minpaint.study.parity_sides import Case

FORMAT, MANIFEST = 1, "parity.json"
KINDS: dict[str, tuple[type, ...]] = {  # of a case's values; the others are text
    **dict.fromkeys(("width", "height", "steps", "seed"), (int,)),
    "guidance": (int, float),
    "sampler": (str, type(None)),
}


class Dump(NamedTuple):
    """What a dump's parity.json says; its stages are read one by one."""

    folder: Path
    side: str
    case: Case
    model: dict[str, Any] | None
    stages: list[dict[str, Any]]


def model_of(architecture: Architecture) -> dict[str, Any]:
    """The shapes of the networks, as JSON has them."""
    parts = {part: asdict(getattr(architecture, part)) for part in ("unet", "vae", "text")}
    found: dict[str, Any] = json.loads(json.dumps(parts))
    return found


def check_target(folder: Path) -> None:
    """InputError if a dump cannot be written to a folder: it must be new or empty."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"dump {folder}: is not an empty folder; name a new one")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"dump {folder}: cannot be made ({error}); name another folder") from None


def write_dump(folder: Path, side: str, case: Case, architecture: Architecture, stages: Iterable[Stage]) -> int:
    """Write stages as they come, parity.json last; returns the bytes. MinpaintError if the disk refuses."""
    described, size = [], 0
    try:
        for stage in stages:
            tensors, keys = dict(stage.tensors), dict[int, str]()

            def key(tensor: Tensor, name: str, tensors: dict[str, Tensor] = tensors, keys: Any = keys) -> str:
                if id(tensor) not in keys:
                    keys[id(tensor)], tensors[name] = name, tensor
                return str(keys[id(tensor)])

            layers = []
            for layer in stage.layers:
                inputs: dict[str, Any] = {}
                for role, value in layer.inputs.items():
                    name = f"{layer.name}:{role}"
                    inputs[role] = (
                        [key(each, f"{name}.{number}") for number, each in enumerate(value)]
                        if isinstance(value, list)
                        else key(value, name)
                    )
                output = key(layer.output, f"{layer.name}:output")
                layers.append({"name": layer.name, "inputs": inputs, "output": output, "floor": layer.floor})
            file = f"{stage.name.replace(' ', '-')}.safetensors"
            # of its own each: two layers may return views of one tensor, which the format refuses
            save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / file
            )
            size += (folder / file).stat().st_size
            described.append({"name": stage.name, "file": file, "floors": stage.floors, "layers": layers})
        manifest = {"format": FORMAT, "side": side, "case": asdict(case), "model": model_of(architecture)}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"stages": described}, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise MinpaintError(f"dump {folder}: cannot be written ({error}); name a folder with more room") from None
    return size


def open_dump(folder: Path) -> Dump:
    """Read parity.json; InputError if it is missing, damaged, or of another format."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise InputError(f"dump {folder}: is of format {found['format']}, not {FORMAT}; write it again")
        known = {field.name: field for field in fields(Case)}
        case = Case(**{name: value for name, value in found["case"].items() if name in known})
        for name, value in asdict(case).items():
            if not isinstance(value, KINDS.get(name, (str,))) or isinstance(value, bool):
                raise TypeError(f"{name} {value!r}")
        if case.dtype not in DTYPES or min(case.width, case.height, case.steps) < 1 or case.seed < 0:
            raise ValueError(f"case {asdict(case)}")
        stages = [
            {"name": str(stage["name"]), "file": str(stage["file"]), "floors": dict(stage.get("floors") or {})}
            | {"layers": [_layer(layer) for layer in stage["layers"]]}
            for stage in found["stages"]
        ]
        if not stages:
            raise ValueError("no stages")
        return Dump(folder, str(found.get("side", "dump")), case, found.get("model"), stages)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"dump {folder}: has no {MANIFEST}; make one with --dump {folder}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(f"dump {folder}: {MANIFEST} is damaged ({told}); make the dump again") from None


def _layer(given: dict[str, Any]) -> dict[str, Any]:
    floor, inputs = given.get("floor"), dict(given["inputs"])
    return {"name": str(given["name"]), "inputs": inputs, "output": given["output"], "floor": floor and float(floor)}


def read_stages(dump: Dump) -> Iterator[Stage]:
    """The stages of a dump, whose tensors are read when they are asked for; InputError for a damaged file."""
    for described in dump.stages:
        path = dump.folder / described["file"]
        try:
            with ExitStack() as stack:
                file = stack.enter_context(safe_open(path, framework="pt"))
                tensors = {name: _finite(file.get_tensor(name), name) for name in file.keys()}  # noqa: SIM118
            layers = []
            for layer in described["layers"]:
                inputs = {
                    role: [tensors[key] for key in value] if isinstance(value, list) else tensors[value]
                    for role, value in layer["inputs"].items()
                }
                layers.append(Layer(layer["name"], inputs, tensors[layer["output"]], layer["floor"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            told = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({str(error)[:200]})"
            raise InputError(f"dump {dump.folder}: {described['file']} {told}; make the dump again") from None
        floors = {str(name): float(value) for name, value in described["floors"].items()}
        yield Stage(described["name"], layers, {} if layers else tensors, floors)


def _finite(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor


def refuse_other(dump: Dump, architecture: Architecture, asked: Mapping[str, Any]) -> None:
    """InputError if a dump is of another model, or its case is not what was asked for (None: anything)."""
    made = asdict(dump.case) | {"size": f"{dump.case.width}x{dump.case.height}"}
    for name, value in asked.items():
        if value is not None and value != made[name]:
            told = f"was made with {name} {made[name]}, not {value}"
            raise InputError(f"dump {dump.folder}: {told}; leave --{name} out, or make another dump")
    own = model_of(architecture)
    if dump.model is not None and dump.model != own:
        parts = [(part, name) for part in own for name in own[part]]
        different = [
            f"{part} {name} {dump.model.get(part, {}).get(name)!r} there, {own[part][name]!r} here"
            for part, name in parts
            if dump.model.get(part, {}).get(name) != own[part][name]
        ]
        told = (different or ["other networks"])[0]
        raise InputError(f"dump {dump.folder}: is of another model ({told}); name that model, or make another dump")
