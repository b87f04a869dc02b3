"""Other runtimes as sides of bench.speed: diffusers' networks converted for OpenVINO and for ONNX Runtime.

Each takes the networks as they are, in float32, and compiles them for this processor and these shapes,
as its users would. Packages: the extra `bench`; a runtime that is not installed is a row with the reason.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.sides import TIMESTEP, Case, Inputs, Theirs, Work

Converted = Callable[[list[Tensor]], Tensor]  # takes a network's inputs in float32


class Call(nn.Module):
    """One row's call of a network of diffusers, with tensors in and a tensor out, as converters want it."""

    def __init__(self, row: str, network: nn.Module) -> None:
        super().__init__()
        self.row, self.network = row, network

    def forward(self, *inputs: Tensor) -> Tensor:
        network: Any = self.network
        if self.row == "encode":
            return network.encode(*inputs).latent_dist.mean  # type: ignore[no-any-return]
        if self.row == "decode":
            return network.decode(*inputs, return_dict=False)[0]  # type: ignore[no-any-return]
        x, t, context = inputs
        return network(x, t, encoder_hidden_states=context, return_dict=False)[0]  # type: ignore[no-any-return]


def for_openvino(call: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> Converted:
    """Compiled by OpenVINO for the lowest latency, computing in float32 or bfloat16 as asked."""
    import openvino

    model = openvino.convert_model(call, example_input=tuple(inputs), input=[tuple(x.shape) for x in inputs])
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    return lambda inputs: torch.from_numpy(compiled([x.numpy() for x in inputs])[0])


def for_onnxruntime(call: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> Converted:
    """A session of ONNX Runtime with all its graph optimisations."""
    if dtype != torch.float32:
        raise NotImplementedError("ONNX Runtime computes in float32 on this kind of processor")
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        torch.onnx.export(call, tuple(inputs), file, dynamo=True, external_data=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: torch.from_numpy(
        session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
    )


RUNTIMES = {"openvino": for_openvino, "onnxruntime": for_onnxruntime}


class Peer(Theirs):
    """The work of diffusers' networks in another runtime; the row `run` has none."""

    def __init__(self, pipe: Any, inputs: Inputs, case: Case, runtime: str) -> None:
        super().__init__(pipe, inputs, case)
        self.runtime, self.ready = runtime, dict[str, Converted]()

    def network(self, row: str) -> Work:
        inputs, case = self.inputs, self.case
        x = torch.cat([inputs.x, inputs.x])
        given = {
            "encode": [inputs.pixels],
            "step": [x, torch.full((len(x),), TIMESTEP), inputs.context],
            "decode": [inputs.latents],
        }[row]
        if row not in self.ready:
            self.ready.clear()  # never two converted networks in memory
            network = self.pipe.unet if row == "step" else self.pipe.vae
            if case.dtype != torch.float32:
                network = copy.deepcopy(network).float()
            self.ready[row] = RUNTIMES[self.runtime](Call(row, network).eval(), given, case.dtype)
        converted = self.ready[row]
        return lambda: converted(given)
