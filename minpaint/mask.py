"""The canvas: a picture and its hole at the size the network works on, and back again.

White in a mask means repaint. A pixel belongs to the hole from grey level 128 up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minpaint.errors import InputError
from minpaint.image import KEPT_MODES, to_pixels, to_unit

NOTHING_TO_PAINT = "the mask has nothing to paint: no pixel is white (grey level 128 or more)"
SHAPE_TOLERANCE = 0.01  # relative difference of the aspect ratios of a picture and its mask


@dataclass(frozen=True)
class Canvas:
    """What one run works on.

    pixels: [1, 3, Y, X] in [-1, 1]; hole: [1, 1, Y, X], 1 where to paint, 0 elsewhere; Y and X
    are multiples of the VAE's factor. original and cover are the picture as it was given and
    its hole in that size (mode L), for pasting back; None in the reference's profile.
    """

    pixels: Tensor
    hole: Tensor
    original: Image.Image | None
    cover: Image.Image | None

    @property
    def masked_pixels(self) -> Tensor:
        """The picture with its hole blanked to mid-grey, [1, 3, Y, X]."""
        return self.pixels * (self.hole < 0.5)

    def latent_hole(self, factor: int) -> Tensor:
        """The hole at the size of the latents, [1, 1, Y / factor, X / factor].

        Sampled at the corner of each cell, as the reference does.
        """
        return self.hole[:, :, ::factor, ::factor]

    def finish(self, painted: Image.Image) -> Image.Image:
        """The painted picture in the original's size, everything outside the hole pasted back."""
        if self.original is None or self.cover is None:
            return painted
        painted = painted.crop((0, 0, *self.original.size)).convert(self.original.mode)
        return Image.composite(painted, self.original, self.cover)


def make_canvas(image: Image.Image, mask: Image.Image, factor: int, profile: str) -> Canvas:
    """Bring a picture and its mask to a size that the network takes.

    profile "minpaint": the picture is extended to the next multiple of the VAE's factor by
    mirroring, never resampled, and what is kept will be pasted back. "diffusers": both are
    resampled to the last multiple (diffusers/image_processor.py, VaeImageProcessor), and the
    painting comes back in that size.

    Raises:
        InputError: the mask has another shape than the picture, or there is nothing to paint.
    """
    check_mask(image, mask)
    if profile == "diffusers":
        size = (image.width - image.width % factor, image.height - image.height % factor)
        if 0 in size:
            raise InputError(f"image of {image.width}x{image.height} is under {factor} pixels wide or high")
        pixels = to_pixels(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        hole = _hole(mask.resize(size, Image.Resampling.LANCZOS))
        canvas = Canvas(pixels, hole, None, None)
    else:
        original = image if image.mode in KEPT_MODES else image.convert("RGB")
        hole = _hole(mask.resize(image.size, Image.Resampling.LANCZOS))
        cover = Image.frombytes("L", image.size, (hole * 255).to(torch.uint8).numpy().tobytes())
        canvas = Canvas(mirror(to_pixels(image), factor), mirror(hole, factor), original, cover)
    if not bool(canvas.hole.any()):
        raise InputError(NOTHING_TO_PAINT)
    return canvas


def check_mask(image: Image.Image, mask: Image.Image) -> None:
    """InputError unless the mask has the picture's aspect ratio and something to paint."""
    if 0 in image.size:
        raise InputError(f"the image is empty ({image.width}x{image.height} pixels)")
    if 0 in mask.size:
        raise InputError(f"the mask is empty ({mask.width}x{mask.height} pixels)")
    across, down = mask.width * image.height, mask.height * image.width
    if abs(across - down) > SHAPE_TOLERANCE * max(across, down):
        raise InputError(
            f"the mask is {mask.width}x{mask.height} but the image {image.width}x{image.height}: "
            f"the shapes differ; make the mask at the image's size"
        )
    if not bool(_hole(mask).any()):
        raise InputError(NOTHING_TO_PAINT)


def mirror(x: Tensor, factor: int) -> Tensor:
    """Extend [b, c, Y, X] at the bottom and the right to multiples of `factor` by mirroring."""
    for dim in (2, 3):
        size = x.shape[dim]
        period = max(2 * size - 2, 1)  # there and back, the edges once
        positions = torch.arange(-(-size // factor) * factor) % period
        x = x.index_select(dim, torch.where(positions < size, positions, period - positions))
    return x


def _hole(mask: Image.Image) -> Tensor:
    """1 where a mask is at least half white, [1, 1, Y, X]."""
    return (to_unit(mask.convert("L")) >= 0.5).float()
