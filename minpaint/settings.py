"""What to paint and how: every option of a painting, checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from minpaint.errors import InputError

SAMPLERS = ("ddim", "pndm", "dpmpp")
PROFILES = ("minpaint", "diffusers")
FILLS = ("original", "edge", "blur", "noise", "blank")
SIDES = ("left", "top", "right", "bottom")
OWN = ("grow", "feather", "soft", "context", "separate", "expand", "fill", "color_match")  # not the reference's


@dataclass(frozen=True)
class Settings:
    """What to paint and how, checked as it is made: InputError names a value that cannot be used.

    prompt, negative_prompt: what to paint, and what guidance leads away from.
    steps: sampler steps over the whole range of noise.
    guidance: weight of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); at 1 or
        less it is left out.
    strength: in (0, 1]; below 1 the hole starts from the noised picture and only the last
        int(steps * strength) steps are run.
    sampler: "ddim", "pndm" or "dpmpp"; None is what the checkpoint names.
    eta: randomness of ddim, from 0 (none) to 1.
    seed, count: paint `count` pictures, with the seeds seed, seed + 1, ...
    profile: "minpaint" keeps every pixel outside the hole, and the input's size; "diffusers"
        gives what diffusers.StableDiffusionInpaintPipeline gives, and takes none of the
        settings below.
    grow: pixels by which the hole grows outward.
    feather: pixels beyond the hole over which the painting fades into the picture.
    soft: grey in the mask means partly: such pixels are let go late in the run, the darker the
        later (differential diffusion, Levin & Fried 2023, arXiv:2306.00950).
    context: "auto", "whole" or pixels around the hole; see view.choose_views.
    separate: parts of the hole that are far apart are painted one after the other.
    expand: pixels to add at the sides and paint, as "left=128,top=64" or a dict.
    fill: what the hole starts from at a strength under 1; see canvas.Canvas.filled. "noise"
        starts from random latents.
    color_match: take out the colour shift measured around the hole.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 50
    guidance: float = 7.5
    strength: float = 1.0
    sampler: str | None = None
    eta: float = 0.0
    seed: int = 0
    count: int = 1
    profile: str = "minpaint"
    grow: int = 0
    feather: int = 0
    soft: bool = False
    context: str | int = "auto"
    separate: bool = False
    expand: str | Mapping[str, int] | None = None
    fill: str = "original"
    color_match: bool = True

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a string, not {type(getattr(self, name)).__name__}")
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:
                raise InputError(f"{name} {getattr(self, name)!r} is not valid UTF-8") from None
        for name, least in (("steps", 1), ("count", 1), ("seed", 0), ("grow", 0), ("feather", 0)):
            _check_whole(name, getattr(self, name), least)
        if self.seed + self.count > 2**63:
            raise InputError(f"seed {self.seed} is too large; use one under 2^63")
        for name, most in (("guidance", math.inf), ("strength", 1), ("eta", 1)):
            _check_number(name, getattr(self, name), most)
        if self.strength == 0:
            raise InputError("strength 0 would leave the picture as it is; use more than 0, up to 1")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InputError(f"sampler {self.sampler!r} is unknown; use {', '.join(SAMPLERS)}")
        if self.profile not in PROFILES:
            raise InputError(f"profile {self.profile!r} is unknown; use {', '.join(PROFILES)}")
        if self.fill not in FILLS:
            raise InputError(f"fill {self.fill!r} is unknown; use {', '.join(FILLS)}")
        for name in ("soft", "separate", "color_match"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.context not in ("auto", "whole"):
            if isinstance(self.context, str):
                raise InputError(f"context {self.context!r} is unknown; use auto, whole or a number of pixels")
            _check_whole("context", self.context, 0)
        self.margins  # noqa: B018 - checks it
        changed = [f.name for f in fields(self) if f.name in OWN and getattr(self, f.name) != f.default]
        if changed and self.profile == "diffusers":
            raise InputError(f"{changed[0]} is not for profile diffusers, which paints as diffusers does; leave it out")

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Pixels added at the left, top, right and bottom."""
        sides = self.expand or {}
        if isinstance(sides, str):
            pairs = [part.split("=") for part in sides.split(",")]
            if not all(len(pair) == 2 and pair[1].strip().isdecimal() for pair in pairs):
                raise InputError(f"expand {sides!r} is not understood; write it like left=128,top=64")
            if len({pair[0].strip() for pair in pairs}) < len(pairs):
                raise InputError(f"expand {sides!r} names a side twice")
            sides = {pair[0].strip(): int(pair[1]) for pair in pairs}
        if not isinstance(sides, Mapping) or not set(sides) <= set(SIDES):
            raise InputError(f"expand {self.expand!r} is not understood; the sides are {', '.join(SIDES)}")
        for side, pixels in sides.items():
            _check_whole(f"expand {side}", pixels, 0)
        left, top, right, bottom = (int(sides.get(side, 0)) for side in SIDES)
        return left, top, right, bottom

    @property
    def guided(self) -> bool:
        """Whether guidance has an effect: it adds a share of what the two prompts differ by."""
        return self.guidance > 1 and self.prompt != self.negative_prompt

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.count)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise InputError(f"{name} must be a whole number from {least} up, not {value!r}")


def _check_number(name: str, value: Any, most: float) -> None:
    try:
        fits = not isinstance(value, (bool, str)) and 0 <= float(value) <= most and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        limits = f"a number from 0 to {most}" if math.isfinite(most) else "a finite number from 0 up"
        raise InputError(f"{name} must be {limits}, not {value!r}")
