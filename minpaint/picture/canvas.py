"""What the network works on: pixels, the pixels hidden from it, and the latent cells it paints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minpaint.errors import InputError
from minpaint.picture.fill import from_nearest, membrane
from minpaint.picture.image import to_pixels, to_unit
from minpaint.picture.mask import NOTHING_TO_PAINT


@dataclass(frozen=True)
class Canvas:
    """The network's input, before it is encoded.

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

        fill: "original" leaves the hole as it is; "edge" copies the nearest kept pixel; "blur"
        lets the surroundings' colours flow in (fill.membrane); "blank" and "noise" give mid-grey.
        """
        known = self.blanked[0, 0] < 0.5
        if fill == "original":
            return self.pixels
        if fill == "edge":
            return from_nearest(self.pixels, known)
        return membrane(self.pixels, known) if fill == "blur" else self.masked_pixels


def reference_canvas(image: Image.Image, mask: Image.Image, factor: int, least: int = 1) -> Canvas:
    """The canvas that the reference makes (diffusers/image_processor.py, VaeImageProcessor).

    It resamples picture and mask to the last multiple of the VAE's factor, and paints a latent
    cell if the pixel at the cell's corner is white.

    Raises:
        InputError: a side has no cell, the longer one fewer than `least`, or the resampled mask no white pixel.
    """
    size = (image.width - image.width % factor, image.height - image.height % factor)
    if 0 in size or max(size) < least * factor:
        raise InputError(
            f"image of {image.width}x{image.height} is too small for --profile diffusers, where this model takes from "
            f"{least * factor}x{factor} pixels; use a larger picture or --profile minpaint"
        )
    pixels = to_pixels(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    hole = (to_unit(mask.convert("L").resize(size, Image.Resampling.LANCZOS)) >= 0.5).float()
    if not bool(hole.any()):
        raise InputError(NOTHING_TO_PAINT)
    return Canvas(pixels, hole, hole[:, :, ::factor, ::factor])


def mirror(x: Tensor, extent: tuple[int, int]) -> Tensor:
    """Extend [b, c, Y, X] at the right and the bottom to a width and height, by mirroring to and fro."""
    for dim, wanted in ((2, extent[1]), (3, extent[0])):
        size = x.shape[dim]
        period = max(2 * size - 2, 1)  # there and back, the pixels at both ends once
        positions = torch.arange(wanted) % period
        x = x.index_select(dim, torch.where(positions < size, positions, period - positions))
    return x
