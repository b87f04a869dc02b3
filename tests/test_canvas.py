"""Pictures and masks: what comes in, what the network sees, what goes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_mask, make_picture
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from minpaint.errors import InputError
from minpaint.image import open_image, to_image, to_pixels
from minpaint.mask import make_canvas, mirror


def test_pixels_and_back_equal_the_reference() -> None:
    picture = make_picture(40, 24)
    reference = VaeImageProcessor(vae_scale_factor=8)
    pixels = to_pixels(picture)
    assert torch.equal(pixels, reference.preprocess(picture, height=24, width=40))
    assert to_image(pixels[0]).tobytes() == picture.tobytes()
    wild = torch.randn(3, 24, 40) * 2
    expected = reference.postprocess(wild[None], output_type="pil", do_denormalize=[True])[0]
    assert to_image(wild).tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_any_mode_is_read_and_kept_pixels_stay(mode: str) -> None:
    picture = make_picture(21, 13).convert("L" if mode in ("I;16", "I", "F") else "RGB").convert(mode)
    canvas = make_canvas(picture, make_mask(21, 13), 8, "minpaint")
    assert canvas.pixels.shape == (1, 3, 16, 24)
    finished = canvas.finish(Image.new("RGB", (24, 16), (255, 0, 0)))
    assert finished.size == picture.size
    before = picture if mode == finished.mode else picture.convert("RGB")
    hole = np.asarray(make_mask(21, 13)) >= 128
    assert (np.asarray(finished) == np.asarray(before))[~hole].all()
    assert (np.asarray(finished.convert("RGB"))[hole] == (255, 0, 0)).all() or mode in ("L", "LA")


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_eight_without_clipping(mode: str) -> None:
    picture = Image.new(mode, (2, 1), 65535)
    picture.putpixel((0, 0), 300)
    assert [open_image(picture).getpixel((x, 0)) for x in (0, 1)] == [1, 255]
    assert open_image(Image.new(mode, (1, 1), 200)).convert("L").getpixel((0, 0)) == 200


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (8, 8), (9, 17), (2, 600)])
def test_mirroring_extends_to_multiples_and_keeps_what_is_there(size: tuple[int, int]) -> None:
    x = torch.rand(1, 2, *size)
    extended = mirror(x, 8)
    assert all(n % 8 == 0 and n - m < 8 for n, m in zip(extended.shape[2:], size, strict=True))
    assert torch.equal(extended[:, :, : size[0], : size[1]], x)
    if min(size) > 8:
        pad = [(0, n - m) for n, m in zip(extended.shape[2:], size, strict=True)]
        assert np.array_equal(extended[0], np.pad(x[0].numpy(), [(0, 0), *pad], mode="reflect"))


def test_the_mask_in_latents_is_the_references_nearest_neighbour() -> None:
    canvas = make_canvas(make_picture(72, 40), make_mask(72, 40), 8, "diffusers")
    expected = torch.nn.functional.interpolate(canvas.hole, size=(5, 9))
    assert torch.equal(canvas.latent_hole(8), expected)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (100, 100), (33, 33)])
def test_a_mask_of_the_same_shape_is_scaled(size: tuple[int, int]) -> None:
    canvas = make_canvas(make_picture(), make_mask(*size), 8, "minpaint")
    assert canvas.hole.shape[2:] == (64, 64)
    assert 0.1 < float(canvas.hole.mean()) < 0.5


@pytest.mark.parametrize("size", [(64, 32), (60, 64), (128, 64), (1, 64)])
def test_a_mask_of_another_shape_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]}.*64x64"):
        make_canvas(make_picture(), Image.new("L", size, 255), 8, "minpaint")


@pytest.mark.parametrize("level", [0, 127])
def test_a_mask_without_white_is_refused(level: int) -> None:
    with pytest.raises(InputError, match="nothing to paint"):
        make_canvas(make_picture(), Image.new("L", (64, 64), level), 8, "minpaint")


def test_grey_level_128_is_white_enough() -> None:
    assert float(make_canvas(make_picture(), Image.new("L", (64, 64), 128), 8, "minpaint").hole.min()) == 1.0


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
