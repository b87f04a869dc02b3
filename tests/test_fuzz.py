"""The first cases of `fuzz_checkpoints`, which says what they are; the long run is by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_checkpoints import run_cases


@pytest.mark.parametrize(("kind", "count"), [("headers", 120), ("files", 25), ("records", 120)])
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(kind: str, count: int, tmp_path: Path) -> None:
    report = run_cases(kind, range(count), tmp_path)
    assert report.finds == []
    assert report.count == count
    assert report.sound > count / 20  # most of the mutations must not end at the first check
    assert len(report.messages) > 5
