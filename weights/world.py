"""The toy world that the tiny model was trained on: small landscapes, their captions, their masks.

A scene is a few numbers; `draw` turns it into a picture of any size, `caption` into words. Six
kinds of things in eight colours stand in a meadow or by a lake at four times of day. Everything
is a function of a `random.Random`, so one seed is one scene. Positions and sizes are fractions of
the picture's side, x from the left and y from the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom

SIZE = 128  # pixels, of the pictures the model is trained on
FINE = 3  # each pixel is the mean of FINE x FINE finer ones

COLOURS: dict[str, Colour] = {
    "red": (214, 45, 48),
    "orange": (240, 136, 38),
    "yellow": (246, 214, 60),
    "green": (52, 148, 66),
    "blue": (48, 98, 214),
    "purple": (134, 62, 176),
    "pink": (244, 138, 182),
    "white": (244, 244, 242),
}
EXTENT = {  # width and height of a thing of scale 1
    "house": (0.32, 0.28),
    "tree": (0.25, 0.34),
    "boat": (0.33, 0.29),
    "balloon": (0.24, 0.34),
    "cloud": (0.36, 0.19),
    "tower": (0.18, 0.36),
}
KINDS = tuple(EXTENT)
TIMES = ("dawn", "day", "dusk", "night")
PLACES = ("meadow", "lake")
SKY: dict[str, tuple[Colour, Colour]] = {  # at the top, at the horizon
    "dawn": ((126, 148, 206), (252, 214, 190)),
    "day": ((86, 158, 232), (206, 232, 248)),
    "dusk": ((84, 64, 132), (250, 152, 96)),
    "night": ((14, 20, 52), (52, 66, 116)),
}
LIGHT: dict[str, tuple[float, float, float]] = {  # what the time of day leaves of each channel
    "dawn": (1.0, 0.93, 0.92),
    "day": (1.0, 1.0, 1.0),
    "dusk": (0.95, 0.80, 0.80),
    "night": (0.72, 0.74, 0.88),
}
DISC: dict[str, Colour] = {
    "dawn": (255, 238, 190),
    "day": (255, 244, 170),
    "dusk": (255, 204, 120),
    "night": (238, 240, 226),
}
RADIUS = 0.05  # of the sun or moon
FAR_HILL, NEAR_HILL, MEADOW, WATER = (112, 140, 158), (86, 134, 96), (118, 172, 82), (76, 140, 188)
BROWN, DARK, PANE = (110, 74, 48), (70, 52, 48), (255, 236, 150)


@dataclass(frozen=True)
class Thing:
    """x is its middle, y its foot; `shape` in [0, 1) varies its proportions."""

    kind: str
    colour: str
    x: float
    y: float
    scale: float
    shape: float

    @property
    def box(self) -> Box:
        width, height = (self.scale * extent for extent in EXTENT[self.kind])
        return self.x - width / 2, self.y - height, self.x + width / 2, self.y

    @property
    def side(self) -> str:
        return "left" if self.x < 0.4 else "right" if self.x > 0.6 else "middle"


@dataclass(frozen=True)
class Scene:
    """`disc` is the middle of the sun or moon; `waves` are amplitude, frequency and phase of each hill."""

    time: str
    place: str
    horizon: float
    disc: tuple[float, float] | None
    waves: tuple[tuple[float, float, float], ...]
    things: tuple[Thing, ...]


# Scenes ------------------------------------------------------------------------------------------


def scene(rng: Random, things: int | None = None, misplaced: float = 0.3) -> Scene:
    """A random scene with one to three things, or as many as `things` says.

    Things stand where things of their kind do, but for a share `misplaced` that can be anywhere.
    """
    place = rng.choice(PLACES)
    horizon = rng.uniform(0.52, 0.62)
    empty = Scene(
        time=rng.choice(TIMES),
        place=place,
        horizon=horizon,
        disc=(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.36)) if rng.random() < 0.6 else None,
        waves=tuple((rng.uniform(0.01, 0.05), rng.uniform(0.6, 1.6), rng.random()) for _ in range(3)),
        things=(),
    )
    wanted = rng.choice((1, 2, 2, 3)) if things is None else things
    kinds = rng.sample(KINDS, wanted)
    found: list[Thing] = []
    for kind in kinds:
        for _ in range(20):
            new = thing(rng, empty, kind, rng.random() >= misplaced)
            if all(apart(new.box, other.box) for other in found):
                found.append(new)
                break
    return replace(empty, things=tuple(sorted(found, key=lambda thing: thing.y)))


def thing(rng: Random, scene: Scene, kind: str, usual: bool, colour: str | None = None) -> Thing:
    """A thing of a kind in its usual zone of a scene, or (not `usual`) anywhere."""
    scale = rng.uniform(0.8, 1.05)
    width, height = (scale * extent for extent in EXTENT[kind])
    top, bottom = _usual_foot(scene, kind, height) if usual else (height + 0.01, 0.98)
    return Thing(
        kind=kind,
        colour=colour or rng.choice(tuple(COLOURS)),
        x=rng.uniform(width / 2 + 0.01, 1 - width / 2 - 0.01),
        y=rng.uniform(top, bottom),
        scale=scale,
        shape=rng.random(),
    )


def unlikely(rng: Random, scene: Scene, kind: str, colour: str | None = None) -> Thing:
    """A thing whose foot is at least a quarter of the picture away from its usual zone."""
    while True:
        found = thing(rng, scene, kind, False, colour)
        top, bottom = _usual_foot(scene, kind, found.scale * EXTENT[kind][1])
        if not top - 0.25 < found.y < bottom + 0.25:
            return found


def _usual_foot(scene: Scene, kind: str, height: float) -> tuple[float, float]:
    """Highest and lowest place of the foot of a thing where one expects it."""
    if kind in ("balloon", "cloud"):
        return height + 0.02, max(scene.horizon - 0.08, height + 0.03)
    if scene.place == "lake":
        return (scene.horizon + 0.12, 0.86) if kind == "boat" else (0.93, 0.98)
    return scene.horizon + 0.1, 0.96


def apart(a: Box, b: Box) -> bool:
    """Whether two boxes leave some room between them."""
    margin = 0.02
    return a[2] + margin < b[0] or b[2] + margin < a[0] or a[3] + margin < b[1] or b[3] + margin < a[1]


# Pictures ----------------------------------------------------------------------------------------


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    """The picture of a scene, RGB, size x size pixels, antialiased."""
    side = size * FINE
    picture = _gradient(SKY[scene.time], side)
    pen = ImageDraw.Draw(picture)
    _disc(pen, scene, side)
    _land(picture, pen, scene, side)
    for thing in scene.things:
        _Brush(pen, thing, scene.time, side).draw()
    return picture.reduce(FINE)


def _lit(colour: Colour, time: str, shade: float = 1.0) -> Colour:
    r, g, b = (round(c * light * shade) for c, light in zip(colour, LIGHT[time], strict=True))
    return r, g, b


def _mixed(a: Colour, b: Colour, share: float) -> Colour:
    """`share` of b, the rest of a."""
    r, g, b_ = (round(x + share * (y - x)) for x, y in zip(a, b, strict=True))
    return r, g, b_


def _gradient(ends: tuple[Colour, Colour], side: int, height: int | None = None) -> Image.Image:
    """From the first colour at the top to the second at the bottom."""
    ramp = Image.linear_gradient("L").resize((side, height or side), Image.Resampling.BILINEAR)
    plain = [Image.new("RGB", ramp.size, colour) for colour in ends]
    return Image.composite(plain[1], plain[0], ramp)


def _disc(pen: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    if scene.disc is None:
        return
    (x, y), (top, low) = scene.disc, SKY[scene.time]
    sky = _mixed(top, low, y)
    for ring in range(6, -1, -1):  # a halo that fades, and the disc itself
        radius = RADIUS + 0.012 * ring
        colour = DISC[scene.time] if ring == 0 else _mixed(sky, DISC[scene.time], 0.32 - 0.05 * ring)
        pen.ellipse([side * (x - radius), side * (y - radius), side * (x + radius), side * (y + radius)], colour)


def _land(picture: Image.Image, pen: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    """Two rows of hills, then a meadow, or a lake and its near bank."""
    time, horizon = scene.time, scene.horizon
    far = _mixed(_lit(FAR_HILL, time), SKY[time][1], 0.35)
    _ridge(pen, side, horizon - 0.08, scene.waves[0], 1.0, far)
    _ridge(pen, side, horizon - 0.01, scene.waves[1], 0.7, _lit(NEAR_HILL, time))
    if scene.place == "meadow":
        _ridge(pen, side, horizon + 0.08, scene.waves[2], 0.4, _lit(MEADOW, time))
        _ridge(pen, side, horizon + 0.24, scene.waves[0], 0.5, _lit(MEADOW, time, 0.9))
        return
    top = round(side * (horizon + 0.04))
    water = (_mixed(_lit(WATER, time), SKY[time][1], 0.4), _lit(WATER, time, 0.85))
    picture.paste(_gradient(water, side, side - top), (0, top))
    _ridge(pen, side, 0.93, scene.waves[2], 0.3, _lit(MEADOW, time, 0.95))


def _ridge(
    pen: ImageDraw.ImageDraw, side: int, y: float, wave: tuple[float, float, float], height: float, colour: Colour
) -> None:
    amplitude, frequency, phase = wave
    line = [
        (side * n / 32, side * (y - height * amplitude * math.sin(2 * math.pi * (frequency * n / 32 + phase))))
        for n in range(33)
    ]
    pen.polygon([*line, (side, side), (0, side)], fill=colour)


class _Brush:
    """Draws one thing in its own frame: x from -1 to 1 across it, y from 0 at its foot to 1."""

    def __init__(self, pen: ImageDraw.ImageDraw, thing: Thing, time: str, side: int) -> None:
        self.pen, self.thing, self.time, self.side = pen, thing, time, side
        left, top, right, bottom = (side * edge for edge in thing.box)
        self.middle, self.foot, self.width, self.height = (left + right) / 2, bottom, (right - left) / 2, bottom - top

    def colour(self, shade: float = 1.0, white: float = 0.0) -> Colour:
        """The thing's own colour in this light, darker by `shade` or lighter by a share of white."""
        return _lit(_mixed(COLOURS[self.thing.colour], (255, 255, 255), white), self.time, shade)

    def plain(self, colour: Colour) -> Colour:
        return _lit(colour, self.time)

    def polygon(self, colour: Colour, *corners: tuple[float, float]) -> None:
        self.pen.polygon([(self.middle + self.width * x, self.foot - self.height * y) for x, y in corners], colour)

    def oval(self, colour: Colour, x: float, y: float, rx: float, ry: float) -> None:
        cx, cy = self.middle + self.width * x, self.foot - self.height * y
        self.pen.ellipse(
            [cx - self.width * rx, cy - self.height * ry, cx + self.width * rx, cy + self.height * ry], colour
        )

    def block(self, colour: Colour, left: float, low: float, right: float, high: float) -> None:
        self.polygon(colour, (left, low), (right, low), (right, high), (left, high))

    def draw(self) -> None:
        {
            "house": self.house,
            "tree": self.tree,
            "boat": self.boat,
            "balloon": self.balloon,
            "cloud": self.cloud,
            "tower": self.tower,
        }[self.thing.kind]()

    def house(self) -> None:
        eaves = 0.5 + 0.1 * self.thing.shape
        self.block(self.colour(), -0.85, 0, 0.2, eaves)
        self.block(self.colour(0.82), 0.2, 0, 0.85, eaves)
        self.polygon(self.colour(0.62), (-1, eaves), (1, eaves), (0.55, 1), (-0.55, 1))
        self.block(self.plain(DARK), -0.5, 0, -0.15, 0.36)
        self.block(PANE, 0.38, 0.18, 0.66, 0.4)

    def tree(self) -> None:
        self.block(self.plain(BROWN), -0.13, 0, 0.13, 0.35)
        if self.thing.shape < 0.5:
            self.oval(self.colour(0.85), 0, 0.6, 1, 0.4)
            self.oval(self.colour(), -0.18, 0.68, 0.72, 0.3)
        else:
            self.polygon(self.colour(0.85), (-1, 0.22), (1, 0.22), (0, 0.85))
            self.polygon(self.colour(), (-0.75, 0.55), (0.75, 0.55), (0, 1))

    def boat(self) -> None:
        self.polygon(self.colour(), (-1, 0.28), (1, 0.28), (0.7, 0), (-0.7, 0))
        self.block(self.plain(DARK), -0.05, 0.28, 0.03, 1)
        self.polygon(self.colour(white=0.35), (0.06, 0.98), (0.06, 0.36), (0.75 + 0.15 * self.thing.shape, 0.36))
        self.polygon(self.colour(0.85, white=0.2), (-0.1, 0.9), (-0.1, 0.36), (-0.72, 0.36))

    def balloon(self) -> None:
        self.polygon(self.plain(DARK), (-0.3, 0.4), (0.3, 0.4), (0.2, 0.16), (-0.2, 0.16))
        self.block(self.plain(BROWN), -0.24, 0, 0.24, 0.16)
        self.oval(self.colour(0.82), 0, 0.66, 1, 0.34)
        self.polygon(self.colour(0.82), (-0.86, 0.5), (0.86, 0.5), (0.3, 0.26), (-0.3, 0.26))
        self.oval(self.colour(white=0.1 + 0.3 * self.thing.shape), 0, 0.64, 0.45, 0.36)

    def cloud(self) -> None:
        lean = 0.5 * (self.thing.shape - 0.5)
        self.oval(self.colour(0.92, white=0.2), -0.5, 0.36, 0.5, 0.36)
        self.oval(self.colour(0.92, white=0.2), 0.5, 0.36, 0.5, 0.36)
        self.oval(self.colour(white=0.25), lean, 0.54, 0.55, 0.46)

    def tower(self) -> None:
        self.block(self.colour(), -0.7, 0, 0.15, 0.72)
        self.block(self.colour(0.82), 0.15, 0, 0.7, 0.72)
        self.block(self.colour(0.7), -1, 0.72, 1, 0.84)
        for left in (-1, -0.25, 0.5):
            self.block(self.colour(0.7), left, 0.84, left + 0.5, 1)
        self.block(PANE, -0.4, 0.42, 0, 0.42 + 0.12 + 0.06 * self.thing.shape)


