"""Trace a run: everything that happens between the prompt and the picture, kept to be shown (page.py) or compared.

The run is an ordinary one. Its networks are wrapped (Painter.around), so that what goes into them and comes out is
seen. On top come the weights of the attention to the words (watch.py), and some pictures decoded on the way.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from minpaint.engine.plan import PHASES
from minpaint.engine.run import Run
from minpaint.models.networks import Networks
from minpaint.models.vae import LATENT_CHANNELS
from minpaint.painter import Job, Painter, Painting
from minpaint.picture.explain import stages
from minpaint.picture.frame import Frame
from minpaint.picture.image import to_image
from minpaint.picture.mask import Box
from minpaint.samplers import Step
from minpaint.settings import Settings
from minpaint.study.attention import TO_PROMPT, attention_weights, word_positions
from minpaint.study.preview import Pair, colours, fit_rgb, pair
from minpaint.study.watch import Seen

T = TypeVar("T")
EMBED, ENCODE, DENOISE, DECODE = PHASES
SHOWN_DECODES = 5  # steps of which the predicted picture is really decoded


@dataclass
class Part:
    """What happened in one view; a picture is painted in several where --separate says so.

    box: the part of the picture. stages: those of its mask, by name. conditioning: mask and latents of the
        masked picture as the UNet sees them, [5, y, x]; None for a UNet with four channels.
    inputs: what the UNet saw in each step, without the conditioning, [n, 4, y, x] float32.
    steps: the sampler's, with all tensors on the CPU.
    attention: by size (y, x) of the feature map, of every step, how much each cell takes of each word, mean over
        heads and modules, [n, words, y, x].
    decoded: by step, the pictures that the network took for the result, of the VAE, [n] pictures.
    """

    box: Box
    stages: dict[str, Image.Image]
    conditioning: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    attention: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    decoded: dict[int, list[Image.Image]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return bool(self.steps) and self.steps[-1].i + 1 == self.steps[-1].total


@dataclass
class Trace:
    """A run and all that was seen of it.

    job: the request as the painter understood it, with schedule and views. words: of the prompt, with the
        positions of their tokens. embeddings: by prompt, [1, tokens, D] float32.
    calls: for every call of a network, in order, its phase, the seconds it took, and the most bytes that the run
        had taken by then.
    run: the painter's, with its plan and the memory it took.
    to_rgb: the linear map from latents to colours that fits this checkpoint's VAE best, [5, 3]: a weight for each
        latent channel and a constant, to pixels in [-1, 1].
    """

    painter: Painter
    job: Job
    words: list[tuple[str, list[int]]]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    calls: list[tuple[str, float, int]] = field(default_factory=list)
    to_rgb: Tensor = field(default_factory=lambda: torch.zeros(LATENT_CHANNELS + 1, 3))
    paintings: list[Painting] = field(default_factory=list)
    run: Run = field(init=False)

    def colours(self, latents: Tensor) -> Tensor:
        """Latents [n, 4, y, x], scaled -> about the picture they stand for, [n, 3, y, x] in [-1, 1], a pixel a cell."""
        return colours(latents, self.to_rgb)


def trace_run(
    painter: Painter,
    frame: Frame,
    settings: Settings,
    on_step: Callable[[Step], object] | None = None,
    inside: bool = True,
) -> Trace:
    """Paint, and keep what happens.

    inside: also keep the attention to the words, and decode what the network expected at a few steps. Then the
    layers are watched, which changes the result by rounding (watch.py); without it, not a bit is changed.

    Raises:
        The painter's errors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the painter says the same when it paints
        job = painter.job(frame, settings)
    trace = Trace(painter, job, word_positions(painter.tokenizer, settings.prompt))
    pairs: list[Pair] = []

    def step(step: Step) -> None:
        on_cpu: dict[str, Any] = {name: x.cpu() for name, x in step._asdict().items() if isinstance(x, Tensor)}
        trace.parts[-1].steps.append(step._replace(**on_cpu))
        if on_step is not None:
            on_step(step)

    before = painter.around
    with ExitStack() as stack:
        stack.callback(setattr, painter, "around", before)
        painter.around = lambda networks: _Recorder(before(networks), trace, pairs, frame, inside)
        if inside and trace.words:
            attention = _Attention(trace)
            attention.seen = stack.enter_context(painter.watch(attend=attention))
            stack.callback(attention.average)
        trace.paintings = painter.paint(frame, settings, step)
    trace.to_rgb = fit_rgb(pairs)
    return trace


