"""A memory budget is a guarantee: kept while running, with the same picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import largest_level_difference, make_mask, make_picture, mean_level_difference, relative_error
from PIL import Image
from torch import Tensor, nn

import minpaint
from minpaint.cli.main import main
from minpaint.engine.budget import capped, is_out_of_memory, release_cached, used_memory
from minpaint.engine.calls import Request
from minpaint.engine.device import has_bfloat16_kernels
from minpaint.engine.fast import OF_PROMPT
from minpaint.engine.measure import measure
from minpaint.engine.plan import Planner
from minpaint.engine.run import Engine, Run
from minpaint.engine.winograd import Thresholds
from minpaint.errors import MinpaintWarning
from minpaint.models.networks import PlainNetworks
from minpaint.painter import Painter, open_painter
from minpaint.picture.frame import open_frame
from minpaint.settings import Settings

Folders = Callable[[str], Path]
GIB = 2**30
needs_bfloat16_kernels = pytest.mark.skipif(
    not has_bfloat16_kernels(), reason="the library has no bfloat16 for this processor, and nothing is computed in it"
)
UNLIMITED = 2**50


def compute_in(engine: Engine, arithmetic: torch.dtype) -> None:
    """Have an engine plan as on a processor that is quickest in a number format, whatever this one is."""
    architecture = engine.checkpoint.architecture
    engine.planners[engine.dtype] = Planner(architecture, engine.device, engine.dtype, arithmetic)


def reopened(folder: Path, dtype: str, like: Painter | None = None, arithmetic: torch.dtype | None = None) -> Painter:
    """A painter whose networks are offloaded, but stay if there is room; `like` has measured already."""
    ours = open_painter(folder, "cpu", dtype, None, None)
    ours.engine.keeps = True
    if arithmetic is not None:
        compute_in(ours.engine, arithmetic)
    if like is not None:
        ours.engine.planners = like.engine.planners
    return ours


def run_of(ours: Painter, request: Request) -> Run:
    return ours.engine.run(request, PlainNetworks(ours.unet, ours.vae, ours.text_encoder, ours.tokenizer))


def budgets_of(ours: Painter, request: Request) -> list[int]:
    """Seven budgets from the smallest that can hold a run to one without limit."""
    planner = ours.engine.planner()
    least, most = planner.least(request, 0), planner.choose(request, UNLIMITED, 0).peak
    return [*(least + (most - least) * k // 5 for k in range(6)), UNLIMITED]


def painted_by_plan(folder: Path, dtype: str, arithmetic: torch.dtype) -> dict[tuple[str, ...], list[Image.Image]]:
    """What is painted within every budget of `budgets_of`, by how it was done; the last one without limit."""
    picture, mask = make_picture(96, 64), make_mask(96, 64)
    call = {"steps": 3, "count": 2, "eta": 0.5, "seed": 3}
    first = reopened(folder, dtype, arithmetic=arithmetic)
    frame, settings = open_frame(picture, mask, Settings("a dog")), Settings("a dog", count=2)
    request = first.request(frame, settings, first.views(frame, settings))
    seen: dict[tuple[str, ...], list[Image.Image]] = {}
    for budget in budgets_of(first, request):
        ours = reopened(folder, dtype, first)
        ours.engine.budget = budget
        images = [painting.image for painting in ours(picture, mask, "a dog", **call)]
        assert ours.last_run is not None
        assert ours.last_run.plan.peak <= budget
        seen[tuple(phase.how for phase in ours.last_run.plan.phases.values())] = images
    assert len(seen) >= 4, "the budgets were to give different plans"
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "levels"), [("small-sd1", "fp32", 1), ("small-sd2", "bf16", 2)])
@pytest.mark.usefixtures("without_base")
def test_any_budget_gives_the_same_picture(checkpoint: Folders, family: str, dtype: str, levels: int) -> None:
    *others, unlimited = painted_by_plan(checkpoint(family), dtype, torch.float32).values()
    for images in others:
        assert max(map(largest_level_difference, images, unlimited)) <= levels


@pytest.mark.slow
@needs_bfloat16_kernels
@pytest.mark.usefixtures("without_base")
def test_any_budget_is_as_near_to_float32_where_the_processor_computes_in_bfloat16(
    checkpoint: Folders,
) -> None:
    """Kernels for other batches add in another order, and a sum that is rounded otherwise changes all that follows."""
    *_, exact = painted_by_plan(checkpoint("small-sd2"), "fp32", torch.float32).values()
    seen = painted_by_plan(checkpoint("small-sd2"), "bf16", torch.bfloat16).values()
    distances = [sum(map(mean_level_difference, images, exact)) for images in seen]
    assert 0 < max(distances) < 1.5 * min(distances)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("small-sd1", "bf16"), ("small-sd2", "bf16"), ("small-v", "fp16")])
@pytest.mark.usefixtures("without_base")
def test_what_a_run_takes_is_what_was_planned(checkpoint: Folders, family: str, dtype: str) -> None:
    """The live bytes of a real run: within 10 % of the prediction, never above. (Files are fp32, none is mapped.)"""
    picture, mask, settings = make_picture(64, 64), make_mask(64, 64), Settings("a dog", steps=1, count=2)
    frame = open_frame(picture, mask, settings)
    first = reopened(checkpoint(family), dtype)
    request = first.request(frame, settings, first.views(frame, settings))
    for budget in budgets_of(first, request)[::3]:
        ours = reopened(checkpoint(family), dtype, first)
        ours.engine.budget = budget
        ours.engine.planner().choose(request, budget, 0)  # measures on the meta device, out of what is counted
        taken = measure(lambda ours=ours: ours.paint(frame, settings)).total
        assert ours.last_run is not None
        phases = ours.last_run.plan.phases.values()
        planned = max(phase.weights + phase.others + phase.activations for phase in phases)
        assert 0.9 * planned <= taken <= planned, [phase.how for phase in phases]


def doubled_inputs(ours: Painter) -> tuple[Tensor, Tensor, Tensor]:
    """A latent twice, its timesteps, and the contexts of two prompts."""
    context = torch.randn(2, 77, ours.unet_config.context_dim, dtype=ours.dtype)
    return torch.randn(1, 9, 8, 8).repeat(2, 1, 1, 1), torch.tensor([501.0, 501.0]), context


@pytest.mark.usefixtures("without_base")
def test_filters_are_cached_where_there_is_room(checkpoint: Folders) -> None:
    request = Request(64, 64)
    full = minpaint.load(checkpoint("small-sd2"), "cpu", "fp32")
    full.engine.thresholds = Thresholds(channels=8, f4_cells=5 * 5, f2_cells=4 * 4)  # as small as the networks here
    planner = full.engine.planner()
    widened = Planner(planner.architecture, full.device, torch.bfloat16, torch.float32)
    cached, half = (each.choose(request, UNLIMITED, 0) for each in (planner, widened))
    plain = planner.choose(request, cached.peak - 1, 0)
    assert plain.resident
    assert half.phases["denoise"].cached == plain.phases["denoise"].cached == 0
    for large_or_short in (Request(1024, 1024), Request(64, 64, steps=5)):
        assert planner.choose(large_or_short, UNLIMITED, 0).phases["denoise"].cached == 0

    x, t, context = doubled_inputs(full)
    outputs = []
    for plan in (cached, plain):
        full.engine.budget, phase = plan.peak, plan.phases["denoise"]
        with run_of(full, request) as run:
            first, again = (measure(lambda run=run: outputs.append(run.unet(x, t, context))).total for _ in range(2))
            tensors = [part for forms in run.calls.cache.values() for parts in forms.values() for part in parts]
            assert {len(part) for part in tensors} == ({16, 36} if plan is cached else set())
            assert sum(part.nbytes for part in tensors) == phase.cached
            assert first <= phase.cached + phase.activations
            assert again <= phase.activations
        assert not run.calls.cache
        hook = full.unet.conv_out.register_forward_hook(lambda *_: None)
        with run:
            outputs.append(run.unet(x, t, context))  # who looks sees the layers as they are
            assert not run.calls.cache
        hook.remove()
    assert all(relative_error(output, outputs[0]) < 1e-5 for output in outputs)


@needs_bfloat16_kernels
@pytest.mark.usefixtures("without_base")
def test_packed_weights_are_cached_where_the_processor_computes_in_bfloat16(checkpoint: Folders) -> None:
    full, request = minpaint.load(checkpoint("small-sd2"), "cpu", "bf16"), Request(64, 64, steps=2)
    compute_in(full.engine, torch.bfloat16)
    assert full.engine.planner(torch.float16).choose(request, UNLIMITED, 0).phases["denoise"].cached == 0
    cached = full.engine.planner().choose(request, UNLIMITED, 0)
    full.engine.budget, phase = cached.peak, cached.phases["denoise"]
    packed = {  # the prompt's keys and values are computed once
        module: module.weight
        for name, module in full.unet.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.endswith(OF_PROMPT)
    }
    assert phase.cached == sum(weight.nbytes for weight in packed.values())

    x, t, context = doubled_inputs(full)
    outputs = []
    with run_of(full, request) as run:
        first, again = (measure(lambda: outputs.append(run.unet(x, t, context))).total for _ in range(2))
        assert first <= phase.cached + phase.activations
        assert again <= phase.activations
        assert run.calls.cache.keys() == packed.keys()
    full.unet.conv_out.register_forward_hook(lambda *_: None)  # who looks sees the layers as they are
    with run:
        outputs.append(run.unet(x, t, context))
        assert not run.calls.cache
    assert torch.equal(outputs[0], outputs[1])
    assert relative_error(outputs[0], outputs[2]) < 2e-2


@pytest.mark.usefixtures("without_base")
def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
    checkpoint: Folders,
) -> None:
    ours = open_painter(checkpoint("small-sd1"), "cpu", "fp32", "60MiB", None)
    with pytest.raises(minpaint.BudgetError, match="the smallest budget that can is") as caught:
        ours(make_picture(256, 256), make_mask(256, 256), "a dog", context="whole")
    assert not any(weights.resident_size for weights in ours.engine.weights.values())
    smallest = re.search(r"can is (\d+MiB)", str(caught.value))
    assert smallest
    ours = open_painter(checkpoint("small-sd1"), "cpu", "fp32", smallest[1], None)
    ours(make_picture(256, 256), make_mask(256, 256), "a dog", context="whole", steps=1)


def test_the_smallest_budget_named_by_the_command_line_is_enough(
    checkpoint: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_picture().save(tmp_path / "photo.png")
    make_mask().save(tmp_path / "mask.png")
    call = ["paint", "--model", str(checkpoint("small-sd1")), "--image", str(tmp_path / "photo.png"), "--steps", "2"]
    call += ["--mask", str(tmp_path / "mask.png"), "--prompt", "a dog", "-o", str(tmp_path / "out.png")]
    release_cached(torch.device("cpu"))
    held = used_memory(torch.device("cpu"))
    assert main([*call, "--budget", str(held + 10**6)]) == 3
    error = capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
    smallest = re.search(r"the smallest budget that can is ([\d.]+[MG]iB)", error)
    assert smallest, error
    assert error.count("\n") <= 2
    assert main([*call, "--budget", smallest[1], "--json"]) == 0
    out, err = capsys.readouterr()
    memory = json.loads(out)["memory"]
    assert memory["planned"] <= memory["budget"]
    assert re.search(r"memory: budget .*, planned .*, measured ", err)
    assert held / 2 < memory["measured"]


class FullFor:
    """Raises the allocator's error for the first calls of a module."""

    def __init__(self, module: torch.nn.Module, times: int) -> None:
        self.left = times
        module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["unet", "text_encoder", "vae.decoder.conv_in", "vae.encoder.conv_in"])
