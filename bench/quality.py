"""Does the tiny model paint what it is asked? Measured on held-out scenes, with controls.

    python -m bench.quality                      # prints a table, appends it to bench/results/
    python -m bench.quality --scenes 20          # a quick look

Two small classifiers (bench/judges.py), trained here on the renderer's own pictures, say what stands
in a hole and how many; the table's first rows tell how often they are right. Pictures are painted
through the public call with its defaults, except for the sampler (DPM-Solver++, 20 steps).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from functools import partial
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench import common, judges
from bench.scenes import HELD_OUT, MODEL, Case, tiny
from minpaint.picture.fill import membrane
from minpaint.picture.image import to_image, to_pixels, to_unit
from weights import world

SAMPLER: dict[str, Any] = {"sampler": "dpmpp", "steps": 20}
RIM = 12  # pixels inside a hole's edge in which the scenery is to go on as it was
OWN = "the renderer's own"
HILLS, DISCS = "<= 0.26", "<= 0.72"  # half of what the first model had
WHOLE = 24  # levels of mean error below which a cut sun or moon counts as whole


# Painting ----------------------------------------------------------------------------------------


def paint(picture: Image.Image, mask: Image.Image, prompt: str, seed: int = 0, **options: Any) -> Image.Image:
    """A painting with the measured model."""
    [painting] = tiny()(picture, mask, prompt, seed=seed, **(SAMPLER | options))
    return painting.image


def paint_case(case: Case, prompt: str) -> Image.Image:
    return paint(case.without, case.mask, prompt, seed=case.number)


def rebuild(picture: Image.Image) -> Image.Image:
    """A picture through the autoencoder."""
    with torch.inference_mode():
        mean, _ = tiny().vae.encode(to_pixels(picture))
        return to_image(tiny().vae.decode(mean)[0])


def reconstruct(number: int) -> tuple[float, float, int]:
    """Mean squared errors of the autoencoder on a held-out scene: whole, in the boxes, and their pixels."""
    scene = world.scene(Random(HELD_OUT + 700_000 + number))
    picture = world.draw(scene)
    error = (to_unit(rebuild(picture)) - to_unit(picture)).square().mean((0, 1))
    boxes = torch.zeros_like(error, dtype=torch.bool)
    for thing in scene.things:
        boxes[world.pixels(thing.box)] = True
    inside = float(error[boxes].mean()) if boxes.any() else 0.0
    return float(error.mean()), inside, int(boxes.sum())


# The scenery that a hole cuts ----------------------------------------------------------------------


def cut_hills(number: int) -> tuple[world.Scene, Image.Image]:
    """A held-out scene and a hole over its rows of hills that hides none of its things, nor its sun or moon."""
    rng = Random(HELD_OUT + 500_000 + number)
    while True:
        scene = world.scene(rng, misplaced=0.0)
        mask = world.hole_anywhere(rng)
        boxes = [thing.box for thing in scene.things]
        if scene.disc:
            x, y = scene.disc
            boxes.append((x - 0.12, y - 0.12, x + 0.12, y + 0.12))
        white = to_unit(mask)[0, 0]
        over_hills = white[world.pixels((0, scene.horizon - 0.13, 1, scene.horizon + 0.06))].mean()
        if over_hills >= 0.1 and not any(white[world.pixels(box)].any() for box in boxes):
            return scene, mask


def cut_disc(number: int) -> tuple[world.Scene, Image.Image]:
    """A held-out scene and a hole that hides a quarter to three quarters of its sun or moon, and none of its things."""
    rng = Random(HELD_OUT + 600_000 + number)
    while True:
        scene = world.scene(rng, misplaced=0.0)
        mask = world.hole_anywhere(rng)
        white = to_unit(mask)[0, 0]
        if scene.disc is None or any(white[world.pixels(thing.box)].any() for thing in scene.things):
            continue
        if 0.25 <= float(white[disc_of(scene)].mean()) <= 0.75:
            return scene, mask


def disc_of(scene: world.Scene) -> Tensor:
    """The pixels of the sun or moon, with the brightest part of its halo, bool [y, x]."""
    assert scene.disc is not None
    x, y = (world.SIZE * v for v in scene.disc)
    at = torch.arange(world.SIZE) + 0.5
    return (at[None] - x) ** 2 + (at[:, None] - y) ** 2 <= (0.06 * world.SIZE) ** 2


def continued(picture: Image.Image, scene: world.Scene, mask: Image.Image, disc: bool) -> tuple[float, float]:
    """Mean error of a picture, in levels, and of its hole filled by a membrane.

    Over the hole's outer RIM pixels, or over what it hides of the sun or moon; against the renderer.
    """
    true, hole = to_unit(world.draw(scene))[0], to_unit(mask)[0, 0] > 0.5
    near = F.max_pool2d((~hole)[None, None].float(), 2 * RIM + 1, 1, RIM)[0, 0] > 0.5
    looked = hole & (disc_of(scene) if disc else near)
    filled = membrane(true[None], ~hole)[0]
    painted = to_unit(picture.convert("RGB"))[0]
    errors = [255 * (found - true).abs()[:, looked].mean() for found in (painted, filled)]
    return float(errors[0]), float(errors[1])


def continue_scenery(number: int, disc: bool) -> tuple[float, float, float]:
    """The same for a painting, and for the true scene as the autoencoder gives it: painted, membrane, true."""
    scene, mask = (cut_disc if disc else cut_hills)(number)
    true = world.draw(scene)
    painted = paint(true, mask, world.caption(scene, disc=disc), seed=number)
    found, filled = continued(painted, scene, mask, disc)
    return found, filled, continued(rebuild(true), scene, mask, disc)[0]


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

    def colours_of(pictures: list[Image.Image], cases: list[Case], kinds: list[str | None]) -> list[str | None]:
        """The colours; where a picture has no thing, what there is of the colour asked for."""
        looked = zip(pictures, cases, kinds, strict=True)
        return [judges.colour_of(picture, case, kind or case.target.kind) for picture, case, kind in looked]

    with common.make_pool() as pool:
        spread = partial(pool.map, chunksize=8)
        judge, accuracy = judges.train_judge(spread=spread)
        row("classifier right on real crops", accuracy, ">= 0.98", "1000 crops; chance 0.14")
        counter, accuracy = judges.train_counter(spread=spread)
        row("counter right on made pictures", accuracy, ">= 0.95", "1000 pictures; none, one, more, broken")

        rebuilt = list(pool.map(reconstruct, range(count), chunksize=8))
        row("VAE, whole picture, dB of mean error", psnr(sum(e[0] for e in rebuilt) / count), ">= 40", "")
        pixels = sum(e[2] for e in rebuilt)
        row("VAE, in boxes, dB of mean error", psnr(sum(e[1] * e[2] for e in rebuilt) / pixels), "", "")

        def painted(cases: list[Case], prompts: list[str]) -> list[Image.Image]:
            return list(pool.map(paint_case, cases, prompts, chunksize=4))

        usual, unlikely = ([Case(number, where) for number in range(count)] for where in (True, False))
        for zone, cases in (("usual zone", usual), ("unlikely zone", unlikely)):
            bound = ">= 0.98" if cases is usual else ">= 0.96"
            kind, colour = [case.target.kind for case in cases], [case.target.colour for case in cases]
            pictures, drawn = painted(cases, [case.prompt for case in cases]), [case.drawn() for case in cases]
            kinds, real = judges.kinds(judge, pictures, cases), judges.kinds(judge, drawn, cases)
            row(f"kind asked for, {zone}", agreement(kinds, kind), bound, f"{OWN}: {agreement(real, kind):.3f}")
            hidden = [case for case in cases if judges.hides(case.mask, case.scene.disc)]
            sunless = [case.sunless() for case in hidden]
            real = colours_of(drawn, cases, [*kind])
            bare = zip(colours_of(sunless, hidden, [case.target.kind for case in hidden]), hidden, strict=True)
            right = sum(found == case.target.colour for found, case in bare)
            control = f"{OWN}: {agreement(real, colour):.3f}, {right} of {len(hidden)} without a hidden sun"
            colours = colours_of(pictures, cases, kinds)
            row(f"colour asked for, {zone}", agreement(colours, colour), bound, control)
            counted, own = judges.counts(counter, pictures, cases), judges.counts(counter, drawn, cases)
            right = judges.counts(counter, sunless, hidden).count("one")
            control = f"{OWN}: {own.count('one') / count:.3f}, {right} of {len(hidden)} without a hidden sun; "
            control += ", ".join(f"{answer} {counted.count(answer) / count:.3f}" for answer in judges.COUNTS)
            row(f"exactly one thing, {zone}", counted.count("one") / count, ">= 0.97", control)

        kind, colour = [case.target.kind for case in usual], [case.target.colour for case in usual]
        pictures = painted(usual, [""] * count)
        kinds = judges.kinds(judge, pictures, usual)
        colours = colours_of(pictures, usual, kinds)
        control = f"chance {1 / 6:.3f}; nothing painted {kinds.count(None) / count:.3f}"
        row("kind, empty prompt", agreement(kinds, kind), "chance", control)
        row("colour, empty prompt", agreement(colours, colour), "chance", f"chance {1 / 8:.3f}")

        others = [*usual[1:], usual[0]]
        pictures = painted(usual, [other.prompt for other in others])
        kinds = judges.kinds(judge, pictures, usual)
        colours = colours_of(pictures, usual, kinds)
        control = f"its own kind {agreement(kinds, kind):.3f}"
        row("kind of another scene's prompt", agreement(kinds, [c.target.kind for c in others]), "high", control)
        control = f"its own colour {agreement(colours, colour):.3f}"
        row("colour of another scene's prompt", agreement(colours, [c.target.colour for c in others]), "high", control)

        for name, disc, bound in (("hills continued", False, HILLS), ("sun or moon completed", True, DISCS)):
            errors = list(pool.map(continue_scenery, range(count), [disc] * count, chunksize=4))
            levels, filled, true = (sum(column) / count for column in zip(*errors, strict=True))
            control = f"{levels:.1f} of {filled:.1f} levels; true scene through the VAE {true:.1f}"
            row(f"{name}, error / membrane's", levels / filled, bound, control)
        whole = sum(error[0] < WHOLE for error in errors) / count
        row("suns and moons whole", whole, "", f"membrane {sum(error[1] < WHOLE for error in errors) / count:.3f}")
        pairs = list(pool.map(compare_samplers, range(count), chunksize=4))
        control = f"in the hole {sum(p[0] for p in pairs) / count:.2f}"
        row("samplers differ, levels, whole picture", sum(p[1] for p in pairs) / count, "<= 2", control)

    report = {"scenes": count, "first_seed": HELD_OUT, "model": options.model}
    seconds = round(time.monotonic() - began)
    common.append("quality", report | {"seconds": seconds, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
