"""Does the tiny model paint what it is asked? Measured on held-out scenes, with controls.

    python -m bench.quality                      # prints a table, appends it to bench/results/
    python -m bench.quality --scenes 20          # a quick look

A small classifier, trained here on the renderer's own pictures, says what stands in a hole; its
accuracy on such pictures is the table's first row. Pictures are painted through the public call
with its defaults, except for the sampler (DPM-Solver++, 20 steps).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench import common
from bench.scenes import HELD_OUT, MODEL, Case, tiny
from minpaint.picture.image import to_image, to_unit
from weights import world

SAMPLER: dict[str, Any] = {"sampler": "dpmpp", "steps": 20}
NOTHING = len(world.KINDS)  # the classifier's last class
WINDOW = 60  # pixels of the square the classifier looks at
VISIBLE = 36  # levels by which a thing's pixel differs from the scenery behind it


# The holes over scenery ---------------------------------------------------------------------------


def scenery(number: int) -> tuple[world.Scene, Image.Image]:
    """A held-out scene and a hole that hides none of its things, nor its sun or moon."""
    rng = Random(HELD_OUT + 500_000 + number)
    while True:
        scene = world.scene(rng, misplaced=0.0)
        mask = world.hole_anywhere(rng)
        boxes = [thing.box for thing in scene.things]
        if scene.disc:
            x, y = scene.disc
            boxes.append((x - 0.12, y - 0.12, x + 0.12, y + 0.12))
        white = to_unit(mask)[0, 0]
        if white.sum() >= 300 and not any(white[world.pixels(box)].any() for box in boxes):
            return scene, mask


# The judges --------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Which kind of thing is in a square of WINDOW pixels, or nothing: [n, 3, y, x] -> [n, 7]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, out in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(width, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(128, NOTHING + 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.features(x).amax((2, 3)))
        return found


def window(picture: Image.Image, x: float, y: float) -> Tensor:
    """The square around a place, moved inside the picture where it would stick out."""
    left, top = (min(max(round(world.SIZE * v - WINDOW / 2), 0), world.SIZE - WINDOW) for v in (x, y))
    return to_unit(picture.crop((left, top, left + WINDOW, top + WINDOW)))


def _middle(thing: world.Thing) -> tuple[float, float]:
    left, top, right, bottom = thing.box
    return (left + right) / 2, (top + bottom) / 2


def _real_crop(rng: Random) -> tuple[Tensor, int]:
    """A square of a rendered scene around one thing, or around none."""
    scene = world.scene(rng, things=1, misplaced=0.5)
    if rng.random() < 0.15:
        empty = replace(scene, things=())
        return window(world.draw(empty), rng.random(), rng.random()), NOTHING
    [thing] = scene.things
    x, y = _middle(thing)
    picture = world.draw(scene)
    return window(picture, x + rng.uniform(-0.07, 0.07), y + rng.uniform(-0.07, 0.07)), world.KINDS.index(thing.kind)


def train_judge(steps: int = 500, seed: int = 0) -> tuple[Judge, float]:
    """The classifier, and its accuracy on 1,000 real crops it was not trained on."""
    torch.manual_seed(seed)
    judge, rng = Judge(), Random(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    for step in range(steps):
        crops, kinds = zip(*(_real_crop(rng) for _ in range(32)), strict=True)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        pixels = torch.cat(crops)
        pixels = pixels + 0.02 * torch.randn_like(pixels)
        optimizer.zero_grad()
        F.cross_entropy(judge(pixels), torch.tensor(kinds)).backward()
        optimizer.step()
    judge.eval()
    fresh = Random(HELD_OUT + 900_000)
    with torch.no_grad():
        crops, kinds = zip(*(_real_crop(fresh) for _ in range(1000)), strict=True)
        right = (judge(torch.cat(crops)).argmax(1) == torch.tensor(kinds)).float().mean()
    return judge, float(right)


def colour_of(picture: Image.Image, case: Case, kind: str) -> str | None:
    """The colour of what stands in a case's hole, or None if nothing does.

    The mean of the pixels that differ from the empty scene, against that of the renderer's
    things of this kind in every colour.
    """
    empty, hole = to_unit(case.without)[0], to_unit(case.mask)[0, 0] > 0.5

    def mean(image: Image.Image) -> Tensor | None:
        pixels = to_unit(image)[0]
        seen = ((pixels - empty).abs().amax(0) * 255 > VISIBLE) & hole
        return pixels[:, seen].mean(1) if int(seen.sum()) >= 40 else None

    painted = mean(picture)
    if painted is None:
        return None
    distances = {}
    for colour in world.COLOURS:
        real = mean(case.drawn(colour, kind))
        distances[colour] = float((real - painted).norm()) if real is not None else math.inf
    return min(distances, key=lambda colour: distances[colour])


# Painting ----------------------------------------------------------------------------------------


def paint(picture: Image.Image, mask: Image.Image, prompt: str, seed: int = 0, **options: Any) -> Image.Image:
    """A painting with the measured model."""
    [painting] = tiny()(picture, mask, prompt, seed=seed, **(SAMPLER | options))
    return painting.image


def paint_case(case: Case, prompt: str) -> Image.Image:
    return paint(case.without, case.mask, prompt, seed=case.number)


def reconstruct(number: int) -> tuple[float, float, int]:
    """Mean squared errors of the autoencoder on a held-out scene: whole, in the boxes, and their pixels."""
    scene = world.scene(Random(HELD_OUT + 700_000 + number))
    pixels = to_unit(world.draw(scene))
    with torch.inference_mode():
        mean, _ = tiny().vae.encode(2 * pixels - 1)
        rebuilt = to_unit(to_image(tiny().vae.decode(mean)[0]))
    error = (rebuilt - pixels).square().mean((0, 1))
    boxes = torch.zeros_like(error, dtype=torch.bool)
    for thing in scene.things:
        boxes[world.pixels(thing.box)] = True
    inside = float(error[boxes].mean()) if boxes.any() else 0.0
    return float(error.mean()), inside, int(boxes.sum())


def continue_scenery(number: int) -> tuple[float, float]:
    """Sums of absolute errors in a hole over mere scenery: painted, and filled with its rim's mean."""
    scene, mask = scenery(number)
    true, hole = to_unit(world.draw(scene))[0], to_unit(mask) > 0.5
    painted = to_unit(paint(world.draw(scene), mask, world.caption(scene), seed=number))[0]
    rim = (F.max_pool2d(hole.float(), 7, 1, 3) > 0.5) & ~hole
    flat = true[:, rim[0, 0]].mean(1)[:, None]
    inside = hole[0, 0]
    return float((painted - true)[:, inside].abs().sum()), float((flat - true[:, inside]).abs().sum())


