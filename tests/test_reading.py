"""READING.md: what its lines print is what it says; `python tests/test_reading.py` writes it anew."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

READING = Path(__file__).parent.parent / "READING.md"
NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def outputs(text: str) -> list[tuple[doctest.Example, str]]:
    """The text's examples in order, and what each prints here; they share their names."""
    names: dict[str, Any] = {}
    found = []
    with torch.set_grad_enabled(True):  # as it is again at the end, whatever the text does
        for example in doctest.DocTestParser().get_examples(re.sub("^```.*", "", text, flags=re.M)):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(example.source, "READING.md", "single"), names)
            found.append((example, printed.getvalue()))
    return found


def refreshed(text: str) -> str:
    """The text with what its examples print here."""
    lines = text.splitlines(keepends=True)
    for example, printed in reversed(outputs(text)):
        first = example.lineno + example.source.count("\n")
        lines[first : first + example.want.count("\n")] = [printed]
    return "".join(lines)


def alike(found: str, told: str) -> bool:
    """The same but for the last digit of each number, which rounding may change from processor to processor."""
    numbers = [[float(each.replace(",", "")) for each in NUMBER.findall(text)] for text in (found, told)]
    if NUMBER.sub("", found).split() != NUMBER.sub("", told).split() or len(numbers[0]) != len(numbers[1]):
        return False
    digits = [len(each.partition(".")[2]) for each in NUMBER.findall(told)]
    pairs = zip(*numbers, digits, strict=True)
    return all(abs(a - b) <= 1.01 * 10.0**-places + 0.02 * abs(b) for a, b, places in pairs)


@pytest.mark.slow
def test_what_the_lines_print_is_what_the_text_says() -> None:
    every = outputs(READING.read_text(encoding="utf-8"))
    assert len(every) > 40
    for example, printed in every:
        assert alike(printed, example.want), example.source


def test_another_output_would_be_seen() -> None:
    assert alike("t 950, 0.4712\n", "t 950, 0.4711\n")
    assert not alike("t 950, 0.4712\n", "t 950, 0.52\n")
    assert not alike("t 950\n", "t 950 0.5\n")
    assert not alike("('a', [1])\n", "('b', [1])\n")


def test_what_the_text_points_to_is_there() -> None:
    text = re.sub("(?ms)^```.*?^```", "", READING.read_text(encoding="utf-8"))  # without its code
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert (READING.parent / path).exists(), path
    for name, module in re.findall(r"`(samplers|inpaint|preview|banded)\.(?!py`)(\w+)`", text):
        source = next(READING.parent.joinpath("minpaint").rglob(f"{name}.py")).read_text(encoding="utf-8")
        assert f"def {module}(" in source


if __name__ == "__main__":
    READING.write_text(refreshed(READING.read_text(encoding="utf-8")), encoding="utf-8")
