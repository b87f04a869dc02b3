"""The hole: which pixels are painted, how strongly, and how far the painting may reach out.

White in a mask means repaint. A pixel belongs to the hole from grey level 128 up; in a soft mask
from 1 up. A hole is a picture in mode L of the image's size: 0 is kept, 255 is painted, and what
is between them, in soft masks only, is painted in part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from minpaint.errors import InputError
from minpaint.picture.fill import nearest
from minpaint.picture.image import alpha_of, to_levels, to_unit
from minpaint.settings import Settings

NOTHING_TO_PAINT = "the mask has nothing to paint: no pixel is white (grey level 128 or more)"
BAND = 2**20  # pixels of a large hole that are looked at together
SHAPE_TOLERANCE = 0.01  # relative difference of the aspect ratios of a picture and its mask

Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside


def find_hole(image: Image.Image, mask: Image.Image | None, settings: Settings) -> Image.Image:
    """The hole in an image: its mask's, else its transparent part; and all of the margins that it will get.

    Raises:
        InputError: the mask has another shape than the image, or there is nothing to paint.
    """
    if 0 in image.size:
        raise InputError(f"the image is empty ({image.width}x{image.height} pixels)")
    if mask is not None:
        if 0 in mask.size:
            raise InputError(f"the mask is empty ({mask.width}x{mask.height} pixels)")
        across, down = mask.width * image.height, mask.height * image.width
        if abs(across - down) > SHAPE_TOLERANCE * max(across, down):
            sizes = f"the mask is {mask.width}x{mask.height} but the image {image.width}x{image.height}"
            raise InputError(f"{sizes}: the shapes differ; make the mask at the image's size")
        levels, nothing = _scale(mask if mask.mode == "L" else mask.convert("L"), image.size), NOTHING_TO_PAINT
    else:
        alpha = alpha_of(image)
        if alpha is None and not any(settings.margins):
            raise InputError("no mask, and the image has no transparent part to repaint; add --mask")
        levels = ImageChops.invert(alpha) if alpha is not None else Image.new("L", image.size)
        nothing = "nothing to paint: the image has no pixel more than half transparent; add --mask"
    if not settings.soft:
        levels = levels.point(lambda level: 255 * (level >= 128))
    levels = ImageOps.expand(levels, settings.margins, 255)
    if levels.getbbox() is None:
        raise InputError(nothing)
    return levels


def _scale(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask at the image's size; made smaller, it loses no stroke however thin."""
    if mask.width <= size[0] and mask.height <= size[1]:
        return mask.resize(size, Image.Resampling.LANCZOS)
    return to_levels(strongest(mask, size)[0, 0])


def strongest(hole: Image.Image, size: tuple[int, int]) -> Tensor:
    """A hole or mask at another size, [1, 1, Y, X] in [0, 1]: as strong as the strongest pixel taken in."""
    return F.adaptive_max_pool2d(to_unit(hole), (size[1], size[0]))


def grow(hole: Image.Image, pixels: int) -> Image.Image:
    """The hole with every pixel within a distance of it added, as strong as the nearest of the hole."""
    return _around(hole, pixels, lambda level, distance: level * (distance <= pixels))


def feather(hole: Image.Image, pixels: int) -> Image.Image:
    """The cover: how much of the painting shows, 255 in the hole and falling to 0 beyond the distance.

    Outward only: no pixel of the hole lets the old picture through.
    """

    def fall(level: Tensor, distance: Tensor) -> Tensor:
        x = (1 - distance / (pixels + 1)).clamp(0, 1)
        return torch.where(distance > pixels, 0.0, x * x * (3 - 2 * x))

    return _around(hole.point(lambda level: 255 * (level > 0)), pixels, fall)


def _around(hole: Image.Image, reach: int, change: Callable[[Tensor, Tensor], Tensor]) -> Image.Image:
    """The hole changed near it: change(level of the nearest pixel of the hole, its distance).

    A large hole is gone through in bands of rows, each with the rows that reach into it.
    """
    if reach == 0:
        return hole
    left, top, right, bottom = reach_box(hole, reach)
    rows, changed = max(BAND // (right - left), 2 * reach), hole.copy()
    for first in range(top, bottom, rows):
        last, start = min(first + rows, bottom), max(first - reach, top)
        part = to_unit(hole.crop((left, start, right, min(last + reach, bottom))))[0, 0]
        found, distance = nearest(part > 0)
        band = to_levels(change(part.flatten()[found], distance)[first - start : last - start])
        changed.paste(band, (left, first))
    return changed


def reach_box(hole: Image.Image, reach: int = 0) -> Box:
    """The box of the hole, or of all if it is empty, and so many pixels around it, inside the picture."""
    left, top, right, bottom = hole.getbbox() or (0, 0, *hole.size)
    return max(left - reach, 0), max(top - reach, 0), min(right + reach, hole.width), min(bottom + reach, hole.height)


def area(box: Box) -> int:
    """Pixels of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def islands(hole: Image.Image, apart: int) -> Iterator[Image.Image]:
    """The parts of a hole that are at least some `apart` pixels from one another, each as a hole, top first."""
    padded = F.pad(to_unit(hole), (0, -hole.width % apart, 0, -hole.height % apart))
    marked = F.max_pool2d(padded, apart)[0, 0] > 0  # squares of `apart` pixels that hold some of the hole
    left_over = {(int(y), int(x)) for y, x in marked.nonzero().tolist()}
    while left_over:
        island, reached = Image.new("L", (marked.shape[1], marked.shape[0])), {min(left_over)}
        while reached:
            left_over -= reached
            for y, x in reached:
                island.putpixel((x, y), 255)
            reached = {(y + down, x + right) for y, x in reached for down in (-1, 0, 1) for right in (-1, 0, 1)}
            reached &= left_over
        squares = island.resize((island.width * apart, island.height * apart), Image.Resampling.NEAREST)
        yield ImageChops.darker(hole, squares.crop((0, 0, *hole.size)))
