"""Damaged pictures: a few of those that tests/fuzz_pictures.py tries in bulk, and bombs."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_picture
from fuzz_pictures import mutated, try_case, whole_files
from PIL import Image

from minpaint.errors import InputError
from minpaint.picture.image import open_image
from minpaint.picture.saving import FORMATS

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_ends_in_one_line_or_in_a_painting(tmp_path: Path) -> None:
    ends = Counter(try_case(number, 0, tmp_path) for number in range(300))
    assert ends["refused"] > 100
    assert ends["saved"] > 50
    assert list(tmp_path.iterdir()) == []


def test_a_case_is_the_same_each_time() -> None:
    assert [zlib.crc32(mutated(number, 0)) for number in range(3)] == [zlib.crc32(mutated(n, 0)) for n in range(3)]
    assert mutated(0, 0) != mutated(0, 1)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def tiff(width: int, height: int, compression: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (10, 10)).save(content, "TIFF", compression=compression)
    data = bytearray(content.getvalue())
    [start] = struct.unpack_from("<L", data, 4)
    for entry in range(start + 2, start + 2 + 12 * data[start], 12):
        [tag] = struct.unpack_from("<H", data, entry)
        if tag in (256, 257):
            struct.pack_into("<HLL", data, entry + 2, 4, 1, width if tag == 256 else height)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    packed = zlib.compress(bytes(1 << 27), 9)
    webp = io.BytesIO()
    Image.new("RGB", (10, 10)).save(webp, "WEBP", lossless=True)
    head = webp.getvalue()[:21] + struct.pack("<L", 16383 | 16383 << 14) + webp.getvalue()[25:]
    made = {"png, 10 gigapixels": png(100_000, 100_000), "png, 169 megapixels": png(13_000, 13_000), "webp": head}
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        made[f"tiff, {compression}"] = tiff(13_000, 13_000, compression)
    made["tiff, 10 gigapixels"] = tiff(100_000, 100_000, "raw")
    made["zTXt"] = png(10, 10, chunk(b"zTXt", b"a\0\0" + packed))
    made["iTXt"] = png(10, 10, chunk(b"iTXt", b"a\0\1\0\0\0" + packed))
    made["iCCP"] = png(10, 10, chunk(b"iCCP", b"a\0\0" + packed))
    made["tEXt"] = png(10, 10, b"".join(chunk(b"tEXt", b"k%d\0" % i + bytes(100_000)) for i in range(700)))
    return made


def peak() -> int:
    """The largest resident set in MiB since it was forgotten."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) >> 10


def test_a_bomb_ends_in_one_line_and_not_in_memory() -> None:
    """In a process of its own: pages that others have freed into the heap count as taken when they are used again."""
    code = "import sys; sys.path.insert(0, 'tests'); from test_fuzz_pictures import open_bombs; open_bombs()"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def open_bombs() -> None:
    made = bombs()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"the peak of this process cannot be forgotten: {error}")
        return
    before = peak()
    for name, content in made.items():
        with pytest.raises(InputError) as caught:
            open_image(io.BytesIO(content))
        assert "\n" not in str(caught.value), name
        assert peak() - before < 100, name


@pytest.mark.parametrize(("tag", "kind"), [(0x010A, 2), (0x010F, 11), (0x011F, 2)])
def test_a_picture_with_damaged_exif_is_refused_in_one_line(tag: int, kind: int, tmp_path: Path) -> None:
    """Pillow's reader raises struct.error, AttributeError and TypeError when it turns these pictures upright."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    damaged = exif.tobytes().replace(b"\x01\x0f\x00\x02", struct.pack(">HH", tag, kind)) + bytes(40)
    make_picture(9, 9).save(tmp_path / "photo.jpg", exif=damaged)
    with pytest.raises(InputError, match=r"photo\.jpg: cannot be read, or is damaged"):
        open_image(tmp_path / "photo.jpg")


def test_a_picture_in_lab_colours_is_refused_with_a_way_out() -> None:
    for what in ("image", "mask"):
        content = io.BytesIO()
        Image.new("LAB", (9, 9)).save(content, "TIFF")
        with pytest.raises(InputError, match=f"the {what}: its colours are CIE LAB.*save it as RGB"):
            open_image(content, what)


def test_every_format_that_is_written_is_damaged() -> None:
    kinds = {Image.open(io.BytesIO(data)).format for data in whole_files()}
    assert set(FORMATS.values()) | {"GIF", "BMP", "MPO", "ICO", "PPM", "TGA", "JPEG2000", "AVIF"} <= kinds
