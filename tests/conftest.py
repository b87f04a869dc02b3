"""What several test modules share: small random checkpoints, pictures, and the reference."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

# The processes that tests start run small models, too; this one has read its own number of threads by now.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import minpaint
import minpaint.engine.run
from minpaint.errors import MinpaintError, MinpaintWarning
from minpaint.painter import Painter
from weights.random_checkpoint import FAMILIES, write_checkpoint

SMALL_FAMILIES = ("small-sd1", "small-sd2", "small-sd1-4ch", "small-v")


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|; NaN never passes a bound."""
    difference = (ours.double() - reference.double()).norm() / reference.double().norm()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def level_differences(a: Image.Image, b: Image.Image) -> Tensor:
    """Of two 8-bit pictures of one size and mode, number by number."""
    assert (a.size, a.mode) == (b.size, b.mode)
    left, right = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (a, b))
    return (left - right).abs()


def largest_level_difference(a: Image.Image, b: Image.Image) -> int:
    return int(level_differences(a, b).max())


def mean_level_difference(a: Image.Image, b: Image.Image) -> float:
    return float(level_differences(a, b).float().mean())


def make_picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Coloured blobs on a gradient, with some grain."""
    generator = torch.Generator().manual_seed(seed)
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        x, y, r, *colour = torch.randint(0, 256, (6,), generator=generator).tolist()
        x, y, r = x * width // 256, y * height // 256, 3 + r * width // 1024
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colour))
    grain = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.blend(picture, Image.frombytes("RGB", (width, height), bytes(grain.flatten().tolist())), 0.15)


def make_mask(width: int = 64, height: int = 64) -> Image.Image:
    """An ellipse left of the middle and a bar, white on black."""
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    draw.ellipse((width // 8, height // 8, width // 2, height * 3 // 4), fill=255)
    draw.rectangle((width * 5 // 8, height // 2, width * 7 // 8, height * 5 // 8), fill=255)
    return mask


@pytest.fixture(scope="session", autouse=True)
def _messages() -> Iterator[None]:
    """Write down every error and warning of the program, if a variable names the file (tests/messages.py)."""
    if not (file := os.environ.get("MINPAINT_MESSAGES")):
        yield
        return
    with Path(file).open("a", encoding="utf-8") as found, pytest.MonkeyPatch.context() as patch:
        for base in (MinpaintError, MinpaintWarning):
            before = base.__init__

            def told(self: Exception, message: str, before: Callable[..., None] = before) -> None:
                before(self, message)
                print(self, file=found)

            patch.setattr(base, "__init__", told)
        yield


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small models are slowed down by threads, and much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if "full_size" in request.keywords else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return make_picture()


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    return make_mask()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's random checkpoint in diffusers layout, written once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = write_checkpoint(tmp_path_factory.mktemp(family), FAMILIES[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def painter(checkpoint: Callable[[str], Path]) -> Callable[[str], Painter]:
    """A loaded Painter of a family, on the CPU in float32."""
    made: dict[str, Painter] = {}

    def load(family: str) -> Painter:
        if family not in made:
            made[family] = minpaint.load(checkpoint(family), device="cpu", dtype="fp32")
        return made[family]

    return load


@pytest.fixture
def without_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what a run adds to the process, which in a test holds much else."""
    monkeypatch.setattr(minpaint.engine.run, "used_memory", lambda device: 0)


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A family's checkpoint in a folder of the test's own, to be changed; weights by `edit` only."""

    def link_or_copy(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)

    return lambda family: Path(shutil.copytree(checkpoint(family), tmp_path / family, copy_function=link_or_copy))


@pytest.fixture
def broken(copy: Callable[[str], Path]) -> Path:
    """A checkpoint to be broken."""
    return copy("small-sd1-4ch")
