"""Files: the receipt that proves what was kept, the metadata, and the record that repeats a run."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import make_mask, make_picture
from PIL import ExifTags, Image, ImageChops, PngImagePlugin

from minpaint.errors import InputError, MinpaintError
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.image import KEPT_MODES
from minpaint.picture.saving import UNFINISHED, check_target, read_record, save
from minpaint.settings import Settings

RECORD = {"minpaint": "0", "prompt": "a dög \U0001f415 on a bench", "seed": 3}


def frame_of(image: Image.Image | Path) -> Frame:
    size = image.size if isinstance(image, Image.Image) else Image.open(image).size
    return open_frame(image, make_mask(*size), Settings(""))


def painted(frame: Frame) -> Image.Image:
    """A painting of plain colour in the hole."""
    worked = frame.begin()
    worked.paste(Image.new("RGB", worked.size, "orange").convert(worked.mode), (0, 0), frame.touched)
    return frame.finish(worked)


@pytest.mark.parametrize("mode", KEPT_MODES)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_lossless_file_keeps_every_pixel_and_its_mode(mode: str, suffix: str, tmp_path: Path) -> None:
    frame = frame_of(make_picture(50, 37).convert(mode))
    receipt = save(painted(frame), frame, RECORD, tmp_path / f"x.{suffix}")
    hole = sum(frame.touched.convert("L").histogram()[1:])
    assert (receipt.changed, receipt.largest, receipt.lossless) == (0, 0, True)
    assert receipt.outside == 50 * 37 - hole
    if suffix != "webp":  # which knows colour only
        with Image.open(tmp_path / f"x.{suffix}") as saved:
            assert saved.mode == mode


def test_transparent_pixels_keep_their_hidden_colour(tmp_path: Path) -> None:
    frame = frame_of(Image.merge("RGBA", (*make_picture(50, 37).split(), Image.new("L", (50, 37), 0))))
    for suffix in ("png", "webp", "tif"):
        assert save(painted(frame), frame, None, tmp_path / f"x.{suffix}").changed == 0


@pytest.mark.parametrize("mode", KEPT_MODES)
def test_jpeg_says_that_it_is_lossy(mode: str, tmp_path: Path) -> None:
    frame = frame_of(make_picture(50, 37).convert(mode))
    receipt = save(painted(frame), frame, RECORD, tmp_path / "x.jpg")
    assert not receipt.lossless
    assert "lossy" in str(receipt)
    assert receipt.changed > 0


def test_transparency_goes_on_white_in_a_jpeg(tmp_path: Path) -> None:
    frame = frame_of(Image.new("RGBA", (50, 37), (10, 10, 10, 0)))
    receipt = save(painted(frame), frame, None, tmp_path / "x.jpg")
    assert receipt.largest < 30  # beside the orange
    with Image.open(tmp_path / "x.jpg") as saved:
        assert min(saved.getpixel((49, 0))) > 240  # type: ignore[arg-type]


def test_one_changed_pixel_outside_is_an_error_and_nothing_is_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = frame_of(make_picture(50, 37))
    wrong = painted(frame)
    red, green, blue = wrong.getpixel((49, 36))  # type: ignore[misc]
    wrong.putpixel((49, 36), (red, green, blue ^ 1))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for target in (tmp_path / "x.png", BytesIO()):
        with pytest.raises(MinpaintError, match="changed pixels outside: 1 of") as caught:
            save(wrong, frame, None, target)
        rescued = Path(str(caught.value).split("the painting is in ")[1])
        with Image.open(rescued) as image:
            assert image.tobytes() == wrong.tobytes()
        rescued.unlink()
    assert target.getvalue() == b""  # type: ignore[union-attr]
    assert list(tmp_path.glob("*.*")) == list((tmp_path / "tmp").iterdir()) == []
    inside = painted(frame)
    inside.putpixel((15, 15), (0, 0, 0))
    assert save(inside, frame, None, tmp_path / "x.png").changed == 0


def test_a_stream_gets_png() -> None:
    frame, stream = frame_of(make_picture(50, 37)), BytesIO()
    receipt = save(painted(frame), frame, RECORD, stream)
    assert receipt is not None
    assert receipt.changed == 0
    assert Image.open(stream).format == "PNG"
    assert read_record(BytesIO(stream.getvalue())) == RECORD


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_the_record_travels_in_the_file(suffix: str, tmp_path: Path) -> None:
    frame = frame_of(make_picture(50, 37))
    save(painted(frame), frame, RECORD, tmp_path / f"x.{suffix}")
    assert read_record(tmp_path / f"x.{suffix}") == RECORD


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"other": 1}'])
def test_a_file_without_a_record_is_said(text: str | None, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("minpaint", text)
    make_picture(9, 9).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(InputError, match=r"x\.png holds no record"):
        read_record(tmp_path / "x.png")


def test_a_record_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    deep, number = PngImagePlugin.PngInfo(), Image.Exif()
    deep.add_text("minpaint", "[" * 100_000)
    make_picture(9, 9).save(tmp_path / "deep.png", pnginfo=deep)
    number.get_ifd(0x8769)[0x9286] = 1 << 31  # as many zeros, if it was taken for a length
    make_picture(9, 9).save(tmp_path / "number.png", exif=number)
    for name in ("deep.png", "number.png"):
        with pytest.raises(InputError, match=f"file .*{name} holds no record"):
            read_record(tmp_path / name)


@pytest.fixture
def photo(tmp_path: Path) -> dict[str, Path]:
    """The same picture with the same metadata in several formats."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x8298] = "maker", 6, "(c) me"
    exif.get_ifd(0x8769)[0x9003] = "2026:11:22 10:00:00"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0old comment"
    exif.get_ifd(0x8825)[1] = "N"
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a title")
    text.add_text("minpaint", "an old record")
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options: dict[str, Any] = {"exif": exif.tobytes(), "icc_profile": profile, "dpi": (300, 300)}
    made = {}
    for suffix in ("png", "jpg", "tif", "webp"):
        made[suffix] = tmp_path / f"photo.{suffix}"
        more = {"png": {"pnginfo": text}, "jpg": {"comment": b"hello"}}.get(suffix, {})
        make_picture(40, 24).save(made[suffix], **options, **more)
    return made


