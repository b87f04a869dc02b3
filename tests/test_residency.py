"""Weights that are loaded and offloaded, or streamed, are the files'; those that somebody changed stay."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture

import minpaint
from minpaint.checkpoint.tensorfile import empty_pages
from minpaint.engine.budget import release_cached, used_memory
from minpaint.engine.cuda import Buffer
from minpaint.engine.measure import measure
from minpaint.engine.residency import split_weights
from minpaint.painter import open_frame, open_painter
from minpaint.settings import Settings

Folders = Callable[[str], Path]
UNLIMITED = 2**50


@pytest.mark.usefixtures("without_base")
def test_networks_can_be_called_when_their_weights_are_offloaded(checkpoint: Folders) -> None:
    rich = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32", budget=UNLIMITED)
    poor = open_painter(checkpoint("small-sd1"), "cpu", "fp32", None, None)
    poor.engine.budget = poor.engine.weights["unet"].size + 2**20
    for ours in (rich, poor):
        assert (ours.engine.weights["unet"].resident_size > 0) == (ours is rich)
    x, t, context = torch.randn(1, 9, 8, 8), torch.tensor([5]), torch.randn(1, 77, 64)
    pixels = torch.randn(1, 3, 64, 64)
    for call in (
        lambda ours: ours.unet(x, t, context),
        lambda ours: ours.vae.encode(pixels)[0],
        lambda ours: ours.vae.decode(x[:, :4]),
        lambda ours: ours.text_encoder(torch.zeros(1, 77, dtype=torch.long))[0],
        lambda ours: ours.unet(x, t, context),
    ):
        assert torch.equal(call(poor), call(rich))
    assert sum(part.resident_size for part in poor.engine.weights.values()) <= poor.engine.budget


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_streamed_weights_are_the_files(checkpoint: Folders, part: str, dtype: str) -> None:
    """Every layer computes with its own weights, in turn, round again, and out of turn."""
    resident = minpaint.load(checkpoint("small-sd1"), "cpu", dtype)
    streamed = open_painter(checkpoint("small-sd1"), "cpu", dtype, None, None)
    mine = streamed.engine.weights[part]
    order = streamed.engine.planner().order(part)
    split = split_weights(mine.directory, mine.dtype, order, 0, smallest=0)
    assert len(split.chunks) > 2
    mine.load(split)
    inputs: tuple[Any, ...] = (torch.zeros(1, 77, dtype=torch.long),)
    if part == "unet":
        inputs = (torch.randn(2, 9, 8, 8), torch.tensor([5, 9]), torch.randn(2, 77, 64))
        inputs = (inputs[0].to(mine.dtype), inputs[1], inputs[2].to(mine.dtype))
    for _ in range(3):
        theirs, ours = getattr(resident, part)(*inputs), getattr(streamed, part)(*inputs)
        assert torch.equal(ours if part == "unet" else ours[0], theirs if part == "unet" else theirs[0])
    theirs = resident.engine.weights[part].model
    for name in [split.chunks[-1][0], split.chunks[0][0], split.chunks[1][0]]:
        layer = name.rpartition(".")[0]
        with pytest.raises((RuntimeError, TypeError, IndexError)):  # None is no input; the weights are loaded first
            mine.model.get_submodule(layer)(None)
        assert torch.equal(mine.model.get_parameter(name), theirs.get_parameter(name))
    mine.offload()
    assert mine.resident_size == 0
    assert all(parameter.is_meta for parameter in mine.model.parameters())


class SlowBuffer(Buffer):
    """A GPU's copies as far as a CPU can show them: two tensors, of which a thread fills the second late."""

    copies = 0
    copied: Future[None] | None = None

    def __init__(self, size: int, device: torch.device) -> None:
        self.on_host, self.on_device = torch.zeros(2, size, dtype=torch.uint8)
        self.thread = ThreadPoolExecutor(1)

    def copy(self, after: None) -> None:
        def late() -> None:
            time.sleep(0.002)
            self.on_device.copy_(self.on_host)
            self.copies += 1

        self.copied = self.thread.submit(late)

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.result()

    synchronize = wait


