"""Pictures: files to PIL images to tensors, and back, whatever their mode."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike, fspath
from typing import BinaryIO

import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from minpaint.errors import InputError, MinpaintWarning

ImageSource = Image.Image | str | PathLike[str] | BinaryIO
KEPT_MODES = ("RGB", "RGBA", "L", "LA", "1", "P")
SPARE = 16  # unused entries that a palette must have to take new colours
GAP = 4  # pixels between the pictures of a strip


def name_of(source: ImageSource, what: str) -> str:
    """What messages call a picture: by its file, where it comes from one."""
    name = fspath(source) if isinstance(source, (str, PathLike)) else getattr(source, "name", None)
    return f"the {what}" if name is None else f"{what} {name}"


def open_image(source: ImageSource, what: str = "image") -> Image.Image:
    """A fully read picture from a file (turned as its EXIF orientation says) or from memory.

    what: its name in messages. InputError if it is missing, unreadable, truncated or absurdly large.
    """
    if not isinstance(source, (Image.Image, str, PathLike)) and not hasattr(source, "read"):
        raise InputError(f"{what} must be a path or a PIL image, not {type(source).__name__}")
    name = name_of(source, what)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # whose other pictures are previews
        image.load()
        if image is not source:
            exif = image.getexif()
            if exif and "exif" not in image.info:  # a TIFF's is elsewhere, and copies would lack it
                image.info["exif"] = exif.tobytes()
            image = ImageOps.exif_transpose(image)
        image = to_eight_bits(image)
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        told: dict[type[Exception], str] = {FileNotFoundError: "no such file"}
        told[UnidentifiedImageError] = "not a picture that Pillow can read"
        told[Image.DecompressionBombError] = f"too many pixels ({error})"
        raise InputError(f"{name}: {told.get(type(error), f'cannot be read, or is damaged ({error!r})')}") from None
    if image.mode == "LAB":  # which Pillow opens but converts to nothing
        raise InputError(f"{name}: its colours are CIE LAB, which cannot be painted in; save it as RGB")
    if several and image is not source:
        warnings.warn(f"{name} holds several pictures; the first is used", MinpaintWarning, stacklevel=2)
    return image


def to_eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture in 8 bits, which Pillow's own conversion would clip; any other as it is."""
    brightest = image.getextrema()[1] if image.mode.startswith("I") else 0
    if not isinstance(brightest, tuple) and brightest > 255:
        scaled = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
        scaled.info = {**image.info, "bits": 16}
        return scaled
    return image


def keep_mode(image: Image.Image) -> Image.Image:
    """The picture in a mode that a painting can have; a MinpaintWarning says what cannot be kept."""
    given = kept = image.mode
    if image.info.get("bits") == 16:
        given, kept = "16-bit grey", "8-bit grey"
    elif image.mode not in KEPT_MODES:
        grey, info = image.mode.startswith(("I", "F")), dict(image.info)
        kept = "L" if grey else "RGBA" if image.mode in ("PA", "RGBa", "La") else "RGB"
        if not grey:
            info.pop("icc_profile", None)  # it is about the colours of the old mode
        image = image.convert(kept)
        image.info = info
    if kept != given:
        told = f"the image is {given}, which cannot be painted in; it is read and written as {kept}"
        warnings.warn(told, MinpaintWarning, stacklevel=2)
    return image


