"""What only a GPU has: copies that run beside its computing, CUDA graphs, TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Buffer:
    """Bytes on the device, filled through bytes on the host.

    aside: on CUDA, through pinned bytes and a stream of the buffer's own, so that a GPU copies while it
    computes. On the CPU both are one tensor: there is nothing to copy or to wait for.
    """

    stream: Any = None

    def __init__(self, size: int, device: torch.device, aside: bool = True) -> None:
        aside = aside and device.type == "cuda"
        self.on_host = self.on_device = torch.empty(size, dtype=torch.uint8, device=device)
        if device.type != "cpu":
            self.on_host = torch.empty(size, dtype=torch.uint8, pin_memory=aside)
        if aside:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def work_so_far(self) -> Any:
        """A CUDA event that happens when the GPU has done all the work it was given so far; None on the CPU."""
        return None if self.stream is None else torch.cuda.current_stream(self.on_device.device).record_event()

    def copy(self, after: Any) -> None:
        """Start the copy to the device, which waits for the CUDA event `after`."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(after)
                self.on_device.copy_(self.on_host, non_blocking=True)
        elif self.on_host is not self.on_device:
            self.on_device.copy_(self.on_host)

    def wait(self) -> None:
        """Let the device's further work wait for the copy."""
        if self.stream is not None:
            torch.cuda.current_stream(self.on_device.device).wait_stream(self.stream)

    def synchronize(self) -> None:
        """Let the calling thread wait for the copy."""
        if self.stream is not None:
            self.stream.synchronize()


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
    """Whether PyTorch's attention is sure to run without holding all scores.

    NVIDIA's cards before 8.0 have no such bfloat16 kernel; on other makers' GPUs it depends on card and version.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.is_available():
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)
