"""Kept pixels are kept: any size, mode, mask, feather and grow, with whatever a network may paint."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw

import minpaint
from minpaint.errors import InputError
from minpaint.painter import Painter
from minpaint.picture.explain import explain
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.image import KEPT_MODES
from minpaint.picture.saving import save
from minpaint.picture.view import View, choose_views
from minpaint.settings import Settings

NATIVE = 64
MASKS = ("empty", "full", "pixel", "stroke", "borders", "islands", "noise", "ellipse")
sizes = st.tuples(st.integers(1, 600), st.integers(1, 600))


def draw_mask(kind: str, size: tuple[int, int], seed: int) -> Image.Image:
    """A mask of a kind, white on black."""
    rng, (width, height) = Random(seed), size
    mask = Image.new("L", size, 255 * (kind == "full"))
    draw = ImageDraw.Draw(mask)

    def place() -> tuple[int, int]:
        return rng.randrange(width), rng.randrange(height)

    if kind == "pixel":
        mask.putpixel(place(), 255)
    elif kind == "stroke":
        draw.line((*place(), *place()), fill=255, width=1)
    elif kind == "borders":
        draw.rectangle((0, 0, width - 1, height - 1), outline=255)
    elif kind == "islands":
        for _ in range(rng.randrange(2, 12)):
            x, y = place()
            draw.rectangle((x, y, x + rng.randrange(9), y + rng.randrange(9)), fill=255)
    elif kind == "noise":
        mask = Image.effect_noise(size, 90)
    elif kind == "ellipse":
        x, y = place()
        draw.ellipse((x - width // 3, y - height // 3, x, y), fill=255)
    return mask


def check(frame: Frame, result: Image.Image, given_image: Image.Image, mask: Image.Image, options: Settings) -> None:
    """Size and mode are the image's, and nothing has changed beyond the hole, its growth and feather."""
    assert result.size == given_image.size
    assert result.mode == (given_image.mode if given_image.mode in KEPT_MODES else frame.original.mode)
    assert save(result, frame, {"minpaint": "x"}, BytesIO()).changed == 0
    # the same by other means than the program's own: far from the mask's white, and exactly
    reach = options.grow + options.feather
    white = np.asarray(mask) >= (1 if options.soft else 128)
    near = white.copy()
    for axis in (0, 1):
        for shift in range(1, min(reach, 600) + 1):
            ahead, behind = np.roll(white, shift, axis), np.roll(white, -shift, axis)
            np.swapaxes(ahead, 0, axis)[:shift], np.swapaxes(behind, 0, axis)[-shift:] = False, False
            near |= ahead | behind
        white = near.copy()
    before, after = (np.asarray(x.convert("RGBA")) for x in (frame.original, result))
    assert (before == after)[~near].all()


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    size=sizes,
    mode=st.sampled_from([*KEPT_MODES, "CMYK", "I;16", "F"]),
    kind=st.sampled_from(MASKS),
    grow=st.integers(0, 12),
    feather=st.integers(0, 20),
    soft=st.booleans(),
    separate=st.booleans(),
    context=st.one_of(st.sampled_from(["auto", "whole"]), st.integers(0, 40)),
    seed=st.integers(0, 2**20),
)
@pytest.mark.filterwarnings("ignore::minpaint.errors.MinpaintWarning")
def test_whatever_is_painted(size: tuple[int, int], mode: str, kind: str, seed: int, **options: Any) -> None:
    """All but the network: its output is noise."""
    image, mask = make_picture(*size, seed=seed).convert("L" if mode in ("I;16", "F") else "RGB"), None
    image, mask = image.convert(mode), draw_mask(kind, size, seed)
    asked = Settings("", **options)
    if not (np.asarray(mask) >= (1 if asked.soft else 128)).any():
        with pytest.raises(InputError, match="nothing to paint"):
            open_frame(image, mask, asked)
        return
    frame = open_frame(image, mask, asked)
    picture = frame.begin()
    generator = torch.Generator().manual_seed(seed)
    painted = np.zeros(size[::-1], dtype=bool)
    for view in choose_views(frame, asked, NATIVE, 8, least=1 + seed % 3):
        assert isinstance(view, View)
        canvas = view.canvas([picture])
        columns, rows = view.extent
        assert min(rows, columns) >= 8
        assert max(rows, columns) >= 8 * (1 + seed % 3)
        assert canvas.blanked.shape == (1, 1, rows, columns)
        assert canvas.pixels.shape == (1, 3, rows, columns)
        assert canvas.cells.shape == (1, 1, rows // 8, columns // 8)
        assert float(canvas.cells.max()) > 0
        if view.size == (view.box[2] - view.box[0], view.box[3] - view.box[1]):  # not scaled: pixel for pixel
            own = np.asarray(view.cover)[: view.size[1], : view.size[0]] == 255
            asked_for = own & (np.asarray(view.hole) > 0)
            assert (canvas.blanked[0, 0, : view.size[1], : view.size[0]].numpy() > 0)[asked_for].all()
        left, top, right, bottom = view.box
        painted[top:bottom, left:right] |= np.asarray(view.cover) == 255
        picture = view.finish(picture, torch.randn(3, rows, columns, generator=generator), match=seed % 2 == 0)
    assert painted[np.asarray(frame.hole) > 0].all()  # every pixel of the hole is in some part, covered wholly
    check(frame, frame.finish(picture), image, mask, asked)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=sizes,
    mode=st.sampled_from(KEPT_MODES),
    kind=st.sampled_from(MASKS),
    options=st.fixed_dictionaries(
        {},
        optional={
            "grow": st.integers(0, 5),
            "feather": st.integers(0, 9),
            "soft": st.booleans(),
            "separate": st.booleans(),
            "strength": st.sampled_from([0.6, 1.0]),
            "sampler": st.sampled_from(["ddim", "pndm", "dpmpp"]),
            "fill": st.sampled_from(["original", "edge", "blur", "noise", "blank"]),
        },
    ),
    seed=st.integers(0, 2**20),
)
@pytest.mark.filterwarnings("ignore::minpaint.errors.MinpaintWarning")
def test_a_whole_run(
    painter: Callable[[str], Painter], size: tuple[int, int], mode: str, kind: str, options: dict[str, Any], seed: int
) -> None:
    image, mask = make_picture(*size, seed=seed).convert(mode), draw_mask(kind, size, seed)
    asked = Settings("a dog", steps=2, seed=seed, **options)
    if not (np.asarray(mask) >= (1 if asked.soft else 128)).any():
        with pytest.raises(InputError, match="nothing to paint"):
            open_frame(image, mask, asked)
        return
    frame = open_frame(image, mask, asked)
    [painting] = painter("small-sd1").paint(frame, asked)
    check(frame, painting.image, image, mask, asked)
    assert painting.seam >= 0
    assert bool(painting.latents.isfinite().all())


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind not in ("empty", "noise")])
def test_what_is_masked_is_painted(painter: Callable[[str], Painter], kind: str) -> None:
    """A stroke of one pixel too."""
    image, mask = Image.new("RGB", (70, 50), (250, 0, 250)), draw_mask(kind, (70, 50), seed=3)
    [painting] = painter("small-sd1")(image, mask, "a dog", steps=2, color_match=False)
    changed = (np.asarray(painting.image) != np.asarray(image)).any(-1)
    assert np.array_equal(changed, np.asarray(mask) >= 128)


