"""Compare two traced runs: where they part, by how much, and what of it can be seen."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
from PIL import Image, ImageChops
from torch import Tensor

from minpaint.engine.device import dtype_name
from minpaint.picture.image import to_pixels
from minpaint.study.page import Line, Page, canvas, plot, slider, table
from minpaint.study.parity_record import UNLIKE, relative_error
from minpaint.study.trace import Part, Trace, spread
from minpaint.study.trace_page import PICTURES, STEPS

BEFORE, AFTER = -1, sys.maxsize  # steps
ROUNDING = 1e-5  # relative; two ways to compute the same in float32 differ by less
SEEN = 0.01  # relative; from here on two runs count as apart


UNCOND, COND, MOVED = "eps without the prompt", "eps with the prompt", "where the sampler goes"


class Difference(NamedTuple):
    """How much two runs differ in one thing.

    step: counted from 0; BEFORE and AFTER for what there is before the first and after the last. what: its name.
    size: |b - a| / |a|, UNLIKE where there is nothing to compare, as with other timesteps or shapes.
    """

    step: int
    what: str
    size: float

    @property
    def when(self) -> str:
        ends = {BEFORE: "before the first step", AFTER: "after the last step"}
        return ends.get(self.step, f"in step {self.step + 1}")

    def __str__(self) -> str:
        how_much = f"differs by {self.size:.2g}" if self.size < UNLIKE else "is another"
        return f"{self.when}: {self.what} {how_much}"


def differences(a: Trace, b: Trace) -> Iterator[Difference]:
    """All that two runs compute, in the order in which it is computed, with how much it differs."""
    for name, prompts in {
        "the negative prompt": (a.job.settings.negative_prompt, b.job.settings.negative_prompt),
        "the prompt": (a.job.settings.prompt, b.job.settings.prompt),
    }.items():
        embeddings = (a.embeddings.get(prompts[0]), b.embeddings.get(prompts[1]))
        yield Difference(BEFORE, f"the embedding of {name}", difference(*embeddings))
    if len(a.parts) != len(b.parts):
        yield Difference(BEFORE, "the number of parts", UNLIKE)
    start = 0
    for part_a, part_b in zip(a.parts, b.parts, strict=False):
        yield from _of_parts(part_a, part_b, start)
        start += len(part_a.steps)
    for one, other in zip(a.paintings, b.paintings, strict=False):
        pixels = (to_pixels(each.image.convert("RGB")) for each in (one, other))
        yield Difference(AFTER, "the picture", difference(*pixels))


def _of_parts(a: Part, b: Part, start: int) -> Iterator[Difference]:
    pictures = [None if part.conditioning is None else part.conditioning[1:] for part in (a, b)]
    for stage in ("hole", "cover", "latent cells"):
        masks_of_stage = [to_pixels(part.stages[stage].convert("RGB")) for part in (a, b)]
        yield Difference(BEFORE, f"the mask ({stage})", difference(*masks_of_stage))
    yield Difference(BEFORE, "what the steps start from", difference(a.inputs[0], b.inputs[0]))
    yield Difference(BEFORE, "the masked picture", difference(*pictures))
    for i, (one, other) in enumerate(zip(a.steps, b.steps, strict=False)):
        yield Difference(start + i, "the timestep", 0.0 if one.t == other.t else UNLIKE)
        yield Difference(start + i, UNCOND, difference(one.eps_uncond, other.eps_uncond))
        cond = [step.eps if step.eps_cond is None else step.eps_cond for step in (one, other)]
        yield Difference(start + i, COND, difference(*cond))
        yield Difference(start + i, "eps after guidance", difference(one.eps, other.eps))
        yield Difference(start + i, MOVED, difference(one.x, other.x))
    if len(a.steps) != len(b.steps):
        yield Difference(start + min(len(a.steps), len(b.steps)), "the number of steps", UNLIKE)


def difference(a: Tensor | None, b: Tensor | None) -> float:
    """|b - a| / |a|; UNLIKE for other shapes or if only one is there, or where a is 0 and b is not."""
    if a is None or b is None:
        return 0.0 if a is b else UNLIKE
    return relative_error(b, a)


class Verdict(NamedTuple):
    """Where two runs part.

    first: the first thing that differs at all. beyond: the first that differs by more than rounding. apart: the first
    step whose latents differ by more than 1 %. final: how much the final latents differ. Where there is none, None.
    """

    first: Difference | None
    beyond: Difference | None
    apart: int | None
    final: float

    def __str__(self) -> str:
        if self.first is None:
            return "The two runs are the same, to the last bit."
        told = (
            f"They part {self.beyond or self.first}." if self.beyond else f"They differ by rounding only: {self.first}."
        )
        if self.apart is not None:
            told += f" From step {self.apart + 1} on, their latents differ by more than {SEEN:.0%}."
        return told + (f" The final latents differ by {self.final:.2g}." if self.final < UNLIKE else "")


def judge(a: Trace, b: Trace) -> Verdict:
    """Find where two runs part."""
    every = list(differences(a, b))
    moves = [each for each in every if each.what == MOVED]
    return Verdict(
        next((each for each in every if each.size > 0), None),
        next((each for each in every if each.size > ROUNDING), None),
        next((each.step for each in moves if each.size > SEEN), None),
        difference(a.parts[-1].steps[-1].x, b.parts[-1].steps[-1].x),
    )


def options_apart(a: Trace, b: Trace) -> list[tuple[str, str, str]]:
    """The options of two runs that are not the same: name, value, value."""
    both = []
    for trace in (a, b):
        machine = {"model": trace.painter.name, "dtype": dtype_name(trace.painter.dtype)}
        both.append(machine | asdict(trace.job.settings) | {"sampler": trace.job.sampler})
    return [(name, str(both[0][name]), str(both[1][name])) for name in both[0] if both[0][name] != both[1][name]]


def compare_page(a: Trace, b: Trace, names: tuple[str, str] = ("A", "B")) -> str:
    """The page that shows two runs side by side."""
    page = Page(f"{names[0]} and {names[1]}")
    page.add(f"<p><strong>{html.escape(str(judge(a, b)))}</strong></p>")
    page.heading("Options that differ")
    page.add(table(options_apart(a, b), ("", *names)))
    page.heading("Pictures", "The difference is amplified so that its largest is white.")
    for one, other in list(zip(a.paintings, b.paintings, strict=False))[:PICTURES]:
        pictures = [(f"{name}, seed {each.seed}", each.image) for name, each in zip(names, (one, other), strict=True)]
        page.pictures([*pictures, *_apart(one.image, other.image)])
    page.heading("Where they part", "Relative difference in each step: of the two eps, and of the latents.")
    every, curves = list(differences(a, b)), dict[str, Line]()
    for name, what in {"eps without the prompt": UNCOND, "eps with the prompt": COND, "latents": MOVED}.items():
        sizes = {each.step + 1: each.size for each in every if each.what == what and each.size < UNLIKE}
        if any(sizes.values()):
            curves[name] = (list(sizes), [size or math.nan for size in sizes.values()])
    if curves:
        page.add(plot(("relative difference", "step", curves), log=["relative difference"]))
    for part_a, part_b in zip(a.parts, b.parts, strict=False):
        _steps(page, a, b, (part_a, part_b), names)
    page.heading("Everything, in order")
    rows = [
        ("before" if each.step is None else each.step + 1, each.what, f"{each.size:.3g}") for each in differences(a, b)
    ]
    page.add(f"<details><summary>{len(rows)} figures</summary>{table(rows, ('step', '', 'difference'))}</details>")
    return page.finish()


def _steps(page: Page, a: Trace, b: Trace, parts: tuple[Part, Part], names: tuple[str, str]) -> None:
    """The pictures that either run expected in each step, and how they differ, under one slider."""
    steps = list(zip(parts[0].steps, parts[1].steps, strict=False))
    shown = spread(len(steps), STEPS)
    page.heading("Steps", "The picture that the network expects (x0), as colours by the linear map of each run's VAE.")
    page.add(f"<section class=steps>{slider([f'{i + 1}, t {steps[i][0].t} and {steps[i][1].t}' for i in shown])}")
    for number in range(min(len(a.paintings), len(b.paintings), PICTURES)):
        both = [
            trace.colours(torch.stack([steps[i][side].x0[number] for i in shown])) for side, trace in enumerate((a, b))
        ]
        figures = [canvas(page.sprite(frames), f"x0 of {name}") for frames, name in zip(both, names, strict=True)]
        if both[0].shape == both[1].shape:
            apart = (both[1] - both[0]).abs()
            figures.append(canvas(page.sprite(apart / apart.max().clamp(min=1e-9) * 2 - 1), "difference, amplified"))
        page.add(f'<div class="row">{"".join(figures)}</div>')
    page.add("</section>")


def _apart(a: Image.Image, b: Image.Image) -> list[tuple[str, Image.Image]]:
    """The amplified difference of two pictures with its caption; nothing for pictures of other sizes."""
    if a.size != b.size:
        return []
    apart = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    largest = max(high for _, high in apart.getextrema())  # type: ignore[misc]
    changed = sum(apart.convert("L").point(lambda level: level > 0).histogram()[1:])
    share = changed / (a.width * a.height)
    caption = f"difference, at most {largest} levels, in {share:.1%} of the pixels"
    return [(caption, apart.point(lambda level: level * 255 // max(largest, 1)))]
