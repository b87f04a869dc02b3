"""Chapters 1 to 3: noise, samplers, guidance."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from minpaint.engine.device import without_gradients
from minpaint.samplers import Model, ddim
from minpaint.schedule import Schedule
from minpaint.study.exercises.lab import Answer, Lab, Result, apart, exercise
from minpaint.study.parity_record import UNLIKE

NOISE, SAMPLERS, GUIDANCE = "1 noise and schedule", "2 samplers", "3 guidance"
MEAN, DEVIATION = 0.7, 0.4  # of the made-up pictures of exercise 4


@exercise(NOISE)
def add_noise(lab: Lab, answer: Answer) -> Result:
    """add_noise(x0, noise, alpha_bar) -> the latents x0 [n, 4, y, x] with noise, at the level alpha_bar (a number).

    Check yourself: at alpha_bar 1 nothing is added, at 0 nothing is left, and the variance stays 1 if x0's is 1.
    """
    x0, noise = lab.noise(1), lab.noise(2)
    errors = [
        apart(answer(x0, noise, level), level**0.5 * x0 + (1 - level) ** 0.5 * noise) for level in (0.999, 0.3, 0.01)
    ]
    return Result(max(errors), 1e-5)


@exercise(NOISE)
def first_below(lab: Lab, answer: Answer) -> Result:
    """first_below(alpha_bar, ratio) -> the first timestep at which the signal-to-noise ratio is below `ratio`.

    alpha_bar is a tuple with the level of every training timestep; the ratio is alpha_bar / (1 - alpha_bar).
    """
    levels = lab.schedule(10).alpha_bar
    wrong = 0
    for ratio in (100.0, 10.0, 1.0, 0.1, 0.01):
        expected = next(t for t, level in enumerate(levels) if level / (1 - level) < ratio)
        wrong += answer(levels, ratio) != expected
    return Result(wrong, 0, "wrong of 5")


@exercise(NOISE)
def picture_in_noise(lab: Lab, answer: Answer) -> Result:
    """picture_in_noise(x, eps, alpha_bar) -> the latents x0 that x is made of if its noise is eps: add_noise undone."""
    x0, eps = lab.noise(3), lab.noise(4)
    noised = {level: level**0.5 * x0 + (1 - level) ** 0.5 * eps for level in (0.9, 0.5, 0.1)}
    return Result(max(apart(answer(x, eps, level), x0) for level, x in noised.items()), 1e-4)


@exercise(SAMPLERS)
@without_gradients
def my_ddim(lab: Lab, answer: Answer) -> Result:
    """my_ddim(model, x, schedule) -> the finished latents: a sampler of your own in ten lines.

    model(x, t) gives eps. Go through schedule.timesteps; at each take x apart into x0 and eps, and put them together
    again at the level of t - schedule.stride. schedule.level(t) is alpha_bar, also for a t below 0.
    """
    model, schedule = lab.model("a red tower"), lab.schedule(20)
    expected = [step.x for step in ddim(model, lab.noise(), schedule)][-1]
    return Result(apart(answer(model, lab.noise(), schedule), expected), 1e-4)


@exercise(SAMPLERS)
def second_order(lab: Lab, answer: Answer) -> Result:
    """second_order(model, x, schedule) -> the latents at the last of schedule.timesteps, by a method of second order.

    The same as my_ddim, but halving the steps' length must leave a quarter of the error, not a half: Heun's method,
    or DPM-Solver++(2M), which remembers the x0 before. It is tried on pictures whose every number is drawn from one
    normal distribution, so that the model and the right result can be written down.
    """
    errors = [error_on_gaussian(lab, answer, steps) for steps in (40, 80)]
    order = math.log2(errors[0] / errors[1]) if 0 < errors[1] < errors[0] < 0.1 else 0.0
    return Result(order, 1.7, "order of convergence", most=False)


def error_on_gaussian(lab: Lab, method: Answer, steps: int, sampler: str = "dpmpp") -> float:
    """The relative error in the middle of a run, of a method like `second_order`, against the right result.

    The pictures' numbers are drawn from a normal distribution; so are the noised ones', and the flow from noise to
    pictures keeps each number's place in it. sampler: whose timesteps are taken.
    """
    schedule = lab.schedule(steps, sampler)
    schedule = replace(schedule, timesteps=schedule.timesteps[: steps // 2 + 1])
    first, last = (schedule.level(schedule.timesteps[end]) for end in (0, -1))
    x = lab.noise().double()
    place = (x - math.sqrt(first) * MEAN) / math.sqrt(_variance(first))
    expected = math.sqrt(last) * MEAN + math.sqrt(_variance(last)) * place
    return apart(method(_gaussian_model(schedule), x, schedule), expected)


def _variance(alpha_bar: float) -> float:
    """Of the noised pictures, which are normally distributed too."""
    return alpha_bar * DEVIATION**2 + 1 - alpha_bar


def _gaussian_model(schedule: Schedule) -> Model:
    """The perfect network for pictures whose numbers are drawn from a normal distribution: eps, expected given x."""

    def eps(x: Tensor, t: float) -> Tensor:
        alpha_bar = schedule.level(t)
        return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * MEAN) / _variance(alpha_bar)

    return eps


@exercise(SAMPLERS)
@without_gradients
def sdedit(lab: Lab, answer: Answer) -> Result:
    """sdedit(model, x0, noise, schedule) -> the finished latents, started from the picture x0 and not from noise alone.

    Meng et al. 2022 (arXiv:2108.01073). schedule.timesteps begins somewhere in the middle; noise x0 to there and go
    on with your sampler. What is left of x0 depends on where that is: `--strength`.
    """
    model, schedule = lab.model("a red tower"), lab.schedule(20, strength=0.6)
    x0 = lab.encode(lab.canvas.pixels)
    start = schedule.add_noise(x0, lab.noise(), schedule.timesteps[0])
    expected = [step.x for step in ddim(model, start, schedule)][-1]
    return Result(apart(answer(model, x0, lab.noise(), schedule), expected), 1e-4)


@exercise(SAMPLERS)
@without_gradients
def invert(lab: Lab, answer: Answer) -> Result:
    """invert(model, x0, schedule) -> noise from which ddim paints x0 again: ddim backwards.

    Song et al. 2021 (arXiv:2010.02502), section 4.3. Go through the timesteps from the last to the first, and assume
    that eps at the next noise level is what the model says at this one.
    """
    model, schedule = lab.model("a house by day"), lab.schedule(50)
    x0 = lab.encode(lab.canvas.pixels)
    noise = answer(model, x0, schedule)
    if apart(noise, lab.noise()) == UNLIKE:
        return Result(UNLIKE, 0.2)
    again = [step.x for step in ddim(model, noise, schedule)][-1]
    return Result(apart(again, x0), 0.2, "relative error of the picture painted again")


@exercise(GUIDANCE)
@without_gradients
def negative_prompt(lab: Lab, answer: Answer) -> Result:
    """negative_prompt(unet, inputs, t, prompt, negative, guidance) -> eps, led to a prompt and away from another.

    unet(inputs, t, context) takes inputs [b, 9, y, x], timesteps [b] and embeddings [b, tokens, D]; `inputs` and `t`
    are given for one picture, and so are the two embeddings. Ho & Salimans 2022 (arXiv:2207.12598).
    """
    x, t = lab.noise(), 500.0
    prompt, negative = (lab.networks.embed(text) for text in ("a red tower", "a blue house"))
    towards, away = (lab.model(text)(x, t) for text in ("a red tower", "a blue house"))
    inputs = torch.cat([x, lab.conditioning], dim=1)
    found = answer(lab.networks.unet, inputs, torch.tensor([t]), prompt, negative, 4.0)
    return Result(apart(found, away + 4.0 * (towards - away)), 1e-5)


@exercise(GUIDANCE)
def guide_by_loss(lab: Lab, answer: Answer) -> Result:
    """guide_by_loss(eps, x, alpha_bar, loss, weight) -> another eps, which leads to pictures with a smaller loss.

    loss(x0) is a number that you can differentiate, of latents [n, 4, y, x]. With eps held fixed, x0 depends on x
    alone: add sqrt(1 - alpha_bar) * weight * the gradient of the loss by x. Dhariwal & Nichol 2021
    (arXiv:2105.05233), algorithm 2, with a loss in the place of a classifier. Here it asks for latents that are dark
    in their first channel, with a weight that grows as the noise goes, and is measured on the finished ones, against
    those of the run without it.
    """
    model, schedule = lab.model("a tree by day"), lab.schedule(20)

    def loss(x0: Tensor) -> Tensor:
        return (x0[:, 0] + 1).square().sum()

    def guided(x: Tensor, t: float) -> Tensor:
        eps = model(x, t)
        with torch.enable_grad():
            changed: Tensor = answer(eps, x.clone().requires_grad_(), schedule.level(t), loss, 0.8 * schedule.level(t))
        return changed.detach()

    without, led = ([step.x for step in ddim(each, lab.noise(), schedule)][-1] for each in (model, guided))
    ratio = float(loss(led) / loss(without))
    return Result(ratio if math.isfinite(ratio) else float("inf"), 0.7, "loss in shares of the unguided run's")


@exercise(GUIDANCE)
@without_gradients
def anagram(lab: Lab, answer: Answer) -> Result:
    """anagram(model_a, model_b, x, t, view) -> eps for a picture that is one thing as it is and another seen by `view`.

    Geng et al. 2024 (arXiv:2311.17919), equation 3: the mean of what one model says of x, and of what the other says
    of view(x), seen back. `view` is its own inverse, such as upside down.
    """

    def upside_down(x: Tensor) -> Tensor:
        return x.flip(2)

    everywhere = torch.cat([torch.ones_like(lab.canvas.cells), torch.zeros_like(lab.conditioning[:, 1:])], dim=1)
    a, b = (lab.model(prompt, everywhere) for prompt in ("a red tower", "a green tree"))
    x, t = lab.noise(), 700.0
    expected = (a(x, t) + upside_down(b(upside_down(x), t))) / 2
    return Result(apart(answer(a, b, x, t, upside_down), expected), 1e-5)
