"""Bytes: how many a run may take, how many are taken and free, and how to release them."""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from minpaint.engine.device import gpu_module, is_present
from minpaint.errors import InputError, MinpaintWarning

DEFAULT_BUDGET = "15GiB"  # a free Colab T4

# `tune_heap`'s calls of mallopt; glibc's malloc.h: M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3
HEAP: dict[bool | None, tuple[tuple[int, int], ...]] = {
    True: ((-4, 0), (-1, 2**31 - 1)),
    False: ((-4, 65536), (-1, 2**20), (-3, 2**20)),
    None: ((-4, 65536), (-1, 2**26), (-3, 2**25)),
}


def parse_budget(budget: str | int | float | None) -> int:
    """Bytes from "15GiB", "800 MB", "2.5g" or a number of bytes; GiB counts in 1024s, GB and G in 1000s.

    None is the default. InputError for anything that is no positive size.
    """
    budget = DEFAULT_BUDGET if budget is None else budget
    number, unit = r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)", r"(?:([kmgt])(ib|b)?|b)?"
    match = re.fullmatch(rf"{number}\s*{unit}", str(budget).strip().lower())
    if isinstance(budget, bool) or not match:
        raise InputError(f"budget {budget!r} is not a size; write it like 15GiB, 800MB or 4.5GiB")
    size = int(float(match[1]) * (1024 if match[3] == "ib" else 1000) ** " kmgt".index(match[2] or " "))
    if size < 1:
        raise InputError(f"budget {budget!r} leaves no memory at all; write it like 15GiB")
    return size


def format_size(size: float) -> str:
    """A number of bytes for people, in the largest unit of which it has one: 1536 is "1.5 KiB"."""
    power = 0
    while power < 4 and float(f"{size / 1024**power:.4g}") >= 1024:
        power += 1
    return f"{max(size / 1024**power, min(power, 1)):.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def choose_budget(budget: str | int | float | None, device: torch.device, free: int | None = None) -> int:
    """The budget in bytes, or what the device has if that is less; a warning says when a given budget is cut.

    The default comes on top of what the process uses already. For a device that this machine lacks,
    any budget is taken as it is. free: bytes that are free; None asks the system.
    """
    wanted = parse_budget(budget)
    if not is_present(device):
        return wanted
    used = used_memory(device)
    available = used + (free_memory(device) if free is None else free)
    if budget is None:
        wanted += used
    elif wanted > available:
        cut = f"budget {format_size(wanted)} is more than {device} has free; keeping to {format_size(available)}"
        warnings.warn(cut, MinpaintWarning, stacklevel=3)
    return min(wanted, available)


def used_memory(device: torch.device) -> int:
    """Bytes that count against a budget now.

    On the CPU the resident set of the process; on a GPU all its tensors. What the driver takes for
    itself, on CUDA some 0.3 to 0.6 GiB, cannot be counted and comes on top.
    """
    if device.type == "cpu":
        return _process_memory("VmRSS")
    gpu = gpu_module(device)
    if gpu is None:
        return 0
    return int(gpu.current_allocated_memory()) if device.type == "mps" else _ask(gpu, "memory_allocated", device)


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken on top of those."""
    gpu = gpu_module(device)
    if gpu is not None and device.type == "mps":
        return max((_ask(gpu, "recommended_max_memory") or 2**60) - int(gpu.driver_allocated_memory()), 0)
    if gpu is not None:
        reserved, allocated = _ask(gpu, "memory_reserved", device), _ask(gpu, "memory_allocated", device)
        if hasattr(gpu, "mem_get_info"):
            return int(gpu.mem_get_info(device)[0]) + reserved - allocated
        return int(gpu.get_device_properties(device).total_memory) - allocated  # an older xpu
    free = _read_number("/proc/meminfo", "MemAvailable:", 1024)
    free = 2**60 if free is None else free  # unknown: believe the user
    limit, used = (_read_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))  # a container's
    if limit is not None and used is not None:
        droppable = _read_number("/sys/fs/cgroup/memory.stat", "inactive_file ")  # files, when the system must
        free = min(free, limit - used + (droppable or 0))
    return max(free, 0)


def reset_peak(device: torch.device) -> None:
    """Start measuring `peak_memory` anew, where the system allows it."""
    if device.type != "cpu":
        if hasattr(gpu := gpu_module(device), "reset_peak_memory_stats"):
            gpu.init()
            gpu.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # then the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes that counted against a budget since `reset_peak`; on mps those that the process holds now."""
    if device.type == "cpu":
        return _process_memory("VmHWM")
    gpu = gpu_module(device)
    if device.type == "mps" and gpu is not None:
        return int(gpu.driver_allocated_memory())
    return 0 if gpu is None else _ask(gpu, "max_memory_allocated", device)


def release_cached(device: torch.device) -> None:
    """Return memory to the system that is free but still held in reserve."""
    if device.type == "cpu":
        _call_glibc("malloc_trim", 0)
    elif hasattr(gpu := gpu_module(device), "empty_cache"):
        gpu.empty_cache()


def tune_heap(device: torch.device, keep: bool | None) -> None:
    """Let the CPU's heap keep freed memory for the next tensors (True) or return it to the system at once (False).

    glibc maps every large block anew, and the system clears its pages each time: a good part of a VAE
    pass. None is the state that glibc reaches by itself in a process that frees large blocks: it keeps
    those up to 32 MiB, and how many of them lie around unused differs from run to run. With None all that
    lies around now is returned, too.
    """
    if device.type == "cpu":
        for option, value in HEAP[keep]:
            _call_glibc("mallopt", option, value)
        if keep is None:
            release_cached(device)


@contextmanager
def capped(device: torch.device, budget: int) -> Iterator[None]:
    """Have CUDA's allocator refuse to go beyond a budget in bytes; on other devices nothing does."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.mem_get_info(index)[1]
    torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation was refused."""
    if isinstance(error, RuntimeError) and re.search(
        "DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|(MPS|XPU).*out of memory", str(error)
    ):
        return True
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))


def _ask(gpu: Any, name: str, *arguments: torch.device) -> int:
    """A figure in bytes; 0 where PyTorch is too old to have it for this kind of GPU."""
    return int(getattr(gpu, name)(*arguments)) if hasattr(gpu, name) else 0


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc's allocator; nothing where the C library is another, or (Windows) cannot be asked."""
    with suppress(AttributeError, TypeError):
        getattr(ctypes.CDLL(None), name)(*arguments)


def _read_number(file: str, name: str = "", unit: int = 1) -> int | None:
    """The number after a name at the start of a line of a Linux system file; None if there is none."""
    with suppress(OSError):
        if found := re.search(rf"^{name}\s*(\d+)", Path(file).read_text(), re.MULTILINE):
            return int(found[1]) * unit
    return None


def _process_memory(figure: str) -> int:
    """VmRSS or VmHWM of this process in bytes; elsewhere than on Linux the largest resident set so far, or 0."""
    if (found := _read_number("/proc/self/status", f"{figure}:", 1024)) is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
