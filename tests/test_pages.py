"""The pages of trace and compare in a real browser: no complaint, every picture decodes, the sliders move."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, find_browser
from PIL import Image, ImageChops, ImageStat
from test_trace import EXAMPLE

from minpaint.cli.main import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
RUN = ["trace", "--image", str(EXAMPLE / "picture.png"), "--prompt", "a red tower", "--steps", "4", "--quiet"]
SIZES = {"desktop": (1280, 900, False), "phone": (390, 844, True)}
CANVASES = "[...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())"
# set as a hand does: the value, then the event
MOVE = "(() => {{ const slider = document.querySelector('input[type=range]'); slider.value = {}; " \
       "slider.dispatchEvent(new Event('input')); }})()"  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    mask, wide = Image.open(EXAMPLE / "mask.png"), folder / "wide.png"
    holes = Image.new("L", (256, 96))
    holes.paste(255, (8, 40, 40, 80))
    holes.paste(255, (210, 30, 240, 60))
    holes.save(wide)
    Image.open(EXAMPLE / "picture.png").resize((256, 96)).save(folder / "photo.png")
    mask.save(folder / "mask.png")
    given = ["--mask", str(folder / "mask.png")]
    parts = ["--image", str(folder / "photo.png"), "--mask", str(wide), "--separate", "--count", "2", "--context", "8"]
    for name, options in {"trace": given, "parts": parts, "versus": [*given, "--versus", "--eta 1 --steps 6"]}.items():
        assert main([*RUN, *options, "-o", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in ("trace", "parts", "versus")}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["trace", "parts", "versus"])
def test_a_browser_shows_the_page_without_complaint(
    chromium: Browser, pages: dict[str, Path], name: str, size: str, tmp_path: Path
) -> None:
    width, height, mobile = SIZES[size]
    chromium.open(pages[name], width, height, mobile)
    assert chromium.run("document.images.length") > 0
    chromium.run("Promise.all([...document.images].map(image => image.decode()))")  # rejects if one does not
    assert chromium.run("[...document.images].every(image => image.naturalWidth > 0)")
    assert chromium.run("document.querySelectorAll('svg').length") > 0
    assert chromium.run("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    shown = chromium.photograph(
        Path(os.environ.get("MINPAINT_SCREENSHOTS", tmp_path)) / f"{name}-{size}.png", whole=True
    )
    with Image.open(shown) as picture:
        assert picture.width == width
        assert min(ImageStat.Stat(picture.convert("L")).stddev) > 10  # not an empty page
    assert chromium.complaints == []


@pytest.mark.parametrize("name", ["trace", "parts", "versus"])
def test_the_slider_moves_every_picture_of_its_section(chromium: Browser, pages: dict[str, Path], name: str) -> None:
    chromium.open(pages[name])
    chromium.run("Promise.all([...document.images].map(image => image.decode()))")
    chromium.run(MOVE.format(3))
    last, told = chromium.run(CANVASES), chromium.run("document.querySelector('output').textContent")
    chromium.run(MOVE.format(0))
    first = chromium.run(CANVASES)
    own = chromium.run("document.querySelector('section.steps').querySelectorAll('canvas').length")
    assert 0 < own <= len(first)
    assert all(a != b for a, b in zip(first[:own], last[:own], strict=True))
    assert first[own:] == last[own:]  # another part has a slider of its own
    assert chromium.run("document.querySelector('output').textContent") != told
    chromium.run(MOVE.format(3))
    assert chromium.run(CANVASES) == last
    assert chromium.complaints == []


def test_the_choice_of_a_level_changes_the_maps_of_the_words(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["trace"])
    chromium.run("Promise.all([...document.images].map(image => image.decode()))")
    words = "[...document.querySelectorAll('canvas[data-word]')].map(canvas => canvas.toDataURL())"
    seen = []
    for number in range(chromium.run("document.querySelector('select').options.length")):
        chromium.run(f"(() => {{ const choice = document.querySelector('select'); choice.selectedIndex = {number}; "
                     "choice.dispatchEvent(new Event('input')); })()")  # fmt: skip
        seen.append(tuple(chromium.run(words)))
    assert len(seen) == len(set(seen)) == 4  # the mean, and three sizes of maps
    assert chromium.complaints == []


def test_what_the_canvas_shows_is_the_frame_of_its_step(chromium: Browser, pages: dict[str, Path]) -> None:
    """The frame is cut out of the sprite here too, and compared pixel by pixel."""
    chromium.open(pages["trace"])
    chromium.run("Promise.all([...document.images].map(image => image.decode()))")
    sprite = "document.getElementById(document.querySelector('canvas').dataset.sprite)"
    sheet, columns, width, height = chromium.run(
        f"[{sprite}.src, ...['columns', 'width', 'height'].map(name => +{sprite}.dataset[name])]"
    )
    for step in (0, 2):
        chromium.run(MOVE.format(step))
        x, y = step % columns * width, step // columns * height
        frame = decoded(sheet).crop((x, y, x + width, y + height))
        shown = decoded(chromium.run("document.querySelector('canvas').toDataURL()"))
        assert ImageChops.difference(shown, frame).getbbox() is None


def decoded(url: str) -> Image.Image:
    """The picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
