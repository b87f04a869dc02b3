"""Held-out scenes for the tiny model, and the model: what the benches of quality and of seams paint."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from random import Random

from PIL import Image

import minpaint
from minpaint.painter import Painter
from weights import world

HELD_OUT = 90_000_000  # seeds from here up were never trained on
MODEL = "MINPAINT_QUALITY_MODEL"  # the variable that names the checkpoint to the worker processes


class Case:
    """A held-out scene with a hole over one thing, in its usual zone or an unlikely one."""

    def __init__(self, number: int, usual: bool) -> None:
        rng = Random(HELD_OUT + number)
        while True:
            scene = world.scene(rng, things=rng.choice((0, 1, 2)), misplaced=0.0)
            kind = world.KINDS[number % len(world.KINDS)]
            colour = rng.choice(tuple(world.COLOURS))
            make = world.thing(rng, scene, kind, True, colour) if usual else world.unlikely(rng, scene, kind, colour)
            others = tuple(t for t in scene.things if t.kind != kind and world.apart(t.box, make.box))
            if len(others) == len(scene.things):
                break
        self.number, self.target = number, make
        self.scene = replace(scene, things=others)
        self.mask = world.hole_over(rng, make)
        self.prompt = world.caption(self.scene, [make])

    @property
    def without(self) -> Image.Image:
        return world.draw(self.scene)

    def drawn(self, colour: str | None = None, kind: str | None = None) -> Image.Image:
        """The scene with its thing as the renderer draws it, in another colour or of another kind."""
        thing = replace(self.target, colour=colour or self.target.colour, kind=kind or self.target.kind)
        return world.draw(replace(self.scene, things=(*self.scene.things, thing)))

    def sunless(self) -> Image.Image:
        """The scene with its thing, and in the hole without its sun or moon."""
        drawn = world.draw(replace(self.scene, disc=None, things=(*self.scene.things, self.target)))
        return Image.composite(drawn, self.drawn(), self.mask)


@cache
def tiny() -> Painter:
    """The measured model, loaded once in a process."""
    return minpaint.load(os.environ.get(MODEL, "tiny"), device="cpu", dtype="fp32", budget="15GiB")
