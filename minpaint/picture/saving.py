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
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageChops, PngImagePlugin

try:
    import fcntl
except ImportError:  # Windows has no such locks; there no file can be removed while it is open
    fcntl = None  # type: ignore[assignment]

from minpaint.errors import InputError, MinpaintError
from minpaint.picture.frame import Frame
from minpaint.picture.image import ImageSource, name_of, open_image

Record = dict[str, Any]
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # pixels; libjpeg's and the format's limits
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {"compression": "raw"},  # Pillow would take the input's, which may be lossy or refuse the EXIF
}
REHEARSED = 16  # pixels a side of the piece of a picture that is saved to memory before the painting begins
UNFINISHED = ".minpaint-part"  # ends the names of files that are being written
# Bytes for each pixel that `save` takes beside the painting and the frame: the encoder, reading the file, comparing it
SAVING = {"PNG": 8, "JPEG": 15, "WEBP": 35, "TIFF": 8}
COMPARED = 2**20  # pixels that are compared at a time
RECORD = "minpaint"  # keyword of the record's PNG text chunk, and a key of every record
TEXTS = ("model", "vae", "config", "image", "mask", "dtype")  # fields of a record that are text, or null
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


def check_target(target: Path, frame: Frame, record: Record | None, kept: bool = True) -> None:
    """Rehearse `save` in memory with a small piece of the picture: InputError if the format cannot hold it.

    kept: the frame will be given to `save`, too. A target without a known suffix is saved as PNG.
    """
    kind, (width, height) = FORMATS.get(target.suffix.lower(), "PNG"), frame.original.size
    if max(width, height) > LONGEST_SIDE.get(kind, max(width, height)):
        raise InputError(f"output {target}: {kind} holds up to {LONGEST_SIDE[kind]} pixels a side; use .png or .tif")
    left, top, *_ = frame.cover.getbbox() or (0, 0)
    box = (left, top, min(left + REHEARSED, width), min(top + REHEARSED, height))
    original, hole, cover = (picture.crop(box) for picture in (frame.original, frame.hole, frame.cover))
    piece = replace(frame, original=original, hole=hole, cover=cover)
    try:
        image = piece.finish(piece.begin()) if kept else Image.new("RGB", original.size)
        _write(image, piece if kept else None, record, kind, BytesIO())
    except Exception as error:  # whatever Pillow's writers raise
        told = f"output {target}: {kind} cannot hold this picture's metadata or record ({error})"
        raise InputError(f"{told}; use another format, --no-record, or an image without metadata") from None


def save(
    image: Image.Image, frame: Frame | None, record: Record | None, target: Path | BinaryIO, overwrite: bool = True
) -> Receipt | None:
    """Write a painting to a file, or as PNG to a stream, once it has been read back and compared.

    A file is written beside its target and renamed, so that a killed run leaves no half picture,
    and one that did not keep what it should is never left there. Where the target is a symbolic
    link, it stays one, and the file it points to is written. Without a frame nothing is compared,
    no metadata carried over, and there is no receipt.

    Raises:
        MinpaintError: the file cannot be written, exists and is not to be overwritten, or has a
            changed pixel outside the hole although its format is lossless. The painting is saved
            elsewhere then, and the message says where.
    """
    try:
        if isinstance(target, Path):
            with new_file(target.resolve(), overwrite) as file:
                return _write(image, frame, record, FORMATS[target.suffix.lower()], file)
        content = BytesIO()
        receipt = _write(image, frame, record, "PNG", content)
        target.write(content.getvalue())
        target.flush()
        return receipt
    except Exception as error:
        name = target if isinstance(target, Path) else "-"
        raise MinpaintError(f"output {name}: {error}; {_rescue(image, target)}") from None


def _rescue(image: Image.Image, target: Path | BinaryIO) -> str:
    """Save a painting alone as a PNG beside its target or, if that cannot be, in the temporary folder; says where."""
    bare = image.convert("RGBA") if "transparency" in image.info else image.copy()
    bare.info, failure = {}, ""
    stem, beside = (target.stem[:40], [target.parent]) if isinstance(target, Path) else ("stdout", [])
    for folder in (*beside, Path(tempfile.gettempdir())):
        file = folder / f"{stem}-rescued-{secrets.token_hex(4)}.png"
        try:
            with new_file(file, overwrite=False) as content:
                bare.save(content, "PNG")
            return f"the painting is in {file}"
        except Exception as error:
            failure += f" ({error})"
    return f"the painting is lost, as no folder for it can be written{failure}"


