"""A memory budget is a guarantee: predicted before loading, kept while running, the same picture."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import largest_level_difference, make_mask, make_picture, relative_error
from PIL import Image

import minpaint
from minpaint import fast, machine, residency
from minpaint.__main__ import main
from minpaint.checkpoint import outline
from minpaint.config import text_config, unet_config, vae_config
from minpaint.errors import MinpaintWarning
from minpaint.inpaint import Painter, open_frame, open_painter
from minpaint.measure import measure
from minpaint.memory import capped, choose_budget, give_back, is_out_of_memory, used_memory
from minpaint.plan import PHASES, Architecture, Plan, Planner, Request, blank_models, split_vae
from minpaint.residency import divide
from minpaint.settings import Settings
from minpaint.tensorfile import Stored
from weights.random_checkpoint import FAMILIES

Folders = Callable[[str], Path]
GIB = 2**30
BUDGETS = (0.5, 1, 2, 4, 6, 8, 15)  # GiB
SIZES = (512, 768, 1024, 2048)
UNLIMITED = 2**50


def architecture(family: str) -> Architecture:
    """A full-size checkpoint's, without any file."""
    parts = FAMILIES[family]
    unet, vae = unet_config(parts["unet"]), vae_config(parts["vae"])
    text = text_config(parts["text_encoder"])
    directories = {
        component: {
            name: Stored(Path(), name, tuple(parameter.shape), "F16", 0, 0)
            for name, parameter in model.named_parameters()
        }
        for component, model in blank_models(unet, vae, text).items()
    }
    return Architecture(family, unet, vae, text, split_vae(directories))


@pytest.fixture
def without_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what a run adds to the process, which in a test holds much else."""
    monkeypatch.setattr(machine, "used_memory", lambda device: 0)


def reopened(folder: Path, dtype: str, like: Painter | None = None) -> Painter:
    """A painter whose networks are out, but would stay if there is room; `like` has measured already."""
    ours = open_painter(folder, "cpu", dtype, None, None)
    ours.machine.settled = True
    if like is not None:
        ours.machine.planners = like.machine.planners
    return ours


def budgets_of(ours: Painter, request: Request) -> list[int]:
    """Seven budgets from the smallest that can hold a run to one without limit."""
    planner = ours.machine.planner
    least, most = planner.least(request, 0), planner.choose(request, UNLIMITED, 0).peak
    return [*(least + (most - least) * k // 5 for k in range(6)), UNLIMITED]


# --- the plan, on tensors without numbers


@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_planned_peaks_of_the_official_shapes(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp16 on CUDA, its context excluded: every plan within its budget, or refused."""
    planner = Planner(architecture(family), torch.device("cuda"), torch.float16)
    lines, fits = [], {}
    for side in SIZES:
        for count in (1, 4):
            peaks = []
            for budget in BUDGETS:
                request = Request(side, side, count)
                try:
                    plan = planner.choose(request, int(budget * GIB), 0)
                except minpaint.BudgetError:
                    assert planner.least(request, 0) > budget * GIB
                    peaks.append("refused")
                    continue
                assert plan.peak <= budget * GIB
                fits[side, count, budget] = plan
                peaks.append(f"{plan.peak / GIB:.2f} {'all' if plan.resident else 'phased'}")
            lines.append(f"{side:5} x{count} " + "".join(f"{peak:>14}" for peak in peaks))
    with capsys.disabled():
        print(f"\n{family}, fp16, planned peak in GiB  " + "".join(f"{budget:>12} GiB" for budget in BUDGETS))
        print("\n".join(lines))
    assert (512, 1, 0.5) in fits
    assert (1024, 1, 1) in fits
    assert (2048, 1, 4) in fits
    assert fits[512, 1, 15].resident
    assert fits[512, 1, 0.5].phases["denoise"].division is not None  # its weights flow
    planner.choose(Request(2048, 2048), 3 * GIB, 0)
    planner.choose(Request(4096, 4096), 10 * GIB, 0)


