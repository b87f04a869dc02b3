"""What a run takes is known before anything is loaded: plans, on tensors without numbers."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture

import minpaint
from minpaint.checkpoint.architecture import Architecture, blank_models, split_vae
from minpaint.checkpoint.configs import text_config, unet_config, vae_config
from minpaint.checkpoint.load import outline
from minpaint.checkpoint.tensorfile import Stored
from minpaint.cli.main import main
from minpaint.engine.budget import choose_budget, format_size, used_memory
from minpaint.engine.calls import Request
from minpaint.engine.measure import measure
from minpaint.engine.plan import PHASES, Plan, Planner
from minpaint.engine.residency import split_weights
from minpaint.errors import MinpaintWarning
from minpaint.painter import open_painter
from weights.random_checkpoint import FAMILIES

Folders = Callable[[str], Path]
GIB = 2**30
BUDGETS = (0.5, 1, 2, 4, 6, 8, 15)  # GiB
SIZES = ((512, 1), (512, 4), (1024, 1), (2048, 1))  # side and count
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_planned_peaks_of_the_official_shapes(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp16 on CUDA, its context excluded: every plan within its budget, or refused."""
    planner = Planner(architecture(family), torch.device("cuda"), torch.float16)
    lines, fits = [], {}
    for side, count in SIZES:
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
    assert fits[512, 1, 0.5].phases["denoise"].split is not None  # its weights are streamed
    planner.choose(Request(2048, 2048), 3 * GIB, 0)
    planner.choose(Request(4096, 4096), 10 * GIB, 0)


