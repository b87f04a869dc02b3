"""A seed is a seed: the same picture in any thread, process, batch, budget and file, on any processor."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from conftest import largest_level_difference, make_mask, make_picture, relative_error
from PIL import Image
from torch import Tensor

import minpaint
from minpaint.engine import device
from minpaint.engine.calls import Request
from minpaint.engine.device import THREAD_WORK, threads_for
from minpaint.painter import Painter, open_painter
from minpaint.samplers import Step

Paint = Callable[[str], Painter]
Folders = Callable[[str], Path]
# Kernels that smaller processors get. PyTorch, MKL and oneDNN, which convolves, choose each for themselves.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SSE4 = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}

# One seed, one picture -----------------------------------------------------------------------------


def paint_all(models: Sequence[str], steps: int, samplers: Sequence[str] = ("ddim",)) -> dict[str, Tensor]:
    """What each model paints with each sampler: the latents, and the picture's bytes."""
    seen = {}
    for model in models:
        ours, side = minpaint.load(model, "cpu", "fp32"), 128 if model == "tiny" else 64
        image, mask = make_picture(side, side), make_mask(side, side)
        for sampler in samplers:
            [painting] = ours(image, mask, "a red tower", steps=steps, sampler=sampler, seed=3)
            name = f"{Path(model).name} {sampler}"
            seen[f"{name} latents"] = painting.latents
            seen[f"{name} picture"] = torch.frombuffer(bytearray(painting.image.tobytes()), dtype=torch.uint8)
    return seen


def paint_elsewhere(file: Path, environment: dict[str, str], *arguments: Any) -> dict[str, Tensor]:
    """The same in another process, with variables that the libraries read as they are loaded."""
    code = f"import torch, test_seeds; torch.save(test_seeds.paint_all(*{arguments!r}), {str(file)!r})"
    places = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Tensor] = torch.load(file)
    return seen


