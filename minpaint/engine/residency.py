"""The weights of a network: on the device while they are needed, in their files otherwise.

A network, or one half of the VAE, is a Part. It is out (its parameters are on the meta device), in
(all of them on the computing device), or flows: its layers are grouped into chunks, and while one
chunk computes the next one is read and copied into the other of two buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minpaint.checkpoint.tensorfile import (
    FLOATS,
    Directory,
    Stored,
    assign,
    empty_pages,
    piece_buffer,
    read_into,
    read_tensors,
)
from minpaint.engine.memory import Lane, give_back, outside_inference
from minpaint.errors import CheckpointError

ALIGNMENT = 512  # bytes; the CUDA allocator's, kept in the buffers too
SMALL = 2**16  # bytes; a layer up to this size is not worth a copy of its own


class Part:
    """A network's weights.

    model: the module that `directory` names parameters of. roots: the modules whose call means
    that the weights are needed. called: what is done when one of them is called and they are out.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        roots: Sequence[nn.Module],
        directory: Directory,
        device: torch.device,
        dtype: torch.dtype,
        called: Callable[[Part], None],
    ) -> None:
        self.name, self.model, self.roots, self.called = name, model, roots, called
        self.directory, self.device, self.dtype = directory, device, dtype
        self.size = total_size(directory, dtype)
        self.format = dtype  # the numbers' now, see `convert`
        self.inside: dict[str, tuple[int, int]] = {}  # what is in, and a mark by which a change is noticed
        self.flow: Flow | None = None
        self.hooks: list[RemovableHandle] = []
        self._watch()

    @property
    def held(self) -> int:
        """Bytes that the weights take on the device now."""
        there = sum(part_size(self.directory[name], self.format) for name in self.inside)
        return there + (2 * self.flow.width if self.flow else 0)

    @outside_inference
    def come(self, division: Division | None = None) -> None:
        """Bring the weights in: all of them, or those that stay while the others flow.

        CheckpointError if one is not finite; then none is in.
        """
        if self.changed:
            return
        if division is None or not division.chunks:
            if len(self.inside) < len(self.directory):
                self.go()
                self._bring(self.directory)
        elif self.flow is None or self.flow.chunks != division.chunks:
            self.go()
            self._bring({name: stored for name, stored in self.directory.items() if name in division.stay})
            self.flow = Flow(self, division)
        while self.hooks:
            self.hooks.pop().remove()

    @outside_inference
    def go(self) -> None:
        """Leave the device. Weights that somebody has changed are in no file, and stay."""
        if self.changed or not (self.inside or self.flow):
            return
        if self.flow is not None:
            self.flow.close()
            self.flow = None
        for name in self.inside:
            assign(self.model, name, _nowhere(self.directory[name], self.dtype))
        self.inside, self.format = {}, self.dtype
        give_back(self.device)
        self._watch()

    @outside_inference
    def convert(self, dtype: torch.dtype) -> None:
        """Turn the weights that are in, as they are now, into another number format."""
        if dtype == self.format or self.flow is not None:
            return
        changed, self.format = self.changed, dtype
        for root in self.roots:
            root.to(dtype)
        if not changed:
            self.inside = {name: _mark(self.model.get_parameter(name)) for name in self.inside}

    @property
    def changed(self) -> bool:
        """Whether weights that are in have been given other values than the file's."""
        return any(_mark(self.model.get_parameter(name)) != mark for name, mark in self.inside.items())

    def _watch(self) -> None:
        if not self.hooks:
            self.hooks = [root.register_forward_pre_hook(lambda *_: self.called(self)) for root in self.roots]

    def _bring(self, directory: Directory) -> None:
        try:
            for name, tensor in self._read(directory):
                assign(self.model, name, tensor)
                self.inside[name] = _mark(self.model.get_parameter(name))
        except BaseException:
            self.go()
            raise

    def _read(self, directory: Directory) -> Iterator[tuple[str, Tensor]]:
        mapped = {name: stored for name, stored in directory.items() if self._can_map(stored)}
        for name, tensor in read_tensors(mapped):
            yield name, self._placed(self.checked(name, tensor.to(self.device)))
        rest = {name: stored for name, stored in directory.items() if name not in mapped}
        make = torch.empty if self.device.type == "cuda" else empty_pages
        buffer = piece_buffer(rest.values(), self.dtype)
        for name, stored in rest.items():
            tensor = make(stored.shape, dtype=self.dtype)
            read_into(stored, tensor, buffer)
            yield name, self._placed(self.checked(name, tensor.to(self.device)))

    def _can_map(self, stored: Stored) -> bool:
        """Whether a tensor can be used, or sent to a GPU, as it lies in its file."""
        return FLOATS[stored.kind] == self.dtype and (stored.is_aligned or self.device.type == "cuda")

    def _placed(self, tensor: Tensor) -> Tensor:
        """A tensor on the device in the order that is quickest there.

        A GPU's convolutions in half precision want channels together. The VAE's stay as they are: its
        group norms may take a copy of such maps, and none is planned.
        """
        if self.device.type == "cuda" and self.name == "unet" and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor; CheckpointError if one of its numbers is not finite."""
        lowest, highest = torch.aminmax(tensor)  # one quick pass, and NaN comes through it
        if not bool(lowest.isfinite() & highest.isfinite()):
            stored = self.directory[name]
            fault = "holds NaN or infinity; fetch the file again"
            [(_, before)] = read_tensors({name: stored})
            if bool(before.isfinite().all()):
                fault = f"is beyond what {str(self.dtype).removeprefix('torch.')} can hold; choose another --dtype"
            raise CheckpointError(f"{self.name} ({stored.file.name}): {stored.key} {fault}")
        return tensor


class Flow:
    """Two buffers through which the chunks of a part go, in order and round again.

    The order only predicts: a layer that is called out of turn finds its weights too, later.
    """

    def __init__(self, part: Part, division: Division) -> None:
        self.part, self.chunks, self.width = part, division.chunks, division.width
        self.lane = Lane(part.device)
        self.buffers = [self.lane.buffers(self.width) for _ in range(2)]
        self.sent: list[Any] = [None, None]  # marks of the copies out of the host's buffers
        self.thread = ThreadPoolExecutor(1)
        self.shown: int | None = None  # the chunk whose weights are in place, in buffer `side`
        self.side = 0
        self.coming: tuple[int, Future[Any]] | None = None
        self.checked: set[int] = set()
        layers = {name.rpartition(".")[0]: number for number, chunk in enumerate(self.chunks) for name in chunk}
        self.hooks = [
            part.model.get_submodule(layer).register_forward_pre_hook(lambda *_, number=number: self.show(number))
            for layer, number in layers.items()
        ]

    def show(self, number: int) -> None:
        """Put a chunk's weights in place, and start fetching the next."""
        if number == self.shown:
            return
        if self.coming is None or self.coming[0] != number:
            self._wait()
            self._fetch(number)
        mark = self._wait()
        self._hide()
        self.lane.wait(mark)
        self.shown, self.side = number, 1 - self.side
        for name, view in self._views(number, self.buffers[self.side][1]).items():
            assign(self.part.model, name, view)
        self._fetch((number + 1) % len(self.chunks))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        with suppress(CheckpointError):  # of a chunk that nobody needs any more
            self._wait()
        for mark in self.sent:  # the buffers must not be freed under a copy
            self.lane.finish(mark)
        self.thread.shutdown()
        self._hide()

    def _fetch(self, number: int) -> None:
        """Read a chunk into the buffer that is not shown, once what was computed with it is done."""
        if number != self.shown:
            self.coming = number, self.thread.submit(self._bring, number, 1 - self.side, self.lane.mark())

    def _bring(self, number: int, side: int, after: Any) -> Any:
        here, there = self.buffers[side]
        self.lane.finish(self.sent[side])
        directory = self.part.directory
        buffer = piece_buffer([directory[name] for name in self.chunks[number]], self.part.dtype)
        for name, view in self._views(number, here).items():
            read_into(directory[name], view, buffer)
            if number not in self.checked:
                self.part.checked(name, view)
        self.checked.add(number)
        self.sent[side] = self.lane.send(here, there, after)
        return self.sent[side]

    def _wait(self) -> Any:
        coming, self.coming = self.coming, None
        return coming[1].result() if coming else None

    def _hide(self) -> None:
        if self.shown is not None:
            for name in self.chunks[self.shown]:
                assign(self.part.model, name, _nowhere(self.part.directory[name], self.part.dtype))
            self.shown = None

    def _views(self, number: int, buffer: Tensor) -> dict[str, Tensor]:
        views, start = {}, 0
        for name in self.chunks[number]:
            stored = self.part.directory[name]
            size = stored.count * self.part.dtype.itemsize
            views[name] = buffer[start : start + size].view(self.part.dtype).view(stored.shape)
            start += self._step(name)
        return views

    def _step(self, name: str) -> int:
        return part_size(self.part.directory[name], self.part.dtype)


