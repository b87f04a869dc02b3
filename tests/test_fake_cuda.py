"""The program on a GPU that is not there: fake tensors say that they are on one, and have no numbers.

The painter itself is called, and everything from the prompt to the decoded pixels runs on such tensors.
They refuse to mix with tensors of another device. Inside the denoising loop whatever makes the host wait for
the GPU fails here, too. What fake tensors cannot follow is replaced below, by the function that says why:

- values: whether weights are finite (tests/test_bad_weights.py looks at real ones), and the finished pictures;
- streams of CUDA and recorded graphs, which need the driver (tests/test_residency.py and tests/test_fast.py
  follow them with stand-ins); the streamed weights themselves are read by their thread and copied as always.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import largest_level_difference, make_mask, make_picture, relative_error
from folders import edit
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import minpaint
import minpaint.engine.calls
import minpaint.engine.fast
import minpaint.engine.run
import minpaint.models.unet
import minpaint.painter
from minpaint.checkpoint.load import build, describe
from minpaint.checkpoint.tensorfile import assign
from minpaint.engine.calls import Request
from minpaint.engine.cuda import Buffer
from minpaint.engine.device import outside_inference
from minpaint.engine.plan import PHASES, STREAMED, Plan, Planner
from minpaint.engine.residency import NetworkWeights
from minpaint.engine.run import Run
from minpaint.errors import MinpaintError, MinpaintWarning
from minpaint.painter import Painter, Painting
from minpaint.picture.canvas import Canvas
from minpaint.picture.view import ReferenceView, View
from minpaint.samplers import SAMPLERS, Step
from minpaint.schedule import Schedule

Folders = Callable[[str], Path]
CUDA = torch.device("cuda", 0)
KINDS = {"cuda": 1, "xpu": 12, "mps": 13}  # c10/core/DeviceType.h
META = 14
aten = torch.ops.aten
QUESTIONS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)  # of a number
UNLIMITED = 2**50


class HostSyncError(Exception):
    """The host would wait for the GPU inside the denoising loop."""


class Watch(TorchDispatchMode):
    """Fails where the host would wait for a GPU inside the denoising loop, and answers questions outside of it.

    answers: to the next questions for a truth value; "yes" when there are none left. dtypes: of all tensors that
    were made, with the kind of device that they are on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.looping, self.fake = False, FakeTensorMode(allow_non_fake_inputs=True)
        self.answers: list[bool] = []
        self.dtypes: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_gpu = any(isinstance(x, Tensor) and x.device.type in KINDS for x in tree_leaves((args, kwargs)))
        if func in QUESTIONS and (on_gpu or args[0].dtype == torch.bool):
            if on_gpu and self.looping:
                raise HostSyncError("for a number")
            assert args[0].dtype == torch.bool, "there are no numbers to give"
            return self.answers.pop(0) if self.answers else True
        if func is aten.scaled_dot_product_attention.default:  # asks the GPU's own library which kernel it has
            assert len({(x.device, x.dtype) for x in args[:3]}) == 1
            return args[0].new_empty((*args[0].shape[:-1], args[2].shape[-1]))
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if on_gpu and self.looping and any(x.device.type == "cpu" for x in made):
            raise HostSyncError("for a copy")
        self.dtypes |= {(x.device.type, x.dtype) for x in made}
        return out

    def __call__(self, work: Callable[[], Any]) -> Any:
        """The result of work on fake tensors."""
        with self.fake, self:
            return work()

    def _fake(self, x: Tensor) -> Tensor:
        """A tensor as a fake one, which also a picture's becomes when it is computed with."""
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def loop(self, sampler: Callable[..., Iterator[Step]]) -> Callable[..., Iterator[Step]]:
        """A sampler whose body, with all that it calls, is the inside of the loop."""

        def steps(*args: Any, **kwargs: Any) -> Iterator[Step]:
            inner = sampler(*args, **kwargs)
            while True:
                self.looping = True
                try:
                    step = next(inner, None)
                finally:
                    self.looping = False
                if step is None:
                    return
                yield step

        return steps


