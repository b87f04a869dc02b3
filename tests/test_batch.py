"""`batch`: manifests and folders, what is checked, what is done again, shards, kills and a cluster."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_kills import outputs, write_rows
from conftest import level_differences, make_mask, make_picture
from PIL import Image

import minpaint.batch.run
import minpaint.engine.run
from minpaint.cli.main import main
from minpaint.picture.saving import read_record

ROOT = Path(__file__).parent.parent
Batch = Callable[..., int]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """Runs `batch` on a manifest or folder in tmp_path, into its folder out."""

    def run(what: str, *more: str) -> int:
        return main(["batch", str(tmp_path / what), "-o", str(tmp_path / "out"), "--steps", "2", *more])

    return run


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def write_jsonl(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_inputs(folder: Path, *stems: str, beside: bool = True) -> None:
    for seed, stem in enumerate(stems):
        make_picture(64, 48, seed).save(folder / f"{stem}.png")
        if beside:
            make_mask(64, 48).save(folder / f"{stem}_mask.png")


def test_each_painting_is_the_one_that_paint_gives(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of two sizes, with masks, prompts, seeds and guidance of their own; a batch differs by rounding alone."""
    write_inputs(tmp_path, "a", "b", "c")
    make_picture(80, 64, 9).save(tmp_path / "wide.png")
    make_mask(80, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "wide_mask.png")
    make_mask(64, 48).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b_mask.png")
    prompts = {"a": "a red tower", "b": "a purple tree", "c": "an orange house", "wide": "a meadow by day"}
    rows = [
        {"image": f"{stem}.png", "mask": f"{stem}_mask.png", "prompt": prompt, "seed": seed}
        for seed, (stem, prompt) in enumerate(prompts.items())
    ]
    rows.append(rows[1] | {"guidance": 1, "soft": False, "feather": 3, "output": "plain.png"})
    write_jsonl(tmp_path, *rows)
    assert main(["batch", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out"), "--steps", "4", "--json"]) == 0
    told = report(capsys)
    assert (told["rows"], told["painted"], told["failed"]) == (5, 5, 0)
    for row, output in zip(rows, sorted(told["outputs"], key=lambda each: each["row"]), strict=True):
        words = [f"--{name}={tmp_path / value if name in ('image', 'mask') else value}" for name, value in row.items()]
        words = [word for word in words if not word.startswith(("--soft", "--output"))]
        assert main(["paint", *words, "--steps", "4", "-o", str(tmp_path / "one.png"), "--overwrite", "--json"]) == 0
        alone = report(capsys)["outputs"][0]
        assert output["receipt"] == alone["receipt"]
        assert output["receipt"]["changed"] == 0
        with Image.open(tmp_path / "one.png") as one, Image.open(output["path"]) as other:
            assert level_differences(one, other).max() <= 1
        assert read_record(output["path"]) == read_record(tmp_path / "one.png")
    batched = outputs(tmp_path / "out")
    assert batch("rows.jsonl", "--steps", "4", "--together", "1", "-o", str(tmp_path / "apart")) == 0
    assert main(["paint", *words, "--steps", "4", "-o", str(tmp_path / "one.png"), "--overwrite"]) == 0
    assert outputs(tmp_path / "apart")["plain.png"] == (tmp_path / "one.png").read_bytes()
    assert outputs(tmp_path / "apart").keys() == batched.keys()


def test_csv_gives_what_jsonl_gives(batch: Batch, tmp_path: Path) -> None:
    write_inputs(tmp_path, "a", "b")
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "mask": "a_mask.png", "prompt": "a red tower, by day", "color_match": False, "seed": 3},
        {"image": "b.png", "mask": "b_mask.png", "prompt": "a boat", "expand": "left=8", "output": "x.png"},
    ]
    write_jsonl(tmp_path, *rows)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask", "prompt", "color_match", "seed", "expand", "output"])
        writer.writeheader()
        writer.writerows(rows)
    assert batch("rows.jsonl") == 0
    assert batch("rows.csv", "-o", str(tmp_path / "other")) == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "other")
    assert outputs(tmp_path / "out").keys() == {"a.png", "x.png"}


