"""The exercises of READING.md: right answers pass, and a plausible wrong one of each is told from them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import answers
import pytest
import torch

from minpaint.samplers import ddim
from minpaint.study.exercises.__main__ import NUMBERED, main
from minpaint.study.exercises.lab import Exercise, Lab

ROOT = Path(__file__).parent.parent
ANSWERS = ROOT / "tests" / "answers.py"
EVERY = pytest.mark.parametrize("exercise", [pytest.param(each, id=each.name) for each in NUMBERED.values()])


def first_order(model: Any, x: Any, schedule: Any) -> Any:
    for t, t_next in zip(schedule.timesteps, schedule.timesteps[1:], strict=False):
        eps = model(x, t)
        x = answers.add_noise(answers.picture_in_noise(x, eps, schedule.level(t)), eps, schedule.level(t_next))
    return x


def another_seed(painter: Any, picture: Any, mask: Any, first: str, second: str, steps: int) -> Any:
    return painter(picture, mask, second, steps=steps, sampler="dpmpp", seed=5)[0].image


WRONG: dict[str, Callable[..., Any]] = {
    "add_noise": lambda x0, noise, level: level * x0 + (1 - level) * noise,
    "first_below": lambda levels, ratio: answers.first_below(levels, ratio) - 1,
    "picture_in_noise": lambda x, eps, level: x - math.sqrt(1 - level) * eps,
    "my_ddim": first_order,  # stops at the last timestep, and so with noise
    "second_order": first_order,
    "sdedit": lambda model, x0, noise, schedule: answers.my_ddim(model, noise, schedule),
    "invert": lambda model, x0, schedule: torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)),
    "negative_prompt": lambda unet, x, t, prompt, negative, w: answers.negative_prompt(unet, x, t, negative, prompt, w),
    "guide_by_loss": lambda eps, *rest: 2 * eps - answers.guide_by_loss(eps, *rest),  # uphill
    "anagram": lambda a, b, x, t, view: (a(x, t) + b(view(x), t)) / 2,
    "shapes": lambda channels, y, x: [(width, y >> level, x >> level) for level, width in enumerate(channels)],
    "find_broken_layer": lambda right, *rest: "conv_in",
    "attention": lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
    "word_map": lambda q, k, token, size: (q @ k.transpose(-1, -2)).softmax(-2)[0, :, :, token].mean(0).view(size),
    "swap_word": another_seed,
    "draw_latents": lambda mean, logvar, noise, scaling: scaling * (mean + torch.exp(logvar) * noise),
    "colours_of_latents": lambda latents, colours: torch.zeros(5, 3),
    "unet_input": lambda x, cells, latents: torch.cat([x, latents.expand_as(x), cells.expand(len(x), 1, -1, -1)], 1),
    "put_back": lambda x, picture, noise, cells, level: torch.where(cells > 0, x, picture),
    "find_fault_of_mask": lambda part: "right",
    "bytes_of_scores": lambda width, height, heads, rows: 4 * rows * heads * (width // 8) * (height // 8),
    "sliced_attention": lambda q, k, v, rows: answers.attention(q, k, v),
    "winograd": lambda d, g: [sum((d[i + j] * g[j] for j in range(3)), 0.0) for i in range(2)],
    "once": lambda function: function,
}


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab()


@EVERY
def test_the_right_answer_is_right(exercise: Exercise, lab: Lab) -> None:
    result = exercise.check(lab, getattr(answers, exercise.name))
    print(result)
    assert result.right


@EVERY
def test_a_wrong_answer_is_wrong(exercise: Exercise, lab: Lab) -> None:
    result = exercise.check(lab, WRONG[exercise.name])
    print(result)
    assert not result.right


@EVERY
def test_what_is_no_answer_at_all_is_wrong(exercise: Exercise, tmp_path: Path) -> None:
    """It raises nothing but says so in one line."""
    (tmp_path / "mine.py").write_text(f"def {exercise.name}(*_):\n    return None\n")
    number = next(number for number, each in NUMBERED.items() if each is exercise)
    assert main([str(number), str(tmp_path / "mine.py")]) == 1


def test_every_exercise_says_what_it_takes_and_stands_in_the_text() -> None:
    text = (ROOT / "READING.md").read_text(encoding="utf-8")
    for number, each in NUMBERED.items():
        assert each.task.startswith(f"{each.name}(")
        assert f"**{number}. `{each.name}`**" in text
    chapters = {each.chapter for each in NUMBERED.values()}
    assert len(chapters) == 9
    assert {len([each for each in NUMBERED.values() if each.chapter == chapter]) for chapter in chapters} <= {2, 3, 4}


def test_the_command_says_right_and_wrong_and_what_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(each.name in listed for each in NUMBERED.values())
    assert main(["1"]) == 2
    assert "Write add_noise into answers.py" in capsys.readouterr().out
    Path("answers.py").write_text(ANSWERS.read_text())
    assert main(["1"]) == 0
    assert capsys.readouterr().out.startswith("right: relative error ")
    Path("mine.py").write_text("def add_noise(x0, noise, alpha_bar):\n    return x0\n")
    assert main(["1", "mine.py"]) == 1
    assert capsys.readouterr().out.startswith("wrong: relative error ")
    Path("mine.py").write_text("def add_noise(x0, noise, alpha_bar):\n    return x1\n")
    assert main(["1", "mine.py"]) == 1
    assert capsys.readouterr().out == "wrong: add_noise fails (NameError: name 'x1' is not defined)\n"
    Path("mine.py").write_text("def add_noise(\n")
    assert main(["1", "mine.py"]) == 1
    assert capsys.readouterr().out.startswith("wrong: mine.py cannot be run (SyntaxError: ")
    assert main(["99"]) == 2
    assert "use a number from 1 to" in capsys.readouterr().err


def test_it_runs_as_the_text_says() -> None:
    done = subprocess.run([sys.executable, "-m", "minpaint.study.exercises", "13", str(ANSWERS)], cwd=ROOT, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert done.stdout.startswith("right: ")


def test_ddim_of_the_answers_is_the_programs(lab: Lab) -> None:
    """So that the text's claim of ten lines is one about this sampler."""
    model, schedule = lab.model("a boat"), lab.schedule(7)
    with torch.inference_mode():
        *_, last = ddim(model, lab.noise(), schedule)
        assert torch.allclose(answers.my_ddim(model, lab.noise(), schedule), last.x, atol=1e-5)
