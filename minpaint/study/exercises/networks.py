"""Chapters 4 to 7: the UNet, attention, the autoencoder, and what makes them paint a hole."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minpaint.engine.device import without_gradients
from minpaint.picture.frame import open_frame
from minpaint.picture.image import to_unit
from minpaint.settings import Settings
from minpaint.study.attention import attention_weights
from minpaint.study.exercises.lab import Answer, Lab, Result, apart, exercise
from minpaint.study.parity_record import UNLIKE
from minpaint.study.trace import trace_run

UNET, ATTENTION, AUTOENCODER = "4 the UNet as a picture", "5 attention and words", "6 the autoencoder"
HOLE = "7 nine channels, masks and blending"


@exercise(UNET)
@without_gradients
def shapes(lab: Lab, answer: Answer) -> Result:
    """shapes(channels, y, x) -> the shapes (channels, y, x) that the UNet's down_blocks give, one after the other.

    `channels` are the widths of its levels, (64, 96, 128) for the tiny model; y and x are those of the latents. Every
    block but the last halves the size.
    """
    config, wrong, seen = lab.painter.unet_config, 0, list[tuple[int, ...]]()
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape[1:])))
        for block in lab.networks.unet.down_blocks  # type: ignore[union-attr]
    ]
    for y, x in ((16, 16), (8, 24)):
        seen.clear()
        lab.networks.unet(torch.zeros(1, 9, y, x), torch.zeros(1), lab.networks.embed("a tree"))
        wrong += [tuple(shape) for shape in answer(config.channels, y, x)] != seen
    for handle in handles:
        handle.remove()
    return Result(wrong, 0, "wrong of 2")


@exercise(UNET)
@without_gradients
def find_broken_layer(lab: Lab, answer: Answer) -> Result:
    """find_broken_layer(right, broken, x, t, context) -> the name of the module in which `broken` differs from `right`.

    Both are UNets; in one a single weight of a single layer was changed. What it gives is wrong everywhere after: give
    every layer the *right* one's input, and compare what comes out. That is what `python -m minpaint parity` does.
    """
    unet, found = lab.networks.unet, 0
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    inputs = torch.cat([lab.noise(), lab.conditioning], dim=1), torch.tensor([400.0]), lab.networks.embed("a boat")
    for name in Random(0).sample(layers, 5):
        broken = copy.deepcopy(unet)
        broken.get_submodule(name).weight.view(-1)[0] += 1.0  # type: ignore[operator]
        found += answer(unet, broken, *inputs) == name
    return Result(found, 5, "found of 5", most=False)


@exercise(ATTENTION)
def attention(lab: Lab, answer: Answer) -> Result:
    """attention(q, k, v) -> softmax(q k^T / sqrt(d)) v, for [b, heads, n, d], [b, heads, m, d] and [b, heads, m, d].

    By hand: matrix products, and softmax over the m tokens that are attended to. Vaswani et al. 2017, equation 1.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 8, generator=generator) for tokens in (5, 7, 7))
    return Result(apart(answer(q, k, v), F.scaled_dot_product_attention(q, k, v)), 1e-5)


@exercise(ATTENTION)
@without_gradients
def word_map(lab: Lab, answer: Answer) -> Result:
    """word_map(q, k, token, size) -> how much each cell of a feature map takes of one token, [y, x].

    q [1, heads, y * x, d] are the cells, row after row, k [1, heads, tokens, d] the prompt's tokens; size is (y, x).
    The mean over the heads of the attention's weights, brought into the shape of the map.
    """
    errors: list[float] = []

    def attend(name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: object) -> None:
        side = round(q.shape[2] ** 0.5)
        if name.endswith("attn2") and not errors:
            expected = attention_weights(q, k)[0, :, :, 3].mean(0).view(side, side)
            errors.append(apart(answer(q[:1], k[:1], 3, (side, side)), expected))

    with lab.painter.watch(attend=attend):
        lab.painter(lab.picture, lab.mask, "a red tower", steps=1)
    return Result(errors[0], 1e-4)


@exercise(ATTENTION)
def swap_word(lab: Lab, answer: Answer) -> Result:
    """swap_word(painter, picture, mask, first, second, steps) -> the picture of the second prompt, where the first was.

    Prompt-to-prompt, Hertz et al. 2022 (arXiv:2208.01626): paint the first prompt and remember its attention weights,
    then paint the second with them in the first steps. painter.watch and minpaint.study.attention have what you need.
    Paint with the sampler dpmpp. A red tower becomes a yellow one: measured is how well the two cover each other, the
    area of both in shares of the area of either.
    """
    first, second = "a red tower", "a yellow tower"
    before = lab.painter(lab.picture, lab.mask, first, steps=10, sampler="dpmpp")[0].image
    after = answer(lab.painter, lab.picture, lab.mask, first, second, 10)
    if not isinstance(after, Image.Image) or after.size != lab.picture.size:
        return Result(0, 0.75, "no picture;", most=False)
    (_, green, blue), hole = to_unit(after.convert("RGB"))[0], to_unit(lab.mask)[0, 0] > 0.5
    there, was_there = (((each[0] - each[2]) > 0.35) & hole for each in (to_unit(after)[0], to_unit(before)[0]))
    if not there.any() or float((green - blue)[there].mean()) < 0.3:
        return Result(0, 0.75, "nothing yellow;", most=False)
    return Result(float((there & was_there).sum() / (there | was_there).sum()), 0.75, "overlap", most=False)