def test_a_folder_finds_its_masks_in_three_ways(batch: Batch, tmp_path: Path) -> None:
    beside, apart, one = (tmp_path / name for name in ("beside", "apart", "one"))
    for folder in (beside, apart, one, tmp_path / "masks"):
        folder.mkdir()
    write_inputs(beside, "a", "b")
    write_inputs(apart, "a", "b", beside=False)
    write_inputs(one, "a", "b", beside=False)
    for stem in "ab":
        make_mask(64, 48).save(tmp_path / "masks" / f"{stem}.png")
    given = ["--prompt", "a red tower"]
    assert batch("beside", *given) == 0
    assert batch("apart", *given, "--masks", str(tmp_path / "masks"), "-o", str(tmp_path / "out2")) == 0
    assert batch("one", *given, "--masks", str(tmp_path / "masks/a.png"), "-o", str(tmp_path / "out3")) == 0
    pixels = [
        [Image.open(tmp_path / out / f"{stem}.png").tobytes() for stem in "ab"] for out in ("out", "out2", "out3")
    ]
    assert pixels[0] == pixels[1] == pixels[2]


def test_all_faults_are_listed_before_anything_is_painted(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path, "a")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    good = {"image": "a.png", "mask": "a_mask.png", "prompt": "a dog"}
    faults = [
        (good | {"image": "nowhere.png"}, "nowhere.png: no such file"),
        (good | {"steps": 0, "output": "2.png"}, "steps"),
        (good | {"stepz": 3, "output": "3.png"}, "unknown column 'stepz'"),
        (good | {"output": "../4.png"}, "is not a file in"),
        (good | {"image": "torn.png"}, "torn.png"),
        (good | {"output": "6.xyz"}, "unknown kind of file"),
        (good | {"count": 2, "output": "7.png"}, "count 2"),
        ({"image": "a.png", "mask": "a_mask.png", "output": "8.png"}, "--prompt is missing"),
        (good | {"soft": "perhaps", "output": "9.png"}, "neither true nor false"),
        (good | {"steps": True, "output": "10.png"}, "steps cannot be true"),
        (good | {"row": 3, "output": "11.png"}, "unknown column 'row'"),
        (good | {"output": "x\0.png"}, "null"),
        (good | {"output": "twice.png"}, ""),
        (good | {"output": "twice.png"}, "is that of row 13"),
    ]
    write_jsonl(tmp_path, *(row for row, _ in faults))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{nonsense\n[1]\n")
    assert batch("rows.jsonl", "--quiet") == 2
    said = capsys.readouterr().err
    for number, (_, told) in enumerate(faults, 1):
        assert not told or any(f"row {number}: " in line and told in line for line in said.splitlines()), (told, said)
    assert "row 15 is not a JSON object" in said
    assert "row 16 is not a JSON object" in said
    assert said.splitlines()[-1].startswith("minpaint: error: ")
    assert len(said.splitlines()) == len(faults) - 1 + 3
    assert outputs(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("what", "more", "told"),
    [
        ("nowhere.jsonl", [], "nowhere.jsonl"),
        ("rows.txt", [], "neither .jsonl nor .csv"),
        ("rows.jsonl", [], "holds no row"),
        ("bad.csv", [], "its first line must name the columns"),
        ("rows.jsonl", ["--shard", "3/2"], "shard '3/2'"),
        ("rows.jsonl", ["--together", "0"], "together 0"),
        ("rows.jsonl", ["--masks", "nowhere"], "masks nowhere"),
        ("rows.jsonl", ["--image", "a.png"], "--image"),
    ],
)
def test_bad_usage_is_one_line(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, more: list[str], told: str
) -> None:
    for name in ("rows.jsonl", "rows.txt"):
        (tmp_path / name).touch()
    (tmp_path / "bad.csv").write_text("picture,mask\na.png,b.png\n")
    assert batch(what, *more) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_an_input_or_a_file_that_is_no_painting_is_never_replaced(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path, "a")
    before = (tmp_path / "a.png").read_bytes()
    given = ["--prompt", "a dog", "-o", str(tmp_path)]
    assert main(["batch", str(tmp_path), *given, "--overwrite"]) == 2
    assert "is an input" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"precious")
    assert batch("", "--prompt", "a dog") == 2
    assert "is no painting" in capsys.readouterr().err
    assert (tmp_path / "out/a.png").read_bytes() == b"precious"
    assert batch("", "--prompt", "a dog", "--overwrite") == 0


