"""Views: the parts of the picture that are painted, one after the other.

A view says which part of the picture the network sees, and at what size. It makes the Canvas, and puts
what was painted on it back: View in this project's way, ReferenceView in the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from minpaint.picture.canvas import Canvas, mirror, reference_canvas
from minpaint.picture.frame import Frame
from minpaint.picture.image import to_image, to_levels, to_pixels, to_unit
from minpaint.picture.mask import Box, islands, reach_box, strongest
from minpaint.picture.seam import match_colour
from minpaint.settings import Settings

WHOLE = 4  # times the area the network was trained on: up to this size a picture is painted as a whole
ENLARGED = 4  # times, at most, that a small crop is enlarged
MATCHED = 8  # kept pixels around the cover that the colour shift is measured on


@dataclass(frozen=True)
class View:
    """A part of the picture that is painted in one go; only the hole and its feather change.

    box: the part. size: width and height that it is scaled to. hole: what the network is to
    paint there (mode L, of the part). cover: how much of the painting will show. factor: pixels
    of the VAE per latent cell. least: latent cells that the longer side must have. blends:
    whether the kept part's latents are put back around the hole at every step, also for a
    network that sees the masked picture.
    """

    box: Box
    size: tuple[int, int]
    hole: Image.Image
    cover: Image.Image
    factor: int
    least: int = 1
    blends: ClassVar[bool] = True

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height of the canvas: the size, extended to whole latent cells, and to `least` if too small."""
        width, height = (-(-side // self.factor) for side in self.size)
        if max(width, height) < self.least:
            width = height = self.least
        return self.factor * width, self.factor * height

    def canvas(self, pictures: list[Image.Image]) -> Canvas:
        """The canvas for pictures that differ, or for the one that all paintings start from.

        The part is extended by mirroring, never resampled for it. A latent cell is painted if
        any of its pixels is, and then the network sees none of its pixels.
        """
        parts = (picture.crop(self.box).convert("RGB") for picture in pictures)
        scaled = (to_pixels(part.resize(self.size, Image.Resampling.LANCZOS)) for part in parts)
        pixels = torch.cat([mirror(part, self.extent) for part in scaled])
        cells = F.max_pool2d(mirror(strongest(self.hole, self.size), self.extent), self.factor)
        return Canvas(pixels, F.interpolate((cells > 0).float(), scale_factor=self.factor), cells)

    def fill(self, settings: Settings) -> str:
        """What the hole starts from: at full strength nothing of its old content may be seen."""
        return "blur" if settings.strength == 1 and not settings.soft else settings.fill

    def finish(self, picture: Image.Image, painted: Tensor, match: bool) -> Image.Image:
        """The picture with what was painted, [3, Y, X] in [-1, 1], under the cover.

        match: take out the colour shift measured on the kept pixels. Transparency stays as it is.
        """
        width, height = self.size
        part = picture.crop(self.box)
        painted = painted[None, :, :height, :width].float()
        if part.size != self.size:
            painted = F.interpolate(painted, part.size[::-1], mode="bicubic", antialias=True)
        if match:
            left, top, right, bottom = box = reach_box(self.cover, MATCHED)
            free = (to_unit(self.hole.crop(box)) + to_unit(self.cover.crop(box)))[0, 0] > 0
            original = to_pixels(part.crop(box))[0].to(painted)
            here = painted[0, :, top:bottom, left:right]  # shares its memory: copying into it changes `painted`
            here.copy_(match_colour(here, original, ~free.to(painted.device)))
        shown = to_image(painted[0]).convert(picture.mode.rstrip("A"))
        if picture.mode.endswith("A"):
            shown.putalpha(part.getchannel("A"))
        finished = picture.copy()
        finished.paste(Image.composite(shown, part, self.cover), self.box[:2])
        return finished

    def complete(self, frame: Frame, picture: Image.Image) -> tuple[Image.Image, Image.Image]:
        """The finished picture in the original's mode, and the hole that its seam is measured around."""
        return frame.finish(picture), frame.hole


class ReferenceView:
    """The whole picture as diffusers' pipeline paints it: resampled, and none of its pixels put back.

    It has the properties and methods of a View. It makes its canvas at once, from the original
    picture and mask, so that reference_canvas raises its InputErrors before any work is done.
    """

    blends = False

    def __init__(self, frame: Frame, factor: int, least: int = 1) -> None:
        self.box, self.hole = (0, 0, *frame.original.size), frame.hole
        self._canvas = reference_canvas(frame.original, frame.mask, factor, least)
        self.extent = self._canvas.pixels.shape[3], self._canvas.pixels.shape[2]

    def canvas(self, pictures: list[Image.Image]) -> Canvas:
        return self._canvas

    def fill(self, settings: Settings) -> str:
        return settings.fill

    def finish(self, picture: Image.Image, painted: Tensor, match: bool) -> Image.Image:
        return to_image(painted)

    def complete(self, frame: Frame, picture: Image.Image) -> tuple[Image.Image, Image.Image]:
        return picture, to_levels(self._canvas.blanked[0, 0])


def choose_views(
    frame: Frame, settings: Settings, native: int, factor: int, least: int = 1
) -> list[View | ReferenceView]:
    """The parts of the picture to paint, one after the other.

    native: side of the square that the network was trained on, in pixels. factor, least: see View.
    settings.profile: "diffusers" has one view, the reference's.
    settings.context: "whole" paints the whole picture at its own size. "auto" does so up to 4
        times the native area; beyond, it takes the part around the hole, at least the native
        size and at least twice the hole's, scaled down to the native size where it is larger.
        A number takes that many pixels around the hole, scaled to the native size.
    settings.separate: parts of the hole far apart (a quarter of the native size) have views of
        their own.
    """
    if settings.profile == "diffusers":
        return [ReferenceView(frame, factor, least)]
    views: list[View | ReferenceView] = []
    unpainted = frame.hole
    for cover in islands(frame.cover, max(native // 4, 1)) if settings.separate else [frame.cover]:
        box, size = _box_and_size(cover, native, settings.context)
        views.append(View(box, size, unpainted.crop(box), cover.crop(box), factor, least))
        if settings.separate:
            unpainted = ImageChops.subtract(unpainted, cover.point(lambda level: 255 * (level > 0)))
    return views


def _box_and_size(cover: Image.Image, native: int, context: str | int) -> tuple[Box, tuple[int, int]]:
    """The box around a cover that the network sees, and the size to scale it to."""
    width, height = cover.size
    if context == "whole" or (context == "auto" and width * height <= WHOLE * native**2):
        return (0, 0, width, height), cover.size
    left, top, right, bottom = reach_box(cover)
    longer = max(right - left, bottom - top)
    side = max(longer + 2 * context, native // ENLARGED) if isinstance(context, int) else max(2 * longer, native)
    scale = native / side
    across, down = min(side, width), min(side, height)
    x = min(max((left + right - across) // 2, 0), width - across)
    y = min(max((top + bottom - down) // 2, 0), height - down)
    return (x, y, x + across, y + down), (max(round(across * scale), 1), max(round(down * scale), 1))
