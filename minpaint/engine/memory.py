"""What a run happens on and what it takes there: device, number format, bytes.

Everything that knows about devices stands here; the models do not.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from minpaint.errors import InputError, MinpaintWarning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_BUDGET = "15GiB"  # a free Colab T4
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")  # torch.cpu.get_capabilities' names of them
WORTH = 1.25  # how much quicker bfloat16 has to be where its products are timed
CLEAR = 8  # times as quick or as slow as that settles it,
PATIENCE = 0.2  # and so does the end of so many seconds
UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
UNITS |= {f"{unit}b": size for unit, size in UNITS.items() if unit not in ("", "b")}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

# by what keep_heap is asked for; glibc's malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
HEAP: dict[bool | None, tuple[tuple[int, int], ...]] = {
    True: ((-4, 0), (-1, 2**31 - 1)),
    False: ((-4, 65536), (-1, 2**20), (-3, 2**20)),
    None: ((-4, 65536), (-1, 2**26), (-3, 2**25)),
}

Function = TypeVar("Function", bound=Callable[..., object])


def without_gradients(function: Function) -> Function:
    """Run a function, or each turn of a generator function, without recording gradients."""
    return torch.inference_mode()(function)


def outside_inference(function: Function) -> Function:
    """Run a function so that the tensors it makes are ordinary ones, also within `without_gradients`."""
    return torch.inference_mode(mode=False)(function)


def choose_device(name: str | torch.device, absent: bool = False) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device; InputError if it is not there and must be."""
    if isinstance(name, torch.device):
        name = str(name)
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus and not absent:
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


