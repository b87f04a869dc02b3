"""What to paint and how: every option of a painting, declared once.

A field of `Settings` carries its default, its check and its help text. The checks, the command line's
arguments, `--help`, the record of a painting and README's table are all made from these fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

from minpaint.errors import InputError

SAMPLERS = ("ddim", "pndm", "dpmpp", "lcm")
SIDES = ("left", "top", "right", "bottom")
# the headings under which --help lists the options
WHAT, MODEL, HOLE, MACHINE = "what to paint", "the model and its sampler", "the hole and its seam", "the machine"


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, not {type(value).__name__}")
    if value.encode(errors="ignore").decode() != value:
        raise InputError(f"{name} {value!r} is not valid UTF-8")


def _whole(name: str, value: Any, least: int = 0) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise InputError(f"{name} must be a whole number from {least} up, not {value!r}")


def _number(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__") or not 0 <= value <= most:
        raise InputError(f"{name} must be a number from 0 to {most}, not {value!r}")


def _switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, not {value!r}")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} {value!r} is unknown; use {', '.join(choices)}")


def _context(name: str, value: Any) -> None:
    if value not in ("auto", "whole"):
        if isinstance(value, str):
            raise InputError(f"{name} {value!r} is unknown; use auto, whole or a number of pixels")
        _whole(name, value)


def _margins(name: str, value: Any) -> tuple[int, int, int, int]:
    """Pixels to add at the left, top, right and bottom, from text like "left=128,top=64" or a mapping."""
    sides = value or {}
    if isinstance(sides, str):
        pairs = [part.split("=") for part in sides.split(",")]
        if not all(len(pair) == 2 and pair[1].strip().isdecimal() for pair in pairs):
            raise InputError(f"{name} {sides!r} is not understood; write it like left=128,top=64")
        if len({pair[0].strip() for pair in pairs}) < len(pairs):
            raise InputError(f"{name} {sides!r} names a side twice")
        sides = {pair[0].strip(): int(pair[1]) for pair in pairs}
    if not isinstance(sides, Mapping) or not set(sides) <= set(SIDES):
        raise InputError(f"{name} {value!r} is not understood; the sides are {', '.join(SIDES)}")
    for side, pixels in sides.items():
        _whole(f"{name} {side}", pixels)
    left, top, right, bottom = (int(sides.get(side, 0)) for side in SIDES)
    return left, top, right, bottom


Check = Callable[[str, Any], object]  # takes a field's name and value; raises InputError if it cannot be used
_positive, _share = partial(_whole, least=1), partial(_number, most=1)
_weight = partial(_number, most=10**6)  # far beyond use; from 1e30 on, float32 cannot hold the latents


def _option(default: Any, group: str, check: Check | tuple[str, ...], text: str, **arguments: Any) -> Any:
    """A field of Settings: its heading, its check or the words it may be, its help text, add_argument's arguments."""
    if isinstance(check, tuple):
        arguments["choices"], check = check, partial(_choice, choices=check)
    return field(default=default, metadata={"group": group, "check": check, "help": text, "arguments": arguments})


@dataclass(frozen=True)
class Settings:
    """What to paint and how, checked as it is made: InputError names a value that cannot be used.

    profile="diffusers" gives what diffusers.StableDiffusionInpaintPipeline gives; the options of the
    hole and its seam, which that has not, must then keep their defaults.
    """

    # fmt: off
    prompt: str = _option(MISSING, WHAT, _text, "what to paint", metavar="TEXT")
    negative_prompt: str = _option("", WHAT, _text, "what to stay away from", metavar="TEXT")
    steps: int | None = _option(None, MODEL, _positive, "sampler steps over the whole range of noise "
        "(default: 50, lcm 4)", type=int)
    # classifier-free guidance: Ho & Salimans 2022, arXiv:2207.12598
    guidance: float = _option(7.5, MODEL, _weight, "weight of the prompt; 1 or less turns guidance off, twice as fast")
    strength: float = _option(1.0, MODEL, _share, "how much noise the hole starts from, over 0 up to 1; "
        "under 1 it keeps the picture's layout and runs the last part of the steps only")
    sampler: str | None = _option(None, MODEL, SAMPLERS, "default: what the checkpoint names")
    eta: float | None = _option(None, MODEL, _share, "randomness of ddim, 0 to 1 (default: 0, or 1 for a checkpoint "
        "that names an ancestral sampler)", type=float)
    seed: int = _option(0, MODEL, _whole, "one seed gives one picture")
    count: int = _option(1, MODEL, _positive, "pictures to paint at once, each with the next seed")
    profile: str = _option("minpaint", MACHINE, ("minpaint", "diffusers"),
        "diffusers: what its pipeline gives, nothing pasted back")
    grow: int = _option(0, HOLE, _whole, "pixels by which the hole grows outward", metavar="N")
    feather: int = _option(0, HOLE, _whole, "pixels outside over which the painting fades", metavar="N")
    # differential diffusion: Levin & Fried 2023, arXiv:2306.00950
    soft: bool = _option(False, HOLE, _switch, "grey in the mask means: repaint partly")
    context: str | int = _option("auto", HOLE, _context, "pixels around the hole for the network to see; whole: all; "
        "auto: all, or a crop if large", metavar="N", type=lambda text: int(text) if text.isdecimal() else text)
    separate: bool = _option(False, HOLE, _switch, "paint parts that are far apart one after the other")
    expand: str | Mapping[str, int] | None = _option(None, HOLE, _margins, "add pixels at the sides and paint them",
        metavar="left=N,top=N,...")
    fill: str = _option("original", HOLE, ("original", "edge", "blur", "noise", "blank"),
        "what the hole starts from at a strength under 1")
    color_match: bool = _option(True, HOLE, _switch, "take the colour step out of the seam")
    # fmt: on

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if value is option.default:
                continue
            try:
                option.metadata["check"](name, value)
            except InputError:
                raise
            except (TypeError, ValueError, RuntimeError):  # an array is neither less nor more than a number
                raise InputError(f"{name} cannot be a {type(value).__name__}") from None
            if option.metadata["group"] == HOLE and value != option.default and self.profile == "diffusers":
                raise InputError(f"{name} is not for profile diffusers, which paints as diffusers does; leave it out")
        if self.seed + self.count > 2**63:
            raise InputError(f"seed {self.seed} is too large; use one under 2^63")
        if self.strength == 0:
            raise InputError("strength 0 would leave the picture as it is; use more than 0, up to 1")

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Pixels added at the left, top, right and bottom."""
        return _margins("expand", self.expand)

    @property
    def guided(self) -> bool:
        """Whether guidance has an effect: it adds a share of what the two prompts differ by."""
        return self.guidance > 1 and self.prompt != self.negative_prompt

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.count)
