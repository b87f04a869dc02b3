"""python -m minpaint: what it writes, what it says, and how it ends."""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import largest_level_difference, make_mask, make_picture
from PIL import Image, PngImagePlugin

from minpaint.cli.main import main
from minpaint.cli.options import OPTIONS, SUFFIXES, parse
from minpaint.errors import InputError, MinpaintWarning
from minpaint.picture.saving import FORMATS
from minpaint.settings import Settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a good run in tmp_path, with more put behind them."""
    make_picture(50, 37).save(tmp_path / "photo.png")
    make_mask(50, 37).save(tmp_path / "mask.png")

    def build(*more: str) -> list[str]:
        good = ["--image", "photo.png", "--mask", "mask.png", "--prompt", "a dog", "-o", "out.png", "--steps", "2"]
        files = [str(tmp_path / word) if word.endswith(".png") else word for word in good]
        return ["paint", *files, "--model", str(checkpoint("small-sd1")), "--device", "cpu", *more]

    return build


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_paint_writes_the_picture_and_keeps_stdout_clean(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "out.png (seed 0, 2 network calls)" in err
    with Image.open(tmp_path / "out.png") as image:
        assert (image.size, image.mode, image.format) == ((50, 37), "RGB", "PNG")
    assert files(tmp_path) == {"photo.png", "mask.png", "out.png"}
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_is_one_object_on_stdout(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--json", "--quiet", "--count", "2", "--seed", "3")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert [output["seed"] for output in report["outputs"]] == [3, 4]
    assert [Path(output["path"]).name for output in report["outputs"]] == ["out-3.png", "out-4.png"]
    assert (report["sampler"], report["steps"], report["steps_run"]) == ("ddim", 2, 2)
    for output in report["outputs"]:
        assert output["receipt"]["changed"] == 0
        assert output["receipt"]["outside"] > 0
        assert output["receipt"]["lossless"] is True
        assert output["seam"] >= 0
    assert {"out-3.png", "out-4.png"} < files(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("tiff", "TIFF"), ("PNG", "PNG")])
def test_the_suffix_chooses_the_format(
    command: Callable[..., list[str]], tmp_path: Path, suffix: str, kind: str
) -> None:
    assert main(command("-o", str(tmp_path / f"x.{suffix}"))) == 0
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.format == kind


def test_existing_output_is_kept_unless_told_otherwise(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.png").write_bytes(b"precious")
    assert main(command()) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.png").read_bytes() == b"precious"
    assert main(command("--overwrite")) == 0
    assert (tmp_path / "out.png").read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--mask", "nowhere.png"], "nowhere.png"),
        (["-o", "nowhere/out.png"], "nowhere"),
        (["-o", "out.xyz"], "out.xyz"),
        (["-o", "out"], "unknown kind"),
        (["-o", "/proc/out.png"], "/proc"),
        (["--steps", "0"], "steps"),
        (["--steps", "x"], "--steps"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "inf"], "guidance"),
        (["--strength", "0"], "strength"),
        (["--strength", "1.5"], "strength"),
        (["--eta", "-1"], "eta"),
        (["--count", "0"], "count"),
        (["--seed", "-1"], "seed"),
        (["--sampler", "euler"], "--sampler"),
        (["--device", "gpu"], "gpu"),
        (["--dtype", "fp8"], "--dtype"),
        (["--budget", "much"], "much"),
        (["--budget", "-1GiB"], "dash is written --budget=-"),
        (["--budget=-1GiB"], "budget '-1GiB' is not a size"),
        (["--steps", "9" * 9000], "--steps"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "./missing.safetensors"], "missing.safetensors"),
        (["--config", "nowhere"], "config"),
        (["--profile", "x"], "--profile"),
        (["--fill", "x"], "--fill"),
        (["--grow", "-1"], "grow"),
        (["--feather", "x"], "--feather"),
        (["--context", "near"], "context"),
        (["--expand", "up=3"], "expand"),
        (["--explain-mask", "nowhere/x.png"], "nowhere"),
        (["--like", "nowhere.png"], "nowhere.png"),
        (["--profile", "diffusers", "--soft"], "soft"),
        (["-o", "-", "--count", "2"], "stdout"),
        (["-o", "-", "--json"], "--json"),
        (["--image", "-", "--mask", "-"], "stdin"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_exit_code_2(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    culprit: str,
) -> None:
    before = files(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(command("--quiet", *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minpaint: error: ")
    assert err.count("\n") == 1
    assert len(err) < 600
    assert culprit in err
    assert files(tmp_path) == before


def test_a_budget_that_cannot_hold_is_exit_code_3(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--quiet", "--budget", "100kB")) == 3
    assert capsys.readouterr().err.startswith("minpaint: error: budget")
    assert "out.png" not in files(tmp_path)


def test_a_fault_while_writing_is_exit_code_1_and_leaves_nothing(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Image.Image.save

    def full_disk(self: Image.Image, file: object, *rest: object, **options: object) -> None:
        if not isinstance(file, io.BytesIO):
            raise OSError(28, "No space left on device")
        save(self, file, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", full_disk)
    before = files(tmp_path)
    assert main(command("--quiet")) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left" in err
    assert "out.png" in err
    assert "the painting is lost" in err  # the temporary folder is as full
    assert files(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_no_file(
    command: Callable[..., list[str]], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = command("--steps", "1000", "--sampler", "dpmpp", "--count", "1")
    arguments[arguments.index("1000")] = "900"
    before = files(tmp_path)
    run = subprocess.Popen([sys.executable, "-m", "minpaint", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    for line in run.stderr:  # it says which device it is on just before the first step
        if "on cpu" in line:
            break
    time.sleep(0.5)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert err.strip().splitlines()[-1].startswith("minpaint: error: stopped")
    assert "Traceback" not in err
    assert files(tmp_path) == before


def test_the_default_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_picture().save(tmp_path / "a.png")
    make_mask().save(tmp_path / "m.png")
    paths = {"--image": "a.png", "--mask": "m.png", "-o": "o.png"}
    words = [word for option, name in paths.items() for word in (option, str(tmp_path / name))]
    main(["paint", "--prompt", "x", *words])
    assert "using tiny" in capsys.readouterr().err


def test_help_is_quick() -> None:
    """Not a timed test: help may import nothing heavy, which test_architecture checks for all."""
    code = (
        "import sys; from minpaint.cli.main import main\n"
        "try: main(['paint', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--negative-prompt" in run.stdout


def test_readme_holds_the_table_of_options() -> None:
    """Run this file to write it there: python tests/test_command_line.py"""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_options(readme) == readme


def with_options(readme: str) -> str:
    """README's text with the table of the options of `paint` as it should be."""
    lines, heading = ["| option | |", "| --- | --- |"], ""
    for group, words, text, given in OPTIONS:
        if group != heading:
            heading = group
            lines.append(f"| **{heading}** | |")
        names = words.split()
        value = given.get("metavar") or "\\|".join(given.get("choices", ())) or names[-1].strip("-").upper()
        if given.get("action") is argparse.BooleanOptionalAction:
            names.append(f"--no-{names[0][2:]}")
        takes = "action" not in given or "metavar" in given
        lines.append(f"| `{', '.join(names)}{f' {value}' if takes else ''}` | {text} |")
    start, end = "<!-- options -->\n", "\n<!-- /options -->\n"
    before, after = readme.split(start)[0], readme.split(end)[1]
    return before + start + "\n".join(lines) + end + after


