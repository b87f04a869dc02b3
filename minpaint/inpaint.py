"""Inpainting, top to bottom: text, encode, denoise, decode, composite."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from minpaint.checkpoint import Checkpoint
from minpaint.errors import InputError, MinpaintError, MinpaintWarning
from minpaint.image import ImageSource, open_image, to_image
from minpaint.mask import Canvas, make_canvas
from minpaint.memory import without_gradients
from minpaint.samplers import Step, ddim, dpmpp, keep_nothing, pndm
from minpaint.schedule import Schedule, make_schedule
from minpaint.text import encode_prompt

SAMPLERS = ("ddim", "pndm", "dpmpp")
PROFILES = ("minpaint", "diffusers")


class Options(TypedDict, total=False):
    """What a painting may be asked for beside its image, mask and prompt.

    negative_prompt: what guidance leads away from (default "").
    steps: sampler steps over the whole range of noise (50).
    guidance: weight of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), 7.5;
        at 1 or less it is left out.
    strength: in (0, 1], 1; below, the hole starts from the noised picture and only the last
        int(steps * strength) steps are run.
    sampler: "ddim", "pndm" or "dpmpp"; None is what the checkpoint names.
    eta: randomness of ddim, from 0 (none, the default) to 1.
    seed, count: paint `count` pictures with seeds seed, seed + 1, ... (0, 1).
    profile: "minpaint" keeps every pixel outside the hole, and the input's size; "diffusers"
        gives what diffusers.StableDiffusionInpaintPipeline gives.
    """

    negative_prompt: str
    steps: int
    guidance: float
    strength: float
    sampler: str | None
    eta: float
    seed: int
    count: int
    profile: str


@dataclass(frozen=True)
class Painting:
    """One result.

    image: the picture, in the size of the input. latents: the final ones, float32 on the CPU,
    [4, y, x]. seed: the one that paints this picture again. steps: network calls really made.
    """

    image: Image.Image
    latents: Tensor
    seed: int
    steps: int


@dataclass(frozen=True)
class Job:
    """One checked request."""

    canvas: Canvas
    prompt: str
    negative_prompt: str
    schedule: Schedule
    sampler: str
    guidance: float
    strength: float
    eta: float
    seeds: tuple[int, ...]


class Painter:
    """A loaded checkpoint that paints; made by `minpaint.load`.

    unet(x, t, context): [B, 4 or 9, y, x], [B], [B, 77, D] -> prediction [B, 4, y, x].
    vae.encode(pixels) -> (mean, logvar); vae.decode(latents) -> pixels; latents unscaled.
    text_encoder, tokenizer: transformers' CLIPTextModel and CLIPTokenizer.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.unet = checkpoint.unet
        self.vae = checkpoint.vae
        self.text_encoder = checkpoint.text_encoder
        self.tokenizer = checkpoint.tokenizer
        self.unet_config = checkpoint.unet_config
        self.vae_config = checkpoint.vae_config
        self.scheduler_config = checkpoint.scheduler_config
        self.name = checkpoint.name
        self.device = device
        self.dtype = dtype

    def __call__(
        self,
        image: ImageSource,
        mask: ImageSource,
        prompt: str,
        *,
        on_step: Callable[[Step], object] | None = None,
        **options: Unpack[Options],
    ) -> list[Painting]:
        """Repaint the white part of the mask from a prompt.

        Args:
            image, mask: PIL images or paths. A mask of another size is scaled if its shape
                matches.
            on_step: called with every Step.
            options: see Options, which gives the defaults too.

        Raises:
            InputError: an argument, the image or the mask cannot be used.
            MinpaintError: the network's output is not finite.
        """
        job = self._job(image, mask, prompt, **options)
        latents = torch.empty(0)
        for step in self._denoise(job):
            latents = step.x
            if on_step is not None:
                on_step(step)
        return [
            Painting(self._decode(job, z), z.cpu(), seed, len(job.schedule.timesteps))
            for z, seed in zip(latents, job.seeds, strict=True)
        ]

    def steps(
        self, image: ImageSource, mask: ImageSource, prompt: str, **options: Unpack[Options]
    ) -> Iterator[Step]:
        """The denoising loop of the same call as a generator of Steps, to be looked into.

        A step's x are the latents it ends with, [count, 4, y, x] float32, scaled as the UNet
        sees them; the last step's are the painting's.
        """
        return self._denoise(self._job(image, mask, prompt, **options))

    @without_gradients
    def _denoise(self, job: Job) -> Iterator[Step]:
        """Text, encode, denoise. The order of the random draws is part of the contract."""
        canvas, schedule = job.canvas, job.schedule
        random = _Random(job.seeds, (4, *(n // self.vae_config.factor for n in canvas.pixels.shape[2:])), self.device)
        contexts = self._contexts(job)

        nine_channels = self.unet_config.in_channels == 9
        picture = None
        if job.strength < 1 or not nine_channels:
            picture = self._encode(canvas.pixels, random)  # [n, 4, y, x]
        noise = random.normal()
        masked = self._encode(canvas.masked_pixels, random) if nine_channels else random.normal()
        hole = canvas.latent_hole(self.vae_config.factor).to(self.device).expand(len(job.seeds), -1, -1, -1)

        x = noise
        if picture is not None and job.strength < 1:
            x = schedule.add_noise(picture, noise, schedule.timesteps[0])

        conditioning = torch.cat([hole, masked], dim=1) if nine_channels else None  # [n, 5, y, x]
        keep = keep_nothing
        if picture is not None and not nine_channels:
            keep = partial(_blend, picture, noise, hole, schedule)
        watch = _Watch(self.dtype)

        def model(x: Tensor, t: int) -> Tensor:
            inputs = x if conditioning is None else torch.cat([x, conditioning], dim=1)
            inputs = torch.cat([inputs] * (len(contexts) // len(x))).to(self.dtype)
            ts = torch.full((len(inputs),), t, device=self.device)
            output = self.unet(inputs, ts, contexts).float()
            watch.look(output, t)
            if len(output) == len(x):
                return output
            without, with_prompt = output.chunk(2)
            return without + job.guidance * (with_prompt - without)

        if job.sampler == "ddim":
            yield from ddim(model, x, schedule, job.eta, random.normal, keep)
        elif job.sampler == "pndm":
            yield from pndm(model, x, schedule, keep)
        else:
            yield from dpmpp(model, x, schedule, keep)
        watch.report()

    def _contexts(self, job: Job) -> Tensor:
        """Prompt embeddings [n, 77, D]; with guidance [2n, 77, D], the negative ones first."""
        prompts = [job.negative_prompt, job.prompt] if job.guidance > 1 else [job.prompt]
        rows = [encode_prompt(self.tokenizer, self.text_encoder, p).to(self.dtype) for p in prompts]
        return torch.cat([row.expand(len(job.seeds), -1, -1) for row in rows])

    def _encode(self, pixels: Tensor, random: _Random) -> Tensor:
        """Scaled latents [n, 4, y, x], one draw of the VAE's posterior for each seed."""
        moments = self._vae(lambda x: torch.cat(self.vae.encode(x), dim=1), pixels, "encoder")
        mean, logvar = moments.chunk(2, dim=1)
        sample = mean + torch.exp(0.5 * logvar) * random.normal()
        return self.vae_config.scaling_factor * sample

    @without_gradients
    def _decode(self, job: Job, latents: Tensor) -> Image.Image:
        """Final latents [4, y, x] to the finished picture."""
        pixels = self._vae(self.vae.decode, latents[None] / self.vae_config.scaling_factor, "decoder")
        return job.canvas.finish(to_image(pixels[0]))

    def _vae(self, call: Callable[[Tensor], Tensor], x: Tensor, part: str) -> Tensor:
        """A VAE pass in float32 out, redone in float32 altogether if half precision overflows."""
        out = call(x.to(self.device, self.dtype)).float()
        if bool(out.isfinite().all()):
            return out
        if self.dtype != torch.float32:
            warnings.warn(f"the VAE's {part} overflowed in half precision; done again in float32", MinpaintWarning, stacklevel=2)
            self.vae.float()
            try:
                out = call(x.to(self.device)).float()
            finally:
                self.vae.to(self.dtype)
        if not bool(out.isfinite().all()):
            raise MinpaintError(f"the VAE's {part} gave NaN or infinity; the checkpoint or the picture is damaged")
        return out

    def _job(
        self,
        image: ImageSource,
        mask: ImageSource,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int = 50,
        guidance: float = 7.5,
        strength: float = 1.0,
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int = 0,
        count: int = 1,
        profile: str = "minpaint",
    ) -> Job:
        """Check everything that can be wrong with a request before any work is done."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if not isinstance(text, str):
                raise InputError(f"{name} must be a string, not {type(text).__name__}")
        steps = _whole("steps", steps, 1)
        count = _whole("count", count, 1)
        seed = _whole("seed", seed, 0)
        if seed + count > 2**63:
            raise InputError(f"seed {seed} is too large; use one under 2^63")
        guidance = _number("guidance", guidance, 0, math.inf)
        strength = _number("strength", strength, 0, 1)
        if strength == 0:
            raise InputError("strength 0 would leave the picture as it is; use more than 0, up to 1")
        eta = _number("eta", eta, 0, 1)
        if sampler is not None and sampler not in SAMPLERS:
            raise InputError(f"sampler {sampler!r} is unknown; use {', '.join(SAMPLERS)}")
        if profile not in PROFILES:
            raise InputError(f"profile {profile!r} is unknown; use {', '.join(PROFILES)}")
        chosen = sampler or self.scheduler_config.sampler
        if eta > 0 and chosen != "ddim":
            warnings.warn(f"eta has no effect on the sampler {chosen}, only on ddim", MinpaintWarning, stacklevel=3)
        warm_up = sampler is None and chosen == "pndm" and not self.scheduler_config.skip_prk_steps
        schedule = make_schedule(self.scheduler_config, chosen, steps, strength, warm_up)
        canvas = make_canvas(open_image(image, "image"), open_image(mask, "mask"), self.vae_config.factor, profile)
        seeds = tuple(range(seed, seed + count))
        return Job(canvas, prompt, negative_prompt, schedule, chosen, guidance, strength, eta, seeds)


class _Random:
    """One CPU generator a seed, so that a seed gives one picture on any device, in any batch."""

    def __init__(self, seeds: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def normal(self) -> Tensor:
        """Standard normal float32 [n, 4, y, x]: the next draw of every generator."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


class _Watch:
    """Looks at every output of the network for NaN and infinity without waiting for a GPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.seen: list[tuple[Tensor, int]] = []
        self.dtype = dtype

    def look(self, output: Tensor, t: int) -> None:
        self.seen.append((output.isfinite().all(), t))
        if output.device.type == "cpu":
            self.report()

    def report(self) -> None:
        for finite, t in self.seen:
            if not bool(finite):
                way_out = "the checkpoint is damaged" if self.dtype == torch.float32 else "use dtype fp32"
                name = str(self.dtype).removeprefix("torch.")
                raise MinpaintError(f"the UNet gave NaN or infinity at timestep {t} in {name}; {way_out}")
        self.seen.clear()


def _blend(picture: Tensor, noise: Tensor, hole: Tensor, schedule: Schedule, x: Tensor, t: int | None) -> Tensor:
    """Put the known part of the picture, noised to timestep t, around the hole (4-channel UNets).

    Avrahami et al. 2022, Blended latent diffusion (arXiv:2206.02779), section 4.1.
    """
    known = picture if t is None else schedule.add_noise(picture, noise, t)
    return (1 - hole) * known + hole * x


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, not {value!r}") from None
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name} must be a whole number from {least} up, not {value!r}")
    return number


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} must be a number, not {value!r}") from None
    if isinstance(value, (bool, str)) or not math.isfinite(number) or not low <= number <= high:
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"a finite number from {low:g} up"
        raise InputError(f"{name} must be {limits}, not {value!r}")
    return number
