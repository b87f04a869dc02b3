"""What the network works on: a part of the picture, its hole, and the same in latent cells.

A View says which part of the picture and at what size; it makes the Canvas, and puts what was
painted on it back into the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minpaint.errors import InputError
from minpaint.picture.fill import from_nearest, membrane
from minpaint.picture.image import alpha_of, to_image, to_pixels, to_unit
from minpaint.picture.mask import NOTHING_TO_PAINT, Box, islands, reach_box
from minpaint.picture.seam import match_colour

WHOLE = 4  # times the area the network was trained on: up to this size a picture is painted as a whole
ENLARGED = 4  # times, at most, that a small crop is enlarged
MATCHED = 8  # kept pixels around the cover that the colour shift is measured on


@dataclass(frozen=True)
class Canvas:
    """The network's input, all of it from one geometry.

    pixels: [n, 3, Y, X] in [-1, 1], Y and X multiples of the VAE's factor; n is 1 as long as
        all paintings start from the same picture.
    blanked: [1, 1, Y, X], 1 where the network may not see the picture.
    cells: [1, 1, y, x], how strongly each latent cell is painted, 0 to 1.
    """

    pixels: Tensor
    blanked: Tensor
    cells: Tensor

    @property
    def masked_pixels(self) -> Tensor:
        """The picture with its hole blanked to mid-grey, [n, 3, Y, X]."""
        return self.pixels * (self.blanked < 0.5)

    def filled(self, fill: str) -> Tensor:
        """The picture with something else in its hole, [n, 3, Y, X].

        original: as it is. edge: copies of the nearest kept pixel. blur: the surroundings'
        colours flowing in (a membrane). blank, noise: mid-grey.
        """
        known = self.blanked[0, 0] < 0.5
        if fill == "original":
            return self.pixels
        if fill == "edge":
            return from_nearest(self.pixels, known)
        return membrane(self.pixels, known) if fill == "blur" else self.masked_pixels


@dataclass(frozen=True)
class View:
    """A part of the picture that is painted in one go.

    box: the part. size: width and height it is scaled to for the network. hole: what the
    network is to paint there (mode L, of the part). cover: how much of that will show.
    """

    box: Box
    size: tuple[int, int]
    hole: Image.Image
    cover: Image.Image

    def canvas(self, pictures: list[Image.Image], factor: int) -> Canvas:
        """The canvas for pictures that differ, or for the one that all paintings start from.

        The part is extended to the next multiple of the VAE's factor by mirroring, never
        resampled for it. A latent cell is painted if any of its pixels is, and then the network
        sees none of its pixels.
        """
        pixels = torch.cat([mirror(self._pixels(picture), factor) for picture in pictures])
        cells = F.max_pool2d(mirror(_reduce(self.hole, self.size), factor), factor)
        return Canvas(pixels, F.interpolate((cells > 0).float(), scale_factor=factor), cells)

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
            original = to_pixels(part.crop(box)).to(painted)
            here = painted[0, :, top:bottom, left:right]  # a view: what is put there changes `painted`
            here.copy_(match_colour(here, original[0], ~free.to(painted.device)))
        shown = to_image(painted[0]).convert(picture.mode.rstrip("A"))
        alpha = alpha_of(part) if picture.mode.endswith("A") else None
        if alpha is not None:
            shown.putalpha(alpha)
        finished = picture.copy()
        finished.paste(Image.composite(shown, part, self.cover), self.box[:2])
        return finished

    def _pixels(self, picture: Image.Image) -> Tensor:
        return to_pixels(picture.crop(self.box).convert("RGB").resize(self.size, Image.Resampling.LANCZOS))


def choose_views(hole: Image.Image, cover: Image.Image, native: int, context: str | int, separate: bool) -> list[View]:
    """The parts of the picture to paint, one after the other.

    native: the side of the square the network was trained on, in pixels.
    context: "whole" paints the whole picture at its own size. "auto" does so up to 4 times the
        native area; beyond, it takes the part around the hole, at least the native size and at
        least twice the hole's, scaled down to the native size where it is larger. A number
        takes that many pixels around the hole, scaled to the native size.
    separate: parts of the hole far apart (a quarter of the native size) have views of their own.
    """
    if not separate:
        box, size = _frame(cover, native, context)
        return [View(box, size, hole.crop(box), cover.crop(box))]
    views, left = [], hole.copy()
    for island in islands(cover, max(native // 4, 1)):
        box, size = _frame(island, native, context)
        views.append(View(box, size, left.crop(box), island.crop(box)))
        left.paste(0, (0, 0), island.point(lambda level: 255 * (level > 0)))
    return views


def _frame(cover: Image.Image, native: int, context: str | int) -> tuple[Box, tuple[int, int]]:
    """The box around a cover, and the size to scale it to."""
    width, height = cover.size
    if context == "whole" or (context == "auto" and width * height <= WHOLE * native**2):
        return (0, 0, width, height), cover.size
    left, top, right, bottom = reach_box(cover)
    longer = max(right - left, bottom - top)
    if isinstance(context, int):
        side = max(longer + 2 * context, native // ENLARGED)
        scale = native / side
    else:
        side = max(2 * longer, native)
        scale = min(native / side, 1.0)
    across, down = min(side, width), min(side, height)
    x = min(max((left + right - across) // 2, 0), width - across)
    y = min(max((top + bottom - down) // 2, 0), height - down)
    return (x, y, x + across, y + down), (max(round(across * scale), 1), max(round(down * scale), 1))


def reference_canvas(image: Image.Image, mask: Image.Image, factor: int) -> Canvas:
    """The canvas as the reference makes it (diffusers/image_processor.py, VaeImageProcessor).

    Both are resampled to the last multiple of the factor; a latent cell is painted if the pixel
    at its corner is. InputError if that leaves nothing of the picture or of the hole.
    """
    size = (image.width - image.width % factor, image.height - image.height % factor)
    if 0 in size:
        raise InputError(f"image of {image.width}x{image.height} is under {factor} pixels wide or high")
    pixels = to_pixels(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    hole = (to_unit(mask.convert("L").resize(size, Image.Resampling.LANCZOS)) >= 0.5).float()
    if not bool(hole.any()):
        raise InputError(NOTHING_TO_PAINT)
    return Canvas(pixels, hole, hole[:, :, ::factor, ::factor])


def mirror(x: Tensor, factor: int) -> Tensor:
    """Extend [b, c, Y, X] at the bottom and the right to multiples of `factor` by mirroring."""
    for dim in (2, 3):
        size = x.shape[dim]
        period = max(2 * size - 2, 1)  # there and back, the edges once
        positions = torch.arange(-(-size // factor) * factor) % period
        x = x.index_select(dim, torch.where(positions < size, positions, period - positions))
    return x


def _reduce(hole: Image.Image, size: tuple[int, int]) -> Tensor:
    """A hole at another size, [1, 1, Y, X] in [0, 1]: as strong as the strongest pixel it takes in."""
    return F.adaptive_max_pool2d(to_unit(hole), (size[1], size[0]))