def test_the_options_given_nothing_are_the_defaults_of_settings(command: Callable[..., list[str]]) -> None:
    assert parse(without(command(), "--steps")).settings == Settings("a dog")


def test_bad_usage_is_told_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from minpaint.cli.main import main\n"
        "assert main(['paint', '--image', 'a.png', '--prompt', 'x', '-o', 'o.png', '--steps', '0']) == 2\n"
        "assert not {'torch', 'PIL', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("minpaint: error: steps")


def test_the_suffixes_named_are_those_that_can_be_written() -> None:
    assert tuple(FORMATS) == SUFFIXES


def test_the_number_format_has_one_name(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--json", "--dtype", "fp32")) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "fp32"
    assert main(["info", str(tmp_path / "out.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "fp32"


@pytest.mark.slow
def test_an_installed_command_line_runs_as_a_module_from_any_folder(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "minpaint", *command()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert "\r" not in run.stderr  # no progress bar where nobody watches


# Holes without a mask, records, streams ----------------------------------------------------------


def without(arguments: list[str], option: str) -> list[str]:
    at = arguments.index(option)
    return arguments[:at] + arguments[at + 2 :]


def test_the_receipt_is_printed(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command()) == 0
    assert "receipt: changed pixels outside: 0 of" in capsys.readouterr().err


def test_a_lossy_receipt_says_so(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("-o", str(tmp_path / "x.jpg"), "--json")) == 0
    out, err = capsys.readouterr()
    assert "JPEG is lossy" in err
    assert json.loads(out)["outputs"][0]["receipt"]["lossless"] is False


def test_a_file_that_does_not_keep_what_it_should_is_never_left_behind(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Image.Image.save

    def faulty(self: Image.Image, *rest: object, **options: object) -> None:
        if self.size == (50, 37):
            self.putpixel((0, 36), (1, 2, 3))
        save(self, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", faulty)
    before = files(tmp_path)
    assert main(command("--quiet")) == 1
    err = capsys.readouterr().err
    assert "changed pixels outside: 1 of" in err
    [rescued] = files(tmp_path) - before
    assert re.fullmatch(r"out-rescued-[0-9a-f]{8}\.png", rescued)
    assert err.endswith(f"the painting is in {tmp_path / rescued}\n")


def test_without_a_mask_the_transparent_part_is_painted(command: Callable[..., list[str]], tmp_path: Path) -> None:
    picture = make_picture(50, 37).convert("RGBA")
    picture.putalpha(make_mask(50, 37).point(lambda level: 255 - level))
    picture.save(tmp_path / "photo.png")
    assert main(without(command(), "--mask")) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "RGBA"
        assert image.getchannel("A").getextrema() == (255, 255)


def test_without_a_mask_or_transparency_it_asks_for_one(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(without(command(), "--mask")) == 2
    assert "--mask" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--image", "--prompt", "-o"])
def test_what_is_needed_is_asked_for(
    command: Callable[..., list[str]], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(without(command(), option)) == 2
    assert option in capsys.readouterr().err


def test_expand_paints_new_sides(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main([*without(command(), "--mask"), "--expand", "left=8,bottom=3"]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (58, 40)


def test_explain_mask_draws_the_stages(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(command("--explain-mask", str(tmp_path / "why.png"), "--grow", "2", "--feather", "3")) == 0
    with Image.open(tmp_path / "why.png") as image:
        assert image.width > 7 * 96
    assert main(command("--explain-mask", str(tmp_path / "why.png"), "-o", str(tmp_path / "b.png"))) == 2
    assert main(command("--explain-mask", str(tmp_path / "c.png"), "-o", str(tmp_path / "c.png"))) == 2
    assert files(tmp_path) == {"photo.png", "mask.png", "out.png", "why.png"}


def test_best_writes_the_painting_with_the_smallest_seam(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--count", "3", "--json", "--no-color-match")) == 0
    every = json.loads(capsys.readouterr().out)["outputs"]
    assert main(command("--count", "3", "--json", "--no-color-match", "--best")) == 0
    [best] = json.loads(capsys.readouterr().out)["outputs"]
    assert Path(best["path"]).name == "out.png"
    assert best["seam"] == min(output["seam"] for output in every)
    [same] = [output for output in every if output["seed"] == best["seed"]]
    with Image.open(same["path"]) as a, Image.open(best["path"]) as b:
        assert a.tobytes() == b.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_info_tells_and_like_repeats(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    first, again = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    options = ["--seed", "5", "--feather", "2", "--no-color-match", "--context", "whole", "--strength", "0.9"]
    assert main(command("-o", str(first), *options)) == 0
    capsys.readouterr()
    assert main(["info", str(first), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["prompt"], record["seed"], record["steps"], record["feather"]) == ("a dog", 5, 2, 2)
    assert len(record["model_sha256"]) == len(record["image_sha256"]) == len(record["mask_sha256"]) == 64
    assert main(["info", str(first)]) == 0
    assert "prompt: a dog" in capsys.readouterr().out
    assert main(["paint", "--like", str(first), "-o", str(again)]) == 0
    assert "not what it was" not in capsys.readouterr().err
    assert first.read_bytes() == again.read_bytes()
    changed = tmp_path / f"c.{suffix}"
    assert main(["paint", "--like", str(first), "-o", str(changed), "--seed", "6", "--color-match"]) == 0
    assert first.read_bytes() != changed.read_bytes()
    capsys.readouterr()
    main(["info", str(changed), "--json"])
    record_again = json.loads(capsys.readouterr().out)
    assert record_again == record | {"seed": 6, "color_match": True}


def test_like_says_what_has_changed_since(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    make_picture(50, 37, seed=8).save(tmp_path / "photo.png")
    capsys.readouterr()
    assert main(["paint", "--like", str(tmp_path / "out.png"), "-o", str(tmp_path / "b.png")]) == 0
    assert "photo.png is not what it was" in capsys.readouterr().err


def test_a_record_cannot_say_where_to_write(command: Callable[..., list[str]], tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    record = {"minpaint": "x", "output": str(tmp_path / "evil.png"), "overwrite": True, "explain_mask": "evil.png"}
    info.add_text("minpaint", json.dumps(record))
    make_picture(9, 9).save(tmp_path / "like.png", pnginfo=info)
    (tmp_path / "out.png").write_bytes(b"precious")
    before = files(tmp_path)
    assert main(command("--like", str(tmp_path / "like.png"))) == 2
    assert files(tmp_path) == before


def test_info_on_a_picture_of_someone_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_picture().save(tmp_path / "a.png")
    assert main(["info", str(tmp_path / "a.png")]) == 2
    assert "a.png holds no record" in capsys.readouterr().err


def test_no_record_leaves_none(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(command("--no-record")) == 0
    assert main(["info", str(tmp_path / "out.png")]) == 2


def test_a_pipe_in_and_out(command: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = command("-o", "-", "--image", "-")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "minpaint", *arguments],
        input=(tmp_path / "photo.png").read_bytes(),
        capture_output=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    with Image.open(io.BytesIO(run.stdout)) as image:
        assert image.size == (50, 37)
    assert main(command()) == 0
    with Image.open(tmp_path / "out.png") as image, Image.open(io.BytesIO(run.stdout)) as piped:
        assert largest_level_difference(image, piped) <= 1  # the other process may use more threads


def test_the_steps_really_run_are_said(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--steps", "10", "--strength", "0.3", "--fill", "blur", "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["steps_run"] == 3
    assert "3 network calls" in err


# What is refused, and what is not lost --------------------------------------------------------------


def test_every_painting_that_cannot_be_written_is_left_somewhere(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Image.Image.save

    def faulty(self: Image.Image, file: object, kind: str, **options: object) -> None:
        if kind == "TIFF" and not isinstance(file, io.BytesIO):
            raise OSError("no more of those")
        save(self, file, kind, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", faulty)
    before = files(tmp_path)
    assert main(command("--quiet", "--count", "2", "-o", str(tmp_path / "x.tif"))) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    left = files(tmp_path) - before
    assert len(left) == 2
    assert all(str(tmp_path / name) in err and name.endswith(".png") for name in left)


def test_what_a_format_cannot_hold_is_said_before_painting(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)
    long = ["--prompt", "a dog " * 11_000]
    assert main(command("--quiet", "-o", str(tmp_path / "x.jpg"), *long, "--model", "no-such-model")) == 2
    assert "x.jpg: JPEG cannot hold" in capsys.readouterr().err  # it did not come as far as the model
    assert files(tmp_path) == before


@pytest.mark.parametrize("link", [None, os.link, os.symlink], ids=["the file", "hard link", "symbolic link"])
@pytest.mark.parametrize("name", ["photo.png", "mask.png", "out.png"])
def test_an_explanation_never_replaces_an_input_or_a_painting(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, link: object
) -> None:
    (tmp_path / "out.png").write_bytes(b"old")
    why = tmp_path / name
    if callable(link):
        why = tmp_path / "why.png"
        link(tmp_path / name, why)
    before = (tmp_path / name).read_bytes()
    assert main(command("--overwrite", "--explain-mask", str(why))) == 2
    assert ("out.png" if name == "out.png" else why.name) in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before


def test_a_painting_may_replace_its_image_but_not_its_mask(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    before, white = photo.read_bytes(), mask.read_bytes()
    assert main(command("-o", str(mask), "--overwrite")) == 2
    assert mask.read_bytes() == white
    assert main(command("-o", str(photo))) == 2
    assert main(command("-o", str(photo), "--overwrite")) == 0
    assert photo.read_bytes() != before
    capsys.readouterr()
    assert main(["info", str(photo), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_sha256"] == hashlib.sha256(before).hexdigest()


def test_paintings_of_several_seeds_never_go_to_one_file(command: Callable[..., list[str]], tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"out-{seed}.png").symlink_to("same.png")
    assert main(command("--count", "2")) == 2
    assert "same.png" not in files(tmp_path)


def test_the_record_tells_the_bytes_that_were_read(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, pipe = (tmp_path / "photo.png").read_bytes(), tmp_path / "pipe.png"
    os.mkfifo(pipe)  # which can be read only once
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert main(command("--image", str(pipe))) == 0
    writer.join()
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_sha256"] == hashlib.sha256(content).hexdigest()


LONG = "x" * 300 + ".png"


@pytest.mark.parametrize("option", ["--image", "--mask", "--like", "-o", "--explain-mask", "--config", "--model"])
def test_a_name_that_is_too_long_is_bad_input(
    command: Callable[..., list[str]], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--quiet", option, LONG)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "x" * 50 in err


def test_a_long_name_that_a_folder_takes_is_written(command: Callable[..., list[str]], tmp_path: Path) -> None:
    name = "x" * 250 + ".png"
    assert main(command("-o", str(tmp_path / name))) == 0
    assert name in files(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "closed"),
    [
        (["-o", "-"], "stdout"),
        (["--json"], "stdout"),
        (["--image", "-"], "stdin"),
        (["--like", "-"], "stdin"),
        (["plan"], "stdout"),
        (["info", "x.png"], "stdout"),
    ],
    ids=" ".join,
)
def test_a_closed_stream_is_said(
    command: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    closed: str,
) -> None:
    monkeypatch.setattr(sys, closed, None)
    assert main(command("--quiet", *arguments) if arguments[0].startswith("-") else arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{closed} is closed" in err


def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name can hold any bytes, and Python keeps those that are no UTF-8 as lone surrogates."""
    text = PngImagePlugin.PngInfo()
    text.add_text("minpaint", json.dumps({"minpaint": "0", "image": "photo\udcff.png"}))
    make_picture().save(tmp_path / "x.png", pnginfo=text)
    assert main(["info", str(tmp_path / "x.png")]) == 0
    assert "image: photo\\udcff.png" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_written_to_a_file_in_place_of_a_closed_stream(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A file that is opened while stderr is closed would have its number, and get what is meant for it."""
    words = ["sh", "-c", 'exec "$@" 2>&- <&-', "-", sys.executable, "-m", "minpaint", *command("--json")]
    run = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0
    assert json.loads(run.stdout)["outputs"][0]["receipt"]["changed"] == 0
    with Image.open(tmp_path / "out.png") as image:
        image.load()


def test_a_full_stdout_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no device that is always full")
    make_picture().save(tmp_path / "out.png", pnginfo=_record())
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info", str(tmp_path / "out.png")]) == 1
    assert capsys.readouterr().err == "minpaint: error: stdout: [Errno 28] No space left on device\n"


def _record() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("minpaint", '{"minpaint": "0"}')
    return text


def test_what_a_library_prints_about_a_damaged_file_is_not_shown(
    command: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_picture(50, 37).save(tmp_path / "a.tif", compression="tiff_lzw")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[1000:1100] = bytes(100)
    (tmp_path / "a.tif").write_bytes(content)
    for arguments in (command("--quiet", "--image", str(tmp_path / "a.tif")), ["info", str(tmp_path / "a.tif")]):
        assert main(arguments) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert "a.tif: cannot be read, or is damaged" in err


def test_a_stdout_that_closes_does_not_cost_the_painting(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(command("-o", "-", "--quiet")) == 1
    err = capsys.readouterr().err
    assert err.startswith("minpaint: error: output -: [Errno 32] Broken pipe; the painting is in ")
    with Image.open(err.split("the painting is in ")[1].strip()) as image:
        assert image.size == (50, 37)


@pytest.mark.parametrize("name", [1, [], "a\0b"], ids=repr)
@pytest.mark.parametrize("option", ["image", "mask", "model", "config", "dtype"])
def test_a_damaged_record_is_bad_input(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: object,
) -> None:
    """A number as a name would be taken for that of an open file, and closed."""
    paths = {key: str(tmp_path / f"{key}.png") for key in ("image", "mask")}
    text = PngImagePlugin.PngInfo()
    text.add_text("minpaint", json.dumps({"minpaint": "0", "prompt": "a dog", "steps": 1} | paths | {option: name}))
    make_picture().save(tmp_path / "old.png", pnginfo=text)
    make_picture().save(paths["image"])
    make_mask().save(paths["mask"])
    assert main(["paint", "--like", str(tmp_path / "old.png"), "-o", str(tmp_path / "out.png"), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    os.fstat(1)


@pytest.mark.slow
def test_nothing_depends_on_the_clock(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command()) == 0
    before, times = (tmp_path / "out.png").read_bytes(), itertools.cycle((-1e9, 0.0, 1e11, 1e9))
    monkeypatch.setattr(time, "time", lambda: next(times))
    assert main(command("--overwrite")) == 0
    assert (tmp_path / "out.png").read_bytes() == before


def test_a_long_message_keeps_its_ends() -> None:
    message = str(InputError(f"no such key\n{'x' * 10_000}: take another"))
    assert message.startswith("no such key xxx")
    assert message.endswith("xxx: take another")
    assert len(message) < 520
    assert str(MinpaintWarning(message * 5)).count(" ... ") == 1


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_options(path.read_text(encoding="utf-8")), encoding="utf-8")