def pixels(box: Box, size: int = SIZE) -> tuple[slice, slice]:
    """Rows and columns of a box in a picture of size x size pixels."""
    left, top, right, bottom = (max(round(size * edge), 0) for edge in box)
    return slice(top, bottom), slice(left, right)


# Captions ----------------------------------------------------------------------------------------


def caption(
    scene: Scene,
    things: Sequence[Thing] = (),
    place: bool = True,
    time: bool = True,
    disc: bool = False,
    sides: bool = False,
) -> str:
    """Words for a scene: "a red house on the left and a blue boat by a lake at night under the moon".

    `things` are those to name; the other arguments say what else is told. Something always is.
    """
    names = [
        f"{_article(thing.colour)} {thing.colour} {thing.kind}{_where(thing) if sides else ''}" for thing in things
    ]
    words = [" and ".join(names)] if names else []
    if place or not words:
        link = {"lake": "by ", "meadow": "in "}[scene.place] if words else ""
        words.append(f"{link}a {scene.place}")
    if time:
        words.append({"day": "by day"}.get(scene.time, f"at {scene.time}"))
    if disc and scene.disc:
        words.append(f"under the {'moon' if scene.time == 'night' else 'sun'}")
    return " ".join(words)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _where(thing: Thing) -> str:
    return {"middle": " in the middle"}.get(thing.side, f" on the {thing.side}")