@pytest.mark.parametrize("given", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("written", ["png", "jpg", "tif", "webp"])
def test_metadata_is_carried_over(photo: dict[str, Path], given: str, written: str, tmp_path: Path) -> None:
    with Image.open(photo[given]) as opened:
        profile = opened.info["icc_profile"]
    frame = frame_of(Image.new("RGB", (24, 40)))  # turned
    frame = open_frame(photo[given], make_mask(24, 40), Settings(""))
    assert frame.original.size == (24, 40)
    save(painted(frame), frame, RECORD, tmp_path / f"x.{written}")
    assert read_record(tmp_path / f"x.{written}") == RECORD
    with Image.open(tmp_path / f"x.{written}") as saved:
        assert saved.size == (24, 40)
        exif = saved.getexif()
        assert exif.get(0x0112, 1) == 1  # it is upright now
        assert (exif[0x010F], exif[0x8298]) == ("maker", "(c) me")
        assert exif.get_ifd(0x8769)[0x9003] == "2026:11:22 10:00:00"
        assert exif.get_ifd(0x8825)[1] == "N"
        assert b"old comment" not in exif.tobytes()
        assert saved.info["icc_profile"] == profile
        if "webp" not in (given, written):
            assert round(saved.info["dpi"][0]) == 300
        if (given, written) == ("png", "png"):
            assert saved.info["Title"] == "a title"
        if (given, written) == ("jpg", "jpg"):
            assert saved.info["comment"] == b"hello"


def test_a_profile_for_other_colours_is_left_behind(tmp_path: Path) -> None:
    picture = make_picture(40, 24).convert("CMYK")
    picture.info["icc_profile"] = b"for ink"
    with pytest.warns(UserWarning, match="CMYK"):
        frame = frame_of(picture)
    save(painted(frame), frame, None, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as saved:
        assert "icc_profile" not in saved.info


def test_a_preview_of_the_old_picture_is_not_carried_over(tmp_path: Path) -> None:
    preview, exif = BytesIO(), Image.Exif()
    make_picture(16, 16, seed=5).save(preview, "JPEG")
    exif[0x010F] = "maker"
    first = exif.tobytes().removeprefix(b"Exif\0\0")
    end = ">" if first.startswith(b"MM") else "<"
    # cameras keep the preview in a second directory, which the end of the first points to
    [start] = struct.unpack_from(end + "L", first, 4)
    [entries] = struct.unpack_from(end + "H", first, start)
    link = start + 2 + 12 * entries
    after = len(first) + 2 + 2 * 12 + 4
    second = struct.pack(end + "HHHLLHHLLL", 2, 0x0201, 4, 1, after, 0x0202, 4, 1, len(preview.getvalue()), 0)
    whole = first[:link] + struct.pack(end + "L", len(first)) + first[link + 4 :] + second + preview.getvalue()
    make_picture(24, 40).save(tmp_path / "t.jpg", exif=b"Exif\0\0" + whole)
    with Image.open(tmp_path / "t.jpg") as opened:
        assert opened.getexif().get_ifd(ExifTags.IFD.IFD1)[0x0202] == len(preview.getvalue())
    frame = open_frame(tmp_path / "t.jpg", make_mask(24, 40), Settings(""))
    assert preview.getvalue() in frame.original.info["exif"]  # it was there to be left behind
    save(painted(frame), frame, None, tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as saved:
        assert saved.getexif()[0x010F] == "maker"
    assert preview.getvalue() not in (tmp_path / "x.jpg").read_bytes()


def test_a_format_too_small_for_the_picture_is_said_beforehand() -> None:
    def check(name: str, width: int) -> None:
        strip = Image.new("L", (width, 1), 255)
        check_target(Path(name), Frame(strip, strip, strip, strip, opaque=False), RECORD)

    with pytest.raises(InputError, match="WEBP holds up to 16383"):
        check("x.webp", 16384)
    check("x.webp", 16383)
    check("x.png", 16384)


# What a format cannot hold, and what fails when the painting is done ---------------------------------


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_compression_of_a_tiff_is_not_carried_over(compression: str, mode: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif.get_ifd(0x8769)[0x9003] = "2026:11:22 10:00:00"
    given = make_picture(50, 37).convert(mode)
    given.save(tmp_path / "a.tif", compression=compression, exif=exif)
    frame = frame_of(tmp_path / "a.tif")
    for record in (RECORD, None):
        check_target(tmp_path / "x.tif", frame, record)
        receipt = save(painted(frame), frame, record, tmp_path / "x.tif")
        assert (receipt.changed, receipt.lossless) == (0, True)
        with Image.open(tmp_path / "x.tif") as saved:
            assert saved.getexif()[0x010F] == "maker"


def test_a_fax_is_painted_in(tmp_path: Path) -> None:
    make_picture(50, 37).convert("1").save(tmp_path / "a.tif", compression="group4")
    frame = frame_of(tmp_path / "a.tif")
    assert save(painted(frame), frame, RECORD, tmp_path / "x.tif").changed == 0


@pytest.mark.parametrize(
    ("mode", "clear"), [("P", 3), ("P", bytes([255, 0, 128])), ("L", 90), ("1", 255), ("RGB", "corner")], ids=str
)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_a_clear_colour_stays_clear(mode: str, clear: Any, suffix: str, tmp_path: Path) -> None:
    given = make_picture(50, 37).convert("L").convert(mode) if mode == "L" else make_picture(50, 37).convert(mode)
    given.info["transparency"] = given.getpixel((49, 36)) if clear == "corner" else clear
    frame = frame_of(given)
    check_target(tmp_path / f"x.{suffix}", frame, RECORD)
    receipt = save(painted(frame), frame, RECORD, tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as saved:
        if suffix == "jpg":  # on white
            assert receipt.largest < 128
            assert not saved.has_transparency_data
        else:
            assert receipt.changed == 0
            before, after = (picture.convert("RGBA").getchannel("A") for picture in (given, saved))
            difference = ImageChops.difference(before, after)
            assert ImageChops.multiply(difference, ImageChops.invert(frame.touched.convert("L"))).getbbox() is None


def test_a_lost_clear_colour_counts_as_a_change(tmp_path: Path) -> None:
    given = make_picture(50, 37)
    given.info["transparency"] = given.getpixel((49, 36))
    frame = frame_of(given)
    opaque = painted(frame)
    del opaque.info["transparency"]
    with pytest.raises(MinpaintError, match="changed pixels outside"):
        save(opaque, frame, None, tmp_path / "x.png")


def test_metadata_that_a_format_cannot_hold_is_said_before_painting(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = bytes(65_000)  # a maker note that fills a JPEG's segment nearly to its end
    make_picture(50, 37).save(tmp_path / "a.jpg", exif=exif)
    frame = frame_of(tmp_path / "a.jpg")
    long = RECORD | {"prompt": "a dog" * 200}
    check_target(Path("x.jpg"), frame, None)
    check_target(Path("x.png"), frame, long)
    check_target(Path("-"), frame, long)
    with pytest.raises(InputError, match=r"output x\.jpg: JPEG cannot hold .*metadata or record.*--no-record"):
        check_target(Path("x.jpg"), frame, long)


def test_a_painting_that_cannot_be_written_is_left_beside_its_target(tmp_path: Path) -> None:
    frame = frame_of(make_picture(50, 37))
    (tmp_path / "x.png").mkdir()  # came there while it was painted
    with pytest.raises(MinpaintError, match=r"output .*x\.png: .*; the painting is in (.*)") as caught:
        save(painted(frame), frame, None, tmp_path / "x.png")
    rescued = Path(str(caught.value).split("the painting is in ")[1])
    assert rescued.parent == tmp_path
    with Image.open(rescued) as image:
        assert image.tobytes() == painted(frame).tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", rescued.name}


def test_a_painting_whose_folder_is_gone_is_left_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    picture = make_picture(50, 37).quantize(64)
    picture.info |= {"transparency": 3, "icc_profile": b"odd"}
    frame = frame_of(picture)
    with pytest.raises(MinpaintError, match=r"the painting is in .*long-rescued-\w+\.png$"):
        save(painted(frame), frame, None, tmp_path / "gone" / f"{'long' * 60}.webp")
    [rescued] = tmp_path.iterdir()
    with Image.open(rescued) as image:
        assert image.tobytes() == painted(frame).convert("RGBA").tobytes()


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path: Path) -> None:
    frame, folder = frame_of(make_picture(50, 37)), tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "real.png").write_bytes(b"old")
    for name, there in (("x.png", "real.png"), ("y.png", "not yet.png")):
        (tmp_path / name).symlink_to(folder / there)
        save(painted(frame), frame, None, tmp_path / name)
        assert (tmp_path / name).is_symlink()
        with Image.open(folder / there) as image:
            assert image.size == (50, 37)
    assert {path.name for path in folder.iterdir()} == {"real.png", "not yet.png"}


def test_a_file_that_came_meanwhile_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    frame = frame_of(make_picture(50, 37))
    (tmp_path / "x.png").write_bytes(b"precious")
    with pytest.raises(MinpaintError, match=r"x\.png: the file exists by now.*--overwrite.*the painting is in"):
        save(painted(frame), frame, None, tmp_path / "x.png", overwrite=False)
    assert (tmp_path / "x.png").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    dead, live, others = tmp_path / f".a-0{UNFINISHED}", tmp_path / f".b-1{UNFINISHED}", tmp_path / ".x-12345678.png"
    for path in (dead, live, others):
        path.write_bytes(b"half")
    code = f"import fcntl, time; file = open({str(live)!r}); fcntl.flock(file, 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        frame = frame_of(make_picture(50, 37))
        save(painted(frame), frame, None, tmp_path / "x.png")
        assert {path.name for path in tmp_path.iterdir()} == {live.name, others.name, "x.png"}
        process.kill()
    save(painted(frame), frame, None, tmp_path / "x.png")
    assert {path.name for path in tmp_path.iterdir()} == {others.name, "x.png"}
