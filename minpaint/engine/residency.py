"""The weights of a network: resident on the device, offloaded to their files, or streamed from them in chunks.

Offloaded weights are parameters on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minpaint.checkpoint import tensorfile
from minpaint.checkpoint.tensorfile import Directory, Stored, assign
from minpaint.engine.budget import release_cached
from minpaint.engine.cuda import Buffer
from minpaint.engine.device import outside_inference
from minpaint.errors import CheckpointError

ALIGNMENT = 512  # bytes; the CUDA allocator's, kept in the buffers too


@dataclass(eq=False, repr=False)
class NetworkWeights:
    """The weights of a network, or of one half of the VAE, and where they are.

    model: the module whose parameters `directory` names. dtype: the number format they are loaded in.
    on_call: is called with this object when one of the modules `roots` is called while the weights are
    offloaded, and has to load them. new_buffer: makes the buffers of streamed weights. channels_last:
    lay convolutions out as a GPU wants them in half precision. resident: the names of the resident
    weights, with their `_versions`.
    """

    name: str
    model: nn.Module
    roots: Sequence[nn.Module]
    directory: Directory
    device: torch.device
    dtype: torch.dtype
    on_call: Callable[[NetworkWeights], None]
    new_buffer: Callable[[int, torch.device], Buffer] = Buffer
    channels_last: bool = False
    stream: ChunkStream | None = None
    resident: dict[str, tuple[int, int]] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = total_size(self.directory, self.dtype)
        self.resident_dtype = self.dtype  # differs after `convert`
        self._watch()

    @property
    def resident_size(self) -> int:
        """Bytes on the device now."""
        size = sum(tensor_size(self.directory[name], self.resident_dtype) for name in self.resident)
        return size + (2 * self.stream.split.buffer_size if self.stream else 0)

    @property
    def changed(self) -> bool:
        """Whether somebody has given resident weights other values than the file's."""
        return self._versions(self.resident) != self.resident

    @outside_inference
    def load(self, split: Split | None = None) -> None:
        """Make all weights resident, or those that a split says, and stream the others.

        CheckpointError if one is not finite; then all of them are offloaded.
        """
        if self.changed:
            return
        wanted = {name: stored for name, stored in self.directory.items() if not split or name in split.resident}
        chunks = split.chunks if split else ()
        if wanted.keys() != self.resident.keys() or chunks != (self.stream.split.chunks if self.stream else ()):
            self.offload()
            try:
                for name, read in self._read(wanted):
                    tensor = read.to(self.device)
                    # CUDA looks faster than a CPU; other GPUs' libraries may lack the operation, or miss a NaN
                    self.check(name, tensor if self.device.type == "cuda" else read)
                    if self.channels_last and tensor.dim() == 4:
                        tensor = tensor.contiguous(memory_format=torch.channels_last)
                    assign(self.model, name, tensor)
                    self.resident |= self._versions([name])
            except BaseException:
                self.offload()
                raise
            self.stream = ChunkStream(self, split) if split and chunks else None
        while self.hooks:
            self.hooks.pop().remove()

    @outside_inference
    def offload(self) -> None:
        """Free the device's memory. Weights that somebody has changed are in no file, and stay resident."""
        if self.changed or not (self.resident or self.stream):
            return
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        self.put_on_meta(self.directory)
        self.resident, self.resident_dtype = {}, self.dtype
        release_cached(self.device)
        self._watch()

    @outside_inference
    def convert(self, dtype: torch.dtype) -> None:
        """Convert the resident weights, as they are now, to another number format."""
        if dtype != self.resident_dtype and self.stream is None:
            changed, self.resident_dtype = self.changed, dtype
            for root in self.roots:
                root.to(dtype)
            if not changed:
                self.resident = self._versions(self.resident)

    @outside_inference
    def put_on_meta(self, names: Iterable[str]) -> None:
        """Replace weights by tensors on the meta device: one number, expanded, that takes no memory."""
        number = torch.empty((), dtype=self.dtype, device="meta")
        for name in names:
            assign(self.model, name, number.expand(self.directory[name].shape))

    def check(self, name: str, tensor: Tensor) -> None:
        """CheckpointError if one of a tensor's numbers is not finite."""
        lowest, highest = torch.aminmax(tensor)  # one quick pass; both are NaN if a number is
        if not bool(lowest.isfinite() & highest.isfinite()):
            stored = self.directory[name]
            fault = "holds NaN or infinity; fetch the file again"
            [(_, before)] = tensorfile.read_tensors({name: stored})
            if bool(before.isfinite().all()):
                fault = f"is beyond what {str(self.dtype).removeprefix('torch.')} can hold; choose another --dtype"
            raise CheckpointError(f"{self.name} ({stored.file.name}): {stored.key} {fault}")

    def _versions(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Values that differ once a parameter has been given other numbers, in place or not."""
        parameters = {name: self.model.get_parameter(name) for name in names}
        return {name: (parameter.data_ptr(), parameter._version) for name, parameter in parameters.items()}

    def _watch(self) -> None:
        if not self.hooks:
            self.hooks = [root.register_forward_pre_hook(lambda *_: self.on_call(self)) for root in self.roots]

    def _read(self, directory: Directory) -> Iterator[tuple[str, Tensor]]:
        """Weights on the CPU: as they lie in the mapped file, or converted into memory of their own."""
        on_gpu = self.device.type != "cpu"
        mapped: dict[str, Stored] = {}
        converted: dict[str, Stored] = {}
        for name, stored in directory.items():
            fits = tensorfile.FLOATS[stored.kind] == self.dtype and (stored.is_aligned or on_gpu) and not stored.added
            (mapped if fits else converted)[name] = stored
        yield from tensorfile.read_tensors(mapped)
        buffer = tensorfile.piece_buffer(converted.values(), self.dtype)
        for name, stored in converted.items():
            tensor = (torch.empty if on_gpu else tensorfile.empty_pages)(stored.shape, dtype=self.dtype)
            tensorfile.read_into(stored, tensor, buffer)
            yield name, tensor


class ChunkStream:
    """Streams chunks of a network's weights, in the order of the layers' calls, through two buffers.

    While the weights of one chunk are in use, a thread reads the next chunk into the other buffer. The
    order is only a guess: a layer that is called out of turn finds its weights too, but waits for them.
    """

    def __init__(self, weights: NetworkWeights, split: Split) -> None:
        self.weights, self.split = weights, split
        self.buffers = [weights.new_buffer(split.buffer_size, weights.device) for _ in range(2)]  # in use, and next
        self.thread = ThreadPoolExecutor(1)
        self.used: int | None = None  # the chunk in use
        self.fetched: dict[int, Future[None]] = {}  # the chunk that is read as the next one
        self.checked: set[str] = set()
        layers = {name.rpartition(".")[0]: number for number, chunk in enumerate(split.chunks) for name in chunk}
        self.hooks = [
            weights.model.get_submodule(layer).register_forward_pre_hook(lambda *_, number=number: self.use(number))
            for layer, number in layers.items()
        ]

    def use(self, number: int) -> None:
        """Give the layers of a chunk their weights, and start to fetch the next chunk."""
        if number == self.used:
            return
        reading = self.fetched.get(number) or self._fetch(number)
        self.fetched = {}
        reading.result()
        if self.used is not None:
            self.weights.put_on_meta(self.split.chunks[self.used])
        self.used = number
        self.buffers.reverse()
        self.buffers[0].wait()
        for name, view in self._views(number, self.buffers[0].on_device):
            assign(self.weights.model, name, view)
        following = (number + 1) % len(self.split.chunks)
        self.fetched = {following: self._fetch(following)}

    def close(self) -> None:
        """Stop the thread, and wait for its copies: the buffers must not be freed under one."""
        for hook in self.hooks:
            hook.remove()
        self.thread.shutdown()
        for buffer in self.buffers:
            buffer.synchronize()

    def _fetch(self, number: int) -> Future[None]:
        """Read a chunk into the buffer that is not in use, once the device's work with it is done."""
        return self.thread.submit(self._read, number, self.buffers[1], self.buffers[1].work_so_far())

    def _read(self, number: int, target: Buffer, after: Any) -> None:
        """Fill a buffer on the host, in the thread, and start its copy to the device."""
        target.synchronize()
        directory = self.weights.directory
        buffer = tensorfile.piece_buffer([directory[name] for name in self.split.chunks[number]], self.weights.dtype)
        for name, view in self._views(number, target.on_host):
            tensorfile.read_into(directory[name], view, buffer)
            if name not in self.checked:
                self.weights.check(name, view)
                self.checked.add(name)
        target.copy(after)

    def _views(self, number: int, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The weights of a chunk as they lie in a buffer."""
        start, dtype = 0, self.weights.dtype
        for name in self.split.chunks[number]:
            stored = self.weights.directory[name]
            yield name, buffer[start : start + stored.count * dtype.itemsize].view(dtype).view(stored.shape)
            start += tensor_size(stored, dtype)


def tensor_size(stored: Stored, dtype: torch.dtype) -> int:
    """Bytes of a tensor on the device, in a buffer or on its own."""
    return -(-stored.count * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def total_size(directory: Directory, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a directory on the device."""
    return sum(tensor_size(stored, dtype) for stored in directory.values())


@dataclass(frozen=True)
class Split:
    """Which weights stay resident and which are streamed."""

    resident: frozenset[str]
    chunks: tuple[tuple[str, ...], ...]  # names of weights in the order of use; empty if all are resident
    buffer_size: int  # bytes of each of the two buffers: those of the largest chunk
    size: int  # bytes of both buffers and the resident weights


def split_weights(
    directory: Directory, dtype: torch.dtype, order: Sequence[str], room: int, smallest: int = 2**16
) -> Split:
    """Keep as many weights resident as `room` bytes allow; if they are too few, use the least that is possible.

    Layers that the order leaves out are always resident, and so are those of up to `smallest` bytes, which
    are not worth a copy of their own. Then come the largest, which makes the buffers small as well.
    """
    layers: dict[str, list[str]] = {}
    for name in directory:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    sizes = {layer: sum(tensor_size(directory[name], dtype) for name in names) for layer, names in layers.items()}
    streamable = [layer for layer in order if sizes.get(layer, 0) > smallest]
    by_size = sorted(streamable, key=lambda layer: -sizes[layer])[::-1]
    largest = [0, *(sizes[layer] for layer in by_size)]  # by how many of the smallest are streamed
    total = sum(sizes.values())
    totals = [total - gone + 2 * size for gone, size in zip(accumulate(largest), largest, strict=True)]
    count = next((count for count, size in enumerate(totals) if size <= room), totals.index(min(totals)))
    buffer_size, streamed = largest[count], set(by_size[:count])
    chunks: list[list[str]] = []
    filled = buffer_size
    for layer in [each for each in streamable if each in streamed]:
        if filled + sizes[layer] > buffer_size:
            chunks.append([])
            filled = 0
        chunks[-1] += layers[layer]
        filled += sizes[layer]
    return Split(frozenset(directory).difference(*chunks), tuple(map(tuple, chunks)), buffer_size, totals[count])
