"""A seed is a seed: the same picture in any thread, process, batch, budget and file, on any processor."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture
from PIL import Image

import minpaint
from minpaint.engine.device import THREAD_WORK, threads_for
from minpaint.painter import Painter
from minpaint.samplers import Step

Paint = Callable[[str], Painter]

# One painter, one painting at a time ---------------------------------------------------------------


def test_threads_that_share_a_painter_wait_for_each_other(painter: Paint) -> None:
    """Sizes, prompts and counts differ, so that anything shared by two runs would show."""
    ours = painter("small-sd1")
    requests: list[tuple[int, dict[str, Any]]] = [
        (64, {"steps": 3}),
        (40, {"steps": 3, "count": 2, "seed": 3}),
        (48, {"steps": 4, "sampler": "dpmpp", "guidance": 1.0}),
    ]

    def paint(size: int, options: dict[str, Any]) -> list[bytes]:
        torch.set_num_threads(1)  # each thread of a process begins with its own
        paintings = ours(make_picture(size, size), make_mask(size, size), f"a dog of {size}", **options)
        return [painting.image.tobytes() for painting in paintings]

    alone = [paint(*request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: paint(*request), requests * 2))
    assert together == alone * 2


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