def compare_samplers(number: int) -> tuple[float, float]:
    """Mean difference in levels of PNDM 25 and DPM++ 15 from DDIM 50, the larger: in the hole, in all."""
    case = Case(number, True)

    def run(sampler: str, steps: int) -> Tensor:
        return 255 * to_unit(paint(case.without, case.mask, case.prompt, number, sampler=sampler, steps=steps))[0]

    reference, hole = run("ddim", 50), to_unit(case.mask)[0, 0] > 0.5
    differences = [(run(sampler, steps) - reference).abs() for sampler, steps in (("pndm", 25), ("dpmpp", 15))]
    return max(float(d[:, hole].mean()) for d in differences), max(float(d.mean()) for d in differences)


# The table ---------------------------------------------------------------------------------------


def psnr(error: float) -> float:
    return -10 * math.log10(max(error, 1e-12))


def agreement(found: Iterable[object], wanted: Iterable[object]) -> float:
    """The share of what was found that is what was wanted."""
    equal = [a == b for a, b in zip(found, wanted, strict=True)]
    return sum(equal) / len(equal)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes of each row")
    parser.add_argument("--model", default="tiny", help="the checkpoint (default: tiny)")
    options = parser.parse_args()
    os.environ[MODEL] = options.model
    count, rows, began = options.scenes, list[dict[str, Any]](), time.monotonic()

    def row(name: str, figure: float, bound: str, control: str) -> None:
        rows.append({"measure": name, "figure": round(figure, 4), "asked": bound, "control": control})
        print(f"| {name} | {figure:.3f} | {bound} | {control} | {count} |", flush=True)

    print(f"seeds {HELD_OUT} up; model {options.model}; {SAMPLER}")
    print("| measure | figure | asked | control | scenes |\n| --- | --- | --- | --- | --- |")
    judge, accuracy = train_judge()
    row("classifier right on real crops", accuracy, ">= 0.98", "1000 crops; chance 0.14")

    def kinds_of(pictures: list[Image.Image], cases: list[Case]) -> list[str | None]:
        crops = [window(p, *_middle(case.target)) for p, case in zip(pictures, cases, strict=True)]
        with torch.no_grad():
            return [(*world.KINDS, None)[int(kind)] for kind in judge(torch.cat(crops)).argmax(1)]

    def colours_of(pictures: list[Image.Image], cases: list[Case], kinds: list[str | None]) -> list[str | None]:
        """The colours; where a picture has no thing, what there is of the colour asked for."""
        looked = zip(pictures, cases, kinds, strict=True)
        return [colour_of(picture, case, kind or case.target.kind) for picture, case, kind in looked]

    with common.make_pool() as pool:
        errors = list(pool.map(reconstruct, range(count), chunksize=8))
        row("VAE, whole picture, dB of mean error", psnr(sum(e[0] for e in errors) / count), ">= 32", "")
        pixels = sum(e[2] for e in errors)
        row("VAE, in boxes, dB of mean error", psnr(sum(e[1] * e[2] for e in errors) / pixels), ">= 27", "")

        def judged(cases: list[Case], prompts: list[str]) -> tuple[list[str | None], list[str | None]]:
            """The kinds and the colours of what is painted in these holes from these prompts."""
            pictures = list(pool.map(paint_case, cases, prompts, chunksize=4))
            kinds = kinds_of(pictures, cases)
            return kinds, colours_of(pictures, cases, kinds)

        usual, unlikely = ([Case(number, where) for number in range(count)] for where in (True, False))
        for zone, cases, bound in (("usual zone", usual, ">= 0.95"), ("unlikely zone", unlikely, ">= 0.75")):
            kind, colour = [case.target.kind for case in cases], [case.target.colour for case in cases]
            kinds, colours = judged(cases, [case.prompt for case in cases])
            drawn = [case.drawn() for case in cases]
            control = f"the renderer's own: {agreement(kinds_of(drawn, cases), kind):.3f}"
            row(f"kind asked for, {zone}", agreement(kinds, kind), bound, control)
            control = f"the renderer's own: {agreement(colours_of(drawn, cases, [*kind]), colour):.3f}"
            row(f"colour asked for, {zone}", agreement(colours, colour), ">= 0.98", control)

        kind, colour = [case.target.kind for case in usual], [case.target.colour for case in usual]
        kinds, colours = judged(usual, [""] * count)
        control = f"chance {1 / 6:.3f}; nothing painted {kinds.count(None) / count:.3f}"
        row("kind, empty prompt", agreement(kinds, kind), "chance", control)
        row("colour, empty prompt", agreement(colours, colour), "chance", f"chance {1 / 8:.3f}")

        others = [*usual[1:], usual[0]]
        kinds, colours = judged(usual, [other.prompt for other in others])
        control = f"its own kind {agreement(kinds, kind):.3f}"
        row("kind of another scene's prompt", agreement(kinds, [c.target.kind for c in others]), "high", control)
        control = f"its own colour {agreement(colours, colour):.3f}"
        row("colour of another scene's prompt", agreement(colours, [c.target.colour for c in others]), "high", control)

        sums = list(pool.map(continue_scenery, range(count), chunksize=4))
        row("scenery continued, error / rim's mean", sum(s[0] for s in sums) / sum(s[1] for s in sums), "<= 0.5", "1")
        pairs = list(pool.map(compare_samplers, range(count), chunksize=4))
        control = f"in the hole {sum(p[0] for p in pairs) / count:.2f}"
        row("samplers differ, levels, whole picture", sum(p[1] for p in pairs) / count, "<= 3", control)

    report = {"scenes": count, "first_seed": HELD_OUT, "model": options.model}
    seconds = round(time.monotonic() - began)
    common.append("quality", report | {"seconds": seconds, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
