"""Noise levels and the timesteps at which a sampler visits them.

Notation, here and in the samplers, after Ho et al. 2020 (DDPM, arXiv:2006.11239):
`alpha_bar[t]` is the product of (1 - beta) up to timestep t, so that a picture x0 noised to
timestep t is  x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps,  with eps standard normal.
Coefficients are Python floats: no device, and no rounding beyond that of alpha_bar itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minpaint.errors import CheckpointError, InputError

RUNGE_KUTTA_STEPS = 4  # timesteps that the warm-up of PNDM spans, `pndm_order` in the reference
SAMPLER_OF_CLASS = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "DPMSolverMultistepScheduler": "dpmpp"}


@dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule a checkpoint was trained with, and what it asks of a sampler.

    `None` stands for a key the file leaves out: each sampler then has the default of its own
    class in the reference, as `from_config` there gives it.
    """

    class_name: str
    train_steps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction: str
    steps_offset: int
    spacing: str | None
    set_alpha_to_one: bool | None
    clip_sample: bool | None
    clip_sample_range: float
    skip_prk_steps: bool

    @property
    def sampler(self) -> str:
        """The sampler this checkpoint names; CheckpointError if it is none of ours."""
        if self.class_name not in SAMPLER_OF_CLASS:
            told = f"_class_name {self.class_name!r} is not supported; choose a sampler: ddim, pndm or dpmpp"
            raise CheckpointError(f"scheduler/scheduler_config.json: {told}")
        return SAMPLER_OF_CLASS[self.class_name]


