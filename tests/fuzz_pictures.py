"""Damaged pictures in bulk: whatever a file holds, reading it, taking it for a mask and saving it end in order.

    python -m tests.fuzz_pictures --cases 20000 --seed 1

Every case is a picture in one of the formats and modes that Pillow writes here, with metadata, changed at random
places: bytes, lengths, tags, chunks, its end, or a piece of another file. It may open or raise an InputError of one
line, within SECONDS and MEMORY; what opens and passes the rehearsal must be saved. A case depends only on the seed
and its number. The cases run in a process of their own, so that a crash of a decoder costs one case and is counted.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, PngImagePlugin

from minpaint.errors import InputError
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.image import open_image
from minpaint.picture.saving import FORMATS, check_target, read_record, save
from minpaint.settings import Settings

SECONDS, MEMORY = 10, 3 << 30  # of processor time for a case; bytes of address space that a worker may add
WAIT = 60  # seconds that a case may take by the clock, on a busy machine, too
RECORD = {"minpaint": "0", "prompt": "a dög on a bench", "seed": 3}
SIZE = (40, 30)
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma", "group3", "group4")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
EXTREMES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@cache
def whole_files() -> list[bytes]:
    """Good files: every format that Pillow reads and writes here, in every mode and compression that it takes."""
    Image.init()
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x8298] = "maker", 6, "(c) me"
    exif.get_ifd(0x8769).update({0x9003: "2026:11:22 10:00:00", 0x9286: b"ASCII\0\0\0a comment", 0x829A: 0.01})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.5)})
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a title" * 20, zip=True)
    text.add_itxt("minpaint", '{"minpaint": "0", "prompt": "x"}', zip=True)
    metadata = {"exif": exif.tobytes(), "dpi": (72, 72), "icc_profile": bytes(range(200)), "xmp": b"<x/>"}
    metadata |= {"pnginfo": text, "comment": b"hello"}
    base = Image.radial_gradient("L").resize(SIZE).convert("RGB")
    base = Image.blend(base, Image.effect_noise(SIZE, 80).convert("RGB"), 0.3)
    files = []
    for kind, mode in itertools.product(sorted(set(Image.SAVE) & set(Image.OPEN)), MODES):
        if kind == "ICNS" and mode != "RGBA":  # it takes long to be made
            continue
        for more in [{"compression": each} for each in TIFF_COMPRESSIONS] if kind == "TIFF" else [{}]:
            for kept in (metadata, {}) if kind != "ICNS" else ({},):
                content = BytesIO()
                try:
                    picture = base.convert("L").convert(mode) if mode in ("I;16", "I", "F") else base.convert(mode)
                    picture.save(content, kind, **kept, **more)
                except Exception:  # a mode, compression or metadata that the format does not take
                    continue
                files.append(content.getvalue())
    for mode, clear in (("P", 3), ("P", bytes([255, 0, 128])), ("L", 9), ("RGB", (9, 9, 9)), ("1", 1)):
        content = BytesIO()
        base.convert(mode).save(content, "PNG", transparency=clear, **metadata)
        files.append(content.getvalue())
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):  # several pictures in one file
        content = BytesIO()
        base.save(content, kind, save_all=True, append_images=[base.rotate(90), base.convert("L").convert("RGB")])
        files.append(content.getvalue())
    return files


def mutated(number: int, seed: int) -> bytes:
    """The file of one case."""
    rng, files = random.Random(f"{seed} {number}"), whole_files()
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        # headers and metadata lie at the beginning, and where a TIFF begins, at the end
        at = min(int(len(data) * rng.random() ** rng.choice((1, 4))), len(data) - 1)
        at = rng.choice((at, len(data) - 1 - at)) if at >= 0 else 0
        match rng.randrange(8):
            case 0 | 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 3:  # a number
                number_format = rng.choice("<>") + rng.choice("HIB")
                size = struct.calcsize(number_format)
                data[at : at + size] = struct.pack(number_format, rng.choice(EXTREMES) % 256**size)
            case 4:
                del data[at : at + rng.choice((1, 4, 12, 100))]
            case 5:
                data[at:at] = data[at : at + rng.choice((1, 4, 12, 100))]
            case 6:  # a piece of another
                other = rng.choice(files)
                start = rng.randrange(len(other))
                data[at : at + rng.choice((0, 12))] = other[start : start + rng.choice((4, 16, 300))]
            case 7:
                if rng.random() < 0.3:
                    del data[at:]
    return _checked(bytes(data)) if rng.random() < 0.7 else bytes(data)


def _checked(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks put right, so that their content is looked at; other files as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    at, out = 8, bytearray(data[:8])
    while at + 12 <= len(data):
        [length] = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out) + data[at:]


def try_case(number: int, seed: int, folder: Path) -> str:
    """Do all with one damaged file that the program does with pictures; says how far it came.

    Raises:
        Exception: anything but the errors that a damaged picture should end in.
    """
    data, good = mutated(number, seed), Image.new("L", SIZE, 255)
    try:
        read_record(BytesIO(data))
    except InputError as error:
        _one_line(error)
    try:
        open_frame(Image.new("RGB", SIZE), BytesIO(data), Settings(""))
    except InputError as error:
        _one_line(error)
    try:
        image = open_image(BytesIO(data))
        frame = open_frame(BytesIO(data), None if number % 3 == 0 else good.resize(image.size), Settings(""))
    except InputError as error:
        _one_line(error)
        return "refused"
    target = folder / f"x{list(FORMATS)[number % len(FORMATS)]}"
    try:
        check_target(target, frame, RECORD)
    except InputError as error:
        _one_line(error)
        return "not to be saved"
    save(_painted(frame), frame, RECORD, target)
    target.unlink()
    return "saved"


def _painted(frame: Frame) -> Image.Image:
    worked = frame.begin()
    worked.paste(Image.new("RGB", worked.size, "orange").convert(worked.mode), (0, 0), frame.touched)
    return frame.finish(worked)


def _one_line(error: InputError) -> None:
    assert "\n" not in str(error), str(error)
    assert len(str(error)) < 600, str(error)


def _work(numbers: range, seed: int) -> None:
    """The worker: a line for each case, begun and ended."""
    warnings.simplefilter("ignore")
    whole_files()
    [used] = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line]
    resource.setrlimit(resource.RLIMIT_AS, (1024 * used + MEMORY, resource.RLIM_INFINITY))
    with TemporaryDirectory() as folder:
        for number in numbers:
            print(number, end=" ", flush=True)
            faulthandler.dump_traceback_later(WAIT, exit=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the signal at its end ends the process
            try:
                told = try_case(number, seed, Path(folder))
            except BaseException:
                told = "FAULT " + " | ".join(traceback.format_exc().splitlines()[-12:])
            print(told, flush=True)
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.cases)
    if options.worker:
        _work(numbers, options.seed)
        return 0
    counts: dict[str, int] = {}
    faults, started, next_one = 0, time.monotonic(), options.first
    while next_one < numbers.stop:
        words = [sys.executable, "-m", "tests.fuzz_pictures", "--worker", "--seed", str(options.seed)]
        words += ["--first", str(next_one), "--cases", str(numbers.stop - next_one)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                number, _, told = line.strip().partition(" ")
                next_one = int(number) + 1
                if not told or told.startswith("FAULT"):
                    faults += 1
                    print(f"case {number}: {told or 'crashed or took too long'}", flush=True)
                counts[told.split(" |")[0][:30] or "crashed"] = counts.get(told.split(" |")[0][:30] or "crashed", 0) + 1
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{len(numbers)} cases, {faults} faults, {time.monotonic() - started:.0f} s, at most {largest} MiB: {counts}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