def part_size(stored: Stored, dtype: torch.dtype) -> int:
    """Bytes of a tensor on the device, in a buffer or on its own."""
    return -(-stored.count * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def total_size(directory: Directory, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a directory on the device."""
    return sum(part_size(stored, dtype) for stored in directory.values())


@dataclass(frozen=True)
class Division:
    """Which weights stay and which flow.

    chunks: names in the order of use; none, if all stay. width: bytes of the largest chunk, and of
    each of the two buffers. size: of those and of what stays.
    """

    stay: frozenset[str]
    chunks: tuple[tuple[str, ...], ...]
    width: int
    size: int


def divide(directory: Directory, dtype: torch.dtype, order: Sequence[str], room: int) -> Division:
    """As much of the weights as `room` bytes allow stays; if they are too few, the least that is possible.

    Layers that are small, or that the order leaves out, always stay. Then the largest do, which
    makes the buffers small as well.
    """
    layers: dict[str, list[str]] = {}
    for name in directory:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    sizes = {layer: sum(part_size(directory[name], dtype) for name in names) for layer, names in layers.items()}
    flowing = [layer for layer in order if sizes.get(layer, 0) > SMALL]
    total, by_size = sum(sizes.values()), sorted(flowing, key=lambda layer: -sizes[layer])
    flows, needs = 0, []
    for staying in range(len(by_size), -1, -1):
        width = sizes[by_size[staying]] if staying < len(by_size) else 0  # the largest of those that flow
        flows += width
        needs.append((total - flows + 2 * width, staying))
    fitting = [staying for need, staying in needs if need <= room]
    best = fitting[0] if fitting else min(needs)[1]
    moving = set(by_size[best:])
    chunks: list[list[str]] = []
    filled, width = 0, max((sizes[layer] for layer in moving), default=0)
    for layer in flowing:
        if layer in moving:
            if not chunks or filled + sizes[layer] > width:
                chunks.append([])
                filled = 0
            chunks[-1] += layers[layer]
            filled += sizes[layer]
    stay = frozenset(name for name in directory if name.rpartition(".")[0] not in moving)
    size = total - sum(sizes[layer] for layer in moving) + 2 * width
    return Division(stay, tuple(map(tuple, chunks)), width, size)


def _nowhere(stored: Stored, dtype: torch.dtype) -> Tensor:
    return _nothing(dtype).expand(stored.shape)


@cache
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype, device="meta")


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Differs once a tensor has been given other numbers, in place or not."""
    return tensor.data_ptr(), tensor._version
