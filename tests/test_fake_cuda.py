"""The program on a GPU that is not there: fake tensors say that they are on "cuda", and have no numbers.

Every phase, plan and sampler runs on them, through the painter itself. They refuse to mix with tensors on another
device, and to give a number away, which on a real GPU would be a wait in the middle of the loop. What they
cannot follow is left out here and named: the values of weights (NaN is looked for with numbers), the copy of
streamed weights beside the computing (a stream and a thread of its own), recorded graphs, and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import minpaint.engine.run
import minpaint.inpaint
import minpaint.samplers
from minpaint.engine.cuda import Buffer
from minpaint.engine.residency import NetworkWeights
from minpaint.painter import Painter, open_painter
from minpaint.samplers import SAMPLERS, Step

Folders = Callable[[str], Path]
CUDA = torch.device("cuda")


class RealHost(Buffer):
    """A buffer whose bytes on the host are real, so that a file can be read into them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.on_device = torch.empty(size, dtype=torch.uint8, device=device)
        self.on_host = torch.utils._python_dispatch._disable_current_modes  # replaced below
        with torch.utils._python_dispatch._disable_current_modes():
            self.on_host = torch.empty(size, dtype=torch.uint8)

    def copy(self, after: Any) -> None:
        """Nothing: a fake tensor has no bytes."""


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is computed with fake tensors, and "cuda" is there as far as they need it."""
    monkeypatch.setattr(NetworkWeights, "check", lambda *_: None)
    monkeypatch.setattr("minpaint.painter.choose_device", lambda name: torch.device(name))
    monkeypatch.setattr("minpaint.engine.run.Buffer", RealHost)
    monkeypatch.setattr("minpaint.engine.calls.GraphReplay", lambda function, device: function)
    monkeypatch.setattr("minpaint.engine.run._check", _no_wait_in_the_loop)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _no_wait_in_the_loop(finite: Tensor, what: str, dtype: torch.dtype, when: str = "") -> None:
    assert isinstance(finite, FakeTensor)


def run(painter: Painter, picture: Image.Image, mask: Image.Image, **options: Any) -> list[Step]:
    """The steps of a painting and the decoded picture; fails where a real GPU would, or would wait."""
    seen: list[Tensor] = []
    unet = painter.unet.forward

    def watched(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.extend((x, context))
        return unet(x, t, context)

    painter.unet.forward = watched  # type: ignore[method-assign]
    steps = list(painter.steps(picture, mask, "a dog", **options))
    for step in steps:
        assert (step.x.device.type, step.x.dtype) == ("cuda", torch.float32)
    assert {x.dtype for x in seen} == {painter.dtype}
    assert {x.device.type for x in seen} == {"cuda"}
    return steps
