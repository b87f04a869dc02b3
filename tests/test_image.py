"""Pictures of any kind: what comes in, and what mode it goes out in."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_mask, make_picture
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from minpaint.errors import InputError, MinpaintWarning
from minpaint.picture.frame import Frame
from minpaint.picture.image import (
    KEPT_MODES,
    alpha_of,
    expand,
    keep_mode,
    open_image,
    restore_mode,
    to_image,
    to_pixels,
)


def test_pixels_and_back_equal_the_reference() -> None:
    picture = make_picture(40, 24)
    reference = VaeImageProcessor(vae_scale_factor=8)
    pixels = to_pixels(picture)
    assert torch.equal(pixels, reference.preprocess(picture, height=24, width=40))
    assert to_image(pixels[0]).tobytes() == picture.tobytes()
    wild = torch.randn(3, 24, 40) * 2
    expected = reference.postprocess(wild[None], output_type="pil", do_denormalize=[True])[0]
    assert to_image(wild).tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_eight_without_clipping(mode: str) -> None:
    picture = Image.new(mode, (2, 1), 65535)
    picture.putpixel((0, 0), 300)
    assert [open_image(picture).getpixel((x, 0)) for x in (0, 1)] == [1, 255]
    assert open_image(Image.new(mode, (1, 1), 200)).convert("L").getpixel((0, 0)) == 200


def test_files_that_are_no_pictures_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    make_picture(200, 200).save(whole)
    faults = {"missing.png": None, "empty.png": b"", "text.png": b"hello", "short.png": whole.read_bytes()[:2000]}
    for name, content in faults.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="directory"):
        open_image(tmp_path)
    with pytest.raises(InputError, match="int"):
        open_image(3)  # type: ignore[arg-type]


def test_pillows_limit_on_decompression_bombs_stays_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_picture(100, 100).save(tmp_path / "large.png")
    assert Image.MAX_IMAGE_PIXELS is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(InputError, match=r"large\.png.*too many pixels"):
        open_image(tmp_path / "large.png")


def test_the_orientation_of_a_photo_is_applied(tmp_path: Path) -> None:
    picture = make_picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    picture.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (20, 30)


@pytest.mark.parametrize(("mode", "kept"), [("CMYK", "RGB"), ("I;16", "L"), ("I", "L"), ("F", "L"), ("HSV", "RGB")])
def test_a_mode_that_cannot_be_kept_is_said(mode: str, kept: str) -> None:
    picture = make_picture(21, 13).convert("L" if mode in ("I;16", "I", "F") else "RGB").convert(mode)
    with pytest.warns(MinpaintWarning, match="cannot be painted in"):
        assert keep_mode(picture).mode == kept


def test_sixteen_bits_that_became_eight_are_said() -> None:
    with pytest.warns(MinpaintWarning, match="16-bit"):
        keep_mode(open_image(Image.new("I;16", (2, 2), 40000)))


@pytest.mark.parametrize("mode", KEPT_MODES)
def test_other_modes_are_kept_without_a_word(mode: str) -> None:
    picture = make_picture(21, 13).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep_mode(picture) is picture


@pytest.mark.parametrize("colours", [2, 100, 256])
@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])], ids=["opaque", "index", "levels"])
def test_a_palette_picture_takes_new_colours_and_keeps_its_pixels(
    colours: int, transparency: int | bytes | None
) -> None:
    picture = make_picture(40, 30).quantize(colours)
    if transparency is not None:
        picture.info["transparency"] = transparency
    mask = make_mask(40, 30)
    worked, touched = Frame(picture, mask, mask, mask, opaque=False).begin(), mask.convert("1")
    worked.paste("fuchsia", (0, 0, 40, 30))
    restored = restore_mode(worked, picture, touched)
    assert restored.mode == "P"
    before, after, hole = (np.asarray(x) for x in (picture.convert("RGBA"), restored.convert("RGBA"), touched))
    assert (after[~hole] == before[~hole]).all()
    if colours <= 240:  # there are entries to spare
        assert np.abs(after[hole].astype(int) - (255, 0, 255, 255)).max() <= 4
    elif transparency != bytes([255, 0, 128]):
        assert (after[hole][:, 3] == 255).all()


@pytest.mark.parametrize("mode", KEPT_MODES)
def test_expanding_repeats_the_edges(mode: str) -> None:
    picture = make_picture(20, 10).convert(mode)
    grown = expand(picture, (3, 0, 5, 7))
    assert (grown.mode, grown.size) == (mode, (28, 17))
    given, found = (np.asarray(x.convert("RGB")) for x in (picture, grown))
    assert np.array_equal(found, np.pad(given, ((0, 7), (3, 5), (0, 0)), mode="edge"))


def test_expanded_transparency_is_opaque_at_the_new_sides() -> None:
    picture = Image.new("RGBA", (4, 4), (1, 2, 3, 0))
    alpha = np.asarray(expand(picture, (2, 0, 0, 0)))[..., 3]
    assert (alpha[:, :2] == 255).all()
    assert (alpha[:, 2:] == 0).all()


def test_transparency_is_found_wherever_a_mode_keeps_it() -> None:
    clear = Image.new("RGBA", (3, 3), (9, 9, 9, 0))
    keyed = Image.new("RGB", (3, 3), (9, 9, 9))
    keyed.info["transparency"] = (9, 9, 9)
    palette = Image.new("P", (3, 3), 1)
    palette.info["transparency"] = 1
    for picture in (clear, clear.convert("LA"), keyed, palette):
        alpha = alpha_of(picture)
        assert alpha is not None
        assert alpha.getextrema() == (0, 0)
    assert alpha_of(Image.new("RGB", (3, 3))) is None


def test_the_exif_of_a_tiff_survives_being_opened(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    make_picture(9, 9).save(tmp_path / "a.tif", exif=exif.tobytes())
    assert open_image(tmp_path / "a.tif").getexif()[0x010F] == "maker"


def test_all_but_the_first_picture_of_a_file_are_said_to_be_left_out(tmp_path: Path) -> None:
    first, second = make_picture(9, 9), make_picture(9, 9, seed=1)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    with pytest.warns(MinpaintWarning, match=r"a\.gif holds several pictures"):
        assert open_image(tmp_path / "a.gif").size == (9, 9)