def alpha_of(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, mode L; None if the picture has no transparency."""
    if "A" in image.getbands():
        return image.getchannel("A")
    return image.convert("RGBA").getchannel("A") if "transparency" in image.info else None


def restore_mode(worked: Image.Image, original: Image.Image, touched: Image.Image) -> Image.Image:
    """The original with its touched pixels (mode 1) from a picture in another mode; the others stay its own.

    A palette picture gets the new colours in entries that no pixel uses. If it has fewer than
    SPARE of them, it gets the nearest of the opaque colours that it has.
    """
    result, box = original.copy(), touched.getbbox()
    if box is None:
        return result
    part = worked.crop(box)
    part = _into_palette(part.convert("RGB"), result) if original.mode == "P" else part.convert(original.mode)
    result.paste(part, box[:2], touched.crop(box))
    return result


def _into_palette(part: Image.Image, result: Image.Image) -> Image.Image:
    """An RGB picture in the palette of another, mode P; entries that the other does not use may change."""
    palette, clear = _colours(result), result.info.get("transparency")  # None, an index, or a byte per index
    levels = list(clear.ljust(256, b"\xff")) if isinstance(clear, bytes) else [255] * 256
    used = result.histogram()
    entries = [index for index in range(256) if not used[index] and index != clear]
    if len(entries) >= SPARE:
        part = part.quantize(len(entries), dither=Image.Dither.FLOYDSTEINBERG)
        for index, colour in zip(entries, _colours(part), strict=False):
            palette[index], levels[index] = colour, 255
        result.putpalette([level for colour in palette for level in colour])
        if isinstance(clear, bytes):
            result.info["transparency"] = bytes(levels)
    else:
        entries = [index for index in range(256) if used[index] and index != clear]
        entries = [index for index in entries if levels[index] == 255] or entries
        sample = Image.new("P", (1, 1))
        sample.putpalette([level for index in entries for level in palette[index]])
        part = part.quantize(palette=sample)
    return part.point([*entries, *[entries[0]] * (256 - len(entries))])


def _colours(image: Image.Image) -> list[list[int]]:
    """The palette of a picture as 256 colours; those that it lacks are black."""
    levels = (image.getpalette("RGB") or [])[:768]
    levels += [0] * (768 - len(levels))
    return [levels[i : i + 3] for i in range(0, 768, 3)]


def expand(image: Image.Image, margins: tuple[int, int, int, int]) -> Image.Image:
    """The picture with margins (left, top, right, bottom) that repeat its edges; fully opaque there."""
    (left, top, right, bottom), (width, height) = margins, image.size
    if not any(margins):
        return image
    grown = image.crop((-left, -top, width + right, height + bottom))  # keeps mode, palette and metadata
    for at, edge, size in (
        ((0, top), (left, top, left + 1, top + height), (left, height)),
        ((left + width, top), (left + width - 1, top, left + width, top + height), (right, height)),
        ((0, 0), (0, top, grown.width, top + 1), (grown.width, top)),
        ((0, top + height), (0, top + height - 1, grown.width, top + height), (grown.width, bottom)),
    ):
        if 0 not in size:
            grown.paste(grown.crop(edge).resize(size, Image.Resampling.NEAREST), at)
    if "A" in image.getbands():
        grown.putalpha(ImageOps.expand(image.getchannel("A"), margins, 255))
    return grown


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as [1, 3, Y, X] float32 in [-1, 1]."""
    return 2.0 * to_unit(image.convert("RGB")) - 1.0


def to_unit(image: Image.Image) -> Tensor:
    """An 8-bit picture as [1, channels, Y, X] float32 in [0, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    channels = len(image.getbands())
    return data.reshape(1, image.height, image.width, channels).permute(0, 3, 1, 2).float() / 255.0


def to_image(pixels: Tensor) -> Image.Image:
    """[3, Y, X] in [-1, 1], clamped to it, as an RGB picture."""
    return Image.merge("RGB", [to_levels(channel.float().cpu() * 0.5 + 0.5) for channel in pixels])


def to_levels(x: Tensor) -> Image.Image:
    """[Y, X] in [0, 1], clamped to it, as a picture in mode L."""
    levels = (x.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.frombytes("L", (x.shape[1], x.shape[0]), levels.contiguous().numpy().tobytes())


def strip(pictures: Sequence[Image.Image], names: Sequence[str] = ()) -> Image.Image:
    """Pictures of one size side by side, RGB, with their names above them."""
    width, height = pictures[0].size
    head = 16 if names else 0
    joined = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height + head), "white")
    for number, picture in enumerate(pictures):
        joined.paste(picture.convert("RGB"), (number * (width + GAP), head))
        if names:
            ImageDraw.Draw(joined).text((number * (width + GAP) + 2, 2), names[number], fill="black")
    return joined
