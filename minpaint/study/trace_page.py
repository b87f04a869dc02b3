"""The page of a traced run: what minpaint.study.trace has kept, from the schedule to the settings."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minpaint.engine.budget import format_size
from minpaint.engine.device import dtype_name
from minpaint.picture.view import ReferenceView, View
from minpaint.schedule import Schedule, log_snr
from minpaint.study.page import Line, Page, Panel, canvas, plot, slider, table
from minpaint.study.trace import Part, Trace, spread

STEPS = 50  # that the sliders have, at most; of more, these are chosen evenly
WORDS, PICTURES = 24, 4  # that are shown, at most; --raw has all
AVERAGE = "average"


def trace_page(trace: Trace) -> str:
    """The page of one run."""
    settings = trace.job.settings
    page = Page(f"“{settings.prompt}”, step by step")
    started = trace.job.frame.original
    page.pictures([("the picture", started), ("its mask", trace.job.frame.mask)])
    page.pictures((f"painted, seed {painting.seed}", painting.image) for painting in trace.paintings[:PICTURES])
    if len(trace.paintings) > PICTURES:
        page.note(f"{PICTURES} of {len(trace.paintings)} pictures are shown.")
    told = "How much of the picture is left at each timestep (alpha_bar), and at which the network was called."
    page.heading("Schedule", f"{told} The signal-to-noise ratio is alpha_bar / (1 - alpha_bar).")
    page.add(_schedule(trace.job.schedule))
    for number, part in enumerate(trace.parts):
        several = f" of part {number + 1} of {len(trace.parts)}" if len(trace.parts) > 1 else ""
        _part(page, trace, part, several)
    page.heading("Time and memory", "Seconds in the networks, and the most bytes that the run had taken by the end.")
    page.add(_times(trace))
    page.add(f'<div class="wide"><pre>{html.escape(trace.run.plan.table())}</pre></div>')
    page.heading("Settings")
    page.add(table(_settings(trace)))
    return page.finish()


def _part(page: Page, trace: Trace, part: Part, several: str) -> None:
    """Everything of one view."""
    page.heading(f"Mask{several}", "From the mask as given to the latent cells that are painted.")
    left, top, right, bottom = part.box
    page.pictures(part.stages.items())
    if several:
        page.note(f"This part is from ({left}, {top}) to ({right}, {bottom}).")
    if part.decoded:
        page.heading(f"What the network expects{several}", "Its guess of the finished picture at some steps, decoded.")
        page.pictures(
            (f"step {step + 1}" + (f", seed {seed}" if len(pictures) > 1 else ""), picture)
            for step, pictures in part.decoded.items()
            for seed, picture in zip(trace.job.settings.seeds, pictures[:PICTURES], strict=False)
        )
    shown = spread(len(part.steps), STEPS)
    page.heading(f"Steps{several}", "Latents as colours, by the linear map that fits this VAE best; a pixel is a cell.")
    page.add(f"<section class=steps>{slider([_told(trace, part, step) for step in shown])}")
    _latents(page, trace, part, shown)
    if part.attention:
        _attention(page, trace, part, shown)
    page.add("</section>")
    page.add(plot(*_norms(part), log=["what guidance added"]))


def _told(trace: Trace, part: Part, i: int) -> str:
    step = part.steps[i]
    alpha_bar = trace.job.schedule.level(trace.job.schedule.timesteps[i])
    return f"{i + 1} of {len(part.steps)}, t {step.t}, alpha_bar {alpha_bar:.4f}"


def _latents(page: Page, trace: Trace, part: Part, shown: Sequence[int]) -> None:
    """What goes into each step and comes out of it, for each picture."""
    for number, seed in enumerate(trace.job.settings.seeds[:PICTURES]):
        steps = [part.steps[i] for i in shown]
        rows = {
            "x_t, what the network sees": [part.inputs[i][number] for i in shown],
            "x0, the picture it expects": [step.x0[number] for step in steps],
            "eps, the noise it expects": [step.eps[number] for step in steps],
        }
        if steps[0].eps_cond is not None and steps[0].eps_uncond is not None:
            weight = trace.job.settings.guidance - 1
            rows["what guidance added to eps"] = [
                weight * (step.eps_cond[number] - step.eps_uncond[number])  # type: ignore[index]
                for step in steps
            ]
        figures = [canvas(page.sprite(trace.colours(torch.stack(frames))), name) for name, frames in rows.items()]
        page.heading(f"Latents, seed {seed}", level=3)
        page.add(f'<div class="row">{"".join(figures)}</div>')


def _attention(page: Page, trace: Trace, part: Part, shown: Sequence[int]) -> None:
    """Maps of the attention to each word, over the finished picture."""
    told = "Where the picture takes from each word of the prompt: bright is much, each word by its own scale."
    page.heading("Attention to each word", told, level=3)
    levels = {f"{y} x {x}": torch.stack(maps) for (y, x), maps in sorted(part.attention.items(), reverse=True)}
    levels = {AVERAGE: _average(list(levels.values())), **levels}
    words = [word for word, _ in trace.words[:WORDS]]
    if len(trace.words) > WORDS:
        page.note(f"The first {WORDS} of {len(trace.words)} words are shown.")
    prefix = page.new_name()
    options = "".join(f'<option value="{prefix}-{number}">{name}</option>' for number, name in enumerate(levels))
    page.add(f'<label>size of the feature map <select aria-label="size of the feature map">{options}</select></label>')
    view = trace.job.views[trace.parts.index(part)]
    for number, painting in enumerate(trace.paintings[:PICTURES]):
        under, figures = page.new_name(), []
        page.add(f'<div class="sprites">{page.image(_beneath(view, painting.image), under)}</div>')
        for position, word in enumerate(words):
            name = f"{number}-{position}"
            for level, maps in enumerate(levels.values()):
                frames = maps[list(shown), number, position, None]
                page.sprite(frames / frames.max().clamp(min=1e-9), f"{prefix}-{level}-{name}")
            figures.append(canvas(f"{prefix}-0-{name}", word, word=name, under=under))
        page.heading(f"Words, seed {painting.seed}", level=3)
        page.add(f'<div class="row">{"".join(figures)}</div>')


def _average(levels: Sequence[Tensor]) -> Tensor:
    """The mean of maps [steps, n, words, y, x] of several sizes, in the largest of them, which comes first."""
    size = levels[0].shape[-2:]
    return torch.stack([
        F.interpolate(maps.flatten(0, 1), size, mode="bilinear").view(*maps.shape[:3], *size) for maps in levels
    ]).mean(0)  # fmt: skip


def _beneath(view: View | ReferenceView, picture: Image.Image) -> Image.Image:
    """What the network painted in a view, as large as it saw it and pale, so that a map shows on it."""
    sheet = Image.new("RGB", view.extent, "white")
    inside = picture.crop(view.box).resize(view.size) if isinstance(view, View) else picture
    sheet.paste(inside.convert("RGB"))
    return Image.blend(sheet, Image.new("RGB", sheet.size, "white"), 0.25)


def _schedule(schedule: Schedule) -> str:
    every, called = range(len(schedule.alpha_bar)), schedule.timesteps
    levels = [schedule.level(t) for t in called]
    ratios = {"training": (every, _snr(schedule.alpha_bar)), ".called": (called, _snr(levels))}
    return plot(
        ("alpha_bar", "timestep", {"training": (every, schedule.alpha_bar), ".called": (called, levels)}),
        ("signal-to-noise ratio", "timestep", ratios),
        ("timesteps", "step", {"called": (range(1, len(called) + 1), called)}),
        log=["signal-to-noise ratio"],
    )


def _snr(levels: Sequence[float]) -> list[float]:
    return [math.exp(2 * log_snr(alpha_bar)) if 0 < alpha_bar < 1 else math.nan for alpha_bar in levels]


def _norms(part: Part) -> list[Panel]:
    """Root mean squares over the steps, of all pictures together, and the angle between the two predictions."""
    numbers = range(1, len(part.steps) + 1)

    def rms(of_steps: Sequence[Tensor]) -> Line:
        return numbers, [float(x.square().mean().sqrt()) for x in of_steps]

    lines = {"x_t": rms(part.inputs), "x0": rms([step.x0 for step in part.steps])}
    predictions = [(step.eps_uncond, step.eps_cond) for step in part.steps]
    pairs = [(a, b) for a, b in predictions if a is not None and b is not None]
    if not pairs:
        return [("root mean square", "step", {**lines, "eps": rms([step.eps for step in part.steps])})]
    lines |= {"eps, no prompt": rms([a for a, _ in pairs]), "eps, prompt": rms([b for _, b in pairs])}
    cosines = [float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)) for a, b in pairs]
    angles = [math.degrees(math.acos(cosine)) for cosine in cosines]
    return [
        ("root mean square", "step", lines),
        ("angle of the two eps in degrees", "step", {"angle": (numbers, angles)}),
        ("what guidance added", "step", {
            "added": rms([step.eps - a for step, (a, _) in zip(part.steps, pairs, strict=True)])
        }),
    ]  # fmt: skip


def _times(trace: Trace) -> str:
    rows = []
    for phase, planned in trace.run.plan.phases.items():
        calls = [(seconds, peak) for name, seconds, peak in trace.calls if name == phase]
        total, peak = sum(seconds for seconds, _ in calls), max((peak for _, peak in calls), default=0)
        mean = f"{total / len(calls):.3f}" if calls else ""
        rows.append((phase, len(calls), f"{total:.2f}", mean, format_size(planned.peak), format_size(peak)))
    return table(rows, ("phase", "calls", "seconds", "seconds a call", "planned peak", "peak by then"))


def _settings(trace: Trace) -> list[tuple[str, str]]:
    """Everything that was asked for, and the machine."""
    painter = trace.painter
    machine = {"model": painter.name, "device": painter.device, "dtype": dtype_name(painter.dtype)}
    every = machine | asdict(trace.job.settings) | {"sampler": trace.job.sampler, "PyTorch": torch.__version__}
    return [(name, str(value)) for name, value in every.items()]