class _Recorder:
    """A run's networks, which tell the trace of every call."""

    def __init__(self, networks: Networks, trace: Trace, pairs: list[Pair], frame: Frame, decodes: bool) -> None:
        self.networks, self.trace, self.pairs, self.frame, self.decodes = networks, trace, pairs, frame, decodes
        assert trace.painter.last_run is not None
        trace.run = trace.painter.last_run
        self.scaling = trace.painter.vae_config.scaling_factor

    def embed(self, prompt: str) -> Tensor:
        embeddings = self._timed(EMBED, lambda: self.networks.embed(prompt))
        self.trace.embeddings[prompt] = embeddings.float().cpu()
        return embeddings

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self._timed(ENCODE, lambda: self.networks.encode(pixels))
        self.pairs.append(pair(self.scaling * mean, pixels))
        return mean, logvar

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        trace = self.trace
        if not trace.parts or trace.parts[-1].finished:
            view = trace.job.views[len(trace.parts)]
            trace.parts.append(Part(view.box, stages(self.frame, view)))
        part = trace.parts[-1]
        part.inputs.append(x[: trace.job.settings.count, :LATENT_CHANNELS].cpu())
        if x.shape[1] > LATENT_CHANNELS:
            part.conditioning = x[0, LATENT_CHANNELS:].cpu()
        return self._timed(DENOISE, lambda: self.networks.unet(x, t, context))

    def decode(self, latents: Tensor) -> Tensor:
        part = self.trace.parts[-1]
        if self.decodes and not part.decoded:
            for number in spread(len(part.steps), SHOWN_DECODES):
                expected = part.steps[number].x0.to(latents) / self.scaling
                part.decoded[number] = [to_image(self._decode(row[None])[0]) for row in expected]
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        pixels = self._timed(DECODE, lambda: self.networks.decode(latents))
        self.pairs.append(pair(self.scaling * latents, pixels))
        return pixels

    def _timed(self, phase: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = call()
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, Tensor):
            first.flatten()[0].item()  # a GPU has finished only when somebody reads what it computed
        self.trace.calls.append((phase, time.perf_counter() - start, self.trace.run.measured))
        return result


class _Attention:
    """The attention to the words, collected for a trace: the mean over the heads and modules of each size."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.seen: Seen | None = None
        self.modules = defaultdict[tuple[int, tuple[int, int]], set[str]](set)  # by part and size

    def __call__(self, name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: object) -> None:
        """Add one attention's weights, of the rows of the batch that have the prompt."""
        if not name.endswith(TO_PROMPT) or self.seen is None:
            return
        trace, part = self.trace, self.trace.parts[-1]
        count = trace.job.settings.count
        size = _size_of_map(q.shape[2], part.inputs[0].shape[2:])
        maps = part.attention.setdefault(size, [])
        if len(maps) < len(part.inputs):
            maps.append(torch.zeros(count, len(trace.words), *size))
        self.modules[len(trace.parts) - 1, size].add(name)
        for row in range(len(q)):
            picture = self.seen.rows.start + row - (count if self.seen.guided else 0)
            if picture >= 0:
                weights = attention_weights(q[row], k[row]).mean(0)  # over the heads: [cells, tokens]
                words = torch.stack([weights[:, positions].sum(1) for _, positions in trace.words])
                maps[-1][picture] += words.view(-1, *size).cpu()

    def average(self) -> None:
        """Turn the sums over the modules into means."""
        for (part, size), names in self.modules.items():
            maps = self.trace.parts[part].attention
            maps[size] = [each / len(names) for each in maps[size]]


def _size_of_map(tokens: int, cells: torch.Size) -> tuple[int, int]:
    """Rows and columns of a feature map of so many cells: the latents', halved some times and rounded up."""
    y, x = cells
    while y * x > tokens:
        y, x = -(-y // 2), -(-x // 2)
    return y, x


def spread(length: int, count: int) -> list[int]:
    """At most `count` positions in a list of some length, evenly from the first to the last."""
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def save_raw(trace: Trace, folder: Path) -> list[Path]:
    """Write a trace's tensors as safetensors, one file a part: `part-0.safetensors`, ...

    inputs, x, x0, eps, eps_uncond, eps_cond: [steps, n, 4, y, x]; timesteps [steps]; conditioning [5, y, x];
    attention.YxX: [steps, n, words, Y, X]; embeddings.prompt, embeddings.negative_prompt: [1, tokens, D];
    to_rgb [5, 3]. The file's metadata has the words and the settings as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings, written = trace.job.settings, []
    prompts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
    for number, part in enumerate(trace.parts):
        tensors = {"inputs": torch.stack(part.inputs), "timesteps": torch.tensor([step.t for step in part.steps])}
        for name in ("x", "x0", "eps", "eps_uncond", "eps_cond"):
            of_steps = [getattr(step, name) for step in part.steps]
            if of_steps[0] is not None:
                tensors[name] = torch.stack(of_steps)
        if part.conditioning is not None:
            tensors["conditioning"] = part.conditioning
        tensors |= {f"attention.{y}x{x}": torch.stack(maps) for (y, x), maps in part.attention.items()}
        tensors |= {
            f"embeddings.{name}": trace.embeddings[text] for name, text in prompts.items() if text in trace.embeddings
        }
        told = {"words": json.dumps([word for word, _ in trace.words]), "settings": json.dumps(vars(settings))}
        target = folder / f"part-{number}.safetensors"
        beside = target.with_suffix(".part")
        save_file({name: x.contiguous() for name, x in (tensors | {"to_rgb": trace.to_rgb}).items()}, beside, told)
        os.replace(beside, target)
        written.append(target)
    return written
