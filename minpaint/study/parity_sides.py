"""What both sides compute, and minpaint's own side of it: its plain modules, called by the algorithm as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from minpaint import __version__
from minpaint.checkpoint.load import Checkpoint
from minpaint.engine.device import without_gradients
from minpaint.errors import InputError
from minpaint.inpaint import inpaint, seeded_noise
from minpaint.models.config import least_cells
from minpaint.models.networks import PlainNetworks
from minpaint.models.text import encode_prompt
from minpaint.picture.canvas import Canvas, reference_canvas
from minpaint.picture.image import to_image, to_unit
from minpaint.samplers import SAMPLERS, Step
from minpaint.schedule import Schedule, make_schedule
from minpaint.study.parity_record import (
    Call,
    Function,
    Inputs,
    Layer,
    Stage,
    named_modules,
    noise_floor,
    perturbed,
    record,
    relaid,
    relative_error,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What is computed: a picture of this size (drawn by `pictures`), painted from noise with a prompt.

    sampler: None for the checkpoint's own. noise: "torch" if the draws are those that minpaint makes
    from the seed (inpaint.seeded_noise); anything else if they have to be taken from the dump.
    """

    width: int
    height: int
    steps: int
    sampler: str | None = None
    seed: int = 0
    dtype: str = "fp32"
    guidance: float = 7.5
    prompt: str = "two dogs on a bench"
    negative_prompt: str = "blurry"
    noise: str = "torch"


