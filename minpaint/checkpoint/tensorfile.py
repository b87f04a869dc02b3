"""safetensors files: named tensors on disk, mapped and never executed.

Nothing else is ever opened as weights: pickles are recognised only to be refused.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minpaint.errors import CheckpointError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 2**18  # numbers read at a time where they are converted on the way
ALIGNMENT = 64  # bytes; where PyTorch puts a tensor of its own (c10/core/alignment.h)
LONGEST = 2**24  # bytes of a header or a JSON file; the largest checkpoints have some hundred thousand


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: in which file, under which key, with which shape and kind ("F16").

    start, size: its bytes in the file. A part of a fused tensor is a range of the bytes of its key;
    the shape may leave out axes of size 1 that the file has. version: which file it was when its
    header was read (`_version`); the weights are not read from any other. added: what is added to
    the weight whenever it is read.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int
    version: tuple[int, ...] = ()
    added: tuple[LowRank, ...] = ()

    def part(self, index: int, parts: int) -> Stored:
        """One of `parts` equal ranges of rows.

        A tensor whose rows cannot be divided is returned whole, so that its shape is found wrong.
        """
        if not self.shape or self.shape[0] % parts:
            return self
        shape, size = (self.shape[0] // parts, *self.shape[1:]), self.size // parts
        return replace(self, shape=shape, start=self.start + index * size, size=size)

    @property
    def is_aligned(self) -> bool:
        """Whether it lies in the mapped file at an address where PyTorch could have put it.

        The order in which a matrix product adds up may depend on the address of its operands. The
        same weights give the same bits from every file only if they are always aligned.
        """
        return self.start % ALIGNMENT == 0

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down, a change of a weight: LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    up [rows, rank], down [rank, the rest of the weight's shape], beside axes of size 1.
    """

    up: Stored
    down: Stored
    scale: float


Directory = Mapping[str, Stored]


