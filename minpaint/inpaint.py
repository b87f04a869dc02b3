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


@dataclass(frozen=True)
class Settings:
    """What to paint and how, checked as it is made: InputError names a value that cannot be used.

    prompt, negative_prompt: what to paint, and what guidance leads away from.
    steps: sampler steps over the whole range of noise.
    guidance: weight of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); at 1 or
        less it is left out.
    strength: in (0, 1]; below 1 the hole starts from the noised picture and only the last
        int(steps * strength) steps are run.
    sampler: "ddim", "pndm" or "dpmpp"; None is what the checkpoint names.
    eta: randomness of ddim, from 0 (none) to 1.
    seed, count: paint `count` pictures, with the seeds seed, seed + 1, ...
    profile: "minpaint" keeps every pixel outside the hole, and the input's size; "diffusers"
        gives what diffusers.StableDiffusionInpaintPipeline gives.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 50
    guidance: float = 7.5
    strength: float = 1.0
    sampler: str | None = None
    eta: float = 0.0
    seed: int = 0
    count: int = 1
    profile: str = "minpaint"

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a string, not {type(getattr(self, name)).__name__}")
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:
                raise InputError(f"{name} {getattr(self, name)!r} is not valid UTF-8") from None
        for name, least in (("steps", 1), ("count", 1), ("seed", 0)):
            _check_whole(name, getattr(self, name), least)
        if self.seed + self.count > 2**63:
            raise InputError(f"seed {self.seed} is too large; use one under 2^63")
        for name, most in (("guidance", math.inf), ("strength", 1), ("eta", 1)):
            _check_number(name, getattr(self, name), most)
        if self.strength == 0:
            raise InputError("strength 0 would leave the picture as it is; use more than 0, up to 1")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InputError(f"sampler {self.sampler!r} is unknown; use {', '.join(SAMPLERS)}")
        if self.profile not in PROFILES:
            raise InputError(f"profile {self.profile!r} is unknown; use {', '.join(PROFILES)}")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.count)


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
    """One checked request: the settings, and what they mean for this picture and checkpoint."""

    settings: Settings
    canvas: Canvas
    sampler: str
    schedule: Schedule


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
        negative_prompt: str = "",
        steps: int = 50,
        guidance: float = 7.5,
        strength: float = 1.0,
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int = 0,
        count: int = 1,
        profile: str = "minpaint",
        on_step: Callable[[Step], object] | None = None,
    ) -> list[Painting]:
        """Repaint the white part of the mask from a prompt.

        Args:
            image, mask: PIL images or paths. A mask of another size is scaled if its shape
                matches.
            on_step: called with every Step.
            prompt and the others: see Settings.

        Raises:
            InputError: an argument, the image or the mask cannot be used.
            MinpaintError: the network's output is not finite.
        """
        settings = Settings(prompt, negative_prompt, steps, guidance, strength, sampler, eta, seed, count, profile)
        return self.paint(image, mask, settings, on_step)

    def paint(
        self,
        image: ImageSource,
        mask: ImageSource,
        settings: Settings,
        on_step: Callable[[Step], object] | None = None,
    ) -> list[Painting]:
        """The same call with its settings in one object."""
        job = self._job(image, mask, settings)
        latents = torch.empty(0)
        for step in self._denoise(job):
            latents = step.x
            if on_step is not None:
                on_step(step)
        return [
            Painting(self._decode(job, z), z.cpu().clone(), seed, len(job.schedule.timesteps))
            for z, seed in zip(latents, settings.seeds, strict=True)
        ]

    def steps(self, image: ImageSource, mask: ImageSource, prompt: str, **options: Any) -> Iterator[Step]:
        """The denoising loop as a generator of Steps, to be looked into.

        The options are those of the call, but for `on_step`. A step's x are the latents it ends
        with, [count, 4, y, x] float32, scaled as the UNet sees them; the last step's are the
        painting's.
        """
        return self._denoise(self._job(image, mask, Settings(prompt, **options)))

    def _job(self, image: ImageSource, mask: ImageSource, settings: Settings) -> Job:
        """Check all that can be wrong with a request before any work is done."""
        config = self.scheduler_config
        sampler = settings.sampler or config.sampler
        if settings.eta > 0 and sampler != "ddim":
            told = f"eta has no effect on the sampler {sampler}, only on ddim"
            warnings.warn(told, MinpaintWarning, stacklevel=4)
        warm_up = settings.sampler is None and sampler == "pndm" and not config.skip_prk_steps
        schedule = make_schedule(config, sampler, settings.steps, settings.strength, warm_up)
        image, mask = open_image(image, "image"), open_image(mask, "mask")
        canvas = make_canvas(image, mask, self.vae_config.factor, settings.profile)
        return Job(settings, canvas, sampler, schedule)

    @without_gradients
    def _denoise(self, job: Job) -> Iterator[Step]:
        """Text, encode, denoise. The order of the random draws is part of the contract."""
        canvas, schedule, settings = job.canvas, job.schedule, job.settings
        factor, inpainting = self.vae_config.factor, self.unet_config.in_channels == 9
        random = _Random(settings.seeds, (4, *(n // factor for n in canvas.hole.shape[2:])), self.device)
        hole = canvas.latent_hole(factor).to(self.device).expand(settings.count, -1, -1, -1)
        contexts = self._contexts(settings)
        watch = _Watch(self.dtype)

        picture = None
        if settings.strength < 1 or not inpainting:
            picture = self._encode(canvas.pixels, random)  # [n, 4, y, x]
        noise = random.normal()
        conditioning = None
        if inpainting:
            conditioning = torch.cat([hole, self._encode(canvas.masked_pixels, random)], dim=1)  # [n, 5, y, x]
        else:
            random.normal()  # the reference's draw for a masked picture that it then has no use for

        x, keep = noise, keep_nothing
        if picture is not None and settings.strength < 1:
            x = schedule.add_noise(picture, noise, schedule.timesteps[0])
        if picture is not None and not inpainting:
            keep = partial(_blend, picture, noise, hole, schedule)

        def model(x: Tensor, t: int) -> Tensor:
            inputs = x if conditioning is None else torch.cat([x, conditioning], dim=1)
            inputs = torch.cat([inputs] * (len(contexts) // len(x))).to(self.dtype)
            ts = torch.full((len(inputs),), t, device=self.device)
            output: Tensor = self.unet(inputs, ts, contexts).float()
            watch.look(output, t)
            if len(output) == len(x):
                return output
            without, with_prompt = output.chunk(2)
            guided: Tensor = without + settings.guidance * (with_prompt - without)
            return guided

        if job.sampler == "ddim":
            yield from ddim(model, x, schedule, settings.eta, random.normal, keep)
        elif job.sampler == "pndm":
            yield from pndm(model, x, schedule, keep)
        else:
            yield from dpmpp(model, x, schedule, keep)
        watch.report()

    def _contexts(self, settings: Settings) -> Tensor:
        """Prompt embeddings [n, 77, D]; with guidance [2n, 77, D], the negative ones first."""
        prompts = [settings.negative_prompt, settings.prompt] if settings.guidance > 1 else [settings.prompt]
        rows = torch.cat([encode_prompt(self.tokenizer, self.text_encoder, prompt) for prompt in prompts])
        if not bool(rows.isfinite().all()):
            raise MinpaintError(f"the text encoder gave NaN or infinity; {_way_out(self.dtype)}")
        return rows.to(self.dtype).repeat_interleave(settings.count, dim=0)

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
            told = f"the VAE's {part} overflowed in half precision; done again in float32"
            warnings.warn(told, MinpaintWarning, stacklevel=2)
            self.vae.float()
            try:
                out = call(x.to(self.device)).float()
            finally:
                self.vae.to(self.dtype)
        if not bool(out.isfinite().all()):
            raise MinpaintError(f"the VAE's {part} gave NaN or infinity; {_way_out(torch.float32)}")
        return out


class _Random:
    """One CPU generator a seed, so that a seed gives one picture on any device, in any batch."""

    def __init__(self, seeds: range, shape: tuple[int, ...], device: torch.device) -> None:
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
                raise MinpaintError(f"the UNet gave NaN or infinity at timestep {t}; {_way_out(self.dtype)}")
        self.seen.clear()


def _way_out(dtype: torch.dtype) -> str:
    return "the checkpoint is damaged" if dtype == torch.float32 else "use dtype fp32"


def _blend(picture: Tensor, noise: Tensor, hole: Tensor, schedule: Schedule, x: Tensor, t: int | None) -> Tensor:
    """Put the known part of the picture, noised to timestep t, around the hole (4-channel UNets).

    Avrahami et al. 2022, Blended latent diffusion (arXiv:2206.02779), section 4.1.
    """
    known = picture if t is None else schedule.add_noise(picture, noise, t)
    return (1 - hole) * known + hole * x


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise InputError(f"{name} must be a whole number from {least} up, not {value!r}")


def _check_number(name: str, value: Any, most: float) -> None:
    try:
        fits = not isinstance(value, (bool, str)) and 0 <= float(value) <= most and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        limits = f"a number from 0 to {most}" if math.isfinite(most) else "a finite number from 0 up"
        raise InputError(f"{name} must be {limits}, not {value!r}")
