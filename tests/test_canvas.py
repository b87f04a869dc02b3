"""What the network works on: which part of the picture, at what size, with which hole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_mask, make_picture
from PIL import Image, ImageDraw

from minpaint.errors import InputError
from minpaint.picture.canvas import mirror, reference_canvas
from minpaint.picture.fill import membrane
from minpaint.picture.frame import open_frame
from minpaint.picture.image import to_image
from minpaint.picture.view import ReferenceView, View, choose_views
from minpaint.settings import Settings

NATIVE = 64


def hole_at(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Image.Image:
    hole = Image.new("L", size)
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(hole).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return hole


def views_of(hole: Image.Image, least: int = 1, **options: Any) -> list[View]:
    settings = Settings("", **options)
    views = choose_views(open_frame(Image.new("L", hole.size), hole, settings), settings, NATIVE, 8, least)
    assert all(isinstance(view, View) for view in views)
    return views


def whole(hole: Image.Image, least: int = 1) -> View:
    [view] = views_of(hole, least, context="whole", soft=True)
    return view


# The canvas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (8, 8), (9, 17), (2, 600)])
def test_mirroring_extends_to_multiples_and_keeps_what_is_there(size: tuple[int, int]) -> None:
    x = torch.rand(1, 2, *size)
    extended = mirror(x, whole(hole_at(size[::-1], (0, 0, 1, 1))).extent)
    assert all(n % 8 == 0 and n - m < 8 for n, m in zip(extended.shape[2:], size, strict=True))
    assert torch.equal(extended[:, :, : size[0], : size[1]], x)
    if min(size) > 8:
        pad = [(0, n - m) for n, m in zip(extended.shape[2:], size, strict=True)]
        assert np.array_equal(extended[0], np.pad(x[0].numpy(), [(0, 0), *pad], mode="reflect"))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 70), (64, 64)])
@pytest.mark.parametrize("least", [1, 2, 4])
def test_a_small_picture_is_mirrored_up_to_the_least_that_the_network_takes(size: tuple[int, int], least: int) -> None:
    """And its hole with it: what shows the hole is painted, and all else is kept."""
    width, height = size
    view, picture = whole(hole_at(size, (0, 0, 1, 1)), least), make_picture(*size)
    columns, rows = view.extent
    assert all(side % 8 == 0 for side in view.extent)
    assert max(view.extent) >= 8 * least
    assert all(side - given < 8 or side == 8 * least for side, given in zip(view.extent, size, strict=True))
    canvas = view.canvas([picture])
    pad = [(0, 0), (0, rows - height), (0, columns - width)]
    given = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(np.asarray(to_image(canvas.pixels[0])).transpose(2, 0, 1), np.pad(given, pad, mode="reflect"))
    hole = np.pad(np.asarray(view.hole), pad[1:], mode="reflect").reshape(rows // 8, 8, columns // 8, 8).max((1, 3))
    assert np.array_equal(canvas.cells[0, 0].numpy(), hole > 0)
    assert view.finish(picture, canvas.pixels[0], match=True).tobytes() == picture.tobytes()


@pytest.mark.parametrize("at", [(0, 0), (7, 7), (8, 3), (30, 21), (63, 63)])
def test_one_pixel_paints_its_latent_cell_and_no_other(at: tuple[int, int]) -> None:
    x, y = at
    canvas = whole(hole_at((64, 64), (x, y, x + 1, y + 1))).canvas([make_picture()])
    assert canvas.cells.nonzero().tolist() == [[0, 0, y // 8, x // 8]]
    blanked = canvas.blanked[0, 0].nonzero()
    assert len(blanked) == 64  # blanking is the painted cells, pixel for pixel
    assert bool((blanked // 8 == torch.tensor([y // 8, x // 8])).all())
    assert float(canvas.masked_pixels[0, :, canvas.blanked[0, 0] > 0].abs().max()) == 0


def test_a_soft_cell_is_as_strong_as_its_strongest_pixel() -> None:
    hole = hole_at((16, 8), (0, 0, 4, 4))
    hole.putpixel((12, 5), 100)
    hole.putpixel((13, 5), 40)
    canvas = whole(hole).canvas([make_picture(16, 8)])
    assert canvas.cells[0, 0, 0].tolist() == pytest.approx([1.0, 100 / 255])


@pytest.mark.parametrize("fill", ["original", "edge", "blur", "blank", "noise"])
def test_fills_change_the_hole_and_nothing_else(fill: str) -> None:
    canvas = whole(hole_at((64, 64), (16, 16, 40, 48))).canvas([make_picture()])
    inside = canvas.blanked[0, 0] > 0
    filled = canvas.filled(fill)
    assert torch.equal(filled[..., ~inside], canvas.pixels[..., ~inside])
    if fill == "original":
        assert torch.equal(filled, canvas.pixels)
    elif fill == "edge":
        assert torch.equal(filled[0, :, 30, 16], canvas.pixels[0, :, 30, 15])
        assert torch.equal(filled[0, :, 17, 28], canvas.pixels[0, :, 15, 28])
    elif fill == "blur":
        assert torch.equal(filled, membrane(canvas.pixels, ~inside))
    else:
        assert float(filled[..., inside].abs().max()) == 0


def test_the_references_canvas_is_the_references() -> None:
    from diffusers.image_processor import VaeImageProcessor

    image, mask = make_picture(75, 43), make_mask(75, 43)
    canvas = reference_canvas(image, mask, 8)
    masks = VaeImageProcessor(8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    expected = masks.preprocess(mask, height=40, width=72)
    assert torch.equal(canvas.blanked, expected)
    assert torch.equal(canvas.pixels, VaeImageProcessor(8).preprocess(image, height=40, width=72))
    assert torch.equal(canvas.cells, torch.nn.functional.interpolate(expected, size=(5, 9)))
    for size, least in (((7, 40), 1), ((40, 7), 1), ((15, 15), 2), ((31, 24), 4)):
        with pytest.raises(InputError, match=f"{size[0]}x{size[1]} is too small.* {8 * least}x8 pixels.*--profile"):
            reference_canvas(make_picture(*size), make_mask(*size), 8, least)
    assert reference_canvas(make_picture(64, 32), make_mask(64, 32), 8, 4).cells.shape == (1, 1, 4, 8)


def test_the_references_view_is_one_canvas_and_gives_all_that_was_painted() -> None:
    picture, mask, settings = make_picture(75, 43), make_mask(75, 43), Settings("", profile="diffusers", strength=0.5)
    frame = open_frame(picture, mask, settings)
    [view] = choose_views(frame, settings, NATIVE, 8)
    assert isinstance(view, ReferenceView)
    assert (view.extent, view.box, view.blends, view.fill(settings)) == ((72, 40), (0, 0, 75, 43), False, "original")
    canvas = view.canvas([frame.begin()])
    assert view.canvas([frame.begin()]) is canvas
    painted = view.finish(picture, torch.zeros(3, 40, 72), match=True)
    assert np.array_equal(np.asarray(painted), np.full((40, 72, 3), 128))
    result, hole = view.complete(frame, painted)
    assert result is painted
    assert np.array_equal(np.asarray(hole) == 255, canvas.blanked[0, 0].numpy() == 1)


def test_a_view_lets_nothing_of_the_old_content_be_seen_at_full_strength() -> None:
    [view], settings = views_of(hole_at((64, 64), (16, 16, 40, 48))), {"fill": "edge"}
    assert view.blends
    assert view.fill(Settings("", **settings)) == "blur"
    assert view.fill(Settings("", **settings, strength=0.9)) == "edge"
    assert view.fill(Settings("", **settings, soft=True)) == "edge"


# The views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (10, 900), (1, 1)])
def test_pictures_up_to_four_times_the_native_area_are_painted_whole(size: tuple[int, int]) -> None:
    hole = hole_at(size, (0, 0, 1, 1))
    [view] = views_of(hole)
    assert (view.box, view.size) == ((0, 0, *size), size)


def test_auto_takes_the_native_size_around_a_small_hole_as_it_is() -> None:
    hole = hole_at((6000, 4000), (5960, 2000, 5990, 2010))
    [view] = views_of(hole)
    assert view.size == (NATIVE, NATIVE)
    left, top, right, bottom = view.box
    assert (right - left, bottom - top) == (NATIVE, NATIVE)
    assert right == 6000  # moved inside
    assert left <= 5960
    assert top <= 2000
    assert bottom >= 2010


def test_auto_scales_twice_a_large_hole_down_to_the_native_size() -> None:
    hole = hole_at((6000, 4000), (1000, 1000, 1800, 1300))
    [view] = views_of(hole)
    assert view.box[2] - view.box[0] == view.box[3] - view.box[1] == 1600
    assert view.size == (NATIVE, NATIVE)


@pytest.mark.parametrize(("context", "side"), [(0, 20), (6, 32), (100, 220)])
def test_a_number_is_pixels_around_the_hole(context: int, side: int) -> None:
    hole = hole_at((500, 400), (200, 200, 220, 210))
    [view] = views_of(hole, context=context)
    assert view.box[2] - view.box[0] == view.box[3] - view.box[1] == side
    assert view.size == (NATIVE, NATIVE)


def test_the_crop_holds_the_feather_too() -> None:
    hole = hole_at((500, 400), (200, 200, 220, 210))
    [view] = views_of(hole, feather=12, context=0)
    assert view.box[0] <= 188
    assert view.box[2] >= 232


def test_separate_paints_far_parts_one_after_the_other() -> None:
    far, near = ((400, 300, 420, 310), (430, 300, 440, 310)), (10, 10, 30, 30)
    hole = hole_at((500, 400), *far, near)
    views = views_of(hole, separate=True)
    assert [view.cover.getbbox() is not None for view in views] == [True, True]
    assert views[0].box[1] < 100 < views[1].box[1]
    white = [sum(view.cover.histogram()[128:]) for view in views]
    assert white == [400, 300]
    together = views_of(hole)
    assert len(together) == 1


def test_a_part_not_yet_painted_is_hidden_from_the_network_and_a_painted_one_is_not() -> None:
    hole = hole_at((128, 128), (8, 8, 24, 24), (96, 96, 112, 112))
    first, second = views_of(hole, separate=True)
    assert sum(first.hole.histogram()[128:]) == 512
    assert sum(second.hole.histogram()[128:]) == 256
    assert second.hole.getpixel((10, 10)) == 0


@pytest.mark.parametrize(("box", "size"), [((0, 0, 64, 64), (64, 64)), ((8, 4, 40, 52), (64, 96))])
def test_what_is_painted_goes_back_under_the_cover_only(box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    picture, hole = make_picture(64, 64), hole_at((64, 64), (16, 16, 30, 40))
    view = View(box, size, hole.crop(box), hole.crop(box), 8)
    red = torch.tensor([1.0, -1, -1])[:, None, None].expand(3, size[1], size[0])
    finished = np.asarray(view.finish(picture, red, match=False))
    inside = np.asarray(hole) > 0
    assert (finished[inside] == (255, 0, 0)).all()
    assert (finished[~inside] == np.asarray(picture)[~inside]).all()


def test_a_colour_shift_is_taken_out() -> None:
    """A painting that is right but for its tint comes out right."""
    picture, hole = make_picture(64, 64), hole_at((64, 64), (16, 16, 40, 48))
    pixels = 2 * torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255 - 1
    tint = torch.tensor([0.1, -0.06, 0.03])[:, None, None] + 0.1 * torch.linspace(-1, 1, 64)
    view = whole(hole)
    off = np.asarray(view.finish(picture, pixels + tint, match=False)).astype(int) - np.asarray(picture)
    matched = np.asarray(view.finish(picture, pixels + tint, match=True)).astype(int) - np.asarray(picture)
    inside = np.asarray(hole) > 0
    assert np.abs(off[inside]).mean() > 5
    assert np.abs(matched[inside]).mean() < 1.5  # what the palest pixels cannot show is cut off