def test_once_a_full_device_is_met_with_a_smaller_plan(checkpoint: Folders, place: str) -> None:
    picture, mask = make_picture(), make_mask()
    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    [before] = ours(picture, mask, "a dog", steps=3, eta=0.5)
    FullFor(eval_path(ours, place), 1)
    calls: list[int] = []
    with pytest.warns(MinpaintWarning, match="less free memory than it had"):
        [after] = ours(picture, mask, "a dog", steps=3, eta=0.5, on_step=lambda step: calls.append(step.i))
    assert calls == [0, 1, 2]
    assert largest_level_difference(after.image, before.image) <= 1
    assert ours.last_run is not None
    assert not ours.last_run.plan.resident


def test_twice_a_full_device_is_an_error_in_one_line(checkpoint: Folders) -> None:
    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    FullFor(ours.unet, 2)
    with (
        pytest.warns(MinpaintWarning),
        pytest.raises(minpaint.BudgetError, match="ran out of memory in the phase deno"),
    ):
        ours(make_picture(), make_mask(), "a dog", steps=3)
    ours(make_picture(), make_mask(), "a dog", steps=1)  # and it is usable afterwards


def test_what_means_out_of_memory() -> None:
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def eval_path(ours: Painter, place: str) -> Any:
    found: Any = ours
    for name in place.split("."):
        found = getattr(found, name)
    return found


def test_the_cap_is_the_allocators_and_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    caps: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *cap: caps.append(cap))
    for device, number in (("cuda", 1), ("cuda:0", 0)):
        with capped(torch.device(device), 4 * GIB):
            assert caps == [(0.25, number)]
        assert caps == [(0.25, number), (1.0, number)]
        caps.clear()
    with capped(torch.device("cpu"), 4 * GIB):
        assert not caps