@dataclass(frozen=True)
class Side:
    """One implementation with a checkpoint: what the stages call, the layers to look at, and a whole run.

    encode: [1, 3, Y, X] -> [1, 8, y, x], means and log variances. unet: (x, t, context) -> prediction.
    run: whole run as parity_dump describes; True perturbs it by rounding.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    modules: Mapping[str, nn.Module]
    embed: Callable[[str], Tensor]
    unet: Callable[[Tensor, Tensor, Tensor], object]
    run: Callable[[bool], Tensors]

    def call(self, stage: str, inputs: Inputs, prompt: str) -> None:
        """Run a stage on the inputs of its whole network."""
        if stage == "text":
            self.embed(prompt)
            return
        given = {role: value.to(self.device) for role, value in inputs.items() if isinstance(value, Tensor)}
        x = given["x"].to(self.dtype)
        if stage in ("encode", "decode"):
            self.modules[f"vae.{stage}"](x)
        else:
            self.unet(x, given["t"], given["context"].to(self.dtype))


def pictures(case: Case) -> tuple[Image.Image, Image.Image]:
    """The picture that is painted, with shades in all channels and some edges, and a mask with a disc."""
    size = case.width, case.height
    down = Image.linear_gradient("L").resize(size)
    picture = Image.merge(
        "RGB", (down, down.transpose(Image.Transpose.ROTATE_180), Image.radial_gradient("L").resize(size))
    )
    draw = ImageDraw.Draw(picture)
    draw.ellipse((size[0] // 2, size[1] // 8, size[0] * 7 // 8, size[1] // 2), fill=(220, 120, 40))
    draw.rectangle((size[0] // 16, size[1] // 2, size[0] // 3, size[1] * 7 // 8), fill=(30, 90, 160))
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), fill=255)
    return picture, mask


def open_canvas(checkpoint: Checkpoint, case: Case) -> Canvas:
    """What both sides see; InputError for a size that the model cannot paint."""
    vae = checkpoint.architecture.vae
    least = least_cells(checkpoint.architecture.unet, vae) * vae.factor
    if case.width % vae.factor or case.height % vae.factor or min(case.width, case.height) < least:
        raise InputError(f"size {case.width}x{case.height}: use multiples of {vae.factor} from {least} up")
    return reference_canvas(*pictures(case), vae.factor)


def open_schedule(checkpoint: Checkpoint, case: Case) -> tuple[str, Schedule, float]:
    """The sampler, its schedule and its eta, as a painter chooses them."""
    config = checkpoint.scheduler_config
    sampler = case.sampler or config.sampler
    warm_up = case.sampler is None and sampler == "pndm" and not config.skip_prk_steps
    eta = config.eta if case.sampler is None and sampler == "ddim" else 0.0
    return sampler, make_schedule(config, sampler, case.steps, runge_kutta=warm_up), eta


@without_gradients
def stages(side: Side, checkpoint: Checkpoint, case: Case) -> Iterator[Stage]:
    """All stages of one side on inputs of its own, with its noise floors; the run comes last.

    checkpoint: minpaint's, of which only the configurations are used.
    """
    canvas, (_, schedule, _) = open_canvas(checkpoint, case), open_schedule(checkpoint, case)
    unet, vae = checkpoint.architecture.unet, checkpoint.architecture.vae
    yield _stage(side, "text", {}, case)
    encoded = _stage(side, "encode", {"x": canvas.masked_pixels}, case)
    mean = encoded.layers[-1].output.chunk(2, dim=1)[0]
    yield encoded
    del encoded
    context = torch.cat([side.embed(case.negative_prompt), side.embed(case.prompt)])
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(2, unet.in_channels, case.height // vae.factor, case.width // vae.factor, generator=generator)
    for number, timestep in enumerate((schedule.timesteps[0], schedule.timesteps[-1])):
        t = torch.full((2,), round(timestep))
        yield _stage(side, f"unet {number}", {"x": x, "t": t, "context": context}, case)
    yield _stage(side, "decode", {"x": mean}, case)
    tensors, other = side.run(False), side.run(True)
    last = f"step.{count_steps(tensors) - 1}.latents"
    floors = {"run": relative_error(other[last], tensors[last])}
    floors["picture"] = relative_error(other["picture"], tensors["picture"])
    yield Stage("run", tensors=tensors, floors=floors)


def _stage(side: Side, name: str, inputs: Inputs, case: Case) -> Stage:
    calls: list[Call] = []
    record(side.modules, lambda: side.call(name, inputs, case.prompt), calls)
    floors = (noise_floor(call, call.inputs, call.output, side.dtype) for call in calls)
    return Stage(name, [Layer(call.name, call.inputs, call.output, next(floors)) for call in calls])


def count_steps(tensors: Mapping[str, Tensor]) -> int:
    """How many calls of the UNet a run has made."""
    return sum(name.startswith("step.") and name.endswith(".latents") for name in tensors)


def minpaint_side(checkpoint: Checkpoint, case: Case, device: torch.device, dtype: torch.dtype) -> Side:
    """The plain modules of a loaded checkpoint, moved to a device and a number format."""
    unet, vae = checkpoint.unet.to(device, dtype), checkpoint.vae.to(device, dtype)
    text_encoder = checkpoint.text_encoder.to(device, dtype)
    modules = {
        **named_modules(text_encoder, "text_encoder"),
        **named_modules(unet, "unet"),
        **{name: module for name, module in named_modules(vae, "vae").items() if name != "vae"},
        "vae.encode": Function(lambda x: torch.cat(vae.encode(x), dim=1)),
        "vae.decode": Function(lambda x: vae.decode(x)),
    }
    networks = PlainNetworks(unet, vae, text_encoder, checkpoint.tokenizer)
    return Side(
        f"minpaint {__version__}",
        dtype,
        device,
        modules,
        lambda prompt: encode_prompt(checkpoint.tokenizer, text_encoder, prompt),
        unet,
        lambda jitter: run_minpaint(checkpoint, case, Watched(networks, device, dtype, case, jitter=jitter)),
    )


class Watched:
    """Networks (models/networks.py) in a number format, which write down what they are asked and what they answer.

    seen: what was written down, under the names of parity_dump. answers: another run, whose networks'
    answers are given instead of computing any. jitter: perturb what goes in by rounding. draws: a run whose
    random draws are taken, if they are not those that minpaint makes from the seed.
    """

    def __init__(
        self,
        networks: PlainNetworks,
        device: torch.device,
        dtype: torch.dtype,
        case: Case,
        answers: Mapping[str, Tensor] | None = None,
        jitter: bool = False,
        draws: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.networks, self.device, self.dtype, self.case = networks, device, dtype, case
        self.answers, self.jitter, self.draws = answers, jitter, None if case.noise == "torch" else draws
        self.seen: Tensors = {}
        self.seeded = seeded_noise([case.seed])
        self.calls = self.encoded = self.drawn = 0

    def answer(self, name: str) -> Tensor:
        """A tensor of the other run in float32, perturbed if asked for."""
        assert self.answers is not None
        if name not in self.answers:
            raise InputError(f"the recorded run has no {name}, which this run asks for; record it with as many steps")
        tensor = self.answers[name].float()
        return perturbed(tensor, self.dtype) if self.jitter else tensor

    def embed(self, prompt: str) -> Tensor:
        if self.answers is not None:
            rows = self.answer("embeddings")
            return rows[-1:] if prompt == self.case.prompt else rows[:1]
        return self.networks.embed(prompt)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        name, self.encoded = f"encode.{self.encoded}", self.encoded + 1
        self.seen[f"{name}.pixels"] = pixels
        if self.answers is None:
            pixels = relaid(perturbed(pixels, self.dtype)) if self.jitter else pixels
            mean, logvar = (each.float() for each in self.networks.encode(pixels.to(self.device, self.dtype)))
        else:
            nearest = nearest_encoded(self.answers, pixels)
            mean, logvar = self.answer(f"{nearest}.mean"), self.answer(f"{nearest}.logvar")
        self.seen |= {f"{name}.mean": mean, f"{name}.logvar": logvar}
        return mean, logvar

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        name, self.calls = f"step.{self.calls}", self.calls + 1
        self.seen |= {f"{name}.x": x, f"{name}.t": t[:1].float(), f"{name}.context": context}
        if self.answers is None:
            x = relaid(perturbed(x, self.dtype)) if self.jitter else x
            output: Tensor = self.networks.unet(x.to(self.device, self.dtype), t, context).float()
        else:
            output = self.answer(f"{name}.output")
        self.seen[f"{name}.output"] = output
        return output

    def decode(self, latents: Tensor) -> Tensor:
        return self.networks.decode(latents.to(self.device, self.dtype)).float()

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """The next draw, from the seed or, if the other run has draws of its own, its next."""
        name, self.drawn = f"draw.{self.drawn}", self.drawn + 1
        if self.draws is not None and name not in self.draws:
            raise InputError(f"the recorded run has no {name}, which this run asks for; record all draws")
        self.seen[name] = self.seeded(shape) if self.draws is None else self.draws[name].float()
        drawn = self.seen[name]
        return (perturbed(drawn, self.dtype) if self.jitter else drawn).to(self.device)

    def sampler(self, sampler: Any) -> Any:
        """A sampler whose steps are written down; with answers each starts where the other run's did."""

        def watched(model: Any, x: Tensor, schedule: Schedule, eta: float, noise: Any, keep: Any) -> Iterator[Step]:
            def guided(x: Tensor, t: float) -> Tensor:
                output: Tensor = model(x, t)
                self.seen[f"step.{self.calls - 1}.guided"] = output
                return output

            def kept(x: Tensor, t: float | None) -> Tensor:
                name = f"step.{self.calls - 1}.latents"
                self.seen[name] = x = keep(x, t)
                return x if self.answers is None else self.answer(name).to(x.device)

            yield from sampler(guided, x, schedule, eta, noise, kept)

        return watched


