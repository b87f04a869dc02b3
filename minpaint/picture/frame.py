"""The picture as it was given, around what is painted: what is kept of it, down to its mode."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from PIL import Image, ImageChops

from minpaint.errors import InputError, MinpaintWarning
from minpaint.picture.image import ImageSource, alpha_of, expand, keep_mode, open_image, restore_mode
from minpaint.picture.mask import feather, find_hole, grow
from minpaint.settings import Settings


@dataclass(frozen=True)
class Frame:
    """An image ready to be painted in, and what of it may change.

    original: in a mode that can be kept, with its new margins. mask: as given, or the hole found
    in the image. hole: which pixels are painted; cover: those and the feather around them, both
    in mode L and of the original's size. opaque: the hole was the transparent part, and will
    not be transparent any more.
    """

    original: Image.Image
    mask: Image.Image
    hole: Image.Image
    cover: Image.Image
    opaque: bool

    @property
    def touched(self) -> Image.Image:
        """The pixels that may change, mode 1."""
        return self.cover.point(lambda level: 255 * (level > 0)).convert("1", dither=Image.Dither.NONE)

    def begin(self) -> Image.Image:
        """The picture to paint in, as L, LA, RGB or RGBA, in which colours can be mixed."""
        if self.original.mode == "P":
            return self.original.convert("RGBA" if "transparency" in self.original.info else "RGB")
        return self.original.convert("L") if self.original.mode == "1" else self.original

    def finish(self, painted: Image.Image) -> Image.Image:
        """What was painted in, in the original's mode; every pixel not touched is the original's."""
        if self.opaque and painted.mode.endswith("A"):
            painted = painted.copy()
            painted.putalpha(ImageChops.lighter(painted.getchannel("A"), self.cover))
        return restore_mode(painted, self.original, self.touched)


def open_frame(image: ImageSource, mask: ImageSource | None, settings: Settings) -> Frame:
    """Open an image and its mask, and find and shape the hole; without a mask it is the transparent part.

    Raises:
        InputError: image or mask cannot be read, their shapes differ, or there is nothing to paint.
    """
    image, mask = open_image(image), None if mask is None else open_image(mask, "mask")
    left, top, right, bottom = settings.margins
    width, height = image.width + left + right, image.height + top + bottom
    if any(settings.margins) and width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise InputError(f"expand {settings.expand} would make {width}x{height} pixels: too many; add less")
    hole = grow(find_hole(image, mask, settings), settings.grow)
    original = expand(keep_mode(image), settings.margins)
    alpha = alpha_of(original)
    opaque = mask is None and alpha is not None
    if mask is not None and alpha is not None and ImageChops.multiply(alpha, hole).getbbox() is None:
        told = "the hole is transparent in the image and stays so; leave out the mask to make it opaque"
        warnings.warn(told, MinpaintWarning, stacklevel=2)
    return Frame(original, mask or hole, hole, feather(hole, settings.feather), opaque)
