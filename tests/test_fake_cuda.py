"""The program on a GPU that is not there: fake tensors say that they are on "cuda", and have no numbers.

Every phase, plan and sampler runs on them, through the painter and its engine. They refuse to mix with tensors of
another device; and to give a number to Python, or to be copied to the CPU, would let a real GPU wait, which must
not happen from step to step. What they cannot follow is left out, and named here: the search for NaN in weights,
which needs numbers; the canvas, which is made of pictures on the CPU and given to them ready; plans and noise
levels, which are no work for a GPU; Module.to; copies of streamed weights on a stream of their own; recorded
graphs; and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

import minpaint.inpaint
from minpaint.checkpoint.tensorfile import assign
from minpaint.engine import calls, run
from minpaint.engine.cuda import Buffer
from minpaint.engine.plan import PHASES, Planner
from minpaint.engine.residency import NetworkWeights
from minpaint.models.networks import PlainNetworks
from minpaint.painter import Painter
from minpaint.picture.canvas import Canvas
from minpaint.picture.view import View
from minpaint.samplers import SAMPLERS, ddim
from minpaint.schedule import alphas_cumprod
from minpaint.settings import SAMPLERS as NAMES

Folders = Callable[[str], Path]
MOST = 2**50
FAMILIES = {"small-sd1": torch.float16, "small-sd1-4ch": torch.bfloat16, "small-v": torch.float32}


class FakeGpu(TorchFunctionMode):
    """Moves tensors to a "cuda" that is not there, and counts as a fault what would wait for it in the loop.

    answers: what questions about numbers are answered with outside of the loop, such as "is all of it finite?".
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_loop = False
        self.answers: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fake = args and isinstance(args[0], FakeTensor) and args[0].device.type == "cuda"
        if func in (Tensor.to, Tensor.cpu):
            given = [*args[1:], *kwargs.values()]
            given += [each for x in given if isinstance(x, Tensor) for each in (x.device, x.dtype)]
            place = torch.device(next((x for x in given if isinstance(x, (str, torch.device))), args[0].device))
            if func is Tensor.cpu or place.type == "cpu":
                assert not (fake and self.in_loop), "a copy to the CPU in the loop waits for the GPU"
            elif place.type == "cuda":  # PyTorch's own asks the driver for the device
                dtype = next((x for x in given if isinstance(x, torch.dtype)), None)
                alike = args[0].device.type == "cuda" and dtype in (None, args[0].dtype)
                return args[0] if alike else torch.ops.aten._to_copy(args[0], device=place, dtype=dtype)
        if func in (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist):
            assert not (fake and self.in_loop), "a question about numbers in the loop waits for the GPU"
            if isinstance(args[0], FakeTensor):
                return (self.answers.pop(0) if self.answers else True) if func is Tensor.__bool__ else 1
        if func is Tensor.contiguous and fake and kwargs:
            return torch.ops.aten.clone(args[0], **kwargs)
        if func is Tensor.__getitem__ and fake:
            return part(args[0], args[1])
        if func is Tensor.__setitem__ and fake:
            return torch.ops.aten.copy_(part(args[0], args[1]), args[2])
        return func(*args, **kwargs)


def part(x: Tensor, index: Any) -> Tensor:
    """x[index] for tensors, or whole numbers, slices, None and "...": PyTorch's own asks the driver for the device."""
    entries, dim = index if isinstance(index, tuple) else (index,), 0
    if all(isinstance(entry, Tensor) for entry in entries):
        return torch.ops.aten.index(x, list(entries))
    if Ellipsis in entries:
        at, given = entries.index(Ellipsis), sum(entry is not None for entry in entries) - 1
        entries = (*entries[:at], *[slice(None)] * (x.dim() - given), *entries[at + 1 :])
    for entry in entries:
        if entry is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(entry, slice):
            start, stop, step = entry.indices(x.shape[dim])
            x, dim = torch.ops.aten.slice(x, dim, start, max(stop, start), step), dim + 1
        else:
            x = x.select(dim, entry)
    return x