@pytest.fixture(scope="module")
def tiny() -> Painter:
    return minpaint.load("tiny", device="cpu", dtype="fp32")


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grow": 3, "feather": 4},
        {"expand": "left=1,bottom=20"},
        {"soft": True},
        {"context": 0},
        {"context": "whole", "color_match": False},
        {"separate": True},
        {"strength": 0.5, "fill": "edge"},
        {"profile": "diffusers"},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "alpha"])
def test_pictures_of_a_few_pixels(tiny: Painter, size: tuple[int, int], options: dict[str, Any], masked: bool) -> None:
    image, mask = make_picture(*size), Image.new("L", size)
    mask.putpixel((size[0] - 1, size[1] - 1), 255)
    if not masked:
        image.putalpha(ImageChops.invert(mask))
    asked = Settings("a dog", steps=2, **options)
    frame = open_frame(image, mask if masked else None, asked)
    if asked.profile == "diffusers":
        with pytest.raises(InputError, match="too small for --profile diffusers"):
            tiny.paint(frame, asked)
        return
    assert explain(frame, tiny.views(frame, asked)[0]).height > 1
    [painting] = tiny.paint(frame, asked)
    assert (painting.image.size, painting.image.mode) == (frame.original.size, image.mode)
    assert save(painting.image, frame, None, BytesIO()).changed == 0