@exercise(AUTOENCODER)
@without_gradients
def draw_latents(lab: Lab, answer: Answer) -> Result:
    """draw_latents(mean, logvar, noise, scaling) -> latents drawn from what the encoder gives, as the UNet sees them.

    The encoder gives mean and log variance of a normal distribution (Kingma & Welling 2014); the UNet's latents are
    `scaling` times as large.
    """
    mean, logvar = lab.networks.encode(lab.canvas.pixels)
    logvar = logvar + 3.0  # so that the draw is seen
    expected = lab.scaling * (mean + torch.exp(logvar / 2) * lab.noise())
    return Result(apart(answer(mean, logvar, lab.noise(), lab.scaling), expected), 1e-5)


@exercise(AUTOENCODER)
@without_gradients
def colours_of_latents(lab: Lab, answer: Answer) -> Result:
    """colours_of_latents(latents, colours) -> a matrix [5, 3]: from the four channels and a 1 to red, green and blue.

    latents [m, 4] are cells, colours [m, 3] the mean colours of their pixels; torch.linalg.lstsq finds the best
    matrix. It is tried on other cells: how much of their colours it leaves unexplained.
    """
    latents = lab.encode(lab.canvas.pixels)[0].flatten(1).T
    colours = F.avg_pool2d(lab.canvas.pixels, lab.painter.vae_config.factor)[0].flatten(1).T
    matrix = answer(latents[::2], colours[::2])
    if apart(matrix, torch.ones(5, 3)) == UNLIKE:
        return Result(UNLIKE, 0.2)
    shown = torch.cat([latents[1::2], torch.ones(len(latents[1::2]), 1)], dim=1) @ matrix
    left, all_ = (shown - colours[1::2]).square().sum(), (colours[1::2] - colours[1::2].mean(0)).square().sum()
    return Result(float(left / all_), 0.2, "unexplained share of the colours")


@exercise(HOLE)
@without_gradients
def unet_input(lab: Lab, answer: Answer) -> Result:
    """unet_input(x, cells, masked_latents) -> what the inpainting UNet sees, [n, 9, y, x], in the checkpoints' order.

    x [n, 4, y, x]; cells [1, 1, y, x], 1 where to paint; masked_latents [1, 4, y, x] of the picture with its hole grey.
    """
    x = lab.noise(count=2)
    expected = torch.cat([x, lab.conditioning.expand(2, -1, -1, -1)], dim=1)
    return Result(apart(answer(x, lab.conditioning[:, :1], lab.conditioning[:, 1:]), expected), 1e-6)


@exercise(HOLE)
def put_back(lab: Lab, answer: Answer) -> Result:
    """put_back(x, picture, noise, cells, alpha_bar) -> x in the hole, and around it the picture at x's noise level.

    Inpainting without an inpainting model: after every step of a plain one (Avrahami et al. 2022, arXiv:2206.02779,
    section 4.1). All are [n, 4, y, x] but for cells, [n, 1, y, x]; picture has no noise yet.
    """
    x, picture, noise, level = lab.noise(1), lab.noise(2), lab.noise(3), 0.4
    cells = (lab.canvas.cells > 0).float()
    expected = torch.where(cells > 0, x, level**0.5 * picture + (1 - level) ** 0.5 * noise)
    return Result(apart(answer(x, picture, noise, cells, level), expected), 1e-5)


@exercise(HOLE)
def find_fault_of_mask(lab: Lab, answer: Answer) -> Result:
    """find_fault_of_mask(part) -> "right", "inverted", "shifted" or "absent": what is wrong with the mask channel.

    part is what `trace` keeps of a run (minpaint.study.trace.Part): part.conditioning is what the UNet saw of mask
    and masked picture, [5, y, x], and part.stages["latent cells"] a picture of the mask as it should be.
    """
    settings = lab.painter.complete(Settings("a red tower", steps=1))
    faults: dict[str, Any] = {
        "right": lambda mask: mask,
        "inverted": lambda mask: 1 - mask,
        "shifted": lambda mask: mask.roll(2, dims=-1),
        "absent": lambda mask: 0 * mask,
    }
    found = 0
    [part] = trace_run(lab.painter, open_frame(lab.picture, lab.mask, settings), settings, inside=False).parts
    conditioning = part.conditioning
    assert conditioning is not None
    for name, spoil in faults.items():
        part.conditioning = torch.cat([spoil(conditioning[:1]), conditioning[1:]])
        found += answer(part) == name
    return Result(found, 4, "found of 4", most=False)