@dataclass(frozen=True)
class Schedule:
    """What a sampler needs to know of one run.

    timesteps: those at which the network is called, in order.
    stride: training timesteps between two sampler steps, where a sampler counts by it.
    alpha_bar_end: the level that lies before timestep 0.
    warm_up: the Runge-Kutta calls of PNDM before any were left out for `strength`, else empty.
    clip: bound on the predicted x0, or None.
    strength: 1 if the run starts from noise alone; below 1 it starts from a noised picture, and
        the first timesteps are left out.
    """

    alpha_bar: tuple[float, ...]
    alpha_bar_end: float
    timesteps: tuple[int, ...]
    stride: int
    prediction: str
    warm_up: tuple[int, ...] = ()
    clip: float | None = None
    strength: float = 1.0

    def level(self, t: int) -> float:
        """alpha_bar at a timestep; anything before timestep 0 is the end of the run."""
        return self.alpha_bar[t] if t >= 0 else self.alpha_bar_end

    def add_noise(self, x0: Tensor, noise: Tensor, t: int) -> Tensor:
        """x0 noised to timestep t (DDPM, equation 4)."""
        return math.sqrt(self.alpha_bar[t]) * x0 + math.sqrt(1 - self.alpha_bar[t]) * noise

    def split(self, output: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(x0, eps) from a network's output at (x, t).

        Epsilon prediction: DDIM (arXiv:2010.02502), equation 9. v-prediction: Salimans & Ho
        2022 (arXiv:2202.00512), appendix D, v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.
        """
        signal, sigma = math.sqrt(self.alpha_bar[t]), math.sqrt(1 - self.alpha_bar[t])
        if self.prediction == "v_prediction":
            return signal * x - sigma * output, signal * output + sigma * x
        return (x - sigma * output) / signal, output


def make_schedule(
    config: SchedulerConfig,
    sampler: str,
    steps: int,
    strength: float = 1.0,
    runge_kutta: bool = False,
) -> Schedule:
    """The schedule of one run.

    Args:
        sampler: "ddim", "pndm" or "dpmpp".
        steps: sampler steps over the whole range of noise, from 1 to the training's.
        strength: in (0, 1]; only the last int(steps * strength) steps are kept.
        runge_kutta: begin PNDM with its Runge-Kutta warm-up (needs 4 steps).

    Raises:
        InputError: `steps` or `strength` leave nothing to do, or reach past the training's
            timesteps.
    """
    if steps > config.train_steps:
        raise InputError(f"steps {steps} is more than the {config.train_steps} of the training; use fewer")
    if runge_kutta and steps < RUNGE_KUTTA_STEPS:
        raise InputError(
            f"steps {steps} is too few for this checkpoint's Runge-Kutta warm-up; use at least "
            f"{RUNGE_KUTTA_STEPS}, or choose the sampler pndm to do without it"
        )
    kept = int(steps * strength)
    if kept < 1:
        raise InputError(
            f"strength {strength:g} of {steps} steps leaves none to run; "
            f"use at least {math.ceil(1 / strength)} steps or a higher strength"
        )

    spacing = config.spacing or ("linspace" if sampler == "dpmpp" else "leading")
    grid = _grid(config, spacing, steps, beyond=sampler == "dpmpp")
    if max(grid) >= config.train_steps or (sampler == "dpmpp" and len(set(grid)) < len(grid)):
        raise InputError(f"steps {steps} is more than {sampler} can place; use fewer")
    stride = config.train_steps // steps
    warm_up: tuple[int, ...] = ()
    if sampler == "pndm":
        warm_up = _runge_kutta_calls(grid, stride) if runge_kutta else ()
        # PLMS asks the network twice about its second timestep (see samplers.pndm).
        grid = (*warm_up, *grid[3:]) if runge_kutta else (grid[0], *grid[1:2], *grid[1:])

    alpha_bar = alphas_cumprod(config)
    # the default of each class in the reference
    ends_at_one = sampler == "ddim" if config.set_alpha_to_one is None else config.set_alpha_to_one
    clips = sampler == "ddim" and config.clip_sample is not False
    return Schedule(
        alpha_bar=alpha_bar,
        alpha_bar_end=1.0 if ends_at_one or sampler == "dpmpp" else alpha_bar[0],
        timesteps=grid[steps - kept :],
        stride=stride,
        prediction=config.prediction,
        warm_up=warm_up,
        clip=config.clip_sample_range if clips else None,
        strength=strength,
    )


def alphas_cumprod(config: SchedulerConfig) -> tuple[float, ...]:
    """alpha_bar for every training timestep, in float32 as the reference computes it.

    "linear" is DDPM's schedule; "scaled_linear", linear in sqrt(beta), is latent diffusion's
    (Rombach et al. 2022; latent-diffusion, ldm/modules/diffusionmodules/util.py).
    """
    start, end = config.beta_start, config.beta_end
    if config.beta_schedule == "scaled_linear":
        roots = torch.linspace(start**0.5, end**0.5, config.train_steps, dtype=torch.float32)
        betas = roots**2
    else:
        betas = torch.linspace(start, end, config.train_steps, dtype=torch.float32)
    return tuple(torch.cumprod(1.0 - betas, dim=0).tolist())


def _grid(config: SchedulerConfig, spacing: str, steps: int, beyond: bool) -> tuple[int, ...]:
    """Timesteps from noise to picture (Lin et al. 2024, arXiv:2305.08891, table 2).

    `beyond`: leave room for one more step below the last (DPM-Solver++ in the reference).
    Rounding is to even, and the float arithmetic is numpy's linspace and arange.
    """
    last, points = config.train_steps, steps + beyond
    ascending: Iterable[int]
    if spacing == "leading":
        ascending = (i * (last // points) + config.steps_offset for i in range(points))
    elif spacing == "linspace":
        width = (last - 1) / max(points - 1, 1)
        ascending = (round(i * width) if i < points - 1 or i == 0 else last - 1 for i in range(points))
    else:  # trailing
        width = (last - last / steps) - last  # arange's own increment
        ascending = reversed([round(last + i * width) - 1 for i in range(steps)])
        points = steps
    return tuple(ascending)[::-1][:steps]


def _runge_kutta_calls(grid: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """Three Runge-Kutta steps of four calls each: at the start, twice half-way, at the end."""
    calls: list[int] = []
    for start, end in pairwise(grid[:RUNGE_KUTTA_STEPS]):
        half = end + stride // 2
        calls += [start, half, half, end]
    return tuple(calls)
