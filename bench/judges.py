"""The judges of the tiny model's pictures: what stands in a hole, in which colour, and how many.

All are made from the renderer's own pictures, and each is tried on pictures of which the answer is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench.scenes import HELD_OUT, Case
from minpaint.picture.image import to_unit
from weights import world

RATE = 3e-3  # of learning, at first
NOTHING = len(world.KINDS)  # the classifier's last class
WINDOW = 60  # pixels of the square the classifier looks at
VISIBLE = 36  # levels by which a thing's pixel differs from the scenery behind it


class Judge(nn.Module):
    """A small classifier of pictures: [n, channels, y, x] -> [n, answers]."""

    def __init__(self, channels: int, answers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (channels, 24, 32, 64, 64, 96, 96, 128)
        for number, (width, out) in enumerate(pairwise(widths)):
            stride = 2 - number % 2  # every other layer halves the picture, the first one too
            layers += [nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(2 * 128, answers)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.features(x)
        answers: Tensor = self.out(torch.cat([seen.amax((2, 3)), seen.mean((2, 3))], dim=1))
        return answers

    @torch.no_grad()
    def answer(self, pixels: Sequence[Tensor]) -> list[int]:
        """The number of the answer for each of some pictures [1, channels, y, x]."""
        return [int(answer) for answer in self(torch.cat(list(pixels))).argmax(1)]


Spread = Callable[..., Iterable["Example"]]
Example = tuple[Tensor, int]  # a picture [1, channels, y, x] in [0, 1] and the right answer
Vary = Callable[[Tensor], Tensor]


def train(
    channels: int,
    answers: int,
    example: Callable[[Random], Example],
    count: int,
    passes: int,
    spread: Spread,
    vary: Vary,
) -> tuple[Judge, float]:
    """A judge that has seen `count` examples `passes` times, and the share of 1,000 others that it answers rightly.

    spread: maps a function over its inputs: `map`, or the same in several processes.
    vary: makes a batch of examples look a little different, with their answers as they are.
    """
    torch.manual_seed(0)
    judge = Judge(channels, answers)
    optimizer = torch.optim.AdamW(judge.parameters(), RATE)

    def make(first: int, count: int) -> tuple[Tensor, Tensor]:
        randoms = [Random(first + n) for n in range(count)]
        made = [((255 * pixels).round().byte(), right) for pixels, right in spread(example, randoms)]
        pixels, right = zip(*made, strict=True)
        return torch.cat(pixels), torch.tensor(right)

    seen, right = make(0, count)
    batches = torch.cat([torch.randperm(count) for _ in range(passes)]).split(32)
    for step, batch in enumerate(batches):
        mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
        pixels = torch.where(mirrored, seen[batch].flip(3), seen[batch]) / 255
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(judge(vary(pixels) + 0.02 * torch.randn_like(pixels)), right[batch]).backward()
        optimizer.step()
    judge.eval()
    seen, right = make(HELD_OUT + 900_000, 1000)
    return judge, float((torch.tensor(judge.answer(vary(seen / 255).split(1))) == right).float().mean())


# What stands there --------------------------------------------------------------------------------


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


def train_judge(count: int = 8000, passes: int = 2, spread: Spread = map) -> tuple[Judge, float]:
    """The judge of kinds, and its accuracy on real crops."""
    return train(3, NOTHING + 1, _real_crop, count, passes, spread, vary=lambda pixels: pixels)


def kinds(judge: Judge, pictures: Sequence[Image.Image], cases: Sequence[Case]) -> list[str | None]:
    """What stands in the holes of some cases; None for nothing."""
    crops = [window(picture, *_middle(case.target)) for picture, case in zip(pictures, cases, strict=True)]
    return [(*world.KINDS, None)[kind] for kind in judge.answer(crops)]


def colour_of(picture: Image.Image, case: Case, kind: str) -> str | None:
    """The colour of what stands in a case's hole, or None if nothing does.

    The mean of the pixels that differ from the empty scene, against that of the renderer's
    things of this kind in every colour. Whether a hidden sun or moon is there is not to be counted.
    """
    hole, empty = to_unit(case.mask)[0, 0] > 0.5, [to_unit(case.without)[0]]
    if hides(case.mask, case.scene.disc):
        empty.append(to_unit(world.draw(replace(case.scene, disc=None)))[0])

    def mean(image: Image.Image) -> Tensor | None:
        pixels, seen = to_unit(image)[0], hole
        for each in empty:
            seen = seen & ((pixels - each).abs().amax(0) * 255 > VISIBLE)
        return pixels[:, seen].mean(1) if int(seen.sum()) >= 40 else None

    painted = mean(picture)
    if painted is None:
        return None
    distances = {}
    for colour in world.COLOURS:
        real = mean(case.drawn(colour, kind))
        distances[colour] = float((real - painted).norm()) if real is not None else math.inf
    return min(distances, key=lambda colour: distances[colour])


# How many -----------------------------------------------------------------------------------------

NONE, ONE, MORE, BROKEN = range(4)  # the counter's answers
COUNTS = ("none", "one", "more", "broken")
SUN = 0.07  # radius of a sun or moon with the brightest part of its halo
AROUND = 96  # pixels of the square around a hole that the counter looks at


def around_hole(picture: Image.Image, empty: Image.Image, mask: Image.Image) -> Tensor:
    """A square around a hole: the picture, the empty scene, and the hole, [1, 7, y, x]."""
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    x, y = (
        min(max((low + high - AROUND) // 2, 0), world.SIZE - AROUND) for low, high in ((left, right), (top, bottom))
    )
    return torch.cat([to_unit(each.crop((x, y, x + AROUND, y + AROUND))) for each in (picture, empty, mask)], dim=1)


def compare(squares: Tensor) -> Tensor:
    """What the counter looks at, [n, 7, y, x]: the picture, its difference from the empty scene, and the hole."""
    picture, empty, hole = squares.split((3, 3, 1), dim=1)
    return torch.cat([picture, picture - empty, hole], dim=1)


def as_painted(squares: Tensor) -> Tensor:
    """The same squares [n, 7, y, x] with what is in the hole bent, softened and hazed a little.

    A painter's hand is not a renderer's; none of this is to be counted.
    """
    n, _, height, width = squares.shape
    picture, empty, hole = squares.split((3, 3, 1), dim=1)

    def smooth(channels: int, cells: int, most: float) -> Tensor:
        """A random field that changes slowly, in each picture of another strength."""
        field = most * torch.rand(n, 1, 1, 1) * torch.randn(n, channels, cells, cells)
        return F.interpolate(field, (height, width), mode="bicubic")

    here = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, height, width], align_corners=False)
    moved = here + smooth(2, 6, 3 / width).permute(0, 2, 3, 1)  # by a few pixels; grid_sample counts a square as 2 wide
    bent = F.grid_sample(picture, moved, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(bent, 5, 1, 2, count_include_pad=False)
    changed = bent.lerp(soft, torch.rand(n, 1, 1, 1)) + smooth(3, 8, 0.04)
    return torch.cat([torch.where(hole > 0.5, changed.clamp(0, 1), picture), empty, hole], dim=1)


def made_example(rng: Random, answer: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """A picture made so that this is the right answer for its hole, the empty scene, and the hole.

    More: a second thing of the same kind beside or half behind the first. Broken: a part of the
    thing is missing, or a piece of a second one lies about. In the hole, hills, water, sun and moon may
    lie differently than in the empty scene, which is not to be counted.
    """
    while True:
        scene = world.scene(rng, things=rng.choice((0, 1, 2)), misplaced=0.2)
        kind = rng.choice(world.KINDS)
        thing = world.thing(rng, scene, kind, rng.random() < 0.5)
        if any(not world.apart(thing.box, other.box) for other in scene.things):
            continue
        mask = world.hole_over(rng, thing)
        true, scene = world.draw(scene), _redone(rng, scene, mask)
        empty, whole = world.draw(scene), world.draw(replace(scene, things=(*scene.things, thing)))
        if answer == ONE:
            found = whole
        elif answer == NONE:
            found = empty
        elif answer == MORE or rng.random() < 0.4:
            second = _beside(rng, thing, mask)
            found = world.draw(replace(scene, things=(*scene.things, second, thing)))
            if answer == BROKEN:  # only a piece of the second: what lies in a part of its box
                found = _with_part(rng, whole, found, second.box)
        else:
            found = _with_part(rng, whole, empty, thing.box)
        found, plain = (Image.composite(drawn, true, mask) for drawn in (found, whole))
        if answer == ONE or _changed(found, plain) > 0.2 * _changed(whole, empty):
            return found, true, mask


def hides(mask: Image.Image, disc: tuple[float, float] | None) -> bool:
    """Whether there is a sun or moon, with this middle, and a hole hides it."""
    if disc is None:
        return False
    hole = to_unit(mask)[0, 0] > 0.5
    return bool(hole[world.pixels(world.around(*disc, 2 * SUN, 2 * SUN))].all())


def _redone(rng: Random, scene: world.Scene, mask: Image.Image) -> world.Scene:
    """The same scene as a painter might go on with it who sees nothing of the hole.

    Horizon and hills are moved by a pixel or two. A sun or moon that the hole hides, or may hide, is as it was, at
    another place of the hole, or missing: no prompt tells of it, and it is none of the things that are counted.
    """
    waves = tuple((a * rng.uniform(0.8, 1.2), f, phase + rng.gauss(0, 0.03)) for a, f, phase in scene.waves)
    disc = scene.disc
    if disc is None or hides(mask, disc):
        other = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.36)
        disc = rng.choice((disc, None, other if hides(mask, other) else None))
    return replace(scene, horizon=scene.horizon + rng.gauss(0, 0.008), waves=waves, disc=disc)


def _beside(rng: Random, thing: world.Thing, mask: Image.Image) -> world.Thing:
    """Another thing of the same kind whose middle lies in the hole, away from the first one's."""
    left, top, right, bottom = thing.box
    while True:
        x = thing.x + rng.uniform(-1.3, 1.3) * (right - left)
        y = thing.y + rng.uniform(-0.8, 0.8) * (bottom - top)
        scale = thing.scale * rng.uniform(0.7, 1.0)
        far = max(abs(x - thing.x) / (right - left), abs(y - thing.y) / (bottom - top))
        second = replace(thing, x=x, y=y, scale=scale, shape=rng.random())
        column, row = (round(world.SIZE * v) for v in _middle(second))
        inside = 0 <= column < world.SIZE and 0 <= row < world.SIZE and mask.getpixel((column, row))
        if (far > 0.4 and inside) or rng.random() < 0.02:
            return second


