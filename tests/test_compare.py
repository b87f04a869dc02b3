"""Two runs side by side: a single planted difference is found where it is, and nothing where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minpaint
from minpaint.cli.main import main
from minpaint.painter import Painter
from minpaint.picture.frame import open_frame
from minpaint.settings import Settings
from minpaint.study.compare import AFTER, BEFORE, compare_page, judge, options_apart
from minpaint.study.parity_record import UNLIKE
from minpaint.study.trace import Trace, trace_run

EXAMPLE = Path(__file__).parent.parent / "weights" / "example"
AS_GIVEN: dict[str, Any] = {"prompt": "a red tower", "steps": 12, "sampler": "ddim"}


@pytest.fixture(scope="module")
def painters() -> dict[str, Painter]:
    return {dtype: minpaint.load("tiny", device="cpu", dtype=dtype) for dtype in ("fp32", "bf16")}


def run(painter: Painter, **options: Any) -> Trace:
    settings = painter.complete(Settings(**AS_GIVEN | options))
    frame = open_frame(EXAMPLE / "picture.png", EXAMPLE / "mask.png", settings)
    return trace_run(painter, frame, settings, inside=False)


@pytest.fixture(scope="module")
def as_given(painters: dict[str, Painter]) -> Trace:
    """On one thread, as all tests run (conftest.py): with more, sums are rounded differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    trace = run(painters["fp32"])
    torch.set_num_threads(before)
    return trace


# A difference, and where the two runs part by it: the step, counted from 0, and what differs there first.
PLANTED: list[tuple[dict[str, Any], int, str]] = [
    ({"sampler": "pndm"}, 1, "where the sampler goes"),  # the first step of both is Euler's
    ({"sampler": "dpmpp"}, 0, "the timestep"),
    ({"eta": 0.3}, 0, "where the sampler goes"),
    ({"prompt": "a red tree"}, BEFORE, "the embedding of the prompt"),
    ({"negative_prompt": "blue"}, BEFORE, "the embedding of the negative prompt"),
    ({"grow": 1}, BEFORE, "the mask (hole)"),
    ({"feather": 3}, BEFORE, "the mask (cover)"),
    ({"seed": 1}, BEFORE, "what the steps start from"),
    ({"guidance": 7.4}, 0, "eps after guidance"),
    ({"guidance": 1.0}, BEFORE, "the embedding of the negative prompt"),
    ({"steps": 13}, 0, "the timestep"),
    ({"color_match": False}, AFTER, "the picture"),
]


@pytest.mark.parametrize(("options", "step", "what"), PLANTED)
def test_a_single_difference_is_found_where_it_is(
    painters: dict[str, Painter], as_given: Trace, options: dict[str, Any], step: int, what: str
) -> None:
    other = run(painters["fp32"], **options)
    verdict = judge(as_given, other)
    assert verdict.beyond is not None
    assert (verdict.beyond.step, verdict.beyond.what) == (step, what)
    assert {name for name, *_ in options_apart(as_given, other)} == set(options)
    assert verdict.beyond.what in compare_page(as_given, other)


def test_another_number_format_is_found_in_the_first_embedding(painters: dict[str, Painter], as_given: Trace) -> None:
    other = run(painters["bf16"])
    verdict = judge(as_given, other)
    assert verdict.beyond is not None
    assert (verdict.beyond.step, verdict.beyond.what) == (BEFORE, "the embedding of the negative prompt")
    assert 1e-4 < verdict.beyond.size < 0.02
    assert options_apart(as_given, other) == [("dtype", "fp32", "bf16")]


def test_a_run_repeated_is_the_same_to_the_last_bit(painters: dict[str, Painter]) -> None:
    verdict = judge(run(painters["fp32"]), run(painters["fp32"]))
    assert verdict == (None, None, None, 0.0)
    assert str(verdict) == "The two runs are the same, to the last bit."


def test_a_change_within_a_run_is_found_at_its_step(painters: dict[str, Painter], as_given: Trace) -> None:
    """A UNet that gives a hundredth more from the eighth call on."""
    painter = painters["fp32"]
    with painter.watch(patch={"unet": lambda step, output: output * 1.01 if step >= 7 else None}):
        verdict = judge(as_given, run(painter))
    assert verdict.beyond is not None
    assert (verdict.beyond.step, verdict.beyond.what) == (7, "eps without the prompt")
    assert verdict.beyond.size == pytest.approx(0.01, rel=0.01)
    assert verdict.first is not None
    assert verdict.first.size < 1e-5  # a watched run differs from one that is not by rounding


def test_runs_of_other_sizes_are_told_apart(painters: dict[str, Painter], as_given: Trace) -> None:
    other = run(painters["fp32"], expand="left=16")
    verdict = judge(as_given, other)
    assert verdict.beyond is not None
    assert verdict.beyond.size == verdict.final == UNLIKE
    compare_page(as_given, other)


def test_two_files_are_compared_by_repeating_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--image", str(EXAMPLE / "picture.png"), "--mask", str(EXAMPLE / "mask.png"), "--prompt", "a red tower"]
    a, b, page = (str(tmp_path / name) for name in ("a.png", "b.png", "page.html"))
    assert main(["paint", *files, "--steps", "4", "-o", a]) == 0
    assert main(["paint", "--like", a, "--seed", "5", "-o", b]) == 0
    capsys.readouterr()
    assert main(["compare", a, b, "-o", page, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["same"], report["options"]) == (False, {"seed": ["0", "5"]})
    assert report["beyond_rounding"]["what"] == "what the steps start from"
    assert "not exactly what its run gives" not in err
    assert Path(page).read_text().startswith("<!doctype html>")
    assert main(["compare", a, a, "-o", page, "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_a_file_that_its_run_does_not_give_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, a = tmp_path / "photo.png", tmp_path / "a.png"
    Image.open(EXAMPLE / "picture.png").save(photo)
    files = ["--image", str(photo), "--mask", str(EXAMPLE / "mask.png"), "--prompt", "a red tower"]
    assert main(["paint", *files, "--steps", "2", "-o", str(a)]) == 0
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo)
    assert main(["compare", str(a), str(a), "-o", str(tmp_path / "page.html")]) == 0
    assert f"{a} is not exactly what its run gives here and now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "culprit"),
    [
        (["nowhere.png", "nowhere.png"], "nowhere.png: no such file"),
        ([str(EXAMPLE / "mask.png")] * 2, "holds no record of a painting"),
        (["one.png"], "the following arguments are required: FILE"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    files: list[str], culprit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *files, "-o", str(tmp_path / "page.html")]) == 2
    assert culprit in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