@cache
def choose_arithmetic(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which number format to compute with weights in `dtype`.

    On a CPU without units for bfloat16 that is float32 for weights in bfloat16: quicker there, and
    nearer to float32. The processor is asked; where PyTorch cannot tell, products are timed, once in
    a process. What float16 cannot hold is to be seen and told; a GPU has units for either.
    """
    if device.type == "cuda" or dtype != torch.bfloat16:
        return dtype
    units = has_bfloat16_units()
    return dtype if units or (units is None and bfloat16_is_quicker()) else torch.float32


def has_bfloat16_kernels() -> bool:
    """Whether PyTorch's library for the CPU, oneDNN, computes in bfloat16 on this processor.

    Where it does not (x86 without AVX-512 and AVX-NE-CONVERT), its operators refuse bfloat16 or do
    without the library, a hundred times as slowly as in float32.
    """
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is not None and bool(ask())


def has_bfloat16_units() -> bool | None:
    """Whether the processor has instructions that multiply in bfloat16; None if PyTorch cannot tell."""
    if not has_bfloat16_kernels():
        return False
    ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # newer than PyTorch 2.4
    known = [bool(ask()[unit]) for unit in BFLOAT16_UNITS if unit in ask()]
    return any(known) if known else None


def bfloat16_is_quicker(
    product: Callable[[Tensor, Tensor], object] = torch.mm, clock: Callable[[], float] = time.perf_counter
) -> bool:
    """Whether matrix products on the CPU are WORTH times as quick in bfloat16 as in float32.

    Matrices of 64 to 1024 rows are tried, each product twice the size of the one before and so
    eight times as long; it ends with the first clear answer, or where the next would take too long.
    One thread does it, as several of them wait for each other on a busy machine.
    """
    threads, started, gain = torch.get_num_threads(), clock(), 0.0
    torch.set_num_threads(1)
    try:
        for side in (64, 128, 256, 512, 1024):
            begun, seconds = clock(), []
            for kind in (torch.float32, torch.bfloat16):
                matrix, times = torch.ones(side, side, dtype=kind), []
                for _ in range(3):
                    before = clock()
                    product(matrix, matrix)
                    times.append(clock() - before)
                seconds.append(max(min(times), 1e-9))
            gain, now = seconds[0] / seconds[1], clock()
            is_clear = not WORTH / CLEAR < gain < WORTH * CLEAR
            if is_clear or now - started + 8 * (now - begun) > PATIENCE:
                break
    finally:
        torch.set_num_threads(threads)
    return gain > WORTH


def dtype_name(dtype: torch.dtype) -> str:
    """The command line's name of a number format."""
    return next(name for name, known in DTYPES.items() if known == dtype)


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
    power = min(int(size).bit_length() // 10, 4)
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def is_there(device: torch.device) -> bool:
    """Whether this machine has the device."""
    return device.type != "cuda" or torch.cuda.device_count() > (device.index or 0)


def choose_budget(budget: str | int | float | None, device: torch.device) -> int:
    """The budget in bytes, or what the device has if that is less; then a budget given is said to be cut.

    The default comes on top of what the process holds already: nobody has said that this is too
    much. A device that is not there has whatever is asked for.
    """
    if not is_there(device):
        return parse_budget(budget)
    used = used_memory(device)
    wanted, there = parse_budget(budget) + (used if budget is None else 0), used + free_memory(device)
    if wanted > there and budget is not None:
        told = f"budget {format_size(wanted)} is more than {device} has free; keeping to {format_size(there)}"
        warnings.warn(told, MinpaintWarning, stacklevel=3)
    return min(wanted, there)


def used_memory(device: torch.device) -> int:
    """Bytes that count against a budget now.

    On the CPU all that the process holds (its resident set, the interpreter and the libraries
    included); on CUDA all tensors of the process. The CUDA context, some 0.3 to 0.6 GiB that the
    driver takes for itself, cannot be counted and comes on top.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) if is_there(device) else 0
    return _status("VmRSS") or _largest_resident()


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken on top of those."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = int(found[1]) * 1024 if found else 2**60  # unknown: believe the user
    group = Path("/sys/fs/cgroup")  # a container's limit
    limit, taken = _read(group / "memory.max"), _read(group / "memory.current")
    if limit.strip().isdigit() and taken.strip().isdigit():
        files = re.search(r"^inactive_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)
        free = min(free, int(limit) - int(taken) + (int(files[1]) if files else 0))
    return max(free, 0)


def forget_peak(device: torch.device) -> None:
    """Start measuring `peak_memory` anew, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # then the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes that counted against a budget since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _largest_resident()


def give_back(device: torch.device) -> None:
    """Let go of memory that is free but still held in reserve."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def keep_heap(device: torch.device, keep: bool | None) -> None:
    """Let the CPU's heap keep what is freed, for the next tensors, or give back all of it at once.

    glibc maps every large block anew and unmaps it when it is freed, and the system clears its
    pages each time: a good part of a VAE pass. None is the state that glibc reaches by itself in a
    process that frees large blocks: those up to 32 MiB are kept, and how many of them lie around
    unused differs from run to run. Elsewhere this does nothing.
    """
    if device.type == "cuda" or sys.platform != "linux":
        return
    with suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in HEAP[keep]:
            mallopt(option, value)


@contextmanager
def capped(device: torch.device, budget: int) -> Iterator[None]:
    """Have the GPU's allocator refuse to go beyond a budget."""
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
    refusals = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(refusal in str(error) for refusal in refusals)
    )


def attention_is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's attention runs without holding all scores.

    It does on the CPU and on every card with a memory-efficient kernel; before compute
    capability 8.0 those have none for bfloat16.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


class Lane:
    """How bytes reach a device beside its computing: a stream of its own, from pinned memory.

    On the CPU there is no way to go: the buffer that is filled is the one computed with.
    """

    def __init__(self, device: torch.device) -> None:
        self.direct = device.type != "cuda"
        self.stream = None if self.direct else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.device = device

    def buffers(self, size: int) -> tuple[Tensor, Tensor]:
        """A buffer on the host to be filled, and the one on the device it goes to."""
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        return (there if self.direct else torch.empty(size, dtype=torch.uint8, pin_memory=True)), there

    def mark(self) -> Any:
        """A point in the device's work so far."""
        return None if self.direct else torch.cuda.current_stream(self.device).record_event()

    def send(self, here: Tensor, there: Tensor, after: Any) -> Any:
        """Copy once the work up to a mark is done; a mark for the copy."""
        if self.stream is None:
            return None
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            there.copy_(here, non_blocking=True)
            return self.stream.record_event()

    def wait(self, mark: Any) -> None:
        """Let the device's further work wait for a mark."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Any) -> None:
        """Wait here until a mark is reached."""
        if mark is not None:
            mark.synchronize()


class Replay:
    """A function of tensors on a GPU whose kernels are recorded once and then played back together.

    A network at a small batch is many short kernels, and a fast card waits for Python to start each.
    The first call runs as it is, which also lets the libraries choose their kernels; the second is
    recorded. All calls must have inputs of the same shapes.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.device, self.warm = function, device, False
        self.graph: Any = None
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.warm:
            self.warm = True
            return self.function(*inputs)
        with torch.cuda.device(self.device):
            if self.graph is None:
                self.inputs = [x.clone() for x in inputs]
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.output = self.function(*self.inputs)
                self.graph = graph
            for place, x in zip(self.inputs, inputs, strict=True):
                place.copy_(x)
            self.graph.replay()
        assert self.output is not None
        return self.output.clone()


def is_watched(network: torch.nn.Module) -> bool:
    """Whether somebody wants to see the calls of a network's modules, which a replay does not make."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@contextmanager
def exact(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute float32 in float32: on CUDA without TF32, which PyTorch lets convolutions use."""
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    convolution, product = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, product


def _status(name: str) -> int:
    """A figure of this process in bytes; 0 where the system has no such file."""
    found = re.search(rf"{name}:\s+(\d+) kB", _read("/proc/self/status"))
    return int(found[1]) * 1024 if found else 0


def _largest_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