class HostBuffer(Buffer):
    """A buffer whose bytes on the host are real, so that weights can be read into them; a fake has no use for them."""

    def __init__(self, size: int, device: torch.device, aside: bool = True) -> None:
        self.on_device = torch.empty(size, dtype=torch.uint8, device=device)
        with _disable_current_modes():
            self.on_host = torch.empty(size, dtype=torch.uint8)

    def copy(self, after: Any) -> None:
        pass


def with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose tensors are real ones on the CPU."""

    def called(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)

    return called


def convert(weights: NetworkWeights, dtype: torch.dtype) -> None:
    """NetworkWeights.convert without Module.to, which swaps tensors in a way that fakes do not allow."""
    for name in weights.directory if weights.resident else ():
        assign(weights.model, name, weights.model.get_parameter(name).to(dtype))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, checkpoint: Folders) -> Iterator[FakeGpu]:
    """A fake GPU, on which all that follows computes."""
    for family in (*FAMILIES, "small-sd2"):
        checkpoint(family)  # written with real numbers
    monkeypatch.setattr(NetworkWeights, "check", lambda *_: None)
    monkeypatch.setattr(run, "capped", lambda *_: nullcontext())
    monkeypatch.setattr(calls, "GraphReplay", lambda function, device: function)
    side = 64
    canvas = Canvas(torch.rand(1, 3, side, side), torch.ones(1, 1, side, side), torch.ones(1, 1, side // 8, side // 8))
    canvas.blanked[..., : side // 2], canvas.cells[..., : side // 16] = 0, 0
    monkeypatch.setattr("minpaint.schedule.alphas_cumprod", with_numbers(alphas_cumprod))
    for name in ("choose", "least", "phase", "order"):
        monkeypatch.setattr(Planner, name, with_numbers(getattr(Planner, name)))
    read = NetworkWeights._read
    monkeypatch.setattr(NetworkWeights, "_read", with_numbers(lambda *arguments: list(read(*arguments))))
    monkeypatch.setattr(NetworkWeights, "convert", convert)
    monkeypatch.setattr(View, "canvas", lambda *_: canvas)
    monkeypatch.setattr(View, "fill", lambda *_: "original")  # any other asks the picture on the CPU
    with FakeTensorMode(allow_non_fake_inputs=True), FakeGpu() as mode:
        yield mode


def on_gpu(
    folder: Path, gpu: FakeGpu, dtype: torch.dtype, budget: int, keeps: bool = False, fast: bool = False
) -> Painter:
    from minpaint.checkpoint.load import build, describe

    device = torch.device("cuda")
    painter = Painter(build(describe(folder), device), device, dtype, budget, fast)
    for weights in painter.engine.weights.values():
        weights.new_buffer = HostBuffer
    painter.engine.keeps = keeps
    return painter


def paint(painter: Painter, gpu: FakeGpu, picture: Image.Image, mask: Image.Image, **options: Any) -> int:
    """Take all steps of a painting; AssertionError or an error of PyTorch's where a real GPU would fail, or wait."""
    forward, seen = painter.unet.forward, 0

    def watched(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert {x.dtype, context.dtype} == {painter.dtype}
        assert {each.device.type for each in (x, t, context)} == {"cuda"}
        output: Tensor = forward(x, t, context)
        assert output.dtype == painter.dtype
        return output

    painter.unet.forward = watched  # type: ignore[method-assign]
    try:
        for step in painter.steps(picture, mask, "a dog", **options):
            seen += 1
            for latents in (step.x, step.x0, step.eps):
                assert (latents.device.type, latents.dtype) == ("cuda", torch.float32)
            gpu.in_loop = step.i < step.total - 1  # what comes after the last step may wait
    finally:
        gpu.in_loop = False
        painter.unet.forward = forward  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"strength": 1.0}, {"strength": 0.5, "eta": 0.5}, {"guidance": 1.0, "count": 2}], ids=str
)
@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=() if name == "ddim" else pytest.mark.slow) for name in NAMES]
)
def test_every_sampler_stays_on_the_gpu(
    checkpoint: Folders, gpu: FakeGpu, picture: Image.Image, mask: Image.Image, family: str, sampler: str, options: Any
) -> None:
    if "eta" in options and sampler != "ddim":
        options = {"strength": 0.5}
    painter = on_gpu(checkpoint(family), gpu, FAMILIES[family], MOST)
    assert paint(painter, gpu, picture, mask, sampler=sampler, steps=6, **options) >= 3


