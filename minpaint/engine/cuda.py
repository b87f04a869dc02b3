"""What only a GPU has: copies that run beside its computing, CUDA graphs, TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CopyStream:
    """Copies from the host to a GPU on a CUDA stream of their own, so that they run beside its computing.

    On the CPU both buffers of a pair are one tensor, nothing is copied, and every event is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def buffers(self, size: int) -> tuple[Tensor, Tensor]:
        """A buffer of `size` bytes on the host (pinned, so that copies need not wait), and one on the device."""
        device = torch.empty(size, dtype=torch.uint8, device=self.device)
        return device if self.stream is None else torch.empty(size, dtype=torch.uint8, pin_memory=True), device

    def record(self) -> Any:
        """An event that happens when the device has done all the work it was given so far."""
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def copy(self, host: Tensor, device: Tensor, after: Any) -> Any:
        """Start a copy that waits for the event `after`; the event of its end."""
        if self.stream is None:
            return None
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            device.copy_(host, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the device's further work wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Let the calling thread wait for an event."""
        if event is not None:
            event.synchronize()


class GraphReplay:
    """A function of tensors on a GPU whose kernels are recorded in a CUDA graph and replayed together.

    A network at a small batch is many short kernels, and a fast card waits for Python to start each.
    The first call runs as it is, which also lets the libraries choose their kernels; the second is
    recorded. All calls must have inputs of the same shapes.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.device, self.warm = function, device, False
        self.graph: Any = None
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.warm:
            self.warm = True
            return self.function(*inputs)
        with torch.cuda.device(self.device):
            if self.graph is None:
                graph, self.inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
                with torch.cuda.graph(graph):
                    self.output = self.function(*self.inputs)
                self.graph = graph
            for recorded, x in zip(self.inputs, inputs, strict=True):
                recorded.copy_(x)
            self.graph.replay()
            return self.output.clone()


def has_hooks(network: nn.Module) -> bool:
    """Whether a module of a network has forward hooks, which a replay would not call."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@contextmanager
def exact_float32(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
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


def attention_is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's attention runs without holding all scores.

    It does on the CPU and on every card with a memory-efficient kernel; before compute
    capability 8.0 those have none for bfloat16.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True
