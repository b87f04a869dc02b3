"""Where a run happens and what it may use: device, number format, budget.

Everything that knows about devices stands here; the models do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from minpaint.errors import BudgetError, InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_BUDGET = "15GiB"  # a free Colab T4
UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
UNITS |= {f"{unit}b": size for unit, size in UNITS.items() if unit not in ("", "b")}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

Function = TypeVar("Function", bound=Callable[..., object])


def without_gradients(function: Function) -> Function:
    """Run a function, or each turn of a generator function, without recording gradients."""
    return torch.inference_mode()(function)


def choose_device(name: str | torch.device) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device; InputError if it is not there."""
    if isinstance(name, torch.device):
        name = str(name)
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise InputError(f"device {name}: PyTorch sees {gpus or 'no'} CUDA device(s); use --device cpu")
    return device


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The number format of the networks.

    "auto" is fp16 on CUDA, where every card that runs current PyTorch has fast kernels for
    it, and fp32 on the CPU, where half precision is fast on few processors.
    """
    if isinstance(name, torch.dtype):
        if name in DTYPES.values():
            return name
    elif name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    elif isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    raise InputError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")


def parse_budget(budget: str | int | float | None) -> int:
    """Bytes from "15GiB", "800 MB", "2.5g" or a number of bytes; None is the default.

    GiB counts in 1024s, GB and G in 1000s. InputError for anything that is no positive size.
    """
    if budget is None:
        budget = DEFAULT_BUDGET
    text = str(budget).strip().lower()
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([a-z]*)", text)
    if isinstance(budget, bool) or not match or match[2] not in UNITS:
        raise InputError(f"budget {budget!r} is not a size; write it like 15GiB, 800MB or 4.5GiB")
    size = int(float(match[1]) * UNITS[match[2]])
    if size < 1:
        raise InputError(f"budget {budget!r} leaves no memory at all; write it like 15GiB")
    return size


def format_size(size: float) -> str:
    """A number of bytes for people."""
    power = min(int(size).bit_length() // 10, 3)
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def check_budget(weight_count: int, dtype: torch.dtype, budget: int) -> None:
    """BudgetError if the weights alone, `weight_count` numbers of `dtype`, exceed the budget."""
    need = weight_count * dtype.itemsize
    if need > budget:
        raise BudgetError(
            f"budget {format_size(budget)} cannot hold the weights, which take {format_size(need)} "
            f"as {str(dtype).removeprefix('torch.')}; raise --budget or choose a half precision --dtype"
        )


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, ready to run; nothing of it will be trained."""
    return model.to(device).requires_grad_(False).eval()
