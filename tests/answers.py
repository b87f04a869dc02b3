"""Right answers to READING.md's exercises, as short as they can be; look here when you have tried yourself."""

from __future__ import annotations

import math

import torch

from minpaint.samplers import dpmpp
from minpaint.study.attention import prompt_to_prompt, remember


def add_noise(x0, noise, alpha_bar):
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise


def first_below(alpha_bar, ratio):
    return next(t for t, level in enumerate(alpha_bar) if level / (1 - level) < ratio)


def picture_in_noise(x, eps, alpha_bar):
    return (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def my_ddim(model, x, schedule):
    for t in schedule.timesteps:
        eps = model(x, t)
        x0 = picture_in_noise(x, eps, schedule.level(t))
        x = add_noise(x0, eps, schedule.level(t - schedule.stride))
    return x


def second_order(model, x, schedule):
    *_, before, _ = dpmpp(model, x, schedule)
    return before.x


def sdedit(model, x0, noise, schedule):
    return my_ddim(model, add_noise(x0, noise, schedule.level(schedule.timesteps[0])), schedule)


def invert(model, x0, schedule):
    x = x0
    for t in reversed(schedule.timesteps):
        eps = model(x, t)
        x = add_noise(picture_in_noise(x, eps, schedule.level(t - schedule.stride)), eps, schedule.level(t))
    return x


def negative_prompt(unet, inputs, t, prompt, negative, guidance):
    towards, away = unet(inputs, t, prompt), unet(inputs, t, negative)
    return away + guidance * (towards - away)


def guide_by_loss(eps, x, alpha_bar, loss, weight):
    [gradient] = torch.autograd.grad(loss(picture_in_noise(x, eps, alpha_bar)), x)
    return eps + math.sqrt(1 - alpha_bar) * weight * gradient


def anagram(model_a, model_b, x, t, view):
    return (model_a(x, t) + view(model_b(view(x), t))) / 2


def shapes(channels, y, x):
    found = []
    for level, width in enumerate(channels):
        if level < len(channels) - 1:
            y, x = -(-y // 2), -(-x // 2)
        found.append((width, y, x))
    return found


def find_broken_layer(right, broken, x, t, context):
    found = []

    def compare(name):
        def hook(module, inputs, output):
            if not torch.allclose(broken.get_submodule(name)(*inputs), output, atol=1e-5):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in right.named_modules() if getattr(module, "weight", None) is not None]
    handles = [module.register_forward_hook(compare(name)) for name, module in leaves]
    right(x, t, context)
    for handle in handles:
        handle.remove()
    return found[0]


def attention(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def word_map(q, k, token, size):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)[0, :, :, token].mean(0).view(size)


def swap_word(painter, picture, mask, first, second, steps):
    weights = {}
    with painter.watch(attend=remember(weights)):
        painter(picture, mask, first, steps=steps, sampler="dpmpp")
    with painter.watch(attend=prompt_to_prompt(weights, cross=8, own=2)):
        return painter(picture, mask, second, steps=steps, sampler="dpmpp")[0].image


def draw_latents(mean, logvar, noise, scaling):
    return scaling * (mean + torch.exp(logvar / 2) * noise)


def colours_of_latents(latents, colours):
    return torch.linalg.lstsq(torch.cat([latents, torch.ones(len(latents), 1)], dim=1), colours).solution


def unet_input(x, cells, masked_latents):
    known = torch.cat([cells, masked_latents], dim=1)
    return torch.cat([x, known.expand(len(x), -1, -1, -1)], dim=1)


def put_back(x, picture, noise, cells, alpha_bar):
    return torch.where(cells > 0, x, add_noise(picture, noise, alpha_bar))


def find_fault_of_mask(part):
    mask, size = part.conditioning[0] > 0.5, part.conditioning.shape[:0:-1]
    levels = part.stages["latent cells"].convert("L").resize(size, 0).tobytes()
    right = torch.tensor(list(levels)).view(mask.shape) > 127
    if torch.equal(mask, right):
        return "right"
    return "inverted" if torch.equal(mask, ~right) else "shifted" if mask.any() else "absent"


def bytes_of_scores(width, height, heads, rows):
    cells = width // 8 * (height // 8)
    return 4 * rows * heads * cells**2


def sliced_attention(q, k, v, rows):
    return torch.cat([attention(part, k, v) for part in q.split(rows, dim=2)], dim=2)


def winograd(d, g):
    d0, d1, d2, d3 = d
    both, difference = (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2
    a, b, c, e = (d0 - d2) * g[0], (d1 + d2) * both, (d2 - d1) * difference, (d1 - d3) * g[2]
    return a + b + c, b - c - e


def once(function):
    last = [None, None]

    def remembered(x):
        if last[0] is not x:
            last[:] = x, function(x)
        return last[1]

    return remembered
