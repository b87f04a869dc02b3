"""safetensors files: named tensors on disk, mapped and never executed.

Nothing else is ever opened as weights: pickles are recognised only to be refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minpaint.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: a file, its key there, and its shape and kind ("F16") on disk.

    `rows` picks a part of a fused tensor, `shape` may drop axes of size 1.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    kind: str
    rows: tuple[int, int] | None = None

    def part(self, index: int, parts: int) -> Stored:
        """One of `parts` equal ranges of rows; itself, and so misshapen, where they are not equal."""
        if not self.shape or self.shape[0] % parts:
            return self
        height = self.shape[0] // parts
        return replace(self, shape=(height, *self.shape[1:]), rows=(index * height, (index + 1) * height))

    def squeezed(self, shape: tuple[int, ...]) -> Stored:
        """The same numbers without axes of size 1, if that gives `shape`."""
        same = [n for n in self.shape if n != 1] == [n for n in shape if n != 1]
        return replace(self, shape=shape) if same else self


Directory = Mapping[str, Stored]


def read_directory(path: Path) -> dict[str, Stored]:
    """What is in a safetensors file, by key; no weights are read.

    CheckpointError if the file is missing, empty, truncated, damaged, or something else: a Git
    LFS pointer, a pickle. The header is checked by the safetensors library: its length, and
    that the tensors fill the file without gaps or overlaps.
    """
    with _opened(path) as file:
        directory = {}
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(key)
            directory[key] = Stored(path, key, tuple(part.get_shape()), part.get_dtype())
    if not directory:
        raise CheckpointError(f"{path}: holds no tensors")
    return directory


def read_shards(index: Path, content: Mapping[str, Any]) -> dict[str, Stored]:
    """The directory of a checkpoint in several files, as its index says and no more."""
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    directory: dict[str, Stored] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not a safetensors file beside it")
        found = read_directory(index.parent / name)
        if unlike := found.keys() ^ {key for key in weight_map if weight_map[key] == name}:
            raise CheckpointError(f"{index}: does not agree with {name} about {some(list(unlike))}")
        directory.update(found)
    return directory


def read_tensors(directory: Directory) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a directory, file by file, as a view of the mapped file (no copy)."""
    by_file: dict[Path, list[str]] = {}
    for name, stored in directory.items():
        by_file.setdefault(stored.file, []).append(name)
    for path, names in by_file.items():
        with _opened(path) as file:
            for name in names:
                stored = directory[name]
                tensor = file.get_tensor(stored.key)
                if stored.rows is not None:
                    tensor = tensor[slice(*stored.rows)]
                yield name, aligned(tensor.reshape(stored.shape))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where an unpadded header put it at an odd address."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def some(names: list[str], limit: int = 3) -> str:
    """How many names, and the first few of them."""
    first = ", ".join(sorted(names)[:limit])
    return f"{len(names)} ({first}{', ...' if len(names) > limit else ''})"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    refuse_disguise(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged or no safetensors file ({error}); fetch it again") from None
    except (OSError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def refuse_disguise(path: Path) -> None:
    """CheckpointError if a file cannot be read, or its first bytes show that it is something else."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not start:
        raise CheckpointError(f"{path}: empty file; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull")
    # a zip archive is PyTorch's newer pickle; protocol 2 to 5 begin its older one. A header's length
    # may begin with the same bytes, but then the header follows.
    if start[8:9] != b"{" and re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
        raise CheckpointError(f"{path}: a pickle, which can run code when opened; get safetensors weights")


def assign(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
