"""Bad luck: killed, stopped, a full disk, a folder that turns read-only, two at once, a clock that jumps."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_luck import ENVIRONMENT, strikes
from conftest import make_mask, make_picture
from PIL import Image

from minpaint.cli.main import main
from minpaint.picture.frame import open_frame
from minpaint.picture.saving import UNFINISHED, save
from minpaint.settings import Settings


@pytest.mark.slow
def test_a_run_that_is_killed_or_stopped_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    told = list(strikes(tmp_path, {signal.SIGKILL: 4, signal.SIGTERM: 2, signal.SIGINT: 2}, seed=0))
    assert len(told) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed while it saves, which takes a fork")
def test_a_process_killed_while_it_saves_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    frame, target, rng = (
        open_frame(make_picture(256, 256), make_mask(256, 256), Settings("")),
        tmp_path / "x.png",
        random.Random(0),
    )
    started = time.perf_counter()
    save(frame.original, frame, None, target)
    seconds, new, ends = time.perf_counter() - started, target.read_bytes(), set()
    for _ in range(20):
        target.write_bytes(b"old")
        child = os.fork()
        if child == 0:
            save(frame.original, frame, None, target)
            os._exit(0)
        time.sleep(1.2 * seconds * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = target.read_bytes()
        assert content in (b"old", new)
        ends.add((content == new, any(path.name.endswith(UNFINISHED) for path in tmp_path.iterdir())))
    assert (False, True) in ends  # there was something to be cleared
    save(frame.original, frame, None, target)
    assert list(tmp_path.iterdir()) == [target]


def command(folder: Path, output: str, *more: str) -> list[str]:
    """Paint a picture that lies in a folder, with the tiny model."""
    make_picture(256, 256).save(folder / "photo.png")
    make_mask(256, 256).save(folder / "mask.png")
    files = ["--image", str(folder / "photo.png"), "--mask", str(folder / "mask.png"), "-o", output]
    return [sys.executable, "-m", "minpaint", "paint", *files, "--prompt", "a tree", "--steps", "2", *more]


def rescued(said: str) -> Path:
    """The file that the error line names."""
    [line] = [line for line in said.splitlines() if line.startswith("minpaint: error: ")]
    return Path(line.split("the painting is in ")[1])


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_is_full_or_turns_read_only_does_not_cost_the_painting(trouble: str, tmp_path: Path) -> None:
    small, spare = tmp_path / "small", tmp_path / "spare"
    small.mkdir()
    spare.mkdir()
    words = command(tmp_path, str(small / "out.png"), "--steps", "30" if trouble == "read-only" else "2")
    size = "20k" if trouble == "full" else "10m"
    mount = f"mount -t tmpfs -o size={size} none {small}"
    namespace = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    script = f"""{mount} && {{ "$@" 2>{tmp_path}/said & run=$!
        until grep -q 'on cpu' {tmp_path}/said; do sleep 0.05; done
        [ {trouble} = full ] || mount -o remount,ro {small}
        wait $run; echo $?; ls -A {small}; }}"""
    environment = ENVIRONMENT | {"TMPDIR": str(spare)}
    run = subprocess.run([*namespace, script, "-", *words], capture_output=True, text=True, env=environment)
    said = (tmp_path / "said").read_text()
    assert run.stdout.split() == ["1"], (run, said)
    assert ("No space left" if trouble == "full" else "Read-only file system") in said
    assert str(small / "out.png") in said.splitlines()[-1]
    assert rescued(said).parent == spare
    with Image.open(rescued(said)) as image:
        assert image.size == (256, 256)
    assert [path for path in spare.iterdir() if path.is_file()] == [rescued(said)]


@pytest.mark.slow
def test_two_runs_that_write_the_same_file_both_keep_their_paintings(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            command(tmp_path, str(tmp_path / "out.png"), "--seed", seed),
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    said = [run.communicate()[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 1], said
    loser = rescued(said[codes.index(1)])
    with Image.open(tmp_path / "out.png") as first, Image.open(loser) as second:
        first.load()
        assert first.size == second.size
        assert first.tobytes() != second.tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "mask.png", "out.png", loser.name}


def test_a_signal_handler_of_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    frame = open_frame(make_picture(), make_mask(), Settings(""))
    save(frame.original, frame, {"minpaint": "0"}, tmp_path / "x.png")
    assert main(["info", str(tmp_path / "x.png")]) == 0
    assert main(["info", "nowhere.png"]) == 2
    assert main(["plan", "--size"]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