def plans(painter: Painter, request: Any) -> dict[str, int]:
    """Budgets that make plans that differ, by what the plans say."""
    planner, base = painter.engine.planner(), painter.engine.base
    least, most = planner.least(request, base), planner.choose(request, MOST, base).peak
    found = {}
    for share in (0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2):
        budget = int(least + share * (most - least))
        found.setdefault(planner.choose(request, budget, base).table(), budget)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("fast", "keeps"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_phase_of_every_plan_stays_on_the_gpu(
    checkpoint: Folders, gpu: FakeGpu, dtype: torch.dtype, fast: bool, keeps: bool
) -> None:
    probe = on_gpu(checkpoint("small-sd2"), gpu, dtype, MOST, keeps, fast)
    request = calls.Request(128, 128, count=2, again=keeps)
    budgets, seen = plans(probe, request), set()
    for budget in budgets.values():
        painter = on_gpu(checkpoint("small-sd2"), gpu, dtype, budget, keeps, fast)
        networks = PlainNetworks(painter.unet, painter.vae, painter.text_encoder, painter.tokenizer)
        with painter.engine.run(request, networks) as running:
            seen |= {phase.how for phase in running.plan.phases.values()}
            context = torch.cat([running.embed(""), running.embed("a dog")]).repeat_interleave(2, dim=0)
            assert (context.device.type, context.dtype) == ("cuda", dtype)
            mean, logvar = running.encode(torch.rand(1, 3, 128, 128))
            assert {(x.device.type, x.dtype) for x in (mean, logvar)} == {("cuda", torch.float32)}
            x = torch.cat([mean.new_empty(4, 5, 16, 16), mean.expand(4, -1, -1, -1)], dim=1)
            gpu.in_loop = True
            for t in (999, 500, 1):
                output = running.unet(x, x.new_full((4,), t), context)
                assert (output.device.type, output.dtype, tuple(output.shape)) == (
                    "cuda",
                    torch.float32,
                    (4, 4, 16, 16),
                )
            gpu.in_loop = False
            pixels = running.decode(mean)
            assert (pixels.device.type, pixels.dtype, tuple(pixels.shape)) == ("cpu", torch.float32, (1, 3, 128, 128))
    words = " | ".join(seen)
    assert len(budgets) >= 4
    if not keeps:
        for word in ("streamed", "bands", "1 row at a time"):
            assert word in words
    assert ("accelerated" in words) == fast


def test_a_vae_that_overflows_is_computed_again_in_float32(checkpoint: Folders, gpu: FakeGpu) -> None:
    painter = on_gpu(checkpoint("small-sd1"), gpu, torch.float16, MOST)
    networks = PlainNetworks(painter.unet, painter.vae, painter.text_encoder, painter.tokenizer)
    with painter.engine.run(calls.Request(64, 64), networks) as running:
        gpu.answers = [False, True]
        with pytest.warns(minpaint.errors.MinpaintWarning, match="encoder overflowed"):
            mean, _ = running.encode(torch.rand(1, 3, 64, 64))
        assert (mean.device.type, mean.dtype) == ("cuda", torch.float32)
    assert {weight.dtype for weight in painter.vae.encoder.parameters()} == {torch.float16}


def test_what_a_faster_form_raises_is_caught_once_and_the_plain_form_goes_on(
    checkpoint: Folders, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, picture: Image.Image, mask: Image.Image
) -> None:
    def broken(function: Any, device: Any) -> Any:
        def replay(*_: Tensor) -> Tensor:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        return replay

    monkeypatch.setattr(calls, "GraphReplay", broken)
    painter = on_gpu(checkpoint("small-sd1"), gpu, torch.float16, MOST, keeps=True, fast=True)
    with pytest.warns(minpaint.errors.MinpaintWarning, match="--fast failed on cuda .*not permitted") as told:
        assert paint(painter, gpu, picture, mask, sampler="ddim", steps=3) == 3
    assert len(told) == 1
    assert not any(phase.strategy.fast for phase in painter.last_run.plan.phases.values())  # type: ignore[union-attr]
    assert paint(painter, gpu, picture, mask, sampler="ddim", steps=3) == 3  # and is not tried again


def test_the_default_on_a_gpu_is_the_plain_form(checkpoint: Folders, gpu: FakeGpu) -> None:
    for fast in (False, True):
        planner = on_gpu(checkpoint("small-sd1"), gpu, torch.float16, MOST, fast=fast).engine.planner()
        phases = planner.choose(calls.Request(64, 64), MOST, 0).phases
        assert set(phases) == set(PHASES)
        special = [phase.name for phase in phases.values() if phase.strategy.fast or phase.cached or phase.split]
        assert special == (["denoise"] if fast else [])


# Faults that are planted must be found -------------------------------------------------------------


def latents_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    before = minpaint.inpaint.seeded_noise
    patch.setattr("minpaint.painter.seeded_noise", lambda seeds: lambda shape: StaysOnTheCpu(before(seeds)(shape)))


class StaysOnTheCpu:
    """Noise that takes no notice of where it is sent."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def to(self, *_: Any) -> Tensor:
        return self.noise


def a_number_asked_for_in_the_sampler(patch: pytest.MonkeyPatch) -> None:
    def nosy(*arguments: Any) -> Iterator[Any]:
        for step in ddim(*arguments):
            if step.x.abs().max() < 100:
                yield step

    patch.setitem(SAMPLERS, "ddim", nosy)


def a_copy_to_the_cpu_in_the_sampler(patch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Iterator[Any]:
        for step in ddim(*arguments):
            yield step._replace(x=step.x.cpu().to("cuda"))

    patch.setitem(SAMPLERS, "ddim", slow)


def prompts_in_float32(patch: pytest.MonkeyPatch) -> None:
    before = run.Run.embed
    patch.setattr(run.Run, "embed", lambda self, prompt: before(self, prompt).float())


def outputs_checked_at_every_step(patch: pytest.MonkeyPatch) -> None:
    before = run.Run.unet

    def unet(self: run.Run, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        output = before(self, x, t, context)
        self._check_steps()
        return output

    patch.setattr(run.Run, "unet", unet)


def timesteps_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    before = run.Run.unet
    patch.setattr(run.Run, "unet", lambda self, x, t, context: before(self, x, torch.ones(len(t)), context))


FAULTS = {  # and what finding them says
    latents_on_the_cpu: "on the same device|'cpu'",
    a_number_asked_for_in_the_sampler: "a question about numbers in the loop",
    a_copy_to_the_cpu_in_the_sampler: "a copy to the CPU in the loop",
    prompts_in_float32: "float32",
    outputs_checked_at_every_step: "a question about numbers in the loop",
    timesteps_on_the_cpu: "on the same device|'cpu'",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(
    checkpoint: Folders,
    gpu: FakeGpu,
    picture: Image.Image,
    mask: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
) -> None:
    painter = on_gpu(checkpoint("small-sd1"), gpu, torch.float16, MOST)
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[plant]):
        paint(painter, gpu, picture, mask, sampler="ddim", steps=4)