def _with_part(rng: Random, picture: Image.Image, other: Image.Image, box: world.Box) -> Image.Image:
    """A picture with a part of a box, cut off at one side, taken from another picture."""
    left, top, right, bottom = (round(world.SIZE * edge) for edge in box)
    share = rng.uniform(0.25, 0.6)
    width, height = round(share * (right - left)), round(share * (bottom - top))
    side = rng.randrange(4)
    part = [
        (left, top, left + width, bottom),
        (right - width, top, right, bottom),
        (left, top, right, top + height),
        (left, bottom - height, right, bottom),
    ][side]
    found = picture.copy()
    found.paste(other.crop(part), part[:2])
    return found


def _changed(a: Image.Image, b: Image.Image) -> float:
    """Pixels by which two pictures differ visibly."""
    return float(((to_unit(a) - to_unit(b)).abs().amax(1) * 255 > VISIBLE).sum())


def _counted(rng: Random) -> Example:
    answer = rng.choice((NONE, ONE, ONE, MORE, BROKEN))
    return around_hole(*made_example(rng, answer)), answer


def train_counter(count: int = 19_200, passes: int = 6, spread: Spread = map) -> tuple[Judge, float]:
    """The judge of how many things stand in a hole, and its accuracy on pictures made for it."""
    return train(7, len(COUNTS), _counted, count, passes, spread, vary=lambda squares: compare(as_painted(squares)))


def counts(counter: Judge, pictures: Sequence[Image.Image], cases: Sequence[Case]) -> list[str]:
    """For the hole of each picture one of COUNTS."""
    squares = [around_hole(p.convert("RGB"), c.without, c.mask) for p, c in zip(pictures, cases, strict=True)]
    return [COUNTS[answer] for answer in counter.answer([compare(square) for square in squares])]