class RealHost(Buffer):
    """A buffer without a stream whose bytes on the host are real, so that a thread can read a file into them."""

    def __init__(self, size: int, device: torch.device, aside: bool = True) -> None:
        super().__init__(size, device, aside=False)
        with _disable_current_modes():
            self.on_host = torch.empty(size, dtype=torch.uint8)

    def copy(self, after: Any) -> None:
        """Nothing: fake tensors have no bytes, and belong to one thread."""


@pytest.fixture
def device_guards() -> Iterator[None]:
    """Let a PyTorch without GPUs slice and index fake tensors of them, as one with CUDA does.

    Before such an operation PyTorch looks for what selects the tensor's device, and a build for the CPU has
    that for two devices only. That of the meta device does nothing, and does for the others.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        pytest.skip("PyTorch's table of devices is not where it is on Linux")
    before = {number: guards[number] for number in KINDS.values()}
    for number in before:
        guards[number] = guards[number] or guards[META]
    yield
    for number, guard in before.items():
        guards[number] = guard


def unfaked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works on tensors that are not fake."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def finish(view: View | ReferenceView, picture: Image.Image, painted: Tensor, match: bool) -> Image.Image:
    """View.finish of pixels that have no numbers to be put into a picture."""
    width, height = view.extent
    assert (painted.device.type, painted.dtype, painted.shape) == ("cpu", torch.float32, (3, height, width))
    return picture


@outside_inference
def convert(self: NetworkWeights, dtype: torch.dtype) -> None:
    """NetworkWeights.convert, of fake weights: Module.to changes a parameter in place, which they do not allow."""
    if dtype != self.resident_dtype and self.stream is None:
        self.resident_dtype = dtype
        for name in self.resident:
            assign(self.model, name, self.model.get_parameter(name).to(dtype))
        self.resident = self._versions(self.resident)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, device_guards: None) -> Iterator[Watch]:
    """All tensors are fake in `watch(work)`, but for those of plans, which have a device of their own, and pictures."""
    watch, read, check = Watch(), NetworkWeights._read, NetworkWeights.check
    real = [(Painter, "job"), (View, "canvas"), (Canvas, "filled"), (NetworkWeights, "put_on_meta")]
    for owner, name in [*real, (Planner, "_measure"), (Planner, "order")]:
        monkeypatch.setattr(owner, name, unfaked(getattr(owner, name)))
    monkeypatch.setattr(View, "finish", finish)
    monkeypatch.setattr(ReferenceView, "finish", finish)
    monkeypatch.setattr(ReferenceView, "complete", unfaked(ReferenceView.complete))
    monkeypatch.setattr(NetworkWeights, "convert", convert)
    monkeypatch.setattr(minpaint.painter, "seam_error", lambda *_: 0.0)
    monkeypatch.setattr(NetworkWeights, "_read", lambda *args: iter(unfaked(list)(read(*args))))
    # whether weights are finite: the real ones, on the host, are looked at, and the others have no numbers
    monkeypatch.setattr(
        NetworkWeights, "check", lambda *args: None if isinstance(args[2], FakeTensor) else unfaked(check)(*args)
    )
    monkeypatch.setattr(minpaint.engine.calls, "GraphReplay", lambda function, device: function)
    monkeypatch.setattr(minpaint.engine.run, "capped", lambda *_: nullcontext())  # asks the driver
    for name, sampler in list(SAMPLERS.items()):
        monkeypatch.setitem(SAMPLERS, name, watch.loop(sampler))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # where a weight is, not what
        warnings.simplefilter("error", MinpaintWarning)  # a fault that a run gets over is one, too
        yield watch


class Chosen(Planner):
    """A planner that takes the way of a certain number for every phase, however much memory there is.

    number: counts the ways from the fastest, round again for a phase that has fewer. streamed: with as few
    weights resident as possible.
    """

    number, streamed = 0, False

    def choose(self, request: Request, budget: int, base: int) -> Plan:
        phases = {}
        for name in PHASES:
            ways = list(self._strategies(name, request, caches=not self.streamed))
            room = 0 if self.streamed and PHASES[name] in STREAMED else None
            phases[name] = self._phase(name, request, ways[self.number % len(ways)], 0, base, room)
        return Plan(budget, base, phases)


def open_fake(
    watch: Watch, folder: Path, dtype: torch.dtype = torch.float16, device: torch.device = CUDA, fast: bool = False
) -> Painter:
    """A painter on a GPU that is not there."""
    checkpoint = watch(lambda: build(describe(folder), device))
    painter = Painter(checkpoint, device, dtype, UNLIMITED, fast)
    for weights in painter.engine.weights.values():
        weights.new_buffer = RealHost
    return painter


def choose(painter: Painter, number: int, streamed: bool = False) -> None:
    """Let a painter take the way of a certain number, with attention that keeps its scores."""
    engine, dtype = painter.engine, painter.dtype
    planner = Chosen(engine.checkpoint.architecture, painter.device, dtype, fused=False, fast=engine.fast)
    planner.number, planner.streamed = number, streamed
    engine.planners[dtype] = planner


def paint(watch: Watch, painter: Painter, picture: Image.Image, mask: Image.Image, **options: Any) -> list[Painting]:
    """Paint, and look at everything that goes into the UNet and comes out of a step."""
    forward, calls = painter.unet.forward, 0

    def watched(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert (x.dtype, context.dtype, t.dtype) == (painter.dtype, painter.dtype, torch.float32)
        assert {x.device, t.device, context.device} == {painter.device}
        return forward(x, t, context)

    def look(step: Step) -> None:
        for each in (step.x, step.x0, step.eps):
            assert (each.device, each.dtype) == (painter.device, torch.float32)

    painter.unet.forward = watched  # type: ignore[method-assign]
    try:
        paintings: list[Painting] = watch(lambda: painter(picture, mask, "a dog", on_step=look, **options))
    finally:
        del painter.unet.forward
    assert calls > 0
    assert all(painting.latents.device.type == "cpu" for painting in paintings)
    return paintings


def warnings_of(*args: Any, **kwargs: Any) -> list[str]:
    """What is said while something is painted, instead of failing at it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", MinpaintWarning)
        paint(*args, **kwargs)
    return [str(warning.message) for warning in told if isinstance(warning.message, MinpaintWarning)]


