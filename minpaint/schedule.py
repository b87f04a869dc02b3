"""Noise levels and the timesteps at which a sampler visits them.

Notation, here and in the samplers, after Ho et al. 2020 (DDPM, arXiv:2006.11239):
`alpha_bar[t]` is the product of (1 - beta) up to timestep t, so that a picture x0 noised to
timestep t is  x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps,  with eps standard normal.
Coefficients are Python floats: no device, and no rounding beyond that of alpha_bar itself.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minpaint.errors import CheckpointError, InputError

RUNGE_KUTTA_STEPS = 4  # timesteps that the warm-up of PNDM spans, `pndm_order` in the reference
KARRAS_RHO = 7.0  # Karras et al. 2022 (arXiv:2206.00364), appendix D.1


@dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule a checkpoint was trained with, and what it asks of a sampler.

    `None` stands for a key the file leaves out: each sampler then has the default of its own
    class in the reference, as `from_config` there gives it.

    named: the sampler that the file names, or, where `exact` is false, the nearest of ours; None
        if none is near. eta: the randomness that this sampler has there.
    refused: by sampler, what the file asks of it that it cannot do. ignored: by sampler, the
        settings in the file that have no effect on it.
    original_steps: the number of timesteps that a latent consistency model was trained at.
    """

    class_name: str
    named: str | None
    exact: bool
    eta: float
    refused: Mapping[str, str]
    ignored: Mapping[str, str]
    train_steps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction: str
    steps_offset: int
    spacing: str | None
    zero_terminal_snr: bool
    set_alpha_to_one: bool | None
    clip_sample: bool | None
    clip_sample_range: float
    skip_prk_steps: bool
    use_karras_sigmas: bool
    original_steps: int

    @property
    def sampler(self) -> str:
        """The sampler that the checkpoint is run with unless another is chosen; CheckpointError if there is none."""
        if self.named is None:
            told = f"_class_name {self.class_name!r} is not supported; choose a sampler: ddim, pndm, dpmpp or lcm"
            raise CheckpointError(f"scheduler/scheduler_config.json: {told}")
        if self.named in self.refused:
            raise CheckpointError(f"{self.refused[self.named]}; choose a sampler, which does without it")
        return self.named