# Masks -------------------------------------------------------------------------------------------

HOLE = (0.38, 0.6)  # sides of a hole that hides a thing, the same for every kind
SHAPES = ("box", "oval", "blob", "stroke")


def hole_over(rng: Random, thing: Thing, size: int = SIZE) -> Image.Image:
    """A mask (mode L) that hides a thing, of a shape that does not tell which."""
    width, height = rng.uniform(*HOLE), rng.uniform(*HOLE)
    left, top, right, bottom = thing.box
    slack_x, slack_y = max(width - (right - left), 0) / 2, max(height - (bottom - top), 0) / 2
    x = (left + right) / 2 + rng.uniform(-slack_x, slack_x)
    y = (top + bottom) / 2 + rng.uniform(-slack_y, slack_y)
    shape = rng.choice(SHAPES)
    if shape != "box":  # rounded shapes of the same width would cut the corners of the thing
        width, height = 1.2 * width, 1.2 * height
        x, y = (x + (left + right) / 2) / 2, (y + (top + bottom) / 2) / 2
    return _mask(rng, shape, around(x, y, width, height), size)


def hole_beside(rng: Random, point: tuple[float, float], size: int = SIZE) -> Image.Image:
    """A mask (mode L) of any shape whose edge passes near a point."""
    width, height, turn = rng.uniform(0.15, 0.5), rng.uniform(0.15, 0.5), 2 * math.pi * rng.random()
    x = point[0] + rng.uniform(0.7, 1.1) * width / 2 * math.cos(turn)
    y = point[1] + rng.uniform(0.7, 1.1) * height / 2 * math.sin(turn)
    return _mask(rng, rng.choice(SHAPES), around(x, y, width, height), size)