@contextmanager
def new_file(target: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A new file that takes the target's place when the block ends well, and is gone when it does not.

    It is locked while it is written, so one that nobody has locked was left by a killed process, and is removed.
    """
    for left in target.parent.glob(f".*{UNFINISHED}"):
        with suppress(OSError), left.open("rb") as file:
            _lock(file, wait=False)
            left.unlink()
    part: BinaryIO | None = None
    while part is None or not os.fstat(part.fileno()).st_nlink:  # removed by another process before it was locked
        beside = target.with_name(f".{target.stem[:40]}-{secrets.token_hex(4)}{UNFINISHED}")
        part = beside.open("x+b")
        with suppress(OSError):  # some network folders have no locks; there nothing is removed either
            _lock(part, wait=True)
    try:
        with part:
            yield part
            part.flush()
            if not overwrite and target.exists():
                raise MinpaintError("the file exists by now; add --overwrite to replace it")
            if fcntl is None:
                part.close()  # Windows does not rename an open file
            os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _lock(file: BinaryIO, wait: bool) -> None:
    """Lock a file for this process; if another one holds it, wait for that or raise OSError."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def read_record(source: ImageSource) -> Record:
    """The record in a file that minpaint wrote; InputError if there is none."""
    image = open_image(source)
    try:
        text = image.info.get(RECORD)
        if text is None:
            comment = image.getexif().get_ifd(EXIF_FOLDER)[USER_COMMENT]
            comment = comment.encode("latin-1", "replace") if isinstance(comment, str) else memoryview(comment)
            text = bytes(comment).removeprefix(ASCII).decode("ascii", "replace")
        record = json.loads(text)
    except Exception:  # there is none, the EXIF is damaged, or it is nested too deeply
        record = None
    if not isinstance(record, dict) or RECORD not in record or not _is_well_formed(record):
        raise InputError(f"{name_of(source, 'file')} holds no record of a painting; only files that minpaint wrote do")
    return record


def _is_well_formed(record: Record) -> bool:
    """Whether the fields that name files are text, and LoRAs a list of texts."""
    lora = record.get("lora") or []
    return isinstance(lora, list) and all(isinstance(each, str | None) for each in (*map(record.get, TEXTS), *lora))


def _write(image: Image.Image, frame: Frame | None, record: Record | None, kind: str, file: BinaryIO) -> Receipt | None:
    """Save a painting, read it again, and compare what the frame keeps."""
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
    return None if frame is None else _compare(file, frame, kind)


def _exif(original: Image.Image) -> Image.Exif:
    """An original's EXIF without what is about the old file."""
    given, exif = original.getexif(), Image.Exif()
    exif.update({tag: given[tag] for tag in CARRIED if tag in given})
    for folder in (EXIF_FOLDER, GPS_FOLDER):
        exif.get_ifd(folder).update(given.get_ifd(folder))
    exif.get_ifd(EXIF_FOLDER).pop(USER_COMMENT, None)
    return exif


def _fit(image: Image.Image, kind: str) -> Image.Image:
    """The picture in a mode its format takes: TIFF and WebP have no clear colour, JPEG nothing clear (white)."""
    grey, keyed = image.mode in ("1", "L", "LA"), "transparency" in image.info
    if keyed and kind in ("TIFF", "WEBP"):
        return image.convert("LA" if grey and image.mode != "1" else "RGBA")
    if kind != "JPEG" or (image.mode in ("1", "L", "RGB") and not keyed):
        return image
    clear = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return flat.convert("L" if grey else "RGB")


def _compare(file: BinaryIO, frame: Frame, kind: str) -> Receipt:
    original = _fit(frame.original, kind)
    with Image.open(file) as saved:
        if saved.size != original.size:
            raise MinpaintError(f"the file came out as {saved.size}, not {original.size}")
        modes = {saved.mode, original.mode}
        keyed = "transparency" in {*saved.info, *original.info}
        mode = "RGBA" if len(modes) > 1 or "P" in modes or keyed else "L" if modes == {"1"} else saved.mode
        counts, rows = [0] * 256, max(COMPARED // saved.width, 1)
        for top in range(0, saved.height, rows):
            box = (0, top, saved.width, min(top + rows, saved.height))
            differences = ImageChops.difference(*(image.crop(box).convert(mode) for image in (saved, original)))
            kept = frame.cover.crop(box).point(lambda level: 255 * (level == 0))
            found = reduce(ImageChops.lighter, differences.split()).histogram(kept)
            counts = [before + more for before, more in zip(counts, found, strict=False)]
    largest = max((level for level in range(256) if counts[level]), default=0)
    receipt = Receipt(sum(counts[1:]), sum(counts), largest, kind != "JPEG")
    if receipt.lossless and receipt.changed:
        raise MinpaintError(f"{receipt}, although the format is lossless; please report it")
    return receipt
