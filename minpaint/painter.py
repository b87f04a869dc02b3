"""A loaded checkpoint that paints: check a request, denoise its views, put them back into the picture."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from minpaint.checkpoint.load import TINY, Checkpoint, LoRAs, build, describe
from minpaint.checkpoint.tokenizer import TOY_WORLD, unknown_words
from minpaint.engine.budget import choose_budget
from minpaint.engine.calls import Request
from minpaint.engine.device import choose_device, choose_dtype, without_gradients
from minpaint.engine.run import Engine, Run
from minpaint.errors import InputError, MinpaintWarning
from minpaint.inpaint import inpaint, seeded_noise
from minpaint.models.config import least_cells
from minpaint.models.networks import Networks, PlainNetworks
from minpaint.picture.frame import Frame, open_frame
from minpaint.picture.image import ImageSource
from minpaint.picture.mask import area, reach_box
from minpaint.picture.seam import MEASURED, seam_error
from minpaint.picture.view import ReferenceView, View, choose_views
from minpaint.samplers import SAMPLERS, Step
from minpaint.schedule import Schedule, make_schedule
from minpaint.settings import Settings

if TYPE_CHECKING:
    from minpaint.study.watch import Attend, Patch, Seen

STEPS, STEPS_OF_LCM = 50, 4  # by default
GUIDANCE_OF_LCM = 2.0  # the most that its models, whose teacher was guided, take without burning the colours


@dataclass(frozen=True)
class Painting:
    """One result.

    image: the picture, in the size and mode of the input. latents: the final ones, float32 on
    the CPU, [4, y, x]; of the last view, where the picture was painted in several. seed: the one
    that paints this picture again. steps: network calls really made. seam: how much the hole's
    edge shows, in 8-bit levels (picture/seam.py).
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
    start: Image.Image  # the picture that the first view is painted into
    sampler: str
    schedule: Schedule
    request: Request


class Reached(NamedTuple):
    """How far a painting has come: a step, the view it belongs to, and the pictures that the view starts from.

    Those are the one picture that was given, or, after the first view, one for each painting.
    """

    step: Step
    view: View | ReferenceView
    pictures: list[Image.Image]


