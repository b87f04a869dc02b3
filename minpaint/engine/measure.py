"""The memory that a piece of work takes, counted while it runs, on any device or on none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)


@dataclass(frozen=True)
class Usage:
    """Peak bytes of a piece of work: of its live tensors, and with the copies its kernels may make."""

    live: int
    total: int


def measure(work: Callable[[], object], fused: bool = True) -> Usage:
    """What a piece of work takes beyond the tensors that were there before.

    Every storage that an operation makes is counted from then until it is freed, in the
    allocator's steps of 512 bytes. With tensors on the meta device nothing is computed and the
    answer is the same. A convolution may hold a copy of its operands in a layout of its own;
    such copies cannot be seen, and are added to `total`. `fused`: see `attention_is_fused`.
    """
    with _Attention(fused), _Counter() as counter:
        work()
    return Usage(counter.peak, counter.most)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.most = 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.known: dict[Any, list[tuple[Any, ...]]] = {}  # shape, stride and number format of what came out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, fresh = self._outcome(func, args, kwargs or {})
        for x in fresh:
            self._count(_holder(x))
        operands = (args[0], args[1], out) if func in CONVOLUTIONS else ()
        self.peak = max(self.peak, self.live)
        self.most = max(self.most, self.live + sum(x.nbytes for x in operands))
        return out

    def _outcome(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What an operation gives, and the tensors of it that are no views of what it was given.

        On the meta device most operations are Python, and slow. A network calls them again and again
        with the same shapes: from the second time on, new tensors are made like those of the first.
        """
        given = [*args, *kwargs.values()]
        key = (func, *map(_look, given), *kwargs)
        if key in self.known:
            made = [
                torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                for shape, stride, dtype in self.known[key]
            ]
            return made[0] if len(made) == 1 else tuple(made), made
        there = {_holder(x)._cdata for x in _tensors(given)}
        out = func(*args, **kwargs)
        fresh = {_holder(x)._cdata: x for x in _tensors([out]) if _holder(x)._cdata not in there}
        outputs = (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple) and len(out) > 1 else ()
        if outputs and len(fresh) == len(outputs) and all(x.is_meta and x.storage_offset() == 0 for x in outputs):
            self.known[key] = [(x.shape, x.stride(), x.dtype) for x in outputs]
        return out, list(fresh.values())

    def _count(self, holder: Tensor | torch.UntypedStorage) -> None:
        nbytes = holder.nbytes if isinstance(holder, Tensor) else holder.nbytes()
        key, size = holder._cdata, -(-nbytes // 512) * 512
        if key in self.storages:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(holder, gone)
        self.live += size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _holder(x: Tensor) -> Any:
    """What has a tensor's bytes: its storage, or the tensor itself where oneDNN keeps the storage to itself."""
    return x if x.is_mkldnn else x.untyped_storage()


def _look(value: Any) -> Any:
    """All of an operation's argument that its results' shapes depend on."""
    if isinstance(value, Tensor):
        return (*value.shape, *value.stride(), value.dtype, value.device)
    return tuple(map(_look, value)) if isinstance(value, (list, tuple)) else (type(value), value)


class _Attention(TorchFunctionMode):
    """Attention on the meta device as the kernels do it.

    Fused: the output and a sum a row. Otherwise with all scores, in float32
    (aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math).
    """

    def __init__(self, fused: bool) -> None:
        self.fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        if not self.fused:
            return (torch.softmax(q.float() @ k.float().transpose(-2, -1), dim=-1) @ v.float()).to(q.dtype)
        torch.empty(q.shape[:-1], device="meta")
        return torch.empty_like(q)
