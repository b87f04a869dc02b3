"""`batch --ray`: the rows on a local cluster of two workers, of which one is killed in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from batch_kills import outputs, write_rows

from minpaint.cli.main import main

ROOT = Path(__file__).parent.parent


def workers(ancestor: int) -> list[int]:
    """Processes in which Ray's actors run, among the descendants of a process."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ray::MapWorker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue

    def descends(process: int) -> bool:
        return process == ancestor or (process in parents and descends(parents[process]))

    return [process for process in found if descends(process)]


def command(folder: Path, *more: str) -> list[str]:
    return ["batch", str(folder / "rows.jsonl"), "--steps", "3", *more]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason='Ray is not installed: pip install -c constraints.txt ".[ray]"')
def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path, 32, 64)
    assert main(command(tmp_path, "-o", str(tmp_path / "here"))) == 0
    words = [sys.executable, "-m", "minpaint", *command(tmp_path, "-o", str(tmp_path / "out"), "--ray", "--json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        deadline, killed = time.monotonic() + 240, 0
        while run.poll() is None and time.monotonic() < deadline and not killed:
            if len(outputs(tmp_path / "out")) >= 4 and len(at_work := workers(run.pid)) == 2:
                os.kill(at_work[0], signal.SIGKILL)
                killed = at_work[0]
            time.sleep(0.02)
        done = len(outputs(tmp_path / "out"))
        out, err = run.communicate(timeout=300)
    assert killed
    assert done < 32, "the kill came too late to be in the middle"
    assert run.returncode == 0, err
    assert outputs(tmp_path / "out") == outputs(tmp_path / "here")
    told = json.loads(out)
    assert (told["painted"], told["failed"]) == (32, 0)
    assert sorted(output["row"] for output in told["outputs"]) == list(range(1, 33))
    again = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(again.stdout)["before"] == 32


def test_without_ray_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, 1, 48)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(command(tmp_path, "-o", str(tmp_path / "out"), "--ray")) == 2
    assert re.search(r"error: --ray needs Ray .*pip install", capsys.readouterr().err)
