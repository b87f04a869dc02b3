"""The stages of a mask as one picture, to be looked at when a painting is not what was expected."""

from __future__ import annotations

from PIL import Image, ImageDraw

from minpaint.picture.frame import Frame
from minpaint.picture.image import strip, to_image, to_levels
from minpaint.picture.view import ReferenceView, View

LARGEST_SHOWN = 512  # pixels on the longer side of a picture in the explanation


def explain(frame: Frame, view: View | ReferenceView) -> Image.Image:
    """Every stage of the mask side by side: what is given, what the network sees, what will show."""
    pictures = stages(frame, view)
    longest = max(frame.original.size)
    scale = min(LARGEST_SHOWN / longest, max(LARGEST_SHOWN // (2 * longest), 1))
    size = (max(round(frame.original.width * scale), 96), max(round(frame.original.height * scale), 1))
    return strip([_inside(picture, size) for picture in pictures.values()], list(pictures))


def stages(frame: Frame, view: View | ReferenceView) -> dict[str, Image.Image]:
    """The stages of the mask by name, each in its own size."""
    canvas, picture = view.canvas([frame.begin()]), frame.begin().convert("RGB")
    boxed, (left, top, right, bottom) = picture.copy(), view.box
    edge = max(picture.width // 200, 1)
    ImageDraw.Draw(boxed).rectangle((left, top, right - 1, bottom - 1), outline="red", width=edge)
    return {
        "image and crop": boxed,
        "mask": frame.mask.convert("L").resize(picture.size),
        "hole": frame.hole,
        "in the crop": view.hole,
        "latent cells": to_levels(canvas.cells[0, 0]).resize(view.extent, Image.Resampling.NEAREST),
        "network sees": to_image(canvas.masked_pixels[0]),
        "cover": frame.cover,
    }


def _inside(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture scaled to fit a size, on grey."""
    fit = min(size[0] / picture.width, size[1] / picture.height)
    scaled = (max(round(picture.width * fit), 1), max(round(picture.height * fit), 1))
    sheet = Image.new("RGB", size, "grey")
    sheet.paste(picture.convert("RGB").resize(scaled, Image.Resampling.NEAREST if fit > 1 else Image.Resampling.BOX))
    return sheet
