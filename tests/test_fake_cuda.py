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
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import minpaint.engine.calls
import minpaint.models.unet
import minpaint.painter
from minpaint.checkpoint.load import build, describe
from minpaint.engine.cuda import Buffer
from minpaint.engine.plan import Planner
from minpaint.engine.residency import NetworkWeights
from minpaint.engine.run import Run
from minpaint.errors import MinpaintError, MinpaintWarning
from minpaint.painter import Painter, Painting
from minpaint.picture.canvas import Canvas
from minpaint.picture.view import ReferenceView, View
from minpaint.samplers import SAMPLERS, Step

Folders = Callable[[str], Path]
CUDA = torch.device("cuda", 0)
KINDS = {"cuda": 1, "xpu": 12, "mps": 13}  # c10/core/DeviceType.h
META = 14
aten = torch.ops.aten
QUESTIONS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)  # of a number
UNLIMITED = 2**50


class HostSync(Exception):
    """The host would wait for the GPU inside the denoising loop."""


class Watch(TorchDispatchMode):
    """Fails where the host would wait for a GPU inside the denoising loop, and answers questions outside of it.

    answers: to the next questions for a truth value; "yes" when there are none left. asked: how many there were.
    operations: the names of all that was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.looping, self.asked, self.fake = False, 0, FakeTensorMode(allow_non_fake_inputs=True)
        self.answers: list[bool] = []
        self.dtypes: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_gpu = any(isinstance(x, Tensor) and x.device.type in KINDS for x in tree_leaves((args, kwargs)))
        if func in QUESTIONS and (on_gpu or args[0].dtype == torch.bool):
            if on_gpu and self.looping:
                raise HostSync("for a number")
            assert args[0].dtype == torch.bool, "there are no numbers to give"
            self.asked += 1
            return self.answers.pop(0) if self.answers else True
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if on_gpu and self.looping and any(x.device.type == "cpu" for x in made):
            raise HostSync("for a copy")
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
    """A buffer whose bytes on the host are real, so that a file can be read into them; without a stream."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size, device, aside=False)
        with _disable_current_modes():
            self.on_host = torch.empty(size, dtype=torch.uint8)


def add_device_guards() -> None:
    """Let a PyTorch without GPUs slice and index fake tensors of them, as one with CUDA does.

    Before such an operation PyTorch looks for what selects the tensor's device, and a build for the CPU has
    that for two devices only. That of the meta device does nothing, and does for the others.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        pytest.skip("PyTorch's table of devices is not where it is on Linux")
    for number in KINDS.values():
        guards[number] = guards[number] or guards[META]


def unfaked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works on tensors that are not fake."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def finish(view: View, picture: Image.Image, painted: Tensor, match: bool) -> Image.Image:
    """View.finish of pixels that have no numbers to be put into a picture."""
    width, height = view.extent
    assert (painted.device.type, painted.dtype, painted.shape) == ("cpu", torch.float32, (3, height, width))
    return picture


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """All tensors are fake in `watch(work)`, but for those of plans, which have a device of their own, and pictures."""
    add_device_guards()
    watch, read, check = Watch(), NetworkWeights._read, NetworkWeights.check
    real = [(Painter, "_job"), (View, "canvas"), (Canvas, "filled"), (NetworkWeights, "put_on_meta")]
    for owner, name in [*real, (Planner, "choose"), (Planner, "phase"), (Planner, "least")]:
        monkeypatch.setattr(owner, name, unfaked(getattr(owner, name)))
    monkeypatch.setattr(View, "finish", finish)
    monkeypatch.setattr(minpaint.painter, "seam_error", lambda *_: 0.0)
    monkeypatch.setattr(NetworkWeights, "_read", lambda *args: iter(unfaked(list)(read(*args))))
    # whether weights are finite: the real ones of the thread that streams are looked at, others have no numbers
    monkeypatch.setattr(
        NetworkWeights, "check", lambda *args: None if isinstance(args[2], FakeTensor) else check(*args)
    )
    monkeypatch.setattr(minpaint.engine.calls, "GraphReplay", lambda function, device: function)
    for name, sampler in list(SAMPLERS.items()):
        monkeypatch.setitem(SAMPLERS, name, watch.loop(sampler))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # where a weight is, not what
        warnings.simplefilter("error", MinpaintWarning)  # a fault that a run gets over is one, too
        yield watch


def open_fake(watch: Watch, folder: Path, dtype: torch.dtype = torch.float16, budget: int = UNLIMITED, **more: Any) -> Painter:
    """A painter on a GPU that is not there."""
    device, planner = more.pop("device", CUDA), more.pop("planner", {})
    checkpoint = watch(lambda: build(describe(folder), device))
    painter = Painter(checkpoint, device, dtype, budget, **more)
    if planner:
        painter.engine.planners[dtype] = Planner(checkpoint.architecture, device, dtype, **planner)
    for weights in painter.engine.weights.values():
        weights.new_buffer = RealHost
    return painter


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


@pytest.mark.parametrize("family", ["small-sd1", "small-sd1-4ch"])
@pytest.mark.parametrize("sampler", [*SAMPLERS])
def test_a_sampler_never_waits_for_the_gpu(
    checkpoint: Folders, watch: Watch, picture: Image.Image, mask: Image.Image, family: str, sampler: str
) -> None:
    paint(watch, open_fake(watch, checkpoint(family)), picture, mask, sampler=sampler, steps=3)