def test_more_memory_never_plans_less_speed() -> None:
    """With a larger budget nothing is split or offloaded that was not before."""
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    request, before = Request(768, 512, 2), None
    for budget in range(planner.least(request, 0), 6 * GIB, GIB // 5):
        plan = planner.choose(request, budget, 0)
        assert plan.peak <= budget
        phases = plan.phases
        ease = (plan.resident, phases["denoise"].split is None, -(phases["decode"].strategy.bands or 0))
        assert before is None or ease >= before
        before = ease


def test_for_one_painting_no_network_stays(checkpoint: Folders) -> None:
    """As the command line paints: every network would be loaded once anyway."""
    ours = open_painter(checkpoint("small-sd1"), "cpu", "fp32", None, None)
    ours(make_picture(), make_mask(), "a dog", steps=1)
    assert {name for name, weights in ours.engine.weights.items() if weights.resident_size} == {"decoder"}
    ours = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    ours(make_picture(), make_mask(), "a dog", steps=1)
    assert {name for name, weights in ours.engine.weights.items() if weights.resident_size} == set(PHASES.values())


def test_the_smallest_budget_is_the_smallest() -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    request = Request(512, 512)
    least = planner.least(request, 0)
    assert planner.choose(request, least, 0).peak == least
    with pytest.raises(minpaint.BudgetError, match=r"the smallest budget that can is 2\d\dMiB"):
        planner.choose(request, least - 1, 0)


@pytest.mark.slow
def test_the_largest_picture_fits_and_little_more_does_not() -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    found = planner.largest(Request(768, 512), 2 * GIB, 0)
    assert found is not None
    width, height = found
    assert abs(width / height - 1.5) < 0.03
    assert planner.least(Request(width, height), 0) <= 2 * GIB
    assert planner.least(Request(width * 11 // 80 * 8, height * 11 // 80 * 8), 0) > 2 * GIB


@pytest.mark.slow
def test_an_operation_worked_out_once_counts_as_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def plans() -> list[Plan]:
        planner, request = Planner(architecture("small-sd2"), torch.device("cpu"), torch.bfloat16), Request(96, 64, 2)
        least, most = planner.least(request, 0), planner.choose(request, UNLIMITED, 0).peak
        return [planner.choose(request, budget, 0) for budget in range(least, most, (most - least) // 20)]

    def alike() -> None:  # operations that differ in one thing each
        kept = []
        for side, kind in itertools.product((64, 128), (torch.float16, torch.float32)):
            x = torch.empty(side, side, dtype=kind, device="meta")
            for y in (x, x[:, ::2]):
                kept += [y + y, y.sum(0), y.sum(1, keepdim=True), y.to(torch.float64), torch.cat([y, x], 1)]
                kept += [torch.zeros_like(y, dtype=other) for other in (torch.int8, torch.float32)]
                kept += torch.var_mean(y, 1)
        assert len(kept) == 72

    once = plans(), measure(alike)
    monkeypatch.setattr("minpaint.engine.measure._signature", lambda argument: object())  # no call is like another
    assert (plans(), measure(alike)) == once


def test_attention_without_a_fused_kernel_is_planned_in_slices() -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.bfloat16)
    fused = planner.choose(Request(1024, 1024), 4 * GIB, 0)
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.bfloat16, fused=False)
    sliced = planner.choose(Request(1024, 1024), 4 * GIB, 0)
    assert fused.phases["denoise"].strategy.query_rows is None
    assert sliced.phases["denoise"].strategy.query_rows is not None
    assert sliced.peak <= 4 * GIB


@pytest.mark.parametrize("room", [0, 10**8, 3 * 10**8, 10**9, 10**12])
def test_resident_and_streamed_weights_are_all_weights_once(room: int) -> None:
    planner = Planner(architecture("sd15"), torch.device("cuda"), torch.float16)
    directory, order = planner.architecture.directories["unet"], planner.order("unet")
    split = split_weights(directory, torch.float16, order, room)
    streamed = [name for chunk in split.chunks for name in chunk]
    assert sorted([*streamed, *split.resident]) == sorted(directory)
    ranks = [order.index(name.rpartition(".")[0]) for name in streamed]
    assert ranks == sorted(ranks)
    if room >= 10**9:
        assert split.size <= room
    assert (not split.chunks) == (room == 10**12)


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


def test_each_row_of_the_table_adds_up_to_its_peak(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cpu", "cuda"):
        assert main(["plan", "--device", device, "--budget", "4GiB"]) == 0  # more than a process takes
        head, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
        assert head.split() == ["MiB", "base", "weights", "others", "activations", "rest", "peak", "how"]
        assert len(rows) == len(PHASES)
        for row in rows:
            *parts, peak = map(int, row.split()[1:7])
            assert sum(parts) == peak
            assert min(parts) >= 0
            assert not re.search("KiB|GiB|bytes", row)


def test_sizes_are_in_the_largest_unit_of_which_there_is_one() -> None:
    sizes = {0: "0 bytes", 1023: "1023 bytes", 1536: "1.5 KiB", 2**20 - 1: "1 MiB", 700 * 2**20: "700 MiB"}
    sizes |= {2**30 - 2**18: "1 GiB", 2**30 - 2**20: "1023 MiB", 15 * GIB: "15 GiB", 2**50: "1024 TiB"}
    assert {size: format_size(size) for size in sizes} == sizes


def test_on_a_small_machine_the_budget_is_what_is_free() -> None:
    cpu, free = torch.device("cpu"), 300 * 2**20
    used = used_memory(cpu)
    assert abs(choose_budget(None, cpu, free) - used - free) < 2**22
    with pytest.warns(MinpaintWarning, match=r"^budget 15 GiB is more than cpu has free; keeping to "):
        assert choose_budget("15GiB", cpu, free) < used + free + 2**22
    assert choose_budget("100MiB", cpu, free) == 100 * 2**20


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

    monkeypatch.setattr("minpaint.checkpoint.hub._get", get)
    found = outline("somebody/something", half=True)
    assert all(name.endswith(".json") for name in asked)
    exact = outline(folder, half=True)
    device, request = torch.device("cuda"), Request(64, 64)
    plans = [Planner(each, device, torch.float16).choose(request, GIB, 0) for each in (found, exact)]
    assert plans[0].report() == plans[1].report()
