"""python -m minpaint: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_mask, make_picture
from PIL import Image

from minpaint.__main__ import main

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
    assert {"out-3.png", "out-4.png"} < files(tmp_path)


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
        (["--budget", "-1GiB"], "budget"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "./missing.safetensors"], "missing.safetensors"),
        (["--config", "nowhere"], "config"),
        (["--profile", "x"], "--profile"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_exit_code_2(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], culprit: str
) -> None:
    before = files(tmp_path)
    assert main(command("--quiet", *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minpaint: error: ")
    assert err.count("\n") == 1
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
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    before = files(tmp_path)
    assert main(command("--quiet")) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left" in err
    assert files(tmp_path) == before


def test_a_killed_run_leaves_no_file(command: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = command("--steps", "1000", "--sampler", "dpmpp", "--count", "1")
    arguments[arguments.index("1000")] = "900"
    before = files(tmp_path)
    run = subprocess.Popen([sys.executable, "-m", "minpaint", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    for line in run.stderr:  # it says which device it is on just before the first step
        if "on cpu" in line:
            break
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1
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
        "import sys; from minpaint.__main__ import main\n"
        "try: main(['paint', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--negative-prompt" in run.stdout


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