OPTIONS: list[dict[str, Any]] = [
    {"sampler": "ddim", "eta": 0.5, "strength": 0.7, "steps": 3},
    {"sampler": "pndm", "steps": 2, "count": 2},
    {"sampler": "dpmpp", "steps": 2, "guidance": 1.0},
]


def test_no_sampler_waits_for_the_gpu_or_leaves_it(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image
) -> None:
    painter = open_fake(watch, checkpoint("small-sd1"))
    for options in OPTIONS:
        paint(watch, painter, picture, mask, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("small-sd1-4ch", torch.bfloat16), ("small-v", torch.float32)])
def test_other_checkpoints_stay_on_the_gpu_too(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, family: str, dtype: torch.dtype
) -> None:
    """A UNet with four channels, one that predicts v, and a schedule with Runge-Kutta steps at its beginning."""
    painter = open_fake(watch, checkpoint(family), dtype)
    for options in OPTIONS:
        paint(watch, painter, picture, mask, **options)
    config = painter.scheduler_config
    painter.scheduler_config = replace(config, named="pndm", skip_prk_steps=False)
    [painting] = paint(watch, painter, picture, mask, steps=5)
    assert painting.steps > 5


def kinds(painter: Painter) -> set[str]:
    """What is special about the last run's plan."""
    assert painter.last_run is not None
    plan, found = painter.last_run.plan, set[str]()
    found.add("resident" if plan.resident else "offloaded")
    for phase in plan.phases.values():
        strategy = phase.strategy
        found |= {f"{phase.name} streamed"} if phase.split and phase.split.chunks else set()
        found |= {"bands"} if strategy.bands else set()
        found |= {"slices"} if strategy.query_rows else set()
        found |= {"fast"} if strategy.fast else set()
        found |= {"fused"} if strategy.caches else set()
        if phase.name == "denoise":
            found.add(f"{strategy.batch} rows")
    return found


