"""Which device a run uses, in which number format its networks are, and in which one they compute."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minpaint.errors import InputError

GPUS = ("cuda", "xpu", "mps")  # NVIDIA's and, under the same name, AMD's; Intel's; Apple's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
THREAD_WORK = 2**25  # multiply-adds of a layer for each thread that computes it: a millisecond's work for a core

# Who shows another processor by holding PyTorch back means its library too: else attention in bfloat16 fails.
if (held := os.environ.get("ATEN_CPU_CAPABILITY")) in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2" if held == "avx2" else "SSE41")

# Decorators of a function, or of each turn of a generator function.
without_gradients = torch.inference_mode()
outside_inference = torch.inference_mode(mode=False)  # also within the other, tensors made here are ordinary ones


def is_present(device: torch.device) -> bool:
    """Whether this machine has the device."""
    return device.type == "cpu" or _count(device.type) > (device.index or 0)


def _count(kind: str) -> int:
    """How many devices of a kind PyTorch can use here; a build for another kind has no such module."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def gpu_module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu or torch.mps, whose functions mostly have the same names; None if there is no such GPU."""
    return getattr(torch, device.type) if device.type != "cpu" and is_present(device) else None


def remarks(device: torch.device) -> list[str]:
    """What a plan for a GPU cannot promise, in lines for people."""
    if device.type == "cpu":
        return []
    if device.type == "cuda" and torch.version.hip is None:
        return ["the driver's CUDA context, 0.3 to 0.6 GiB, comes on top and is not in the budget"]
    name = "ROCm" if device.type == "cuda" else device.type
    told = [f"what the driver of {name} takes for itself comes on top and is not in the budget"]
    if device.type != "cuda":
        told.append(f"PyTorch has no limit for the memory of {device.type}: the plan is kept, but nothing enforces it")
    if device.type == "mps":
        told.append("PyTorch does not measure peaks on mps: the figure after a run is what is held at its end")
    return told


def choose_device(name: str | torch.device, absent: bool = False) -> torch.device:
    """ "auto", "cpu", "mps", or "cuda" or "xpu" with or without ":N", as a device; "auto" is the first GPU there is.

    InputError for any other name, and for a device that this machine lacks unless `absent` allows it.
    """
    name = str(name) if isinstance(name, torch.device) else name
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:[0-9]{1,2})?", name):
        raise InputError(f"device {str(name)!r} is unknown; use auto, cpu, cuda, cuda:N, mps, xpu or xpu:N")
    device = torch.device(next((kind for kind in GPUS if _count(kind)), "cpu") if name == "auto" else name)
    if not is_present(device) and not absent:
        raise InputError(f"device {name}: PyTorch sees {_count(device.type) or 'no'} such device(s); use --device cpu")
    return device


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The number format of the networks; InputError for one that is not in DTYPES.

    "auto" is fp16 on a GPU, where it is fast everywhere, and fp32 on the CPU, where it is fast on few processors.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    for known, dtype in DTYPES.items():
        if name in (known, dtype):
            return dtype
    raise InputError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The command line's name of a number format."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def choose_arithmetic(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The number format to compute in with weights in `dtype`.

    A CPU without units for bfloat16 computes in float32 with weights in bfloat16: that is quicker there, and nearer to
    float32's result. Float16 is computed with everywhere, so that what is too large for it is noticed and reported.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or has_bfloat16_units():
        return dtype
    return torch.float32


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Compute with as many of PyTorch's threads as layers of `work` multiply-adds keep busy; all wait for the last."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(min(before, work // THREAD_WORK), 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_bfloat16_kernels() -> bool:
    """Whether PyTorch's library for the CPU, oneDNN, computes in bfloat16 on this processor.

    Where it does not (x86 without AVX-512 and AVX-NE-CONVERT), that is refused, or a hundred times as slow as float32.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def has_bfloat16_units() -> bool:
    """Whether oneDNN can use instructions of the processor that multiply in bfloat16: x86's two, or ARM's.

    Where PyTorch is too old to tell, no: bfloat16 without them is slower than float32.
    """
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return has_bfloat16_kernels() and any(features.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
