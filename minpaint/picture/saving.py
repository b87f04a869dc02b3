"""Pictures to files: format, metadata, the record of the painting, and the receipt.

The receipt proves that kept pixels were kept: the file is read again and compared with the
original. The record is all that is needed to paint the picture again; it travels in the file.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from functools import reduce
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageChops, PngImagePlugin

from minpaint.errors import InputError, MinpaintError
from minpaint.picture.frame import Frame
from minpaint.picture.image import ImageSource, open_image

Record = dict[str, Any]
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # pixels; libjpeg's and the format's limits
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
# Bytes for each pixel that `save` takes beside the painting and the frame: the encoder, reading the file, comparing it
SAVING = {"PNG": 17, "JPEG": 20, "WEBP": 31, "TIFF": 17}
RECORD = "minpaint"  # keyword of the record's PNG text chunk, and a key of every record
NO_TEXT = (RECORD, "XML:com.adobe.xmp")  # text chunks that are not carried over as they are
EXIF_FOLDER, GPS_FOLDER, USER_COMMENT, ASCII = 0x8769, 0x8825, 0x9286, b"ASCII\0\0\0"
INFO = ("icc_profile", "dpi", "xmp", "comment")  # metadata that Pillow takes as options by these names
# EXIF tags about the picture: description, camera, software, date, artist, computer, copyright;
# the others say how the old file's pixels are laid out, or hold a preview of the old picture
CARRIED = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298)


@dataclass(frozen=True)
class Receipt:
    """What the saved file has changed outside the hole and its feather.

    changed: how many of the `outside` pixels there differ from the original's. largest: by how
    many 8-bit levels at most. lossless: whether the format can keep every pixel.
    """

    changed: int
    outside: int
    largest: int
    lossless: bool

    def __str__(self) -> str:
        lossy = f", by up to {self.largest} levels: JPEG is lossy; PNG, WebP and TIFF keep them exactly"
        return f"changed pixels outside: {self.changed} of {self.outside}" + ("" if self.lossless else lossy)


def check_target(target: Path, size: tuple[int, int]) -> None:
    """InputError if the format of a file cannot hold a picture of this size."""
    kind = FORMATS[target.suffix.lower()]
    if max(size) > LONGEST_SIDE.get(kind, max(size)):
        raise InputError(f"output {target}: {kind} holds up to {LONGEST_SIDE[kind]} pixels a side; use .png or .tif")


def save(image: Image.Image, frame: Frame | None, record: Record | None, target: Path | BinaryIO) -> Receipt | None:
    """Write a painting to a file, or as PNG to a stream, once it has been read back and compared.

    A file is written beside its target and renamed, so that a killed run leaves no half picture,
    and one that did not keep what it should is never left behind. Without a frame nothing is
    compared, no metadata carried over, and there is no receipt.

    Raises:
        MinpaintError: a pixel outside the hole has changed although the format is lossless.
    """
    if not isinstance(target, Path):
        content = BytesIO()
        _write(image, frame, record, "PNG", content)
        receipt = None if frame is None else _compare(content, frame, "PNG")
        target.write(content.getvalue())
        target.flush()
        return receipt
    kind = FORMATS[target.suffix.lower()]
    beside = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{target.suffix}")
    try:
        with beside.open("xb") as file:
            _write(image, frame, record, kind, file)
        receipt = None if frame is None else _compare(beside, frame, kind)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return receipt


def read_record(source: ImageSource) -> Record:
    """The record in a file that minpaint wrote; InputError if there is none."""
    image = open_image(source)
    text = image.info.get(RECORD)
    if text is None:
        comment = image.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT, b"")
        comment = comment.encode("latin-1", "replace") if isinstance(comment, str) else bytes(comment)
        text = comment.removeprefix(ASCII).decode("ascii", "replace")
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or RECORD not in record:
        raise InputError(f"{source} holds no record of a painting; only files that minpaint wrote do")
    return record


def _write(image: Image.Image, frame: Frame | None, record: Record | None, kind: str, file: BinaryIO) -> None:
    original = frame.original if frame is not None else Image.new("L", (1, 1))
    exif, text = _exif(original), PngImagePlugin.PngInfo()
    for key, value in original.info.items():
        if isinstance(key, str) and isinstance(value, str) and key not in NO_TEXT:
            text.add_itxt(key, value)
    if record is not None and kind == "PNG":
        text.add_text(RECORD, json.dumps(record))
    elif record is not None:
        exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = ASCII + json.dumps(record).encode("ascii")
    options: dict[str, Any] = {key: original.info[key] for key in INFO if original.info.get(key)}
    options |= {"pnginfo": text} if kind == "PNG" else OPTIONS.get(kind, {})
    if len(exif) or any(exif.get_ifd(folder) for folder in (EXIF_FOLDER, GPS_FOLDER)):
        options["exif"] = exif.tobytes()
    _fit(image, kind).save(file, kind, **options)


def _exif(original: Image.Image) -> Image.Exif:
    """An original's EXIF without what is about the old file."""
    given, exif = original.getexif(), Image.Exif()
    exif.update({tag: given[tag] for tag in CARRIED if tag in given})
    for folder in (EXIF_FOLDER, GPS_FOLDER):
        exif.get_ifd(folder).update(given.get_ifd(folder))
    exif.get_ifd(EXIF_FOLDER).pop(USER_COMMENT, None)
    return exif


def _fit(image: Image.Image, kind: str) -> Image.Image:
    """The picture in a mode its format takes: JPEG has no transparency, which goes on white."""
    if kind != "JPEG" or image.mode in ("1", "L", "RGB"):
        return image
    clear = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return flat.convert("L" if image.mode == "LA" else "RGB")


def _compare(file: Path | BytesIO, frame: Frame, kind: str) -> Receipt:
    original = _fit(frame.original, kind)
    with Image.open(file) as saved:
        if saved.size != original.size:
            raise MinpaintError(f"the file came out as {saved.size}, not {original.size}; nothing was written")
        modes = {saved.mode, original.mode}
        mode = "RGBA" if len(modes) > 1 or "P" in modes else "L" if modes == {"1"} else saved.mode
        differences = ImageChops.difference(saved.convert(mode), original.convert(mode)).split()
    counts = reduce(ImageChops.lighter, differences).histogram(ImageChops.invert(frame.touched.convert("L")))[:256]
    largest = max((level for level in range(256) if counts[level]), default=0)
    receipt = Receipt(sum(counts[1:]), sum(counts), largest, kind != "JPEG")
    if receipt.lossless and receipt.changed:
        raise MinpaintError(f"{receipt}: this must not be; nothing was written, please report it")
    return receipt
