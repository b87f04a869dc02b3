"""The hole: where it is, how far it reaches, and what is no mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_mask, make_picture
from PIL import Image, ImageDraw

from minpaint.errors import InputError
from minpaint.picture.mask import feather, find_hole, grow, islands
from minpaint.settings import Settings

PLAIN = Settings("")


def dot(size: tuple[int, int], *at: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    for place in at:
        mask.putpixel(place, 255)
    return mask


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")).astype(int)


def distance_to(hole: Image.Image) -> np.ndarray:
    rows, columns = np.indices((hole.height, hole.width))
    ys, xs = np.nonzero(levels(hole))
    return np.hypot(rows[..., None] - ys, columns[..., None] - xs).min(-1)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (100, 100), (33, 33)])
def test_a_mask_of_the_same_shape_is_scaled(size: tuple[int, int]) -> None:
    hole = find_hole(make_picture(), make_mask(*size), PLAIN)
    assert hole.size == (64, 64)
    assert set(np.unique(levels(hole))) == {0, 255}
    assert 0.1 < (levels(hole) > 0).mean() < 0.5


@pytest.mark.parametrize("soft", [False, True])
def test_a_thin_stroke_survives_a_mask_made_smaller(soft: bool) -> None:
    mask = Image.new("L", (640, 640))
    ImageDraw.Draw(mask).line((0, 320, 640, 320), fill=255, width=1)
    hole = levels(find_hole(make_picture(), mask, Settings("", soft=soft)))
    assert (hole[32] == 255).all()
    assert hole.sum() == 64 * 255


@pytest.mark.parametrize("size", [(64, 32), (60, 64), (128, 64), (1, 64)])
def test_a_mask_of_another_shape_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]}.*64x64"):
        find_hole(make_picture(), Image.new("L", size, 255), PLAIN)


@pytest.mark.parametrize("level", [0, 127])
def test_a_mask_without_white_is_refused(level: int) -> None:
    with pytest.raises(InputError, match="nothing to paint"):
        find_hole(make_picture(), Image.new("L", (64, 64), level), PLAIN)


def test_grey_level_128_is_white_enough() -> None:
    assert levels(find_hole(make_picture(), Image.new("L", (64, 64), 128), PLAIN)).min() == 255


def test_a_soft_mask_keeps_its_grey() -> None:
    mask = Image.linear_gradient("L").resize((64, 64))
    assert find_hole(make_picture(), mask, Settings("", soft=True)).tobytes() == mask.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_without_a_mask_the_transparent_part_is_the_hole(mode: str) -> None:
    image = make_picture().convert("RGBA")
    image.putalpha(make_mask().point(lambda level: 255 - level))
    if mode == "P":
        picture = Image.new("P", (64, 64), 1)
        picture.paste(2, (0, 0), make_mask())
        picture.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
        picture.info["transparency"] = 2
        image = picture
    assert np.array_equal(levels(find_hole(image.convert(mode), None, PLAIN)) > 0, levels(make_mask()) > 0)


def test_no_mask_and_no_transparency_is_refused() -> None:
    with pytest.raises(InputError, match="--mask"):
        find_hole(make_picture(), None, PLAIN)
    with pytest.raises(InputError, match="transparent"):
        find_hole(Image.new("RGBA", (9, 9), (1, 2, 3, 200)), None, PLAIN)


def test_new_margins_are_hole() -> None:
    hole = levels(find_hole(make_picture(20, 10), None, Settings("", expand="left=3,top=2,right=1")))
    assert hole.shape == (12, 24)
    assert (hole[2:, 3:23] == 0).all()
    hole[2:, 3:23] = 255
    assert hole.min() == 255


@pytest.mark.parametrize("pixels", [1, 3, 10])
def test_growing_adds_all_within_the_distance_and_nothing_beyond(pixels: int) -> None:
    hole = dot((50, 40), (20, 20), (48, 1))
    assert np.array_equal(levels(grow(hole, pixels)) > 0, distance_to(hole) <= pixels)


def test_a_soft_hole_grows_with_the_strength_of_its_nearest_pixel() -> None:
    hole = Image.new("L", (20, 5))
    hole.paste(90, (0, 0, 5, 5))
    grown = levels(grow(hole, 3))
    assert (grown[:, :8] == 90).all()
    assert (grown[:, 8:] == 0).all()


@pytest.mark.parametrize("pixels", [1, 4, 15])
def test_the_feather_falls_outward_only(pixels: int) -> None:
    hole = make_mask(60, 60)
    cover, distance = levels(feather(hole, pixels)), distance_to(hole)
    assert (cover[levels(hole) > 0] == 255).all()  # no old pixel shows through
    assert (cover[distance > pixels] == 0).all()
    assert (cover[(distance > 0) & (distance <= pixels)] < 255).all()
    ring = (distance > 0) & (distance <= pixels)
    order = np.argsort(distance[ring])
    assert (np.diff(cover[ring][order]) <= 0).all()


def test_no_feather_covers_a_soft_hole_wholly() -> None:
    hole = Image.linear_gradient("L").resize((8, 256))
    assert np.array_equal(levels(feather(hole, 0)) == 255, levels(hole) > 0)


def test_islands_are_all_of_the_hole_and_far_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        places = (torch.rand(6, 2, generator=generator) * 100).long().tolist()
        hole = dot((100, 100), *map(tuple, places))
        parts = [levels(part) > 0 for part in islands(hole, 10)]
        assert np.array_equal(np.sum(parts, 0), levels(hole) > 0)  # each pixel in just one
        for i, part in enumerate(parts):
            for other in parts[i + 1 :]:
                a, b = (np.argwhere(x) for x in (part, other))
                assert np.abs(a[:, None] - b[None]).max(-1).min() > 10