def test_streamed_weights_wait_for_their_copies(checkpoint: Folders) -> None:
    resident = minpaint.load(checkpoint("small-sd2"), "cpu", "bf16")
    streamed = open_painter(checkpoint("small-sd2"), "cpu", "bf16", None, None)
    part = streamed.engine.weights["unet"]
    part.new_buffer = SlowBuffer
    part.load(split_weights(part.directory, part.dtype, streamed.engine.planner().order("unet"), 0))
    assert part.stream is not None
    x, context = (torch.randn(size).bfloat16() for size in ((2, 9, 8, 8), (2, 77, 64)))
    t = torch.tensor([5, 9])
    expected = resident.unet(x, t, context)
    for _ in range(3):
        assert torch.equal(streamed.unet(x, t, context), expected)
    copies = sum(buffer.copies for buffer in part.stream.buffers if isinstance(buffer, SlowBuffer))
    assert copies >= 3 * len(part.stream.split.chunks)
    part.offload()


def test_a_file_that_vanishes_while_weights_are_streamed_is_one_line(copy: Folders) -> None:
    folder = copy("small-sd1")
    ours = open_painter(folder, "cpu", "bf16", None, None)
    part = ours.engine.weights["unet"]
    part.load(split_weights(part.directory, part.dtype, ours.engine.planner().order("unet"), 0))
    for file in folder.glob("unet/*.safetensors"):
        file.unlink()
    with pytest.raises(minpaint.CheckpointError, match="cannot be read"):
        ours.unet(torch.zeros(1, 9, 8, 8).bfloat16(), torch.tensor([5]), torch.zeros(1, 77, 64).bfloat16())


@pytest.mark.usefixtures("without_base")
def test_weights_somebody_changed_are_not_lost(checkpoint: Folders) -> None:
    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    ours.vae.load_state_dict({name: tensor * 0.5 for name, tensor in ours.vae.state_dict().items()})
    before = ours.vae.decode(torch.ones(1, 4, 8, 8))
    frame = open_frame(make_picture(), make_mask(), Settings(""))
    request = ours.request(frame, Settings(""), ours.views(frame, Settings("")))
    ours.engine.budget = ours.engine.planner().choose(request, UNLIMITED, 0).peak - 1
    ours(make_picture(), make_mask(), "a dog", steps=1)
    assert ours.last_run is not None
    assert not ours.last_run.plan.resident
    assert torch.equal(ours.vae.decode(torch.ones(1, 4, 8, 8)), before)


def test_a_network_put_in_the_place_of_ours_is_the_one_that_runs(checkpoint: Folders) -> None:
    class Zero(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            Zero.calls += 1
            return torch.zeros_like(x[:, :4])

    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    ours.unet = Zero()
    ours(make_picture(), make_mask(), "a dog", steps=3)
    assert Zero.calls == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_weights_that_are_read_lie_aligned_and_go_back_to_the_system() -> None:
    cpu = torch.device("cpu")
    kept: list[torch.Tensor] = []

    def read() -> None:
        tensors = [empty_pages((n, 3, 1000), torch.float16).fill_(1) for n in range(1, 100)]
        assert all(tensor.shape == (n, 3, 1000) and tensor.is_contiguous() for n, tensor in enumerate(tensors, 1))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
        kept.extend(tensors)

    size = 6000 * sum(range(1, 100))
    assert size <= measure(read).live < 1.01 * size  # they are seen by what counts memory
    kept.clear()
    before = used_memory(cpu)
    read()
    assert used_memory(cpu) - before > 0.95 * size
    del kept[::2]  # no two neighbours: a heap would keep holes
    assert used_memory(cpu) - before < 0.6 * size
    with pytest.raises(MemoryError, match="bytes for weights"):
        empty_pages((2**60,), torch.float32)


@pytest.mark.slow
def test_many_paintings_take_no_more_than_few(checkpoint: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred in one process, whose weights are offloaded again and again."""
    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    picture, mask, cpu = make_picture(32, 32), make_mask(32, 32), torch.device("cpu")
    parts = ours.engine.weights.values()
    used = []
    for number in range(100):
        ours(picture, mask, "a dog", steps=1, seed=number)
        if number % 4 == 0:
            for part in parts:
                part.offload()
        if number in (24, 99):
            release_cached(cpu)
            used.append(used_memory(cpu))
    with capsys.disabled():
        print(f"\n100 paintings: {used[0] / 2**20:.1f} MiB after 25, {used[1] / 2**20:.1f} MiB after 100")
    assert used[1] - used[0] < 8 * 2**20