def nearest_encoded(run: Mapping[str, Tensor], pixels: Tensor) -> str:
    """Which of a run's encoded pictures comes nearest to some pixels, as "encode.K"."""
    names = [name.removesuffix(".pixels") for name in run if name.endswith(".pixels")]
    if not names:
        raise InputError("the recorded run has no encode.0.pixels; record what is given to the VAE")
    return min(names, key=lambda name: relative_error(run[f"{name}.pixels"], pixels))


@without_gradients
def run_minpaint(checkpoint: Checkpoint, case: Case, networks: Watched) -> Tensors:
    """A whole run through the algorithm, as parity_dump describes it."""
    sampler, schedule, eta = open_schedule(checkpoint, case)
    unet, vae = checkpoint.architecture.unet, checkpoint.architecture.vae
    steps = inpaint(
        networks,
        open_canvas(checkpoint, case),
        case.prompt,
        schedule,
        networks.noise,
        sampler=networks.sampler(SAMPLERS[sampler]),
        eta=eta,
        negative_prompt=case.negative_prompt,
        guidance=case.guidance,
        in_channels=unet.in_channels,
        scaling_factor=vae.scaling_factor,
    )
    latents = [step.x for step in steps][-1]
    networks.seen["embeddings"] = torch.cat(
        [networks.embed(prompt).float() for prompt in (case.negative_prompt, case.prompt)]
    )
    networks.seen["picture"] = to_unit(to_image(networks.decode(latents / vae.scaling_factor)[0]))
    return networks.seen
