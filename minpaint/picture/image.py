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
GAP = 4  # pixels between the pictures of a strip


def open_image(source: ImageSource, what: str = "image") -> Image.Image:
    """A fully read picture from a file (turned as its EXIF orientation says) or from memory.

    InputError if it is missing, unreadable, truncated or absurdly large.
    """
    if isinstance(source, Image.Image):
        name, image = f"the {what}", source
    elif isinstance(source, (str, PathLike)) or hasattr(source, "read"):
        name = f"{what} {fspath(source)}" if isinstance(source, (str, PathLike)) else f"the {what}"
        try:
            image = Image.open(source)
        except FileNotFoundError:
            raise InputError(f"{name}: no such file") from None
        except Image.DecompressionBombError as error:
            raise InputError(f"{name}: too many pixels ({error})") from None
        except UnidentifiedImageError:
            raise InputError(f"{name}: not a picture that Pillow can read") from None
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{name}: cannot be read ({error})") from None
    else:
        raise InputError(f"{what} must be a path or a PIL image, not {type(source).__name__}")
    try:
        image.load()
        if not isinstance(source, Image.Image):
            if getattr(image, "is_animated", False) and image.format != "MPO":  # whose others are previews
                warnings.warn(f"{name} holds several pictures; the first is used", MinpaintWarning, stacklevel=2)
            exif = image.getexif()
            if exif and "exif" not in image.info:  # TIFF keeps it elsewhere, where no copy finds it
                image.info["exif"] = exif.tobytes()
            image = ImageOps.exif_transpose(image)
        return to_eight_bits(image)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        raise InputError(f"{name}: damaged or truncated ({error})") from None


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
    if image.mode in KEPT_MODES:
        if image.info.get("bits") == 16:
            _say_mode("16-bit grey", "8-bit grey")
        return image
    grey = image.mode.startswith(("I", "F"))
    kept = "L" if grey else "RGBA" if image.mode in ("PA", "RGBa", "La") else "RGB"
    _say_mode(image.mode, kept)
    converted = image.convert(kept)
    converted.info = {key: value for key, value in image.info.items() if key != "icc_profile" or grey}
    return converted


def _say_mode(given: str, kept: str) -> None:
    told = f"the image is {given}, which cannot be painted in; it is read and written as {kept}"
    warnings.warn(told, MinpaintWarning, stacklevel=2)


def mixable(image: Image.Image) -> Image.Image:
    """A picture of a kept mode as L, LA, RGB or RGBA, in which colours can be mixed."""
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert("L") if image.mode == "1" else image


def alpha_of(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, mode L; None if the picture has no transparency."""
    if "A" in image.getbands():
        return image.getchannel("A")
    return image.convert("RGBA").getchannel("A") if "transparency" in image.info else None


def restore_mode(worked: Image.Image, original: Image.Image, touched: Image.Image) -> Image.Image:
    """The original with its touched pixels (mode 1) from a mixable picture; the others are exactly its own.

    In a palette picture the new colours go to entries that no pixel uses; where there are none
    to spare, to the nearest of those there are.
    """
    result, box = original.copy(), touched.getbbox()
    if box is None:
        return result
    part, where = worked.crop(box), touched.crop(box)
    if original.mode == "P":
        return _paste_with_palette(result, part.convert("RGB"), box, where)
    result.paste(part.convert(original.mode), box[:2], where)
    return result


def _paste_with_palette(
    result: Image.Image, part: Image.Image, box: tuple[int, int, int, int], where: Image.Image
) -> Image.Image:
    palette = (result.getpalette("RGB") or [])[:768]
    palette += [0] * (768 - len(palette))
    transparent = result.info.get("transparency")
    used = result.histogram()
    spare = [index for index in range(256) if not used[index] and index != transparent]
    if len(spare) >= 16:
        new = part.quantize(len(spare), dither=Image.Dither.FLOYDSTEINBERG)
        colours = (new.getpalette("RGB") or [])[: 3 * len(spare)]
        for number in range(len(colours) // 3):
            palette[3 * spare[number] : 3 * spare[number] + 3] = colours[3 * number : 3 * number + 3]
        indices = new.point([*spare, *[0] * (256 - len(spare))], "L")
        if isinstance(transparent, bytes):
            opaque = set(spare)
            alphas = transparent + b"\xff" * (256 - len(transparent))
            result.info["transparency"] = bytes(255 if i in opaque else a for i, a in enumerate(alphas))
    else:
        usable = [index for index in range(256) if used[index] and index != transparent]
        if isinstance(transparent, bytes):
            opaque_ones = [i for i in usable if i >= len(transparent) or transparent[i] == 255]
            usable = opaque_ones or usable
        sample = Image.new("P", (1, 1))
        sample.putpalette([level for index in usable for level in palette[3 * index : 3 * index + 3]])
        indices = part.quantize(palette=sample).point([*usable, *[usable[0]] * (256 - len(usable))], "L")
    levels = Image.frombytes("L", result.size, result.tobytes())
    levels.paste(indices, box[:2], where)
    painted = Image.frombytes("P", result.size, levels.tobytes())
    painted.putpalette(palette)
    painted.info = result.info
    return painted


def expand(image: Image.Image, margins: tuple[int, int, int, int]) -> Image.Image:
    """The picture with margins (left, top, right, bottom) that repeat its edges; fully opaque there."""
    left, top, right, bottom = margins
    width, height = image.size
    if not any(margins):
        return image
    grown = Image.new(image.mode, (width + left + right, height + top + bottom))
    if image.mode == "P":
        grown.putpalette(image.getpalette("RGB") or [])
    grown.paste(image, (left, top))
    for at, strip_box, size in (
        ((0, top), (left, top, left + 1, top + height), (left, height)),
        ((left + width, top), (left + width - 1, top, left + width, top + height), (right, height)),
        ((0, 0), (0, top, grown.width, top + 1), (grown.width, top)),
        ((0, top + height), (0, top + height - 1, grown.width, top + height), (grown.width, bottom)),
    ):
        if 0 not in size:
            grown.paste(grown.crop(strip_box).resize(size, Image.Resampling.NEAREST), at)
    if "A" in image.getbands():
        opaque = Image.new("L", grown.size, 255)
        opaque.paste(image.getchannel("A"), (left, top))
        grown.putalpha(opaque)
    grown.info = dict(image.info)
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
    levels = ((pixels.float().cpu() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = levels.shape[1:]
    return Image.frombytes("RGB", (width, height), levels.permute(1, 2, 0).contiguous().numpy().tobytes())


def to_levels(x: Tensor) -> Image.Image:
    """[Y, X] in [0, 1] as a picture in mode L."""
    levels = (x.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.frombytes("L", (x.shape[1], x.shape[0]), levels.contiguous().numpy().tobytes())


def strip(pictures: Sequence[Image.Image], names: Sequence[str] = ()) -> Image.Image:
    """Pictures of one size side by side, RGB, with their names above them."""
    width, height = pictures[0].size
    head = 16 if names else 0
    joined = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height + head), "white")
    for number, picture in enumerate(pictures):
        joined.paste(picture.convert("RGB"), (number * (width + GAP), head))
    for number, name in enumerate(names):
        ImageDraw.Draw(joined).text((number * (width + GAP) + 2, 2), name, fill="black")
    return joined
