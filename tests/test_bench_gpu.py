"""python -m bench.gpu, which waits for a card: what it does without one, and at its deadlines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.common import make_input

ROOT = Path(__file__).parent.parent
HANG = """
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("looking", flush=True)
with open(os.environ["MINPAINT_ROWS"], "w") as rows:
    rows.write(json.dumps({"child": child.pid}) + "\\n" + '{"half')
time.sleep(60)
"""


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--device", "cuda"], ["--device", "tpu"]):
        assert gpu.main([*arguments, "--results", str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is only waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in /proc")
def test_a_part_that_hangs_is_stopped_with_its_children_and_keeps_its_rows(tmp_path: Path) -> None:
    started = time.monotonic()
    part = gpu.run_part(["-c", HANG], 2.0, tmp_path)
    assert time.monotonic() - started < 20
    assert part["ended"] == "stopped after 2 s"
    assert part["printed"] == ["looking"]
    [row] = part["rows"]  # without the one that was half written
    for _ in range(100):
        if not alive(row["child"]):
            break
        time.sleep(0.05)
    assert not alive(row["child"])


def test_a_part_that_fails_says_how(tmp_path: Path) -> None:
    part = gpu.run_part(["-c", "raise SystemExit('no kernel image')"], 60.0, tmp_path)
    assert (part["ended"], part["printed"]) == ("failed with exit code 1", ["no kernel image"])


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--minutes", "0.01", "--results", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {part["ended"] for part in found["parts"].values()} == {"left out, as no time was left"}
    assert list(found["parts"]) == list(gpu.SHARES)
    assert "speed: left out" in capsys.readouterr().out


def test_the_picture_to_measure_with_is_always_the_same() -> None:
    """Rows are compared with one another, which differ if their pictures do."""
    (a, mask), (b, _) = make_input(64), make_input(64)
    assert a.tobytes() == b.tobytes()
    assert a.tobytes() != make_input(72)[0].tobytes()
    assert mask.getextrema() == (0, 255)


@pytest.mark.slow
def test_every_part_runs_without_a_gpu_too(tmp_path: Path) -> None:
    call = ["-m", "bench.gpu", "--device", "cpu", "--family", "small-sd1", "--results", str(tmp_path)]
    subprocess.run([sys.executable, *call], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    parts = found["parts"]
    assert {name: part["ended"] for name, part in parts.items()} == dict.fromkeys(gpu.SHARES, "done")
    assert found["torch"] == torch.__version__
    assert {"card", "cuda", "rocm", "date", "python"} <= found.keys()
    assert all(row["differ by"] < 1e-5 for row in parts["agreement"]["rows"])
    assert len(parts["agreement"]["rows"]) == 6
    assert [row["row"] for row in parts["memory"]["rows"]] == ["no limit", "one painting", "1GiB", "plain"]
    assert not any("error" in row for row in parts["memory"]["rows"])
    assert [row["row"] for row in parts["speed"]["rows"]] == ["encode", "step", "decode", "run"]
    assert {name for row in parts["speed"]["rows"] for name in row["sides"]} == {
        "minpaint",
        "minpaint --fast",
        "diffusers",
    }
    assert len(parts["start"]["rows"]) == 2
    assert any("differ by" in line for line in parts["agreement"]["printed"])
