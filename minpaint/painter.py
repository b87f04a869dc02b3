"""Inpainting, top to bottom: text, encode, denoise, decode, composite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minpaint.checkpoint.load import Checkpoint, build, describe
from minpaint.engine.memory import choose_budget, choose_device, choose_dtype, without_gradients
from minpaint.engine.plan import Request
from minpaint.engine.run import Machine, Run
from minpaint.errors import MinpaintError, MinpaintWarning
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.image import ImageSource
from minpaint.picture.mask import reach_box
from minpaint.picture.seam import NEIGHBOURHOOD, seam_error
from minpaint.picture.view import ReferenceView, View, choose_views
from minpaint.samplers import Step, ddim, dpmpp, keep_nothing, pndm
from minpaint.schedule import Schedule, make_schedule
from minpaint.settings import Settings


@dataclass(frozen=True)
class Painting:
    """One result.

    image: the picture, in the size and mode of the input. latents: the final ones, float32 on
    the CPU, [4, y, x]; of the last part, where the picture was painted in parts. seed: the one
    that paints this picture again. steps: network calls really made. seam: how much the hole's
    edge shows, in 8-bit levels (seam.seam_error).
    """

    image: Image.Image
    latents: Tensor
    seed: int
    steps: int
    seam: float


@dataclass(frozen=True)
class Job:
    """One checked request: the settings, and what they mean for this picture and checkpoint."""

    settings: Settings
    frame: Frame
    views: list[View | ReferenceView]
    sampler: str
    schedule: Schedule
    run: Run


class Painter:
    """A loaded checkpoint that paints; made by `minpaint.load`.

    unet(x, t, context): [B, 4 or 9, y, x], [B], [B, 77, D] -> prediction [B, 4, y, x].
    vae.encode(pixels) -> (mean, logvar); vae.decode(latents) -> pixels; latents unscaled.
    text_encoder, tokenizer: transformers' CLIPTextModel and CLIPTokenizer.
    last_run: with its plan and the memory it took, of the last painting.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, budget: int) -> None:
        self.unet: nn.Module = checkpoint.unet
        self.vae = checkpoint.vae
        self.text_encoder = checkpoint.text_encoder
        self.tokenizer = checkpoint.tokenizer
        self.unet_config = checkpoint.architecture.unet
        self.vae_config = checkpoint.architecture.vae
        self.scheduler_config = checkpoint.scheduler_config
        self.name = checkpoint.architecture.name
        self.device = device
        self.dtype = dtype
        self.machine = Machine(checkpoint, device, dtype, budget)
        self.last_run: Run | None = None

    def __call__(
        self,
        image: ImageSource,
        mask: ImageSource | None,
        prompt: str,
        *,
        on_step: Callable[[Step], object] | None = None,
        **options: Any,
    ) -> list[Painting]:
        """Repaint the white part of the mask from a prompt.

        Args:
            image, mask: PIL images or paths. A mask of another size is scaled if its shape
                matches; None repaints the image's transparent part, or what `expand` adds.
            on_step: called with every Step.
            options: negative_prompt, steps, guidance, seed, count, ... : the fields of Settings.

        Raises:
            InputError: an argument, the image or the mask cannot be used.
            BudgetError: the budget cannot hold the run; nothing has been done then.
            MinpaintError: the network's output is not finite.
        """
        settings = Settings(prompt, **options)
        return self.paint(open_frame(image, mask, settings), settings, on_step)

    def paint(
        self, frame: Frame, settings: Settings, on_step: Callable[[Step], object] | None = None
    ) -> list[Painting]:
        """The same call with its image and mask in one object, and its settings in another."""
        job = self._job(frame, settings)
        steps, calls = self._run(job), 0
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                pictures, latents = end.value
                break
            calls += 1
            if on_step is not None:
                on_step(step)
        with closing(job.run):
            pictures = self._composite(job, job.views[-1], pictures, latents)
        return [
            self._painting(job, picture, z, seed, calls)
            for picture, z, seed in zip(pictures, latents, settings.seeds, strict=True)
        ]

    def steps(self, image: ImageSource, mask: ImageSource | None, prompt: str, **options: Any) -> Iterator[Step]:
        """The denoising loop as a generator of Steps, to be looked into.

        The options are those of the call, but for `on_step`. A step's x are the latents it ends
        with, [count, 4, y, x] float32, scaled as the UNet sees them; the last step's are the
        painting's. A picture painted in parts gives the steps of each.
        """
        settings = Settings(prompt, **options)
        return self._run(self._job(open_frame(image, mask, settings), settings))

    def views(self, frame: Frame, settings: Settings) -> list[View | ReferenceView]:
        """The parts in which a picture will be painted, one after the other."""
        factor = self.vae_config.factor
        return choose_views(frame, settings, self.unet_config.sample_size * factor, factor)

    def _job(self, frame: Frame, settings: Settings) -> Job:
        """Check all that can be wrong with a request before any work is done."""
        config = self.scheduler_config
        sampler = settings.sampler or config.sampler
        if settings.eta > 0 and sampler != "ddim":
            _tell(f"eta has no effect on the sampler {sampler}, only on ddim")
        if settings.fill != "original" and settings.strength == 1 and not settings.soft:
            _tell(f"fill {settings.fill} has no effect at strength 1, where the hole starts from noise alone")
        warm_up = settings.sampler is None and sampler == "pndm" and not config.skip_prk_steps
        schedule = make_schedule(config, sampler, settings.steps, settings.strength, warm_up)
        views = self.views(frame, settings)
        run = Run(self.machine, self.request(frame, settings, views), self)
        return Job(settings, frame, views, sampler, schedule, run)

    def request(self, frame: Frame, settings: Settings, views: list[View | ReferenceView]) -> Request:
        """What a painting in these parts asks of memory: the largest of them decides."""
        width, height = max((view.extent for view in views), key=lambda extent: extent[0] * extent[1])
        pixels = frame.original.width * frame.original.height
        parts = len(views) > 1
        starts, again = settings.count if parts else 1, parts or self.machine.settled
        steps = int(settings.steps * settings.strength)
        return Request(width, height, settings.count, settings.guided, starts, pixels, again, steps)

    @without_gradients
    def _run(self, job: Job) -> Generator[Step, None, tuple[list[Image.Image], Tensor]]:
        """View after view. Ends with the pictures that the last view starts from, and its latents."""
        self.last_run = job.run
        contexts, random = self._contexts(job), _Random(job.settings.seeds, self.device)
        pictures, latents = [job.frame.begin()], torch.empty(0)
        with closing(job.run):
            for number, view in enumerate(job.views):
                if number > 0:
                    pictures = self._composite(job, job.views[number - 1], pictures, latents)
                for step in self._denoise(job, view, pictures, contexts, random):
                    latents = step.x
                    yield step
        return pictures, latents

    def _denoise(
        self, job: Job, view: View | ReferenceView, pictures: list[Image.Image], contexts: Tensor, random: _Random
    ) -> Iterator[Step]:
        """Encode, denoise. The order of the random draws is part of the contract."""
        schedule, settings = job.schedule, job.settings
        inpainting, canvas, fill = self.unet_config.in_channels == 9, view.canvas(pictures), view.fill(settings)
        cells = canvas.cells.to(self.device).expand(settings.count, -1, -1, -1)
        normal = partial(random.normal, (4, *cells.shape[2:]))
        watch = _Watch(self.dtype)

        # what the steps start from, and what they leave around the hole; [n, 4, y, x]
        picture = None
        if settings.strength < 1 or not inpainting:
            picture = self._encode(job, canvas.filled(fill), normal())
        noise = normal()
        conditioning = None
        if inpainting:
            masked = self._encode(job, canvas.masked_pixels, normal())
            conditioning = torch.cat([(cells > 0).float(), masked], dim=1)  # [n, 5, y, x]
        else:
            normal()  # the reference's draw for a masked picture that it then has no use for
        if picture is None and view.blends and bool((cells < 1).any()):
            picture = self._encode(job, canvas.filled(fill))
        if picture is not None and fill == "noise":
            picture = torch.where(cells > 0, normal(), picture)

        x, keep = noise, keep_nothing
        if picture is not None and settings.strength < 1:
            x = schedule.add_noise(picture, noise, schedule.timesteps[0])
        if picture is not None and (view.blends or not inpainting):
            keep = partial(_blend, picture, noise, cells, schedule)

        def model(x: Tensor, t: int) -> Tensor:
            inputs = x if conditioning is None else torch.cat([x, conditioning], dim=1)
            ts = torch.full((len(x),), t, device=self.device)
            output = job.run.unet(inputs, ts, contexts)
            watch.look(output, t)
            if len(output) == len(x):
                return output
            without, with_prompt = output.chunk(2)
            guided: Tensor = without + settings.guidance * (with_prompt - without)
            return guided

        if job.sampler == "ddim":
            yield from ddim(model, x, schedule, settings.eta, normal, keep)
        elif job.sampler == "pndm":
            yield from pndm(model, x, schedule, keep)
        else:
            yield from dpmpp(model, x, schedule, keep)
        watch.report()

    def _contexts(self, job: Job) -> Tensor:
        """Prompt embeddings [n, 77, D]; with guidance [2n, 77, D], the negative ones first."""
        settings = job.settings
        prompts = [settings.negative_prompt, settings.prompt] if settings.guided else [settings.prompt]
        rows = torch.cat([job.run.embed(prompt) for prompt in prompts])
        if not bool(rows.isfinite().all()):
            raise MinpaintError(f"the text encoder gave NaN or infinity; {_way_out(self.dtype)}")
        return rows.to(self.dtype).repeat_interleave(settings.count, dim=0)

    def _encode(self, job: Job, pixels: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Scaled latents [n, 4, y, x]: the VAE's posterior at a standard normal draw, or its mean."""
        mean, logvar = self._vae(job.run.encode, pixels, "encoder").chunk(2, dim=1)
        sample = mean + torch.exp(0.5 * logvar) * noise
        return self.vae_config.scaling_factor * sample

    @without_gradients
    def _composite(
        self, job: Job, view: View | ReferenceView, pictures: list[Image.Image], latents: Tensor
    ) -> list[Image.Image]:
        """Decode one part, [n, 4, y, x], and put it into the pictures it was painted from."""
        finished = []
        for number, z in enumerate(latents):
            pixels = self._vae(job.run.decode, z[None] / self.vae_config.scaling_factor, "decoder")[0]
            before = pictures[number if len(pictures) > 1 else 0]
            finished.append(view.finish(before, pixels, job.settings.color_match))
        return finished

    def _painting(self, job: Job, picture: Image.Image, latents: Tensor, seed: int, calls: int) -> Painting:
        picture, hole = job.views[-1].complete(job.frame, picture)
        box = reach_box(hole, 2 * NEIGHBOURHOOD)
        return Painting(picture, latents.cpu().clone(), seed, calls, seam_error(picture.crop(box), hole.crop(box)))

    def _vae(self, call: Callable[[Tensor, torch.dtype], Tensor], x: Tensor, part: str) -> Tensor:
        """A VAE pass, redone in float32 altogether if half precision overflows."""
        out = call(x, self.dtype)
        if self.dtype != torch.float32 and not bool(out.isfinite().all()):
            told = f"the VAE's {part} overflowed in half precision; done again in float32"
            warnings.warn(told, MinpaintWarning, stacklevel=2)
            out = call(x, torch.float32)
        if not bool(out.isfinite().all()):
            raise MinpaintError(f"the VAE's {part} gave NaN or infinity; {_way_out(torch.float32)}")
        return out


class _Random:
    """One CPU generator a seed, so that a seed gives one picture on any device, in any batch."""

    def __init__(self, seeds: range, device: torch.device) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.device = device

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 [n, *shape]: the next draw of every generator."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)


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


def _blend(picture: Tensor, noise: Tensor, cells: Tensor, schedule: Schedule, x: Tensor, t: int | None) -> Tensor:
    """Put the known part of the picture, noised to timestep t, around the hole.

    Avrahami et al. 2022, Blended latent diffusion (arXiv:2206.02779), section 4.1. A cell that
    is painted only partly is let go when no more than that part of the run is left
    (differential diffusion, Levin & Fried 2023, arXiv:2306.00950, algorithm 1).
    """
    known = picture if t is None else schedule.add_noise(picture, noise, t)
    left = 0 if t is None else sum(later <= t for later in schedule.timesteps) / len(schedule.timesteps)
    return torch.where((cells > left) | (cells == 1), x, known)


def open_painter(
    model: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    budget: str | int | None,
    config: str | Path | None,
) -> Painter:
    """`minpaint.load` for a single painting: the weights come for their phase, and go."""
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    size = choose_budget(budget, place)
    checkpoint = build(describe(model, number_format == torch.float16, config), place)
    return Painter(checkpoint, place, number_format, size)


def _tell(line: str) -> None:
    warnings.warn(line, MinpaintWarning, stacklevel=4)
