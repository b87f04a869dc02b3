"""What the exercises are done with: the tiny model, its example picture, and how an answer is judged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import minpaint
from minpaint.checkpoint.hub import weights_folder
from minpaint.models.networks import PlainNetworks
from minpaint.painter import Painter
from minpaint.picture.canvas import Canvas, reference_canvas
from minpaint.samplers import Model
from minpaint.schedule import Schedule, make_schedule
from minpaint.study.parity_record import UNLIKE, relative_error

Answer = Callable[..., Any]


class Result(NamedTuple):
    """What a check has measured: a figure, what it is of, and its bound; `most`: that is the most it may be."""

    figure: float
    bound: float
    name: str = "relative error"
    most: bool = True

    @property
    def right(self) -> bool:
        return self.figure <= self.bound if self.most else self.figure >= self.bound

    def __str__(self) -> str:
        return f"{self.name} {self.figure:.3g}, asked: at {'most' if self.most else 'least'} {self.bound:g}"


@dataclass(frozen=True)
class Exercise:
    """One exercise. name: of the function that answers it. task: what it takes and returns. check: tries an answer."""

    chapter: str
    name: str
    task: str
    check: Callable[[Lab, Answer], Result]


EXERCISES: list[Exercise] = []


def exercise(chapter: str) -> Callable[[Callable[[Lab, Answer], Result]], Callable[[Lab, Answer], Result]]:
    """Add a check to the exercises: it has the name of the function to write, and the task as its docstring."""

    def add(check: Callable[[Lab, Answer], Result]) -> Callable[[Lab, Answer], Result]:
        EXERCISES.append(Exercise(chapter, check.__name__, inspect.getdoc(check) or "", check))
        return check

    return add


def apart(found: Any, expected: Tensor) -> float:
    """|found - expected| / |expected|; UNLIKE for what is no tensor of this shape, or is not finite."""
    return relative_error(found, expected) if isinstance(found, Tensor) else UNLIKE


class Lab:
    """The tiny model on the CPU in float32, the example's picture and mask, and a run's ingredients."""

    @cached_property
    def painter(self) -> Painter:
        return minpaint.load("tiny", device="cpu", dtype="fp32")

    @cached_property
    def networks(self) -> PlainNetworks:
        return PlainNetworks(self.painter.unet, self.painter.vae, self.painter.text_encoder, self.painter.tokenizer)

    @cached_property
    def picture(self) -> Image.Image:
        return Image.open(weights_folder() / "example" / "picture.png").convert("RGB")

    @cached_property
    def mask(self) -> Image.Image:
        return Image.open(weights_folder() / "example" / "mask.png").convert("L")

    @cached_property
    def canvas(self) -> Canvas:
        return reference_canvas(self.picture, self.mask, self.painter.vae_config.factor)

    @property
    def scaling(self) -> float:
        return self.painter.vae_config.scaling_factor

    def schedule(self, steps: int, sampler: str = "ddim", strength: float = 1.0) -> Schedule:
        return make_schedule(self.painter.scheduler_config, sampler, steps, strength)

    def noise(self, seed: int = 0, count: int = 1) -> Tensor:
        """Standard normal noise of the latents' shape, [count, 4, 16, 16]."""
        return torch.randn(count, 4, *self.canvas.cells.shape[2:], generator=torch.Generator().manual_seed(seed))

    def encode(self, pixels: Tensor) -> Tensor:
        """The scaled mean of a picture's latents, [n, 4, y, x]."""
        return self.scaling * self.networks.encode(pixels)[0]

    @cached_property
    def conditioning(self) -> Tensor:
        """The five channels that the example's hole adds to the latents: the mask, and the masked picture's latents."""
        return torch.cat([(self.canvas.cells > 0).float(), self.encode(self.canvas.masked_pixels)], dim=1)

    def model(self, prompt: str, conditioning: Tensor | None = None) -> Model:
        """(x [n, 4, y, x], t) -> the noise that the UNet predicts with this prompt in the example's hole."""
        context = self.networks.embed(prompt)
        given = self.conditioning if conditioning is None else conditioning

        def predict(x: Tensor, t: float) -> Tensor:
            inputs = torch.cat([x, given.expand(len(x), -1, -1, -1)], dim=1)
            output: Tensor = self.networks.unet(inputs, torch.full((len(x),), float(t)), context.expand(len(x), -1, -1))
            return output

        return predict
