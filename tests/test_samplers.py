"""Schedules equal the reference's; samplers converge with the order their papers prove."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from minpaint import settings
from minpaint.checkpoint.scheduler import scheduler_config
from minpaint.errors import InputError
from minpaint.samplers import SAMPLERS, Step, ddim
from minpaint.schedule import Schedule, alphas_cumprod, karras_grid, make_schedule
from weights.random_checkpoint import SCHEDULER

REFERENCE = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "dpmpp": DPMSolverMultistepScheduler}
KEYS = {key: value for key, value in SCHEDULER.items() if key != "_class_name"}
PLACEABLE = [n for n in range(1, 1001) if n < 100 or n % 7 == 0 or n > 990]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", REFERENCE)
def test_timesteps_equal_the_reference_for_any_number_of_steps(sampler: str, spacing: str) -> None:
    settings = KEYS | {"timestep_spacing": spacing}
    reference = REFERENCE[sampler].from_config(settings)
    config = scheduler_config(settings | {"_class_name": "DDIMScheduler"})
    for steps in PLACEABLE:
        reference.set_timesteps(steps)
        expected = reference.timesteps.tolist()
        try:
            found = list(make_schedule(config, sampler, steps).timesteps)
        except InputError:  # the reference takes it, then fails or divides by zero
            assert max(expected) > 999 or len(set(expected)) < len(expected), steps
            continue
        # accumulated rounding sometimes gives the reference one step too many, at timestep -1
        assert found == [t for t in expected if t >= 0], steps


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [4, 5, 10, 20, 50, 333])
def test_runge_kutta_timesteps_equal_the_reference(steps: int, offset: int) -> None:
    settings = KEYS | {"skip_prk_steps": False, "steps_offset": offset}
    reference = PNDMScheduler.from_config(settings)
    reference.set_timesteps(steps)
    config = scheduler_config(settings | {"_class_name": "PNDMScheduler"})
    schedule = make_schedule(config, "pndm", steps, runge_kutta=True)
    assert list(schedule.timesteps) == reference.timesteps.tolist()
    assert list(schedule.warm_up) == reference.prk_timesteps.tolist()


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_alpha_bar_equals_the_reference(beta_schedule: str) -> None:
    settings = KEYS | {"beta_schedule": beta_schedule}
    ours = alphas_cumprod(scheduler_config(settings | {"_class_name": "DDIMScheduler"}))
    assert list(ours) == DDIMScheduler.from_config(settings).alphas_cumprod.tolist()


def test_defaults_of_a_file_that_leaves_keys_out_are_those_of_each_class() -> None:
    config = scheduler_config({"_class_name": "PNDMScheduler"})
    assert make_schedule(config, "ddim", 10).clip == 1.0
    assert make_schedule(config, "ddim", 10).alpha_bar_end == 1.0
    assert make_schedule(config, "pndm", 10).clip is None
    assert make_schedule(config, "pndm", 10).alpha_bar_end == alphas_cumprod(config)[0]
    assert make_schedule(config, "dpmpp", 10).timesteps[0] == 999  # linspace
    assert make_schedule(config, "ddim", 10).timesteps[0] == 901  # leading, offset 1


@pytest.mark.parametrize(
    ("steps", "strength", "culprit"), [(1001, 1.0, "1001"), (7, 0.13, "strength 0.13"), (1000, 1.0, "1000")]
)
def test_steps_that_cannot_be_placed_are_refused(steps: int, strength: float, culprit: str) -> None:
    config = scheduler_config(SCHEDULER)
    with pytest.raises(InputError, match=culprit):
        make_schedule(config, "ddim", steps, strength)


# Gaussian data x0 ~ N(0, DATA_STD^2): eps is known, and the probability flow keeps x / std(t).
DATA_STD = 0.3


def _std(alpha_bar: float) -> float:
    return math.sqrt(alpha_bar * DATA_STD**2 + 1 - alpha_bar)


def _fine_schedule(steps: int, prediction: str) -> Schedule:
    """SD's noise levels on a grid so fine that its spacing does not limit the order."""
    fine = 96_000
    config = scheduler_config(
        SCHEDULER | {"num_train_timesteps": fine, "beta_start": 0.00085 * 1000 / fine, "beta_end": 0.012 * 1000 / fine}
    )
    alpha_bar = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, fine, dtype=torch.float64) ** 2
    levels = tuple(torch.cumprod(1 - alpha_bar, 0).tolist())
    stride = fine * 3 // 4 // steps
    # from 7/8 down to 1/8 of the time, where lambda is smooth
    grid = tuple(fine * 7 // 8 - i * stride for i in range(steps))
    return Schedule(levels, levels[0], grid, stride, prediction)


def _end_error(sampler: str, steps: int, prediction: str, karras: bool = False) -> float:
    schedule = _fine_schedule(steps, prediction)
    if karras:  # over the same part of the levels
        levels, eighth = schedule.alpha_bar, len(schedule.alpha_bar) // 8
        grid = tuple(eighth + t for t in karras_grid(levels[eighth : 7 * eighth], steps))
        schedule = replace(schedule, timesteps=grid)
    if sampler == "pndm":
        grid = schedule.timesteps
        schedule = Schedule(
            schedule.alpha_bar, schedule.alpha_bar_end, (grid[0], grid[1], *grid[1:]), schedule.stride, prediction
        )

    def model(x: Tensor, t: int) -> Tensor:
        a = schedule.level(t)
        eps = math.sqrt(1 - a) / _std(a) ** 2 * x
        x0 = math.sqrt(a) * DATA_STD**2 / _std(a) ** 2 * x
        return eps if prediction == "epsilon" else math.sqrt(a) * eps - math.sqrt(1 - a) * x0

    x = torch.ones(1, dtype=torch.float64)
    taken: list[Step] = list(SAMPLERS[sampler](model, x, schedule))
    # dpmpp's last step goes to sigma 0, with order one by design: judge the one before
    step = taken[-2] if sampler == "dpmpp" else taken[-1]
    level = schedule.timesteps[-1] if sampler == "dpmpp" else schedule.timesteps[-1] - schedule.stride
    exact = _std(schedule.level(level)) / _std(schedule.level(schedule.timesteps[0]))
    return abs(float(step.x) - exact) / exact


# pndm of order one for v: it adds up raw outputs, whose meaning changes with the timestep (samplers.py)
@pytest.mark.parametrize(
    ("sampler", "prediction", "order"),
    [
        ("dpmpp Karras", "epsilon", 2),
        ("dpmpp Karras", "v_prediction", 2),
        ("ddim", "epsilon", 1),
        ("ddim", "v_prediction", 1),
        ("pndm", "epsilon", 2),
        ("pndm", "v_prediction", 1),
        ("dpmpp", "epsilon", 2),
        ("dpmpp", "v_prediction", 2),
    ],
)
def test_order_of_convergence_on_gaussian_data(sampler: str, prediction: str, order: int) -> None:
    name, _, karras = sampler.partition(" ")
    errors = [_end_error(name, steps, prediction, bool(karras)) for steps in (40, 80, 160, 320)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    print(f"{sampler} {prediction}: errors {errors}, orders {orders}")
    assert orders[-1] == pytest.approx(order, abs=0.15)


def test_ddim_with_eta_one_ends_with_the_variance_of_the_data() -> None:
    schedule = make_schedule(scheduler_config(SCHEDULER | {"set_alpha_to_one": True}), "ddim", 900)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)

    def model(x: Tensor, t: int) -> Tensor:
        a = schedule.alpha_bar[t]
        return math.sqrt(1 - a) / _std(a) ** 2 * x

    *_, last = ddim(model, x, schedule, 1.0, lambda: torch.randn(x.shape, generator=generator))
    assert float(last.x.std()) == pytest.approx(DATA_STD, rel=0.03)


def test_ddim_with_eta_asks_for_a_source_of_noise() -> None:
    schedule = make_schedule(scheduler_config(SCHEDULER), "ddim", 5)
    with pytest.raises(InputError, match=r"eta 0\.5 .* source of noise"):
        list(ddim(lambda x, t: x, torch.ones(3), schedule, eta=0.5))


def test_the_settings_know_every_sampler() -> None:
    assert tuple(SAMPLERS) == settings.SAMPLERS


def test_clip_sample_bounds_the_predicted_picture() -> None:
    schedule = make_schedule(scheduler_config(SCHEDULER | {"clip_sample": True, "clip_sample_range": 0.5}), "ddim", 5)
    steps = list(ddim(lambda x, t: torch.zeros_like(x), torch.full((3,), 4.0), schedule))
    assert all(float(step.x0.abs().max()) <= 0.5 for step in steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_change_none_of_their_inputs(sampler: str) -> None:
    schedule = make_schedule(scheduler_config(SCHEDULER), sampler, 6)
    x = torch.randn(2, 4, 3, 3)
    before = x.clone()
    noise = torch.randn(2, 4, 3, 3)
    run = partial(SAMPLERS[sampler], lambda x, t: 0.1 * x, x, schedule, noise=lambda: noise)
    first, again = [step.x.clone() for step in run()], [step.x for step in run()]
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