EVERY = {"1 rows", "2 rows", "bands", "slices", "offloaded", "denoise streamed"}
# side of the picture, numbers of the ways to be tried, dtype, with fast ones, and what the plans then had
PLANS: dict[str, Any] = {
    "leanest": (96, [-1], torch.float16, False, EVERY - {"2 rows"}),
    "plain": (64, [0, 1, 2, 4, 7, -1], torch.float32, False, EVERY | {"text streamed"}),
    "fast": (64, [0, 1, 4, 7, 10], torch.float16, True, {"fast", "fused", "slices", "denoise streamed"}),
}


@pytest.mark.parametrize(
    "which", ["leanest", *(pytest.param(each, marks=pytest.mark.slow) for each in ("plain", "fast"))]
)
def test_every_plan_stays_on_the_gpu(checkpoint: Folders, watch: Watch, which: str) -> None:
    """From the fastest to the leanest, in turns with resident and with streamed weights."""
    side, numbers, dtype, fast, expected = PLANS[which]
    painter, seen = open_fake(watch, checkpoint("small-sd2"), dtype, fast=fast), set[str]()
    for turn, number in enumerate(numbers):
        choose(painter, number, streamed=number == -1 or turn % 2 == 1)
        paint(watch, painter, make_picture(side, side), make_mask(side, side), steps=1, sampler="ddim")
        seen |= kinds(painter)
    assert seen >= expected


@pytest.mark.slow
def test_resident_networks_and_parts_painted_one_by_one_stay_on_the_gpu(checkpoint: Folders, watch: Watch) -> None:
    picture, mask = make_picture(192, 64), Image.new("L", (192, 64))
    mask.paste(255, (8, 8, 24, 24))
    mask.paste(255, (160, 30, 180, 50))
    painter = open_fake(watch, checkpoint("small-sd1"), torch.bfloat16)
    watch(painter.engine.keep_loaded)
    [a, b] = paint(watch, painter, picture, mask, steps=1, separate=True, context=8, count=2, sampler="ddim")
    assert a.steps == b.steps == 2
    assert "resident" in kinds(painter)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_of_the_vae_that_overflows_is_done_again_in_float32(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, half: str
) -> None:
    """What is asked: are the embeddings of two prompts finite, the latents, twice, the steps, the pixels, twice."""
    watch.answers = [True, True, False] if half == "encoder" else [*5 * [True], False]
    painter = open_fake(watch, checkpoint("small-sd1"))
    told = warnings_of(watch, painter, picture, mask, steps=1, sampler="ddim", profile="diffusers")
    assert told == [f"the VAE's {half} overflowed in half precision; done again in float32"]
    assert (str(painter.device.type), torch.float32) in watch.dtypes


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_fast_ways_stay_on_the_gpu(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, dtype: torch.dtype
) -> None:
    painter = open_fake(watch, checkpoint("small-sd1"), dtype, fast=True)
    watch(painter.engine.keep_loaded)
    together = painter.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert together == (dtype == torch.float16)
    paint(watch, painter, picture, mask, steps=2)
    assert kinds(painter) >= {"fast", "fused", "resident"}


@pytest.mark.slow
def test_without_being_asked_for_nothing_fast_is_used(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image
) -> None:
    for device, fast in ((CUDA, False), (torch.device("xpu", 0), True), (torch.device("mps", 0), True)):
        painter = open_fake(watch, checkpoint("small-sd1"), device=device, fast=fast)
        watch(painter.engine.keep_loaded)
        paint(watch, painter, picture, mask, steps=1, sampler="ddim")
        assert kinds(painter) == {"resident", "2 rows"}
        assert not painter.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_only_where_there_is_float64_bands_are_merged_in_it(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, kind: str
) -> None:
    device = torch.device(kind, 0)
    painter = open_fake(watch, checkpoint("small-sd1"), device=device)
    choose(painter, 8)
    paint(watch, painter, picture, mask, steps=1, sampler="ddim")
    assert "bands" in kinds(painter)
    assert ((kind, torch.float64) in watch.dtypes) == (kind != "mps")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_weights_are_looked_at_before_they_go_to_a_gpu_that_may_miss_a_nan(
    broken: Path, watch: Watch, kind: str
) -> None:
    edit(broken / "unet" / "diffusion_pytorch_model.safetensors", lambda x: x["conv_in.bias"].fill_(torch.nan))
    painter = open_fake(watch, broken, device=torch.device(kind, 0))
    with pytest.raises(minpaint.CheckpointError, match=r"conv_in\.bias holds NaN"):
        watch(painter.engine.keep_loaded)