def test_a_second_run_does_only_what_is_missing_or_asked_differently(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_rows(tmp_path, 6, 48)
    assert batch("rows.jsonl", "--json") == 0
    assert report(capsys)["painted"] == 6
    first = outputs(tmp_path / "out")
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    (tmp_path / "out/2.png").unlink()
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[4]["seed"] = 77
    write_jsonl(tmp_path, *rows)
    assert batch("rows.jsonl", "--json") == 0
    told = report(capsys)
    assert (told["painted"], told["before"]) == (2, 4)
    second = outputs(tmp_path / "out")
    assert [name for name in first if first[name] != second[name]] == ["4.png"]
    assert read_record(tmp_path / "out/4.png")["seed"] == 77
    kept = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    assert {name for name in first if kept[name] == times[name]} == first.keys() - {"2.png", "4.png"}
    assert batch("rows.jsonl", "--json") == 0
    assert report(capsys)["painted"] == 0


def test_a_row_that_fails_is_written_down_and_the_rest_goes_on(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path, 6, 48)
    undisturbed = batch("rows.jsonl", "-o", str(tmp_path / "good"))
    capsys.readouterr()
    keep_loaded = minpaint.engine.run.Engine.keep_loaded

    def spoil(engine: minpaint.engine.run.Engine) -> None:  # after the check, before the painting
        Image.new("RGB", (48, 48)).save(tmp_path / "1.png")
        keep_loaded(engine)

    monkeypatch.setattr(minpaint.engine.run.Engine, "keep_loaded", spoil)
    assert (undisturbed, batch("rows.jsonl", "--json")) == (0, 1)
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["painted"], told["failed"]) == (5, 1)
    assert "1 of 6 rows failed" in err
    [failure] = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert failure["row"] == 2
    assert "1.png has changed" in failure["error"]
    good, found = outputs(tmp_path / "good"), outputs(tmp_path / "out")
    assert found.keys() == good.keys() - {"1.png"} | {"failures.jsonl"}
    monkeypatch.undo()
    write_rows(tmp_path, 6, 48)
    assert batch("rows.jsonl") == 0
    assert outputs(tmp_path / "out").keys() == good.keys()
    assert outputs(tmp_path / "out")["1.png"] == good["1.png"]


def test_a_batch_that_fails_is_painted_one_by_one(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    write_rows(tmp_path, 3, 48)
    monkeypatch.setattr(minpaint.batch.run, "paint_together", refuse)
    assert batch("rows.jsonl", "--json") == 0
    assert report(capsys)["painted"] == 3


def test_shards_together_are_the_single_run(batch: Batch, tmp_path: Path) -> None:
    write_rows(tmp_path, 10, 48)
    assert batch("rows.jsonl") == 0
    single, seen = outputs(tmp_path / "out"), 0
    for shard in ("1/3", "3/3", "2/3"):
        assert batch("rows.jsonl", "-o", str(tmp_path / "parts"), "--shard", shard) == 0
        assert len(outputs(tmp_path / "parts")) > seen
        seen = len(outputs(tmp_path / "parts"))
    assert outputs(tmp_path / "parts") == single


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """tests/batch_kills.py by itself does more of them."""
    torch.set_num_threads(1)
    done = subprocess.run(
        [sys.executable, "-m", "tests.batch_kills", "6"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "killed: 6" in done.stdout


@pytest.mark.slow
def test_memory_stays_flat_over_many_rows(tmp_path: Path) -> None:
    """tests/batch_memory.py does 1,000 rows."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.batch_memory", "60"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
