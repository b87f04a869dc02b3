"""Pictures to files: format, metadata, the record of the painting, and the receipt.

The receipt proves that kept pixels were kept: the file is read again and compared with the
original. The record is all that is needed to paint the picture again; it travels in the file.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import reduce
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageChops, PngImagePlugin

from minpaint.errors import InputError, MinpaintError
from minpaint.picture.frame import Frame
from minpaint.picture.image import ImageSource, open_image

Record = dict[str, Any]
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # pixels; libjpeg's and the format's limits
REHEARSED = 64  # pixels on the longer side, at most, of the copy that `rehearse` writes
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "TIFF": {"compression": "raw"},  # not the original's, which may be lossy, or refuse the metadata
    "WEBP": {"lossless": True, "exact": True},
}
HIDDEN = ".minpaint-"  # how the names of files begin that are not written to their end
RECORD = "minpaint"  # keyword of the record's PNG text chunk, and a key of every record
TEXTS = ("model", "config", "image", "mask", "dtype")  # fields of a record that are text, or null
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


def rehearse(target: Path, frame: Frame, record: Record | None) -> None:
    """Find out before the painting whether a file can hold it: write a small copy of the original as it will be.

    Raises:
        InputError: the picture is too large for the format, or a copy in its mode, with its metadata and
            a record like this one, cannot be written, or does not come back as it was.
    """
    kind, size = FORMATS[target.suffix.lower()], frame.original.size
    if max(size) > LONGEST_SIDE.get(kind, max(size)):
        raise InputError(f"output {target}: {kind} holds up to {LONGEST_SIDE[kind]} pixels a side; use .png or .tif")
    scale = min(REHEARSED / max(size), 1.0)
    width, height = (max(int(side * scale), 1) for side in size)
    small = frame.original.resize((width, height), Image.Resampling.NEAREST)
    kept, content = replace(frame, original=small, cover=Image.new("L", small.size)), BytesIO()
    try:
        _write(small.copy(), kept, record, kind, content)
        _compare(content, kept, kind)
    except Exception as error:  # whatever Pillow and its libraries raise
        if isinstance(error, MinpaintError) or getattr(error, "errno", None):
            raise  # not the format's fault
        told = f"a {kind} file cannot hold this picture with its metadata ({error}); use .png"
        raise InputError(f"output {target}: {told}{'' if record is None else ', or --no-record'}") from None


def save(image: Image.Image, frame: Frame | None, record: Record | None, target: Path | BinaryIO) -> Receipt | None:
    """Write a painting to a file, or as PNG to a stream, once it has been read back and compared.

    A file is written beside its target and renamed, so that a killed run leaves no half picture,
    and one that did not keep what it should is never left behind. Where the target is a link, the
    file that it points to is replaced. Without a frame nothing is compared, no metadata carried over,
    and there is no receipt.

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
    kind, place = FORMATS[target.suffix.lower()], target.resolve()
    with _file_beside(place) as file:
        _write(image, frame, record, kind, file)
        file.flush()
        receipt = None if frame is None else _compare(Path(file.name), frame, kind)
        if os.name == "nt":  # which does not rename an open file
            file.close()
        os.replace(file.name, place)
    return receipt


def rescue(image: Image.Image, target: Path) -> Path | None:
    """Write a painting that could not be saved as PNG beside its target, or else into the temporary folder.

    Returns where it is; None if it could not be written there either.
    """
    for folder in (target.resolve().parent, Path(tempfile.gettempdir())):
        name = target.stem.strip("-")[:100] or "minpaint"
        places = (folder / f"{name}-rescued{number or ''}.png" for number in count())
        with suppress(Exception):
            place = next(place for place in places if not place.exists())
            save(image, None, None, place)
            return place
    return None


@contextmanager
def _file_beside(target: Path) -> Iterator[BinaryIO]:
    """A new hidden file in a target's folder, to be renamed to it; it is gone in the end.

    A killed process leaves its file behind, and the next one that writes into the folder removes it. It knows
    the files of living processes by their locks, which the system releases when a process ends.
    """
    for left in target.parent.glob(f"{HIDDEN}*"):
        with suppress(OSError), left.open("rb") as file:
            if _lock(file):
                left.unlink()
    while True:
        path = target.with_name(f"{HIDDEN}{secrets.token_hex(4)}{target.suffix}")
        with path.open("xb") as file:
            try:
                # another process may have taken it for a dead one's before it was locked
                if _lock(file) and path.exists():
                    yield file
                    return
            finally:
                path.unlink(missing_ok=True)


def _lock(file: BinaryIO) -> bool:
    """Lock a file for this process; False if another one holds it. Where there are no such locks (Windows), True."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
    if (
        not isinstance(record, dict)
        or RECORD not in record
        or not all(isinstance(record.get(name), str | None) for name in TEXTS)
    ):
        name = getattr(source, "name", source)
        raise InputError(f"{name} holds no record of a painting; only files that minpaint wrote do")
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
    """The picture in a mode its format takes. JPEG has no transparency, which goes on white.

    A colour that stands for transparent, or a palette's transparency, needs PNG, or becomes an alpha channel.
    """
    if kind != "PNG" and "transparency" in image.info:
        image = image.convert("RGBA")
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
        mixed = len(modes) > 1 or "P" in modes or "transparency" in original.info
        mode = "RGBA" if mixed else "L" if modes == {"1"} else saved.mode
        differences = ImageChops.difference(saved.convert(mode), original.convert(mode)).split()
    counts = reduce(ImageChops.lighter, differences).histogram(ImageChops.invert(frame.touched.convert("L")))[:256]
    largest = max((level for level in range(256) if counts[level]), default=0)
    receipt = Receipt(sum(counts[1:]), sum(counts), largest, kind != "JPEG")
    if receipt.lossless and receipt.changed:
        raise MinpaintError(f"{receipt}: this must not be; nothing was written, please report it")
    return receipt
