"""Which device a run uses, in which number format its networks are, and in which one they compute."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minpaint.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
THREAD_WORK = 2**25  # multiply-adds of a layer for each thread that computes it: a millisecond's work for a core

# Decorators of a function, or of each turn of a generator function.
without_gradients = torch.inference_mode()
outside_inference = torch.inference_mode(mode=False)  # also within the other, tensors made here are ordinary ones


def is_present(device: torch.device) -> bool:
    """Whether this machine has the device."""
    return device.type != "cuda" or torch.cuda.device_count() > (device.index or 0)


def choose_device(name: str | torch.device, absent: bool = False) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device.

    InputError for any other name, and for a device that this machine lacks unless `absent` allows it.
    """
    name = str(name) if isinstance(name, torch.device) else name
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    device = torch.device(name if name != "auto" else "cuda" if gpus else "cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus and not absent:
        raise InputError(f"device {name}: PyTorch sees {gpus or 'no'} CUDA device(s); use --device cpu")
    return device


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The number format of the networks; InputError for one that is not in DTYPES.

    "auto" is fp16 on CUDA, where every card that runs current PyTorch has fast kernels for it,
    and fp32 on the CPU, where half precision is fast on few processors.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    for known, dtype in DTYPES.items():
        if name in (known, dtype):
            return dtype
    raise InputError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The command line's name of a number format."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def choose_arithmetic(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The number format to compute in with weights in `dtype`.

    A CPU without units for bfloat16 computes in float32 with weights in bfloat16: that is quicker
    there, and the result is nearer to float32's. Weights in float16 are computed with in float16
    everywhere, so that what is too large for it is noticed and reported.
    """
    if device.type == "cuda" or dtype != torch.bfloat16 or has_bfloat16_units():
        return dtype
    return torch.float32


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Compute with as many of PyTorch's threads as layers of `work` multiply-adds keep busy.

    At a layer's end all wait for the last, for milliseconds if other programs have its core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(min(before, work // THREAD_WORK), 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_bfloat16_kernels() -> bool:
    """Whether PyTorch's library for the CPU, oneDNN, computes in bfloat16 on this processor.

    Where it does not (x86 without AVX-512 and AVX-NE-CONVERT), its operators refuse bfloat16 or do
    without the library, a hundred times as slowly as in float32.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def has_bfloat16_units() -> bool:
    """Whether oneDNN can use instructions of the processor that multiply in bfloat16: x86's two, or ARM's.

    Where PyTorch is too old to tell, the answer is no: bfloat16 without them is slower than float32.
    """
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return has_bfloat16_kernels() and any(features.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
