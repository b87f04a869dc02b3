"""The algorithm: inpainting by latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

A UNet that was trained to inpaint has nine input channels: four noisy latents, the mask, and the
latents of the masked picture. A plain UNet has the first four only; then the known part of the
picture is put back around the hole after every step.

Axes: n pictures of y by x latent cells, each cell a square of Y / y by X / x pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from minpaint.models.networks import Networks
from minpaint.models.vae import LATENT_CHANNELS
from minpaint.picture.canvas import Canvas
from minpaint.samplers import Sampler, Step, ddim, keep_nothing
from minpaint.schedule import Schedule

Noise = Callable[[tuple[int, ...]], Tensor]  # a shape -> standard normal noise [n, *shape]


def inpaint(
    networks: Networks,
    canvas: Canvas,
    prompt: str,
    schedule: Schedule,
    noise: Noise,
    *,
    sampler: Sampler = ddim,
    eta: float = 0.0,
    negative_prompt: str = "",
    guidance: float = 7.5,
    fill: str = "original",
    blend: bool = False,
    in_channels: int = 9,
    scaling_factor: float = 0.18215,
) -> Iterator[Step]:
    """Paint the hole of a canvas: the sampler's steps, of which the last has the finished latents.

    Args:
        networks: whatever has `embed`, `encode`, `unet` and `decode`, such as PlainNetworks.
        schedule: of make_schedule, for `sampler`; below strength 1 the hole starts from the noised picture.
        noise: where all random numbers come from, such as seeded_noise; n is its number of seeds.
            The order of the draws is part of the contract: a seed gives one picture.
        eta: randomness of ddim, from 0 (none) to 1.
        guidance: weight w of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598):
            prediction without the prompt + w * (with it - without it); at 1 or less it is left out.
        fill: what is in the hole of the picture that is encoded to start from and to put back
            (Canvas.filled); "noise" starts from random latents.
        blend: put the known part back after every step although the UNet sees the masked picture.
        in_channels, scaling_factor: of the UNet and of the VAE (models/config.py).

    Yields:
        Steps, whose latents x [n, 4, y, x] are scaled: the VAE decodes x / scaling_factor.
    """
    guided = guidance > 1 and prompt != negative_prompt
    context = torch.cat([networks.embed(text) for text in ([negative_prompt, prompt] if guided else [prompt])])

    def encode(pixels: Tensor, draw: Tensor | float = 0.0) -> Tensor:
        """Scaled latents: a draw from the VAE's posterior, a normal distribution, or its mean."""
        mean, logvar = networks.encode(pixels)
        return scaling_factor * (mean + torch.exp(0.5 * logvar) * draw)

    # 1. Draw noise, and encode what it is drawn for.
    shape = (LATENT_CHANNELS, *canvas.cells.shape[2:])
    picture = conditioning = None
    if schedule.strength < 1 or in_channels == LATENT_CHANNELS:
        picture = encode(canvas.filled(fill), noise(shape))
    x = start = noise(shape)  # [n, 4, y, x]
    cells = canvas.cells.to(x).expand(len(x), -1, -1, -1)
    draw = noise(shape)  # the reference draws it also for a UNet that has no use for it
    if in_channels > LATENT_CHANNELS:
        masked = encode(canvas.masked_pixels, draw)
        conditioning = torch.cat([(cells > 0).to(x), masked], dim=1)  # [n, 5, y, x]
    if picture is None and blend and bool((cells < 1).any()):
        picture = encode(canvas.filled(fill))
    if picture is not None and fill == "noise":
        picture = torch.where(cells > 0, noise(shape), picture)

    # 2. Choose what the steps start from, and what is put back around the hole after each.
    keep = keep_nothing
    if picture is not None and schedule.strength < 1:
        x = schedule.add_noise(picture, start, schedule.timesteps[0])
    if picture is not None and (blend or conditioning is None):
        keep = partial(put_back, picture, start, cells, schedule)

    # 3. Denoise.
    context = context.repeat_interleave(len(x), dim=0)  # [n or 2n, tokens, D]
    last: list[Tensor] = []  # of the last call under guidance: its x, the outputs without and with the prompt

    def model(x: Tensor, t: float) -> Tensor:
        inputs = x if conditioning is None else torch.cat([x, conditioning], dim=1)
        if guided:
            inputs = torch.cat([inputs, inputs])  # once for each prompt
        output = networks.unet(inputs, inputs.new_full((len(inputs),), t), context)
        if not guided:
            return output
        without, with_prompt = output.chunk(2)
        last[:] = x, without, with_prompt
        return without + guidance * (with_prompt - without)

    for step in sampler(model, x, schedule, eta, partial(noise, shape), keep):
        if guided:
            t, (seen, *outputs) = schedule.timesteps[step.i], last
            uncond, cond = (schedule.split(output, seen, t)[1] for output in outputs)
            step = step._replace(eps_uncond=uncond, eps_cond=cond)
        yield step


def put_back(picture: Tensor, noise: Tensor, cells: Tensor, schedule: Schedule, x: Tensor, t: float | None) -> Tensor:
    """x with the known part of the picture, noised to timestep t, around the hole; all [n, 4, y, x].

    Avrahami et al. 2022, Blended latent diffusion (arXiv:2206.02779), section 4.1. A cell that is
    to be painted only partly, 0 < cells < 1, is put back until that share of the run is left
    (differential diffusion, Levin & Fried 2023, arXiv:2306.00950, algorithm 1). After the last
    step t is None, and the picture is put back without noise.
    """
    known = picture if t is None else schedule.add_noise(picture, noise, t)
    left = 0 if t is None else sum(later <= t for later in schedule.timesteps) / len(schedule.timesteps)
    return torch.where((cells > left) | (cells == 1), x, known)


def seeded_noise(seeds: Iterable[int]) -> Noise:
    """A source of standard normal float32 noise with a generator of its own for each of n seeds.

    Picture k of n is therefore the same as the one painted alone with its seed.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda shape: torch.stack([torch.randn(shape, generator=generator) for generator in generators])