class Painter:
    """A loaded checkpoint that paints, one request at a time; made by `minpaint.load`.

    unet(x, t, context): [B, 4 or 9, y, x], [B], [B, 77, D] -> prediction [B, 4, y, x].
    vae.encode(pixels) -> (mean, logvar); vae.decode(latents) -> pixels; latents unscaled.
    text_encoder, tokenizer: transformers' CLIPTextModel and CLIPTokenizer.
    last_run: the last painting's run, with its plan and the memory it took.
    While it paints, its networks may be called by the thread that paints, and by no other.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, budget: int, fast: bool = False
    ) -> None:
        self.unet: nn.Module = checkpoint.unet
        self.vae = checkpoint.vae
        self.text_encoder = checkpoint.text_encoder
        self.tokenizer = checkpoint.tokenizer
        self.unet_config = checkpoint.architecture.unet
        self.vae_config = checkpoint.architecture.vae
        self.scheduler_config = checkpoint.scheduler_config
        self.name, self.files, self.loras = checkpoint.architecture.name, checkpoint.files, checkpoint.loras
        self._useless = checkpoint.ignored
        self.device, self.dtype = device, dtype
        self.engine = Engine(checkpoint, device, dtype, budget, fast)
        self.last_run: Run | None = None
        self.around: Callable[[Networks], Networks] = lambda networks: networks  # study/ sees every call through it
        self._turn = threading.Lock()  # held for a run, and let go by whichever thread drops unfinished steps
        self._painting_in: int | None = 0  # the thread that paints; None for steps, which any may take; 0 for none

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
            InputError: an argument, the image or the mask cannot be used, or the painter is
                painting already (see `steps`).
            BudgetError: the budget cannot hold the run; nothing has been done then.
            MinpaintError: the network's output is not finite.
        """
        settings = Settings(prompt, **options)
        return self.paint(open_frame(image, mask, settings), settings, on_step)

    def steps(self, image: ImageSource, mask: ImageSource | None, prompt: str, **options: Any) -> Iterator[Step]:
        """The denoising loop as a generator of Steps, to be looked into.

        The options are those of the call, but for `on_step`. A step's x are the latents it ends
        with, [count, 4, y, x] float32, scaled as the UNet sees them; the last step's are the
        painting's. A picture painted in several views gives the steps of each.

        From its first step to its last, or until it is closed or dropped, the painter paints nothing
        else: InputError. A call in another thread is different, it ends, and is waited for.
        """
        settings = Settings(prompt, **options)
        job = self.job(open_frame(image, mask, settings), settings)
        with self._run(job, threading.get_ident()):
            pass  # planned here too, so that a budget is refused now and not at the first step

        def steps() -> Iterator[Step]:
            with self._run(job, None) as networks:
                for reached in self._denoise(job, networks):
                    yield reached.step

        return steps()

    def paint(
        self, frame: Frame, settings: Settings, on_step: Callable[[Step], object] | None = None, saving: int = 0
    ) -> list[Painting]:
        """The same as the call, with its image and mask in one object and its settings in another.

        saving: bytes for each pixel that saving a painting takes (saving.SAVING), to be kept within the budget too.
        """
        job, calls = self.job(frame, settings, saving), 0
        with self._run(job, threading.get_ident()) as networks:
            for reached in self._denoise(job, networks):
                calls += 1
                if on_step is not None:
                    on_step(reached.step)
            pictures = self._composite(job, networks, reached)
        step, view, _ = reached
        del reached  # and with it the pictures that the last view started from
        paintings = []
        for latents, seed in zip(step.x, settings.seeds, strict=True):
            image, hole = view.complete(frame, pictures.pop(0))
            paintings.append(Painting(image, latents.cpu().clone(), seed, calls, seam_error(image, hole)))
        return paintings

    def watch(
        self, record: str | Sequence[str] = (), attend: Attend | None = None, patch: Mapping[str, Patch] | None = None
    ) -> AbstractContextManager[Seen]:
        """See into the UNet of all runs in a `with` statement, and change what it does (study/watch.py)."""
        from minpaint.study.watch import watch

        return watch(self, record, attend, patch)

    def complete(self, settings: Settings) -> Settings:
        """Settings with steps and eta: where they are not given, those of the sampler that will be used."""
        config = self.scheduler_config
        steps, eta = settings.steps, settings.eta
        if steps is None:
            steps = STEPS_OF_LCM if (settings.sampler or config.sampler) == "lcm" else STEPS
        if eta is None:
            eta = config.eta if settings.sampler is None else 0.0
        return replace(settings, steps=steps, eta=eta)

    def ignored(self, settings: Settings) -> list[str]:
        """What the checkpoint's files hold that has no effect on a run: settings of its sampler, keys of tensors."""
        return [*self._passed_over(settings), *self._useless]

    def _passed_over(self, settings: Settings) -> list[str]:
        """What a run's sampler makes of the checkpoint's scheduler where it cannot do what that says."""
        config = self.scheduler_config
        sampler, told = settings.sampler or config.sampler, []
        if settings.sampler is None and not config.exact:
            eta = " with eta 1" if config.eta else ""
            told.append(f"{config.class_name} is none of the samplers here; {sampler}{eta} comes nearest, and is taken")
        if fault := config.refused.get(sampler):  # the sampler was chosen all the same
            told.append(f"{fault}; {sampler} does without it")
        if others := config.ignored.get(sampler):
            told.append(f"scheduler_config.json: {sampler} takes no notice of {others}")
        return told

    def views(self, frame: Frame, settings: Settings) -> list[View | ReferenceView]:
        """The parts in which a picture will be painted, one after the other."""
        factor = self.vae_config.factor
        least = least_cells(self.unet_config, self.vae_config)
        return choose_views(frame, settings, self.unet_config.sample_size * factor, factor, least)

    def request(self, frame: Frame, settings: Settings, views: list[View | ReferenceView], saving: int = 0) -> Request:
        """What a painting in these views asks of memory: the largest of them decides."""
        width, height = max((view.extent for view in views), key=lambda extent: extent[0] * extent[1])
        started = settings.count if len(views) > 1 else 0
        return Request(
            width,
            height,
            settings.count,
            settings.guided,
            starts=max(started, 1),
            again=started > 0,
            steps=int((settings.steps or STEPS) * settings.strength),
            photo=frame.original.size,
            part=max(area(view.box) for view in views),
            seam=area(reach_box(frame.cover, MEASURED)),
            started=started,
            saving=saving,
        )

    def job(self, frame: Frame, settings: Settings, saving: int = 0) -> Job:
        """Check all that can be wrong with a request before any work is done."""
        config = self.scheduler_config
        settings = self.complete(settings)
        sampler = settings.sampler or config.sampler
        for told in self._passed_over(settings):
            _tell(told)
        if settings.eta and sampler != "ddim":
            _tell(f"eta has no effect on the sampler {sampler}, only on ddim")
        if sampler == "lcm" and settings.guidance > GUIDANCE_OF_LCM:
            _tell(f"guidance {settings.guidance:g} is much for lcm, whose models are guided already; try --guidance 1")
        if settings.fill != "original" and settings.strength == 1 and not settings.soft:
            _tell(f"fill {settings.fill} has no effect at strength 1, where the hole starts from noise alone")
        if self.name == TINY and (strange := unknown_words(self.tokenizer, settings.prompt)):
            _tell(f"the tiny model has no words for: {', '.join(strange)}; it knows {TOY_WORLD}")
        warm_up = settings.sampler is None and sampler == "pndm" and not config.skip_prk_steps
        schedule = make_schedule(config, sampler, settings.steps or STEPS, settings.strength, warm_up)
        views = self.views(frame, settings)
        request = self.request(frame, settings, views, saving)
        return Job(settings, frame, views, frame.begin(), sampler, schedule, request)

    @contextmanager
    def _run(self, job: Job, thread: int | None) -> Iterator[Networks]:
        """A job's run, planned now, once the painter is free: runs share networks and budget."""
        while not self._turn.acquire(timeout=0.1):
            if self._painting_in in (threading.get_ident(), None):
                raise InputError(
                    "the painter is painting already: finish or close() its steps() first, or load a second painter"
                )
        try:
            self._painting_in = thread
            networks = PlainNetworks(self.unet, self.vae, self.text_encoder, self.tokenizer)
            self.last_run = self.engine.run(job.request, networks)
            with self.last_run as run:
                yield self.around(run)
        finally:
            self._painting_in = 0
            self._turn.release()

    @without_gradients
    def _denoise(self, job: Job, networks: Networks) -> Iterator[Reached]:
        """The steps of all views; each view starts from what the ones before have painted."""
        settings, noise = job.settings, seeded_noise(job.settings.seeds)
        pictures, reached = [job.start], None
        for view in job.views:
            if reached is not None:
                pictures = self._composite(job, networks, reached)
            for step in inpaint(
                networks,
                view.canvas(pictures),
                settings.prompt,
                job.schedule,
                lambda shape: noise(shape).to(self.device),
                sampler=SAMPLERS[job.sampler],
                eta=settings.eta or 0.0,
                negative_prompt=settings.negative_prompt,
                guidance=settings.guidance,
                fill=view.fill(settings),
                blend=view.blends,
                in_channels=self.unet_config.in_channels,
                scaling_factor=self.vae_config.scaling_factor,
            ):
                reached = Reached(step, view, pictures)
                yield reached

    @without_gradients
    def _composite(self, job: Job, networks: Networks, reached: Reached) -> list[Image.Image]:
        """Decode what a view ended with, and put each painting into the picture it was painted from."""
        (step, view, pictures), finished = reached, []
        for number, latents in enumerate(step.x):
            pixels = networks.decode(latents[None] / self.vae_config.scaling_factor)[0]
            before = pictures[number if len(pictures) > 1 else 0]
            finished.append(view.finish(before, pixels, job.settings.color_match))
        return finished


def open_painter(
    model: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    budget: str | int | None,
    config: str | Path | None,
    fast: bool = False,
    vae: str | Path | None = None,
    lora: LoRAs = None,
) -> Painter:
    """`minpaint.load` for a single painting: weights are loaded for their phase and offloaded after it."""
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    size = choose_budget(budget, place)
    checkpoint = build(describe(model, number_format == torch.float16, config, vae, lora), place)
    return Painter(checkpoint, place, number_format, size, fast)


def _tell(line: str) -> None:
    warnings.warn(line, MinpaintWarning, stacklevel=4)