# Faults that the tests above must find -------------------------------------------------------------


def _latents_on_the_cpu(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    noise = minpaint.painter.seeded_noise
    monkeypatch.setattr(minpaint.painter, "seeded_noise", lambda seeds: _Stuck(noise(seeds)))


class _Stuck:
    """Noise that stays where it is drawn, whatever it is told."""

    def __init__(self, noise: Any) -> None:
        self.noise = noise

    def __call__(self, shape: Any) -> Any:
        drawn = self.noise(shape)
        drawn.to = lambda *_: drawn
        return drawn


def _in_every_step(work: Callable[[Tensor], Any]) -> Callable[[pytest.MonkeyPatch, Painter], None]:
    def plant(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
        split = Schedule.split

        def faulty(self: Schedule, output: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            work(output)
            return split(self, output, x, t)

        monkeypatch.setattr(Schedule, "split", faulty)

    return plant


def _steps_in(dtype: torch.dtype) -> Callable[[pytest.MonkeyPatch, Painter], None]:
    def plant(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
        unet = Run.unet
        monkeypatch.setattr(Run, "unet", lambda run, *inputs: unet(run, *inputs).to(dtype))

    return plant


def _timesteps_on_the_cpu(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    unet = Run.unet
    monkeypatch.setattr(Run, "unet", lambda run, x, t, context: unet(run, x, torch.zeros(len(t)), context))


def _frequencies_on_the_cpu(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    original = minpaint.models.unet.timestep_embedding

    def embedding(t: Tensor, dim: int) -> Tensor:
        if t.is_meta:
            return original(t, dim)  # a plan is being made
        angles = t[:, None].float() * torch.arange(dim // 2).exp()[None, :]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    monkeypatch.setattr(minpaint.models.unet, "timestep_embedding", embedding)


def _context_in_float32(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    embed = Run.embed
    monkeypatch.setattr(Run, "embed", lambda run, prompt: embed(run, prompt).float())


def _check_of_every_step(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    unet = Run.unet

    def checked(run: Run, *inputs: Tensor) -> Tensor:
        output = unet(run, *inputs)
        run._check_steps()
        return output

    monkeypatch.setattr(Run, "unet", checked)


def _weights_in_float32(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    painter.engine.weights["unet"].dtype = torch.float32


QUICK = ("latents on the CPU", ".item() in every step")  # one of each kind for the fast lane
FAULTS: dict[str, tuple[Any, Any]] = {
    "latents on the CPU": (_latents_on_the_cpu, FakeTensorDeviceMismatchError),
    "timesteps on the CPU": (_timesteps_on_the_cpu, AssertionError),
    "frequencies on the CPU": (_frequencies_on_the_cpu, FakeTensorDeviceMismatchError),
    ".item() in every step": (_in_every_step(lambda output: output.mean().item()), HostSyncError),
    "float() in every step": (_in_every_step(lambda output: float(output.abs().max())), HostSyncError),
    "bool() in every step": (_in_every_step(lambda output: bool(output.isfinite().all())), HostSyncError),
    ".cpu() in every step": (_in_every_step(lambda output: output.cpu()), HostSyncError),
    ".tolist() in every step": (_in_every_step(lambda output: output.flatten().tolist()), HostSyncError),
    ".nonzero() in every step": (_in_every_step(lambda output: output.nonzero()), Exception),
    "a check of every step": (_check_of_every_step, HostSyncError),
    "context in float32": (_context_in_float32, (AssertionError, RuntimeError)),
    "weights in float32": (_weights_in_float32, RuntimeError),
    "steps in float16": (_steps_in(torch.float16), AssertionError),
    "steps in float64": (_steps_in(torch.float64), AssertionError),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS]
)
def test_a_planted_fault_is_found(
    checkpoint: Folders,
    watch: Watch,
    picture: Image.Image,
    mask: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    plant, found = FAULTS[fault]
    painter = open_fake(watch, checkpoint("small-sd1"))
    plant(monkeypatch, painter)
    with pytest.raises(found):
        paint(watch, painter, picture, mask, steps=1, sampler="ddim")


# A GPU's special ways that fail --------------------------------------------------------------------


def test_what_the_fast_ways_raise_is_caught_once(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(minpaint.engine.calls, "GraphReplay", lambda function, device: refuse)
    painter = open_fake(watch, checkpoint("small-sd1"), fast=True)
    watch(painter.engine.keep_loaded)
    [told] = warnings_of(watch, painter, picture, mask, steps=3, sampler="ddim")
    assert told == (
        "--fast failed on cuda:0 (RuntimeError: operation not permitted when stream is capturing); "
        "going on in the plain way, with the same result"
    )
    assert kinds(painter) == {"resident", "2 rows"}
    paint(watch, painter, picture, mask, steps=2, sampler="ddim")  # says nothing more
    assert kinds(painter) == {"resident", "2 rows"}


def streaming(watch: Watch, folder: Path) -> Painter:
    """A painter whose budget needs streamed weights, at first through buffers that cannot be made."""
    painter = open_fake(watch, folder)
    painter.engine.budget = painter.engine.planner().least(Request(64, 64), 0)
    for weights in painter.engine.weights.values():
        weights.new_buffer = broken_buffer
    return painter


def broken_buffer(*_: object, **__: object) -> Buffer:
    raise RuntimeError("no such stream")


@pytest.mark.slow
def test_where_copies_beside_the_computing_fail_they_are_made_between_it(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minpaint.engine.run, "Buffer", RealHost)
    painter = streaming(watch, checkpoint("small-sd2"))
    [told] = warnings_of(watch, painter, picture, mask, steps=2, sampler="ddim")
    assert "streaming the weights beside the computing failed on cuda:0 (RuntimeError: no such stream)" in told
    assert "denoise streamed" in kinds(painter)


@pytest.mark.slow
def test_where_no_copy_works_and_the_budget_needs_them_the_error_says_so(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minpaint.engine.run, "Buffer", broken_buffer)
    painter = streaming(watch, checkpoint("small-sd2"))
    with pytest.raises(MinpaintError, match=r"which this budget needs, failed on cuda:0 .*no such stream.*raise --b"):
        warnings_of(watch, painter, picture, mask, steps=2, sampler="ddim")


@pytest.mark.slow
def test_an_ordinary_fault_is_not_taken_for_one_of_the_fast_ways(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image
) -> None:
    painter = open_fake(watch, checkpoint("small-sd1"))
    painter.vae.encoder.conv_in.register_forward_pre_hook(lambda *_: broken_buffer())
    with pytest.raises(RuntimeError, match="no such stream"):
        paint(watch, painter, picture, mask, steps=1, sampler="ddim")


def test_the_plain_way_gives_the_same_picture(
    checkpoint: Folders,
    painter: Callable[[str], Painter],
    picture: Image.Image,
    mask: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With numbers, and so on the CPU, where the layers that CUDA would have in its place fail in the second step."""
    ours, calls = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32"), 0
    with_qkv = minpaint.engine.fast._with_fused_qkv

    def fails_later(*inputs: Any) -> Tensor:
        nonlocal calls
        calls += not inputs[2].is_meta  # which a plan's are
        if calls > 7:
            raise RuntimeError("no kernel image is available")
        return with_qkv(*inputs)

    monkeypatch.setattr(minpaint.engine.fast, "_with_fused_qkv", fails_later)
    architecture = ours.engine.checkpoint.architecture
    ours.engine.planners[torch.float32] = Planner(architecture, CUDA, torch.float32, fast=True)
    with pytest.warns(MinpaintWarning, match="--fast failed"):
        [a] = ours(picture, mask, "a dog", steps=4, sampler="ddim")
    assert calls == 8
    [b] = painter("small-sd1")(picture, mask, "a dog", steps=4, sampler="ddim")
    assert relative_error(a.latents, b.latents) < 1e-4
    assert largest_level_difference(a.image, b.image) <= 1