def most_levels(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """The largest difference of their pictures."""
    assert ours.keys() == theirs.keys()
    return max(int((ours[k].int() - theirs[k].int()).abs().max()) for k in ours if k.endswith("picture"))


def test_a_smaller_processor_paints_the_same_within_a_level(checkpoint: Folders, tmp_path: Path) -> None:
    arguments = ([str(checkpoint("small-sd1"))], 2)
    assert most_levels(paint_all(*arguments), paint_elsewhere(tmp_path / "seen", AVX2, *arguments)) <= 1


@pytest.mark.slow
def test_every_sampler_paints_the_same_in_another_process_and_on_smaller_processors(
    checkpoint: Folders, tmp_path: Path
) -> None:
    """Measured over 5, 20 and 50 steps: a level in a few numbers of a picture; latents to 1e-5, PNDM's to 5e-5.

    PNDM in 5 steps multiplies what goes into it: noise changed by 1e-7, as by one rounding, changes its latents by
    1.4e-5. So it is held to what is promised of latents, the others to less. Latents are compared as a
    whole: PNDM makes some of 20, beside which one near 0 is not exact.
    """
    arguments = (["tiny", str(checkpoint("small-v"))], 5, ("ddim", "pndm", "dpmpp"))
    here = paint_all(*arguments)
    there = paint_elsewhere(tmp_path / "seen", {}, *arguments)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    for environment in (AVX2, SSE4):
        there = paint_elsewhere(tmp_path / "seen", environment, *arguments)
        assert most_levels(here, there) <= 1
        for name in here:
            if name.endswith("latents"):
                assert relative_error(there[name], here[name]) < (1e-4 if "pndm" in name else 2e-5), name


@pytest.mark.slow
def test_two_threads_paint_the_same_within_a_level(
    painter: Paint, picture: Image.Image, mask: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "THREAD_WORK", 1)  # also where the layers are too small to share
    images = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        images.append(painter("small-sd2")(picture, mask, "a dog", steps=3)[0].image)
    assert largest_level_difference(*images) <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("without_base")
def test_the_trained_model_paints_the_same_within_any_budget_and_in_any_batch() -> None:
    """All loaded, a network at a time, with streamed weights, in bands, a row at a time."""
    image, mask = make_picture(96, 96), make_mask(96, 96)

    def paint(budget: int, seed: int, count: int) -> list[Image.Image]:
        ours = open_painter("tiny", "cpu", "fp32", None, None)
        ours.engine.keeps, ours.engine.budget = True, budget
        if first:
            ours.engine.planners = first[0].engine.planners  # it has measured already
        first.append(ours)
        paintings = ours(image, mask, "a red tower", steps=8, seed=seed, count=count)
        assert ours.last_run is not None
        plans.add(tuple(phase.how for phase in ours.last_run.plan.phases.values()))
        return [painting.image for painting in paintings]

    first: list[Painter] = []
    plans: set[tuple[str, ...]] = set()
    expected = paint(2**50, 5, 3)
    planner = first[0].engine.planner()
    request = Request(96, 96, 3)
    least, most = planner.least(request, 0), planner.choose(request, 2**50, 0).peak
    for share in (0.0, 0.25, 0.5, 0.75):
        for ours, other in zip(paint(least + int(share * (most - least)), 5, 3), expected, strict=True):
            assert largest_level_difference(ours, other) <= 1
    assert len(plans) >= 3, plans
    for seed, other in zip((5, 6, 7), expected, strict=True):
        [ours] = paint(2**50, seed, 1)
        assert largest_level_difference(ours, other) <= 1


@pytest.mark.slow
def test_many_paintings_in_one_process_leave_nothing_behind(tmp_path: Path) -> None:
    """The libraries keep what they made for the first sizes; see soak.py, which goes on for longer."""
    soak.check(soak.soak(40, tmp_path), memory=150, objects=5000)


# One painter, one painting at a time ---------------------------------------------------------------


def test_threads_that_share_a_painter_wait_for_each_other(painter: Paint) -> None:
    """Sizes, prompts and counts differ, so that anything shared by two runs would show."""
    ours = painter("small-sd1")
    requests: list[tuple[int, dict[str, Any]]] = [
        (64, {"steps": 3}),
        (40, {"steps": 3, "seed": 3}),
    ]

    def paint(size: int, options: dict[str, Any]) -> list[bytes]:
        torch.set_num_threads(1)  # each thread of a process begins with its own
        paintings = ours(make_picture(size, size), make_mask(size, size), f"a dog of {size}", **options)
        return [painting.image.tobytes() for painting in paintings]

    alone = [paint(*request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: paint(*request), requests * 3))
    assert together == alone * 3


def test_a_painting_inside_another_is_refused_and_harms_none(
    painter: Paint, picture: Image.Image, mask: Image.Image
) -> None:
    ours = painter("small-sd1")
    [alone] = ours(picture, mask, "a dog", steps=3)
    refused = []

    def on_step(step: Step) -> None:
        for begin in (ours, ours.steps):
            with pytest.raises(minpaint.InputError, match="painting already") as caught:
                begin(picture, mask, "a cat", steps=2)
            refused.append(str(caught.value))

    [around] = ours(picture, mask, "a dog", steps=3, on_step=on_step)
    assert torch.equal(around.latents, alone.latents)
    assert len(refused) == 6
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
def test_unfinished_steps_refuse_other_paintings_until_they_end(
    painter: Paint, picture: Image.Image, mask: Image.Image, elsewhere: bool
) -> None:
    ours = painter("small-sd1")

    def is_refused() -> bool:
        try:
            ours(picture, mask, "a dog", steps=1)
        except minpaint.InputError as error:
            return "steps() first" in str(error)
        return False

    def is_refused_there() -> bool:
        if not elsewhere:
            return is_refused()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(is_refused).result(timeout=60)

    steps = ours.steps(picture, mask, "a dog", steps=3)
    assert not is_refused_there()  # before the first step there is nothing to disturb
    next(steps)
    assert is_refused_there()
    assert len(list(steps)) == 2
    assert not is_refused_there()


def test_dropped_steps_let_go_of_the_painter(painter: Paint, picture: Image.Image, mask: Image.Image) -> None:
    """Closed, forgotten, or in a cycle that another thread's garbage collection finds."""
    ours = painter("small-sd1")
    [alone] = ours(picture, mask, "a dog", steps=2)

    def begin() -> Any:
        steps = ours.steps(picture, mask, "a cat", steps=4)
        next(steps)
        return steps

    begin().close()
    assert torch.equal(ours(picture, mask, "a dog", steps=2)[0].latents, alone.latents)
    for _ in ours.steps(picture, mask, "a cat", steps=4):
        break
    assert torch.equal(ours(picture, mask, "a dog", steps=2)[0].latents, alone.latents)
    cycle: list[Any] = [begin()]
    cycle.append(cycle)
    del cycle
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gc.collect).result()
    assert torch.equal(ours(picture, mask, "a dog", steps=2)[0].latents, alone.latents)
    with pytest.raises(ZeroDivisionError):
        ours(picture, mask, "a dog", steps=2, on_step=lambda step: 1 // 0)
    assert torch.equal(ours(picture, mask, "a dog", steps=2)[0].latents, alone.latents)


def test_the_networks_can_be_called_between_the_steps(painter: Paint, picture: Image.Image, mask: Image.Image) -> None:
    ours = painter("small-sd1")
    expected = [step.x for step in ours.steps(picture, mask, "a dog", steps=3)]
    seen = []
    for step in ours.steps(picture, mask, "a dog", steps=3):
        with torch.inference_mode():
            assert ours.unet(torch.zeros(1, 9, 8, 8), torch.tensor([step.t]), torch.zeros(1, 77, 64)).isfinite().all()
            assert ours.vae.decode(step.x / ours.vae_config.scaling_factor).isfinite().all()
        seen.append(step.x)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_two_plans_of_steps_may_be_taken_one_after_the_other(
    painter: Paint, picture: Image.Image, mask: Image.Image
) -> None:
    first, second = (painter("small-sd1").steps(picture, mask, "a dog", steps=n) for n in (2, 3))
    assert [len(list(second)), len(list(first))] == [3, 2]


def test_small_networks_are_computed_by_one_thread_and_large_ones_by_all(
    painter: Paint, picture: Image.Image, mask: Image.Image
) -> None:
    """Whatever happens in a run, between its calls the threads are the caller's."""
    torch.set_num_threads(3)
    ours, seen = painter("small-sd1"), []
    hook = ours.unet.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        ours(picture, mask, "a dog", steps=1, on_step=lambda step: seen.append(torch.get_num_threads()))
        with pytest.raises(ZeroDivisionError):
            ours(picture, mask, "a dog", steps=1, on_step=lambda step: 1 // 0)
    finally:
        hook.remove()
    assert seen == [1, 3, 1]
    assert torch.get_num_threads() == 3
    for work, threads in ((0, 1), (THREAD_WORK, 1), (2 * THREAD_WORK, 2), (100 * THREAD_WORK, 3)):
        with threads_for(work):
            assert torch.get_num_threads() == threads
