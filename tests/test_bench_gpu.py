"""The command for a borrowed GPU, on the CPU: it keeps what it has measured, and ends in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(results: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    environment = os.environ | {"MINPAINT_RESULTS": str(results)}
    command = [sys.executable, "-m", "bench.gpu", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in results.glob("gpu-*.json")]
    return done, found[0] if found else {}


@pytest.mark.slow
def test_the_parts_run_and_are_kept_in_one_file(tmp_path: Path) -> None:
    small = ("--device", "cpu", "--family", "small-sd1")
    done, found = run(tmp_path, *small, "--parts", "tests,agreement", "--minutes", "4")
    assert done.returncode in (0, 1), done.stderr  # pytest says 5 where all tests are skipped
    assert found["parts"]["agreement"]["ended"] == "done", found["parts"]["agreement"]["printed"]
    [rows] = [measured["rows"] for measured in found["parts"]["agreement"]["measured"]]
    assert len(rows) == 4
    assert all(row["differ by"] < 1e-4 for row in rows)
    assert {"torch", "machine", "card", "date"} <= set(found)


def test_without_time_the_parts_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--device", "cpu", "--minutes", "0")
    assert done.returncode == 1
    assert {part["ended"] for part in found["parts"].values()} == {"left out: no time was left"}


def test_an_absent_gpu_is_one_line(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--device", "cuda:9")
    assert (done.returncode, found) == (2, {})
    assert done.stderr.count("\n") == 1
    assert "sees no such device" in done.stderr
