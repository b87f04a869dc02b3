"""The two sides that bench.speed compares: one call of a network, or a whole run, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench import common
from bench.common import StepClock
from minpaint.checkpoint.architecture import Architecture
from minpaint.engine.calls import Request
from minpaint.engine.run import Run
from minpaint.models.networks import PlainNetworks
from minpaint.models.vae import LATENT_CHANNELS
from minpaint.painter import Painter

TIMESTEP = 501

Work = Callable[[], Tensor]
Side = Callable[[], AbstractContextManager[Work]]


@dataclass(frozen=True)
class Case:
    """The sizes of the work, and where it is done."""

    size: int
    batch: int
    steps: int
    device: torch.device
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"


@dataclass(frozen=True)
class Inputs:
    """The inputs of the networks in float32, the same for both sides.

    pictures: an image and its mask. pixels: [1, 3, Y, X], on the CPU as pictures are.
    latents: [1, 4, y, x], unscaled. x: [n, 4 or 9, y, x]. context: [2n, 77, D], n rows for the
    negative prompt and then n for the prompt.
    """

    pictures: tuple[Image.Image, Image.Image]
    pixels: Tensor
    latents: Tensor
    x: Tensor
    context: Tensor


def make_inputs(architecture: Architecture, case: Case) -> Inputs:
    """Pictures of noise and random tensors of the shapes that a case needs."""
    generator = torch.Generator().manual_seed(0)
    side = case.size // architecture.vae.factor

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Inputs(
        common.make_input(case.size),
        normal(1, 3, case.size, case.size).clamp(-1, 1),
        normal(1, LATENT_CHANNELS, side, side).to(case.device),
        normal(case.batch, architecture.unet.in_channels, side, side).to(case.device),
        normal(2 * case.batch, 77, architecture.unet.context_dim).to(case.device),
    )


class Ours:
    """minpaint's work, row by row."""

    def __init__(self, painter: Painter, inputs: Inputs, case: Case) -> None:
        self.painter, self.inputs, self.case = painter, inputs, case
        self.paces: list[float | None] = []

    @contextmanager
    def __call__(self, row: str) -> Iterator[Work]:
        """A call ready to be timed; what minpaint caches for it is freed afterwards."""
        case, painter = self.case, self.painter
        request = Request(case.size, case.size, case.batch, guided=True, again=False)
        networks = PlainNetworks(painter.unet, painter.vae, painter.text_encoder, painter.tokenizer)
        with painter.engine.run(request, networks) as run:
            yield self.paint if row == "run" else torch.inference_mode()(self.network(run, row))

    def network(self, run: Run, row: str) -> Work:
        inputs = self.inputs
        context = inputs.context.to(self.case.dtype)
        x = torch.cat([inputs.x, inputs.x])
        t = torch.full((len(x),), TIMESTEP, device=self.case.device)
        return {
            "encode": lambda: run.encode(inputs.pixels)[0],
            "step": lambda: run.unet(x, t, context),
            "decode": lambda: run.decode(inputs.latents),
        }[row]

    def paint(self) -> Tensor:
        clock, case = StepClock(), self.case
        latents = common.run_painter(
            self.painter, self.inputs.pictures, case.steps, case.batch, sampler="ddim", on_step=clock
        )
        self.paces.append(clock.median)
        return latents[0]


class Theirs:
    """diffusers' work, row by row, as its pipeline does it; perhaps with the UNet and the decoder compiled."""

    def __init__(self, pipe: Any, inputs: Inputs, case: Case, compiled: bool = False) -> None:
        self.pipe, self.inputs, self.case = pipe, inputs, case
        self.paces: list[float | None] = []
        self.unet, self.decoder = pipe.unet, pipe.vae.decode
        if compiled:
            torch.compiler.reset()  # forgets the shapes before
            how: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
            self.unet, self.decoder = torch.compile(self.unet, **how), torch.compile(self.decoder, **how)

    @contextmanager
    def __call__(self, row: str) -> Iterator[Work]:
        """A call ready to be timed."""
        yield self.paint if row == "run" else torch.no_grad()(self.network(row))

    def network(self, row: str) -> Work:
        inputs, case = self.inputs, self.case
        x, context, latents = (z.to(case.dtype) for z in (inputs.x, inputs.context, inputs.latents))
        x = torch.cat([x, x])
        t = torch.tensor(TIMESTEP, device=case.device)

        def encode() -> Tensor:
            pixels = inputs.pixels.to(case.device, case.dtype)
            mean: Tensor = self.pipe.vae.encode(pixels).latent_dist.mean.float()
            return mean

        def step() -> Tensor:
            output: Tensor = self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]
            return output.float() if output.dtype != torch.float32 else output.clone()  # a graph's own otherwise

        return {"encode": encode, "step": step, "decode": lambda: self.decode(latents).cpu().float()}[row]

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(latents, return_dict=False)[0]
        return pixels

    def paint(self) -> Tensor:
        pipe, case, clock = self.pipe, self.case, StepClock()
        unet = pipe.unet
        pipe.unet, pipe.vae.decode = self.unet, lambda latents, **_: (self.decode(latents),)
        try:
            latents = common.run_pipe(pipe, self.inputs.pictures, case.steps, case.batch, clock)
            self.paces.append(clock.median)
            return latents[0]
        finally:
            pipe.unet = unet
            del pipe.vae.decode


def load_pipe(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' pipeline with DDIM."""
    from diffusers import DDIMScheduler

    pipe = common.load_pipe(folder, dtype)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe.to(device)
