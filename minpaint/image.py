"""Pictures: files to PIL images to tensors, and back."""

from __future__ import annotations

from os import PathLike, fspath

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minpaint.errors import InputError

ImageSource = Image.Image | str | PathLike[str]
KEPT_MODES = ("RGB", "RGBA", "L", "LA")


def open_image(source: ImageSource, what: str = "image") -> Image.Image:
    """A fully read picture from a file (turned as its EXIF orientation says) or from memory.

    InputError if it is missing, unreadable, truncated or absurdly large.
    """
    if isinstance(source, Image.Image):
        name, image = f"the {what}", source
    elif isinstance(source, (str, PathLike)):
        name = f"{what} {fspath(source)}"
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
            image = ImageOps.exif_transpose(image)
        return to_eight_bits(image)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        raise InputError(f"{name}: damaged or truncated ({error})") from None


def to_eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture in 8 bits, which Pillow's own conversion would clip; any other as it is."""
    brightest = image.getextrema()[1] if image.mode.startswith("I") else 0
    if not isinstance(brightest, tuple) and brightest > 255:
        return image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    return image


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
