"""The memory that a piece of work takes, counted while it runs, on any device or on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)


class Usage(NamedTuple):
    """Peak bytes of a piece of work: of its live tensors, and in total with the copies its kernels may make."""

    live: int
    total: int


def measure(work: Callable[[], object], fused: bool = True) -> Usage:
    """What a piece of work takes beyond the tensors that existed before it.

    Every storage that an operation makes is counted from then until it is freed, in the
    allocator's steps of 512 bytes. With tensors on the meta device nothing is computed and the
    answer is the same. A convolution may hold a copy of its operands in a layout of its own;
    such copies cannot be seen, and are added to `total`. `fused`: whether attention has a kernel that keeps no scores.
    """
    counter = _Counter()
    with _Attention(fused), counter:
        work()
    return counter.peak


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that operations make.

    On the meta device most operations are Python, and slow, and a network calls them again and again
    with the same shapes. From the second time on, new tensors are made like those of the first, which
    makes planning for a full-size checkpoint two to three times as fast.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, Usage(0, 0)
        # by an operation and its arguments: whether it returns a bare tensor, and the outputs' shape, stride and dtype
        self.known: dict[Any, tuple[bool, list[tuple[Any, ...]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _makes_nothing(func):
            return func(*args, **kwargs)
        key = (func, *map(_signature, args), *map(_signature, kwargs.values()), *kwargs)
        if key in self.known:
            is_bare, forms = self.known[key]
            new = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in forms]
            out: Any = new[0] if is_bare else tuple(new)
        else:
            before = {_holder(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            out = func(*args, **kwargs)
            found = {_holder(x)._cdata: x for x in tree_leaves(out) if isinstance(x, Tensor)}
            new = [x for holder, x in found.items() if holder not in before]  # without views of the inputs
            outputs = out if isinstance(out, tuple) else (out,)
            if len(new) == len(outputs) and all(x.is_meta and x.storage_offset() == 0 for x in new):
                self.known[key] = isinstance(out, Tensor), [(x.shape, x.stride(), x.dtype) for x in new]
        for x in new:
            holder = _holder(x)
            size = -(-(x.nbytes if x.is_mkldnn else holder.nbytes()) // 512) * 512
            self.live += size
            weakref.finalize(holder, self._free, size)
        copies = sum(x.nbytes for x in (args[0], args[1], out)) if func in CONVOLUTIONS else 0
        self.peak = Usage(max(self.peak.live, self.live), max(self.peak.total, self.live + copies))
        return out

    def _free(self, size: int) -> None:
        self.live -= size


@cache
def _makes_nothing(func: Any) -> bool:
    """Whether all that an operation returns is a view of its arguments; reshape and its like may make copies."""
    may_copy = func.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd)
    return not may_copy and all(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)


def _holder(x: Tensor) -> Any:
    """The object that owns a tensor's bytes: its storage, or the tensor itself where oneDNN hides the storage."""
    return x if x.is_mkldnn else x.untyped_storage()


def _signature(value: Any) -> Any:
    """Of an operation's argument, everything that the shapes of the results depend on."""
    if isinstance(value, Tensor):
        return (*value.shape, *value.stride(), value.dtype, value.device)
    return tuple(map(_signature, value)) if isinstance(value, (list, tuple)) else (type(value), value)


class _Attention(TorchFunctionMode):
    """Attention on the meta device as the kernels do it.

    Fused: the output and a sum for each row. Otherwise with all scores, in float32
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