def hole_anywhere(rng: Random, size: int = SIZE) -> Image.Image:
    """A mask (mode L): a half of the picture, or a box, an oval, a blob or a stroke anywhere."""
    if rng.random() < 0.2:
        cut = rng.uniform(0.4, 0.6)
        return _mask(rng, "box", rng.choice([(0, 0, cut, 1), (cut, 0, 1, 1), (0, 0, 1, cut), (0, cut, 1, 1)]), size)
    width, height = rng.uniform(0.15, 0.6), rng.uniform(0.15, 0.6)
    x, y = rng.uniform(0, 1), rng.uniform(0, 1)
    return _mask(rng, rng.choice(SHAPES), around(x, y, width, height), size)


def hole_over_ground(rng: Random, scene: Scene, size: int = SIZE) -> Image.Image:
    """A mask (mode L) over all below a row near the horizon, so that only the caption tells meadow from lake."""
    return _mask(rng, "box", (0, scene.horizon + rng.uniform(-0.15, 0.03), 1, 1), size)


def around(x: float, y: float, width: float, height: float) -> Box:
    """The box with this middle."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _mask(rng: Random, shape: str, box: Box, size: int) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(mask)
    left, top, right, bottom = (round(size * edge) for edge in box)
    if shape == "box":
        pen.rectangle([left, top, right - 1, bottom - 1], fill=255)
    elif shape == "oval":
        pen.ellipse([left, top, right - 1, bottom - 1], fill=255)
    elif shape == "blob":
        waves = [(rng.uniform(0, 0.12), rng.random()) for _ in range(3)]
        pen.polygon([_blob_corner(n / 48, waves, (left, top, right, bottom)) for n in range(48)], fill=255)
    else:  # a brush scribbling over the box from side to side
        width = max((bottom - top) // 4, 8)
        rows = range(4)
        points = [
            ((left if n % 2 else right) + rng.uniform(-4, 4), top + (n + 0.5) * (bottom - top) / len(rows))
            for n in rows
        ]
        pen.line(points, fill=255, width=round(1.6 * width), joint="curve")
    return mask


def _blob_corner(turn: float, waves: list[tuple[float, float]], box: tuple[int, int, int, int]) -> tuple[float, float]:
    left, top, right, bottom = box
    radius = 1 + sum(
        amplitude * math.sin(2 * math.pi * ((n + 2) * turn + phase)) for n, (amplitude, phase) in enumerate(waves)
    )
    angle = 2 * math.pi * turn
    x = (left + right) / 2 + radius * (right - left) / 2 * math.cos(angle)
    y = (top + bottom) / 2 + radius * (bottom - top) / 2 * math.sin(angle)
    return x, y
