"""Pictures of equal size in one batch of the network, each with its own hole, prompt and seed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minpaint.engine.device import without_gradients
from minpaint.engine.run import Run
from minpaint.inpaint import inpaint, seeded_noise
from minpaint.models.networks import PlainNetworks
from minpaint.painter import Job, Painter, Painting
from minpaint.picture.canvas import Canvas
from minpaint.picture.seam import seam_error
from minpaint.samplers import SAMPLERS

# Whole pictures that count against the budget for each painting of a run, because they are in memory
# while the network works: a frame, made of four, that was opened for the next batch, and one being saved.
MEANWHILE = 8


@dataclass(frozen=True)
class Canvases(Canvas):
    """Those of several pictures with holes of their own: all tensors are [n, ...]."""

    each: tuple[Canvas, ...]

    def filled(self, fill: str) -> Tensor:
        return torch.cat([canvas.filled(fill) for canvas in self.each])


class OwnPrompts:
    """A run whose UNet sees a prompt of its own beside each picture, in place of one for all.

    context: [n or 2n, tokens, D], first those without the prompt, where guidance is on.
    """

    def __init__(self, run: Run, context: Tensor) -> None:
        self.embed, self.encode, self.decode = run.embed, run.encode, run.decode
        self.run, self.context = run, context

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.run.unet(x, t, self.context)


def alike(job: Job) -> Hashable:
    """Equal for jobs that one batch can hold: they differ in picture, hole, prompts and seed alone."""
    if len(job.views) > 1:
        return id(job)  # each view starts from what the ones before have painted
    common = replace(job.settings, prompt="", negative_prompt="", seed=0)
    return job.frame.original.size, job.views[0].extent, job.settings.guided, common


@without_gradients
def paint_together(painter: Painter, jobs: list[Job]) -> list[Painting]:
    """Paint jobs that are `alike` in one batch, which the engine divides as the budget asks.

    Each painting is the one that `painter.paint` gives for its job alone, but for rounding: the kernels
    add numbers in another order for a batch, which changes a pixel by one level at most.
    """
    first, settings = jobs[0], jobs[0].settings
    several: dict[str, Any] = {"count": len(jobs), "starts": len(jobs), "started": MEANWHILE * len(jobs)}
    several |= {name: max(getattr(job.request, name) for job in jobs) for name in ("part", "seam", "saving")}
    networks = PlainNetworks(painter.unet, painter.vae, painter.text_encoder, painter.tokenizer)
    with painter.engine.run(replace(first.request, **several), networks) as run:
        prompts = [job.settings.negative_prompt for job in jobs] if settings.guided else []
        prompts += [job.settings.prompt for job in jobs]
        context = torch.cat([run.embed(prompt) for prompt in prompts])
        canvases = tuple(job.views[0].canvas([job.start]) for job in jobs)
        pixels, blanked, cells = (
            torch.cat([getattr(canvas, name) for canvas in canvases]) for name in ("pixels", "blanked", "cells")
        )
        noise = seeded_noise([job.settings.seed for job in jobs])
        for step in inpaint(
            OwnPrompts(run, context),
            Canvases(pixels, blanked, cells, canvases),
            settings.prompt,
            first.schedule,
            lambda shape: noise(shape).to(painter.device),
            sampler=SAMPLERS[first.sampler],
            eta=settings.eta or 0.0,
            negative_prompt=settings.negative_prompt,
            guidance=settings.guidance,
            fill=first.views[0].fill(settings),
            blend=first.views[0].blends,
            in_channels=painter.unet_config.in_channels,
            scaling_factor=painter.vae_config.scaling_factor,
        ):
            last = step
        finished = []
        for job, latents in zip(jobs, last.x, strict=True):
            decoded = run.decode(latents[None] / painter.vae_config.scaling_factor)[0]
            finished.append(job.views[0].finish(job.start, decoded, settings.color_match))
    paintings = []
    for job, latents, picture in zip(jobs, last.x, finished, strict=True):
        image, hole = job.views[0].complete(job.frame, picture)
        seed, seam = job.settings.seed, seam_error(image, hole)
        paintings.append(Painting(image, latents.cpu().clone(), seed, last.i + 1, seam))
    return paintings