def test_more_memory_never_plans_less_speed() -> None:
    """With a larger budget nothing is split or sent away that was not before."""
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    request, before = Request(768, 512, 2), None
    for budget in range(planner.least(request, 0), 6 * GIB, GIB // 5):
        plan = planner.choose(request, budget, 0)
        assert plan.peak <= budget
        phases = plan.phases
        ease = (plan.resident, phases["denoise"].division is None, -(phases["decode"].bands or 0))
        assert before is None or ease >= before
        before = ease


def test_for_one_painting_no_network_stays(checkpoint: Folders) -> None:
    """As the command line paints: every network would come once anyway."""
    ours = open_painter(checkpoint("small-sd1"), "cpu", "fp32", None, None)
    ours(make_picture(), make_mask(), "a dog", steps=1)
    assert {name for name, part in ours.machine.parts.items() if part.held} == {"decoder"}
    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    ours(make_picture(), make_mask(), "a dog", steps=1)
    assert {name for name, part in ours.machine.parts.items() if part.held} == set(PHASES.values())


def test_the_smallest_budget_is_the_smallest() -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    request = Request(512, 512)
    least = planner.least(request, 0)
    assert planner.choose(request, least, 0).peak == least
    with pytest.raises(minpaint.BudgetError, match=r"the smallest budget that can is 2\d\dMiB"):
        planner.choose(request, least - 1, 0)


def test_the_largest_picture_fits_and_little_more_does_not() -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    found = planner.largest(Request(768, 512), 2 * GIB, 0)
    assert found is not None
    width, height = found
    assert abs(width / height - 1.5) < 0.03
    assert planner.least(Request(width, height), 0) <= 2 * GIB
    assert planner.least(Request(width * 11 // 80 * 8, height * 11 // 80 * 8), 0) > 2 * GIB


def test_an_operation_worked_out_once_counts_as_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def plans() -> list[Plan]:
        planner, request = Planner(architecture("small-sd2"), torch.device("cpu"), torch.bfloat16), Request(96, 64, 2)
        least, most = planner.least(request, 0), planner.choose(request, UNLIMITED, 0).peak
        return [planner.choose(request, budget, 0) for budget in range(least, most, (most - least) // 20)]

    once = plans()
    monkeypatch.setattr("minpaint.measure._look", lambda argument: object())  # nothing looks as it did before
    assert plans() == once


def test_attention_without_a_fused_kernel_is_planned_in_slices() -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.bfloat16)
    fused = planner.choose(Request(1024, 1024), 4 * GIB, 0)
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.bfloat16)
    planner.fused = False
    sliced = planner.choose(Request(1024, 1024), 4 * GIB, 0)
    assert fused.phases["denoise"].query_rows is None
    assert sliced.phases["denoise"].query_rows is not None
    assert sliced.peak <= 4 * GIB


@pytest.mark.parametrize("room", [0, 10**8, 3 * 10**8, 10**9, 10**12])
def test_weights_that_stay_and_flow_are_all_weights_once(room: int) -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    directory, order = planner.architecture.directories["unet"], planner.order("unet")
    division = divide(directory, torch.float16, order, room)
    moving = [name for chunk in division.chunks for name in chunk]
    assert sorted([*moving, *division.stay]) == sorted(directory)
    ranks = [order.index(name.rpartition(".")[0]) for name in moving]
    assert ranks == sorted(ranks)
    if room >= 10**9:
        assert division.size <= room
    assert (not division.chunks) == (room == 10**12)


# --- keeping it


@pytest.mark.parametrize(("family", "dtype", "levels"), [("small-sd1", "fp32", 1), ("small-sd2", "bf16", 2)])
@pytest.mark.usefixtures("without_base")
def test_any_budget_gives_the_same_picture(checkpoint: Folders, family: str, dtype: str, levels: int) -> None:
    picture, mask = make_picture(96, 64), make_mask(96, 64)
    call = {"steps": 3, "count": 2, "eta": 0.5, "seed": 3}
    first = reopened(checkpoint(family), dtype)
    frame, settings = open_frame(picture, mask, Settings("a dog")), Settings("a dog", count=2)
    request = first.request(frame, settings, first.views(frame, settings))
    seen: dict[tuple[str, ...], list[Image.Image]] = {}
    for budget in budgets_of(first, request):
        ours = reopened(checkpoint(family), dtype, first)
        ours.machine.budget = budget
        images = [painting.image for painting in ours(picture, mask, "a dog", **call)]
        assert ours.last_run is not None
        assert ours.last_run.plan.peak <= budget
        seen[tuple(phase.how for phase in ours.last_run.plan.phases.values())] = images
    assert len(seen) >= 4, "the budgets were to give different plans"
    *_, unlimited = seen.values()
    for images in seen.values():
        assert max(map(largest_level_difference, images, unlimited)) <= levels


@pytest.mark.parametrize(("family", "dtype"), [("small-sd1", "bf16"), ("small-sd2", "bf16"), ("small-v", "fp16")])
@pytest.mark.usefixtures("without_base")
def test_what_a_run_takes_is_what_was_planned(checkpoint: Folders, family: str, dtype: str) -> None:
    """The live bytes of a real run: within 10 % of the prediction, never above. (Files are fp32, none is mapped.)"""
    picture, mask, settings = make_picture(64, 64), make_mask(64, 64), Settings("a dog", steps=1, count=2)
    frame = open_frame(picture, mask, settings)
    first = reopened(checkpoint(family), dtype)
    request = first.request(frame, settings, first.views(frame, settings))
    for budget in budgets_of(first, request)[::2]:
        ours = reopened(checkpoint(family), dtype, first)
        ours.machine.budget = budget
        ours.machine.planner.choose(request, budget, 0)  # measures on the meta device, out of what is counted
        taken = measure(lambda ours=ours: ours.paint(frame, settings)).total
        assert ours.last_run is not None
        phases = ours.last_run.plan.phases.values()
        planned = max(phase.weights + phase.others + phase.working for phase in phases)
        assert 0.9 * planned <= taken <= planned, [phase.how for phase in phases]


@pytest.mark.usefixtures("without_base")
def test_filters_are_held_where_there_is_room(checkpoint: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("NARROW", 8), ("SMALL", 5 * 5), ("SMALLEST", 4 * 4)):  # as the networks of tests are
        monkeypatch.setattr(fast, name, small)
    request = Request(64, 64)
    full = minpaint.load(checkpoint("small-sd2"), "cpu", "fp32")
    planner = full.machine.planner
    held, half = (each.choose(request, UNLIMITED, 0) for each in (planner, full.machine.planner_in(torch.bfloat16)))
    plain = planner.choose(request, held.peak - 1, 0)
    assert plain.resident
    assert half.phases["denoise"].filters == plain.phases["denoise"].filters == 0
    assert planner.choose(Request(1024, 1024), UNLIMITED, 0).phases["denoise"].filters == 0

    x, t, context = torch.randn(1, 9, 8, 8), torch.tensor([501.0]), torch.randn(2, 77, full.unet_config.context_dim)
    outputs = []
    for plan in (held, plain):
        full.machine.budget, phase = plan.peak, plan.phases["denoise"]
        run = machine.Run(full.machine, request, full)
        first, again = (measure(lambda run=run: outputs.append(run.unet(x, t, context))).total for _ in range(2))
        tensors = [part for forms in run.filters.values() for parts in forms.values() for part in parts]
        assert {len(part) for part in tensors} == ({16, 36} if plan is held else set())
        assert sum(part.nbytes for part in tensors) == phase.filters
        assert first <= phase.filters + phase.working
        assert again <= phase.working
        run.close()
        assert not run.filters
    assert all(relative_error(output, outputs[0]) < 1e-5 for output in outputs)


@pytest.mark.usefixtures("without_base")
def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
    checkpoint: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency.Part, "_bring", lambda *_: pytest.fail("read weights"))
    ours = open_painter(checkpoint("small-sd1"), "cpu", "fp32", "60MiB", None)
    with pytest.raises(minpaint.BudgetError, match="the smallest budget that can is") as caught:
        ours(make_picture(256, 256), make_mask(256, 256), "a dog", context="whole")
    smallest = re.search(r"can is (\d+MiB)", str(caught.value))
    assert smallest
    monkeypatch.undo()
    monkeypatch.setattr(machine, "used_memory", lambda device: 0)
    ours = open_painter(checkpoint("small-sd1"), "cpu", "fp32", smallest[1], None)
    ours(make_picture(256, 256), make_mask(256, 256), "a dog", context="whole", steps=1)


def test_the_smallest_budget_named_by_the_command_line_is_enough(
    checkpoint: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_picture().save(tmp_path / "photo.png")
    make_mask().save(tmp_path / "mask.png")
    call = ["paint", "--model", str(checkpoint("small-sd1")), "--image", str(tmp_path / "photo.png"), "--steps", "2"]
    call += ["--mask", str(tmp_path / "mask.png"), "--prompt", "a dog", "-o", str(tmp_path / "out.png")]
    give_back(torch.device("cpu"))
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


# --- a device that turns out fuller than it was


class FullFor:
    """Raises the allocator's error for the first calls of a module."""

    def __init__(self, module: torch.nn.Module, times: int) -> None:
        self.left = times
        module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")


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


# --- weights that come and go


@pytest.mark.usefixtures("without_base")
def test_networks_can_be_called_when_their_weights_are_out(checkpoint: Folders) -> None:
    rich = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32", budget=UNLIMITED)
    poor = open_painter(checkpoint("small-sd1"), "cpu", "fp32", None, None)
    poor.machine.budget = poor.machine.parts["unet"].size + 2**20
    for ours in (rich, poor):
        assert (ours.machine.parts["unet"].held > 0) == (ours is rich)
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
    assert sum(part.held for part in poor.machine.parts.values()) <= poor.machine.budget


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_flowing_weights_are_the_files(
    checkpoint: Folders, part: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer computes with its own weights, in turn, round again, and out of turn."""
    monkeypatch.setattr(residency, "SMALL", 0)
    resident = minpaint.load(checkpoint("small-sd1"), "cpu", dtype)
    flowing = open_painter(checkpoint("small-sd1"), "cpu", dtype, None, None)
    mine = flowing.machine.parts[part]
    order = flowing.machine.planner.order(part)
    division = divide(mine.directory, mine.dtype, order, 0)
    assert len(division.chunks) > 2
    mine.come(division)
    inputs: tuple[Any, ...] = (torch.zeros(1, 77, dtype=torch.long),)
    if part == "unet":
        inputs = (torch.randn(2, 9, 8, 8), torch.tensor([5, 9]), torch.randn(2, 77, 64))
        inputs = (inputs[0].to(mine.dtype), inputs[1], inputs[2].to(mine.dtype))
    for _ in range(3):
        theirs, ours = getattr(resident, part)(*inputs), getattr(flowing, part)(*inputs)
        assert torch.equal(ours if part == "unet" else ours[0], theirs if part == "unet" else theirs[0])
    theirs = resident.machine.parts[part].model
    for name in [division.chunks[-1][0], division.chunks[0][0], division.chunks[1][0]]:
        layer = name.rpartition(".")[0]
        with pytest.raises((RuntimeError, TypeError, IndexError)):  # an input that no layer takes; its weights come
            mine.model.get_submodule(layer)(None)
        assert torch.equal(mine.model.get_parameter(name), theirs.get_parameter(name))
    mine.go()
    assert mine.held == 0
    assert all(parameter.is_meta for parameter in mine.model.parameters())


class SlowLane:
    """A GPU's copies as far as a CPU can show them: a buffer on either side, filled late and by somebody else."""

    def __init__(self, device: torch.device) -> None:
        self.stream = ThreadPoolExecutor(1)
        self.copies = 0

    def buffers(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    def mark(self) -> None:
        """On the CPU all work is done when the next begins."""

    def send(self, here: torch.Tensor, there: torch.Tensor, after: None) -> Future[None]:
        def copy() -> None:
            time.sleep(0.002)
            there.copy_(here)
            self.copies += 1

        return self.stream.submit(copy)

    def wait(self, mark: Future[None] | None) -> None:
        if mark is not None:
            mark.result()

    finish = wait


def test_flowing_weights_wait_for_a_stream_of_copies(checkpoint: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "Lane", SlowLane)
    resident = minpaint.load(checkpoint("small-sd2"), "cpu", "bf16")
    flowing = open_painter(checkpoint("small-sd2"), "cpu", "bf16", None, None)
    part = flowing.machine.parts["unet"]
    part.come(divide(part.directory, part.dtype, flowing.machine.planner.order("unet"), 0))
    assert part.flow is not None
    x, context = (torch.randn(size).bfloat16() for size in ((2, 9, 8, 8), (2, 77, 64)))
    t = torch.tensor([5, 9])
    expected = resident.unet(x, t, context)
    for _ in range(3):
        assert torch.equal(flowing.unet(x, t, context), expected)
    assert part.flow.lane.copies >= 3 * len(part.flow.chunks)  # type: ignore[attr-defined]
    part.go()


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


def test_a_file_that_vanishes_while_weights_flow_is_one_line(copy: Folders) -> None:
    folder = copy("small-sd1")
    ours = open_painter(folder, "cpu", "bf16", None, None)
    part = ours.machine.parts["unet"]
    part.come(divide(part.directory, part.dtype, ours.machine.planner.order("unet"), 0))
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
    ours.machine.budget = ours.machine.planner.choose(request, UNLIMITED, 0).peak - 1
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


def test_many_paintings_take_no_more_than_few(checkpoint: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    """Two hundred in one process, under a budget that has the weights come and go."""
    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    picture, mask, cpu = make_picture(32, 32), make_mask(32, 32), torch.device("cpu")
    parts = ours.machine.parts.values()
    held = []
    for number in range(200):
        ours(picture, mask, "a dog", steps=1, seed=number)
        if number % 4 == 0:
            for part in parts:
                part.go()
        if number in (49, 199):
            give_back(cpu)
            held.append(used_memory(cpu))
    with capsys.disabled():
        print(f"\n200 paintings: {held[0] / 2**20:.1f} MiB after 50, {held[1] / 2**20:.1f} MiB after 200")
    assert held[1] - held[0] < 8 * 2**20


# --- the command line


def test_plan_prints_a_table_or_json(checkpoint: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "--model", str(checkpoint("small-sd1")), "--size", "100x60", "--device", "cuda"]
    assert main(call) == 0
    out = capsys.readouterr().out
    for phase in PHASES:
        assert re.search(rf"^{phase} .* alone", out, re.MULTILINE)
    assert "at 104x64, count 1, fp16 on cuda" in out
    assert "smallest budget" in out
    assert "largest picture" in out
    assert "CUDA context" in out
    assert main([*call, "--budget", "40MiB", "--count", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["peak"] <= report["budget"] == 40 * 2**20
    assert max(phase["peak"] for phase in report["phases"]) == report["peak"]
    assert report["smallest_budget"] <= report["peak"]
    assert report["largest_picture"][0] >= 104


def test_plan_refuses_what_does_not_fit(checkpoint: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "--model", str(checkpoint("small-sd1")), "--size", "4096x4096", "--device", "cuda"]
    assert main([*call, "--budget", "64MiB"]) == 3
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"minpaint: error: budget 64 MiB cannot hold .* smallest budget that can is .*\n", err)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--size", "100"], "size '100'"),
        (["--size", "0x100"], "size '0x100'"),
        (["--size", "-5x100"], "--size"),
        (["--count", "0"], "count"),
        (["--budget", "0"], "budget '0'"),
        (["--budget", "-1GiB"], "--budget"),
        (["--budget", "plenty"], "budget 'plenty'"),
        (["--device", "tpu"], "tpu"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_plan_refuses_bad_input(options: list[str], culprit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert culprit in err
    assert err.count("\n") == 1


def test_a_budget_beyond_the_device_is_cut_and_said() -> None:
    cpu = torch.device("cpu")
    with pytest.warns(MinpaintWarning, match=r"budget 1024 TiB is more than cpu has free"):
        assert choose_budget("1024TiB", cpu) < 2**50
    assert choose_budget(None, cpu) <= 15 * GIB + used_memory(cpu)
    assert choose_budget("1GiB", cpu) == GIB


def test_a_model_of_the_hub_is_planned_from_its_configurations(copy: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("small-sd2")
    asked: list[Any] = []

    def get(repository: str, revision: str, names: Any) -> Path:
        asked.extend(names)
        return folder

    monkeypatch.setattr("minpaint.hub._get", get)
    found = outline("somebody/something", half=True)
    assert all(name.endswith(".json") for name in asked)
    exact = outline(folder, half=True)
    device, request = torch.device("cuda"), Request(64, 64)
    plans = [Planner(each, device, torch.float16).choose(request, GIB, 0) for each in (found, exact)]
    assert plans[0].report() == plans[1].report()
