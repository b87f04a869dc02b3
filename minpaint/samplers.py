"""From noise to latents: DDIM, PNDM, DPM-Solver++ and, for models made for few steps, LCM.

Every sampler is a generator with the same arguments: it calls `model(x, t)` for the network's
output, moves x to the next noise level and yields a Step. Its whole history is in local variables.

eta, noise: randomness from 0 (none) to 1, and where standard normal noise of x's shape comes
    from. `ddim` has as much as eta says, `lcm` all of it; the others are deterministic.
keep: called as `keep(x, t)` with every new x and the timestep at which the network will see it,
    None after the last; returns the x to go on with. So the caller can keep a part of the latents.

Notation as in schedule.py; sigma is sqrt(1 - alpha_bar).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from minpaint.errors import InputError
from minpaint.schedule import Schedule, log_snr

Model = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
Keep = Callable[[Tensor, "float | None"], Tensor]


class Step(NamedTuple):
    """One network call and the move it led to.

    i: number of the call, from 0. t: its timestep. x: latents [B, 4, h, w] after the move.
    x0, eps: the clean latents and the noise that the network predicted in this call.
    total: how many calls the run makes.
    eps_uncond, eps_cond: eps without and with the prompt, of which guidance makes one; or None.
    """

    i: int
    t: int
    x: Tensor
    x0: Tensor
    eps: Tensor
    total: int
    eps_uncond: Tensor | None = None
    eps_cond: Tensor | None = None


def keep_nothing(x: Tensor, t: float | None) -> Tensor:
    """All of x is the sampler's."""
    return x


def _calls(schedule: Schedule) -> Iterator[tuple[int, float, float | None]]:
    """(i, t, next t) for every call of the network; the last has no next."""
    following = (*schedule.timesteps[1:], None)
    for i, (t, t_next) in enumerate(zip(schedule.timesteps, following, strict=True)):
        yield i, t, t_next