@dataclass(frozen=True)
class Schedule:
    """What a sampler needs to know of one run.

    timesteps: those at which the network is called, in order. One that lies between two of the
        training's is a noise level of its own, and rounded when the network is called.
    stride: training timesteps between two sampler steps, where a sampler counts by it.
    alpha_bar_end: the level that lies before timestep 0.
    warm_up: the Runge-Kutta calls of PNDM before any were left out for `strength`, else empty.
    clip: bound on the predicted x0, or None.
    strength: 1 if the run starts from noise alone; below, from a noised picture, without the first timesteps.
    """

    alpha_bar: tuple[float, ...]
    alpha_bar_end: float
    timesteps: tuple[float, ...]
    stride: int
    prediction: str
    warm_up: tuple[float, ...] = ()
    clip: float | None = None
    strength: float = 1.0

    def level(self, t: float) -> float:
        """alpha_bar at a timestep; anything before timestep 0 is the end of the run.

        Between two timesteps log_snr is linear, as the reference has it (`_sigma_to_t`).
        """
        if t < 0 or t == int(t):
            return self.alpha_bar[int(t)] if t >= 0 else self.alpha_bar_end
        before, after = (log_snr(alpha_bar) for alpha_bar in self.alpha_bar[int(t) : int(t) + 2])
        return 1 / (1 + math.exp(-2 * (before + (t - int(t)) * (after - before))))

    def add_noise(self, x0: Tensor, noise: Tensor, t: float) -> Tensor:
        """x0 noised to timestep t (DDPM, equation 4)."""
        return math.sqrt(self.level(t)) * x0 + math.sqrt(1 - self.level(t)) * noise

    def split(self, output: Tensor, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """(x0, eps) from a network's output at (x, t).

        Epsilon prediction: DDIM (arXiv:2010.02502), equation 9. v-prediction: Salimans & Ho
        2022 (arXiv:2202.00512), appendix D, v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.
        """
        signal, sigma = math.sqrt(self.level(t)), math.sqrt(1 - self.level(t))
        if self.prediction == "v_prediction":
            return signal * x - sigma * output, signal * output + sigma * x
        return (x - sigma * output) / signal, output


def make_schedule(
    config: SchedulerConfig, sampler: str, steps: int, strength: float = 1.0, runge_kutta: bool = False
) -> Schedule:
    """The schedule of one run.

    Args:
        sampler: "ddim", "pndm", "dpmpp" or "lcm".
        steps: sampler steps over the whole range of noise, from 1 to the training's.
        strength: in (0, 1]; only the last int(steps * strength) steps are kept.
        runge_kutta: begin PNDM with its Runge-Kutta warm-up (needs 4 steps).

    Raises:
        InputError: `steps` or `strength` leave nothing to do, or reach past the training's timesteps.
        CheckpointError: the checkpoint's settings cannot be used with this sampler.
    """
    if sampler == "pndm" and config.zero_terminal_snr:  # its formula divides by the signal
        told = "rescale_betas_zero_snr true is not supported by pndm; choose another sampler"
        raise CheckpointError(f"scheduler/scheduler_config.json: {told}")
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

    alpha_bar = alphas_cumprod(config)
    if config.zero_terminal_snr and sampler == "dpmpp":  # works with logarithms, and so begins just above 0
        alpha_bar = (*alpha_bar[:-1], 2.0**-24)  # scheduling_dpmsolver_multistep.py, __init__
    grid: tuple[float, ...]
    if sampler == "lcm":
        grid = _trained_grid(config, steps)
    elif sampler == "dpmpp" and config.use_karras_sigmas:
        grid = karras_grid(alpha_bar, steps)
    else:
        spacing = config.spacing or ("linspace" if sampler == "dpmpp" else "leading")
        grid = _grid(config, spacing, steps, beyond=sampler == "dpmpp")
    if not grid or max(grid) >= config.train_steps or (sampler == "dpmpp" and len(set(grid)) < len(grid)):
        raise InputError(f"steps {steps} is more than {sampler} can place; use fewer")
    stride = config.train_steps // steps
    warm_up: tuple[float, ...] = ()
    if sampler == "pndm":
        warm_up = _runge_kutta_calls(grid, stride) if runge_kutta else ()
        # PLMS asks the network twice about its second timestep (see samplers.pndm).
        grid = (*warm_up, *grid[3:]) if runge_kutta else (grid[0], *grid[1:2], *grid[1:])

    # the default of each class in the reference
    ends_at_one = sampler == "ddim" if config.set_alpha_to_one is None else config.set_alpha_to_one
    clips = config.clip_sample is not False if sampler == "ddim" else sampler == "lcm" and config.clip_sample is True
    return Schedule(
        alpha_bar=alpha_bar,
        alpha_bar_end=1.0 if ends_at_one or sampler in ("dpmpp", "lcm") else alpha_bar[0],
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
    alpha_bar = torch.cumprod(1.0 - betas, dim=0)
    if config.zero_terminal_snr:  # the last timestep is noise alone: Lin et al. 2024 (arXiv:2305.08891), algorithm 1
        signal = alpha_bar.sqrt()
        alpha_bar = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
    return tuple(alpha_bar.tolist())


def log_snr(alpha_bar: float) -> float:
    """lambda = log(sqrt(alpha_bar) / sigma)."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _trained_grid(config: SchedulerConfig, steps: int) -> tuple[float, ...]:
    """Some of the timesteps that a latent consistency model was trained at (scheduling_lcm.py, set_timesteps)."""
    number = config.original_steps
    width = config.train_steps // number
    if steps > number:
        raise InputError(f"steps {steps} is more than the {number} that lcm can place; use 4 to 8")
    return tuple(width * (number - number * i // steps) - 1 for i in range(steps))


def karras_grid(alpha_bar: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Timesteps at which (sigma / sqrt(alpha_bar)) ** (1 / rho) falls evenly (Karras et al. 2022, equation 5)."""
    known = [-log_snr(level) for level in alpha_bar]  # the logarithm of sigma / sqrt(alpha_bar), ascending
    most, least = (math.exp(known[t] / KARRAS_RHO) for t in (-1, 0))
    grid = []
    for i in range(steps):
        wanted = KARRAS_RHO * math.log(most + i / max(steps - 1, 1) * (least - most))
        t = min(max(bisect_right(known, wanted) - 1, 0), len(known) - 2)
        grid.append(min(max(t + (wanted - known[t]) / (known[t + 1] - known[t]), 0.0), len(known) - 1.0))
    return tuple(grid)


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


def _runge_kutta_calls(grid: Sequence[float], stride: int) -> tuple[float, ...]:
    """Three Runge-Kutta steps of four calls each: at the start, twice half-way, at the end."""
    calls: list[float] = []
    for start, end in pairwise(grid[:RUNGE_KUTTA_STEPS]):
        half = end + stride // 2
        calls += [start, half, half, end]
    return tuple(calls)