def read_directory(path: Path) -> dict[str, Stored]:
    """What is in a safetensors file, by key; no weights are read.

    CheckpointError if the file is missing, empty, truncated, damaged, or something else: a Git
    LFS pointer, a pickle. The header is checked by the safetensors library: its length, and
    that the tensors fill the file without gaps or overlaps.
    """
    with _open(path) as file:
        version, beginning = _version(file.fileno()), file.read(64)
        _refuse_disguise(path, beginning)
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: not a .safetensors file, the only kind of weights that is opened; get those"
            )
        try:
            length = int.from_bytes(beginning[:8], "little")
            if length > LONGEST:
                raise SafetensorError(f"its header would have {length} bytes")
            with safe_open(path, framework="pt", device="cpu"):
                file.seek(8)
                header = json.loads(file.read(length))
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or no safetensors file ({error}); fetch it again") from None
        except (RuntimeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
    header.pop("__metadata__", None)
    if not header:
        raise CheckpointError(f"{path}: holds no tensors; fetch it again")
    if empty := [key for key, entry in header.items() if 0 in entry["shape"]]:
        raise CheckpointError(f"{path}: tensors without a number: {some(empty)}")
    return {
        key: Stored(path, key, tuple(entry["shape"]), entry["dtype"], 8 + length + start, end - start, version)
        for key, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if there is none."""
    if not os.path.exists(path):
        raise CheckpointError(f"{name} is missing in {path.parent}")
    with _open(path) as file:
        text = file.read(LONGEST + 1)
    try:
        content = json.loads(text.decode()) if len(text) <= LONGEST else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch it again")
    return content


def read_index(path: Path) -> dict[str, set[str]]:
    """The safetensors files that an index lists, and the keys that it says are in each.

    CheckpointError if it is no index, or lists anything but safetensors files beside it.
    """
    weight_map = read_json(path, path.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; fetch it again")
    keys: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        keys.setdefault(str(name), set()).add(key)
    for name in keys:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name!r} is not a safetensors file beside it")
    return keys


def read_shards(index: Path) -> dict[str, Stored]:
    """The directory of a model in several files; CheckpointError if they do not hold what the index says."""
    directory: dict[str, Stored] = {}
    for name, keys in read_index(index).items():
        found = read_directory(index.parent / name)
        if unlike := found.keys() ^ keys:
            raise CheckpointError(f"{index}: does not agree with {name} about {some(list(unlike))}; fetch both again")
        directory.update(found)
    return directory


def read_tensors(directory: Directory) -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor of a directory, by name, as a view of its mapped file (no copy if it is aligned)."""
    for path, version in dict.fromkeys((stored.file, stored.version) for stored in directory.values()):
        with _open(path, version) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, stored in directory.items():
            if stored.file == path:
                flat = torch.frombuffer(mapped, dtype=torch.uint8, count=stored.size, offset=stored.start)
                kind = FLOATS[stored.kind]
                if flat.data_ptr() % kind.itemsize:  # a header without padding leaves tensors at odd addresses
                    flat = flat.clone()
                yield name, flat.view(kind).reshape(stored.shape)


def piece_buffer(tensors: Collection[Stored], dtype: torch.dtype) -> Tensor:
    """Bytes enough for `read_into` to convert any of these tensors to `dtype` piece by piece."""
    kinds = [(FLOATS[stored.kind], min(PIECE, stored.count)) for stored in tensors if FLOATS[stored.kind] != dtype]
    sizes = [count * (kind.itemsize + 4 * (kind.itemsize == dtype.itemsize)) for kind, count in kinds]
    return torch.empty(max([*sizes, merge_size(tensors)], default=0), dtype=torch.uint8)


def merge_size(tensors: Iterable[Stored]) -> int:
    """Bytes of the `piece_buffer` in which changes are added to any of these tensors."""
    return max((4 * sum(_merge_counts(stored)) + 8 * (PIECE + 1) for stored in tensors if stored.added), default=0)


def _merge_counts(stored: Stored) -> list[int]:
    """How many numbers of a changed weight, and of each factor of its changes, are in memory at once."""
    factors = [factor.count for change in stored.added for factor in (change.up, change.down)]
    return [max(PIECE, stored.count // stored.shape[0]), *factors]


def read_into(stored: Stored, target: Tensor, buffer: Tensor) -> None:
    """Fill a contiguous CPU tensor from a file without mapping it, converting in small pieces.

    The memory this takes is `target`'s and a few MiB, whatever the file's size. `buffer`: the
    `piece_buffer` of all tensors that are read together; a fresh one for each leaves holes in the heap.
    """
    kind, flat = FLOATS[stored.kind], target.view(-1)
    if stored.added:
        _read_changed(stored, flat, buffer)
        return
    with _open(stored.file, stored.version) as file:
        file.seek(stored.start)
        if kind == target.dtype:
            _fill(file, flat)
            return
        halves = kind.itemsize == target.itemsize  # fp16 and bf16: with AVX2, float32 between them is a short cut
        for piece in torch.split(flat, PIECE):
            read = buffer[4 * len(piece) * halves :][: len(piece) * kind.itemsize].view(kind)
            _fill(file, read)
            piece.copy_(buffer[: 4 * len(piece)].view(torch.float32).copy_(read) if halves else read)


def _read_changed(stored: Stored, flat: Tensor, buffer: Tensor) -> None:
    """Fill a tensor with a weight and what is added to it, some rows at a time and in float32."""
    counts = _merge_counts(stored)
    size = 4 * sum(counts)
    numbers, rest = buffer[:size].view(torch.float32), buffer[size + size % 8 :]
    piece, *factors = torch.split(numbers, counts)
    rows, width = stored.shape[0], stored.count // stored.shape[0]
    products = []
    for change, up, down in zip(stored.added, factors[::2], factors[1::2], strict=True):
        read_into(change.up, up, rest)
        read_into(change.down, down, rest)
        products.append((up.view(rows, -1), down.view(-1, width), change.scale))
    height, row_size = len(piece) // width, stored.size // rows
    for first in range(0, rows, height):
        few = min(height, rows - first)
        shape, start, size = (few, width), stored.start + first * row_size, few * row_size
        block = piece[: few * width].view(shape)
        read_into(replace(stored, shape=shape, start=start, size=size, added=()), block, rest)
        for up, down, scale in products:
            block.addmm_(up[first : first + few], down, alpha=scale)
        flat[first * width :][: few * width].copy_(block.view(-1))


def empty_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor in pages of its own, to be filled; MemoryError if there are none.

    They lie aligned, and go back to the system when the tensor is freed. In the heap weights of
    some megabytes would leave holes that activations do not fit in.
    """
    size = max(math.prod(shape) * dtype.itemsize, 1)
    try:
        pages = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise MemoryError(f"{size} bytes for weights: {error}") from None
    storage = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


def _fill(file: BinaryIO, flat: Tensor) -> None:
    """Read as many bytes as a tensor has; CheckpointError if the file has become shorter."""
    place = memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())).cast("B")
    while place:
        count = file.readinto(place)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{file.name}: became shorter while it was in use; fetch it again")
        place = place[count:]


def some(names: list[str], limit: int = 3) -> str:
    """How many names, and the first few of them."""
    first = ", ".join(sorted(names)[:limit])
    return f"{len(names)} ({first}{', ...' if len(names) > limit else ''})"


@contextmanager
def _open(path: Path, version: tuple[int, ...] = ()) -> Iterator[BinaryIO]:
    """A file open for reading without a buffer.

    CheckpointError if it is missing, cannot be read, or in the end is not what it was at first, or in `version`.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise OSError("it is not a file")
        with path.open("rb", buffering=0) as file:
            version = version or _version(file.fileno())
            yield file
            refuse_changed({path: version})
    except CheckpointError:  # which is a ValueError too
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def refuse_changed(files: Mapping[Path, tuple[int, ...]]) -> None:
    """CheckpointError if a file is not what it was at the `version` given: weights mapped from it are others now."""
    for path, version in files.items():
        with suppress(OSError):  # a file that was deleted is still there for whoever has mapped it
            if version and _version(path) != version:
                raise CheckpointError(f"{path}: was changed while it was in use; start again")


def _version(file: Path | int) -> tuple[int, ...]:
    """What differs once a file is replaced or written to. Its number may differ on network file systems anyway."""
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns


def _refuse_disguise(path: Path, start: bytes) -> None:
    """CheckpointError if the first 64 bytes of a file show that it is something else."""
    if not start:
        raise CheckpointError(f"{path}: empty file; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull")
    # PyTorch's newer pickle is a zip archive; its older one begins with protocol 2 to 5. The length of
    # a safetensors header may begin with the same bytes, but then the header's brace follows.
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