def ddim(
    model: Model, x: Tensor, schedule: Schedule, eta: float = 0.0, noise: Noise | None = None, keep: Keep = keep_nothing
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502).

    Equation 12, with sigma_t(eta) of equation 16: eta 0 is deterministic, eta 1 is DDPM. A
    clipped x0 leaves eps as the network gave it, as the reference does.

    Raises:
        InputError: eta > 0 and no source of noise.
    """
    if eta > 0 and noise is None:
        raise InputError(f"ddim with eta {eta:g} adds noise at every step; give it a source of noise, or eta 0")
    for i, t, t_next in _calls(schedule):
        x0, eps = schedule.split(model(x, t), x, t)
        if schedule.clip is not None:
            x0 = x0.clamp(-schedule.clip, schedule.clip)
        now, then = schedule.level(t), schedule.level(t - schedule.stride)
        # equation 16; at the end of a run without set_alpha_to_one both levels can be equal
        deviation = eta * math.sqrt(max((1 - then) / (1 - now) * (1 - now / then), 0.0))
        direction = math.sqrt(max(1 - then - deviation**2, 0.0))
        x = math.sqrt(then) * x0 + direction * eps
        if noise is not None and eta > 0:
            x = x + deviation * noise()
        x = keep(x, t_next)
        yield Step(i, round(t), x, x0, eps, len(schedule.timesteps))


def pndm(
    model: Model, x: Tensor, schedule: Schedule, eta: float = 0.0, noise: Noise | None = None, keep: Keep = keep_nothing
) -> Iterator[Step]:
    """Pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv:2202.09778).

    With a warm-up in the schedule: three pseudo Runge-Kutta steps (equation 13), then the
    pseudo linear multistep method of order 4 (equation 12). Without: PLMS as latent
    diffusion runs it (ldm/models/diffusion/plms.py), where the first step is a pseudo
    improved Euler step (two calls) and the order then rises with the history.

    The method combines raw network outputs, and only their combination moves x. That is sound for eps; for v, whose
    meaning changes with the timestep, it costs an order of convergence, and is kept because the reference does the
    same: prefer ddim or dpmpp there. Under `strength` < 1 the schedule has lost its first calls and the second call
    still counts as the corrector of the first, exactly as in the reference's pipeline.
    """
    outputs: list[Tensor] = []  # of the last four multistep calls
    origin, combined = x, x  # where the present Runge-Kutta or Euler step began; its weighted sum
    for i, t, t_next in _calls(schedule):
        output = model(x, t)
        x0, eps = schedule.split(output, x, t)

        if i < len(schedule.warm_up):
            stage = i % 4
            start = schedule.warm_up[i - stage]
            end = t if i % 2 else t - schedule.stride // 2
            if stage == 0:
                origin, combined = x, output / 6
                outputs = [*outputs[-3:], output]
            elif stage < 3:
                combined = combined + output / 3
            else:
                output = combined + output / 6
        elif i == 1:
            output = (output + outputs[-1]) / 2
            start, end = t + schedule.stride, t
        else:
            outputs = [*outputs[-3:], output]
            output = _multistep(outputs)
            origin, start, end = x, t, t - schedule.stride

        x = keep(_transfer(schedule, output, origin, start, end), t_next)
        yield Step(i, round(t), x, x0, eps, len(schedule.timesteps))


def _multistep(outputs: list[Tensor]) -> Tensor:
    """Adams-Bashforth of order len(outputs), newest last (PNDM, equation 12; appendix)."""
    weights = {
        1: (1.0,),
        2: (3 / 2, -1 / 2),
        3: (23 / 12, -16 / 12, 5 / 12),
        4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    }[len(outputs)]
    total = weights[0] * outputs[-1]
    for weight, output in zip(weights[1:], outputs[-2::-1], strict=True):
        total = total + weight * output
    return total


def _transfer(schedule: Schedule, output: Tensor, x: Tensor, start: float, end: float) -> Tensor:
    """x moved from timestep `start` to `end` along `output` (PNDM, equation 11)."""
    _, eps = schedule.split(output, x, start)
    now, then = schedule.level(start), schedule.level(end)
    divisor = now * math.sqrt(1 - then) + math.sqrt(now * (1 - now) * then)
    return math.sqrt(then / now) * x - ((then - now) / divisor) * eps


def dpmpp(
    model: Model, x: Tensor, schedule: Schedule, eta: float = 0.0, noise: Noise | None = None, keep: Keep = keep_nothing
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    A multistep method of order 2 in the log signal-to-noise ratio lambda, over the predicted x0. The first step has no
    history and is of order 1. So is the last: it ends at sigma 0, where lambda is infinite and the update becomes x0
    itself, the reference's default (`final_sigmas_type="zero"`). Karras' noise levels lie between those of the
    training: the network is then called with the nearest timestep.
    """
    x0_before, width_before = None, 0.0
    for i, t, t_next in _calls(schedule):
        x0, eps = schedule.split(model(x, round(t)), x, t)
        if t_next is None:
            x = x0
        else:
            now, then = schedule.level(t), schedule.level(t_next)
            width = log_snr(then) - log_snr(now)
            target = x0
            if x0_before is not None:
                target = x0 + (width / (2 * width_before)) * (x0 - x0_before)
            signal, sigma_ratio = math.sqrt(then), math.sqrt((1 - then) / (1 - now))
            x = sigma_ratio * x - signal * math.expm1(-width) * target
            x0_before, width_before = x0, width
        x = keep(x, t_next)
        yield Step(i, round(t), x, x0, eps, len(schedule.timesteps))


def lcm(
    model: Model, x: Tensor, schedule: Schedule, eta: float = 0.0, noise: Noise | None = None, keep: Keep = keep_nothing
) -> Iterator[Step]:
    """Sampling from a latent consistency model (Luo et al. 2023, arXiv:2310.04378, algorithm 3), in 1 to 8 steps.

    A denoising trajectory leads from noise to one clean picture. Such a model was trained to give the
    same answer, that picture, from every point of a trajectory, which is what consistency means: so one call
    may jump to the end. Each further call begins from the answer before, noised to a lower level, and
    mends it. The answer at timestep 0 must be x itself; c_skip and c_out see to that. The guidance of its
    teacher is trained into the model, which is why it needs none.

    Raises:
        InputError: more than one step and no source of noise.
    """
    for i, t, t_next in _calls(schedule):
        x0, eps = schedule.split(model(x, t), x, t)
        if schedule.clip is not None:
            x0 = x0.clamp(-schedule.clip, schedule.clip)
        # LCM, section 4.2: sigma_data is 0.5, and t counts ten times (scheduling_lcm.py, timestep_scaling)
        scaled, sigma_data = 10.0 * t, 0.5
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / math.sqrt(scaled**2 + sigma_data**2)
        x = c_out * x0 + c_skip * x
        if t_next is not None:
            if noise is None:
                raise InputError("lcm adds noise between its steps; give it a source of noise, or one step")
            x = schedule.add_noise(x, noise(), t_next)
        x = keep(x, t_next)
        yield Step(i, round(t), x, x0, eps, len(schedule.timesteps))


Sampler = Callable[..., Iterator[Step]]  # with the arguments named above
SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "pndm": pndm, "dpmpp": dpmpp, "lcm": lcm}
