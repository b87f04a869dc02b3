"""Watching a run: every output of the UNet can be seen and changed, and nothing of it stays."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture, relative_error
from PIL import Image
from torch import Tensor, nn

import minpaint
from minpaint.engine.cuda import has_hooks
from minpaint.engine.fast import is_unmodified
from minpaint.inpaint import inpaint, seeded_noise
from minpaint.models.networks import PlainNetworks
from minpaint.painter import Painter, open_painter
from minpaint.picture.canvas import reference_canvas
from minpaint.samplers import SAMPLERS, Step
from minpaint.schedule import make_schedule

Paint = Callable[[str], Painter]
Folders = Callable[[str], Path]
CROSS = [f"unet.down_blocks.0.attentions.{number}.transformer_blocks.0.attn2" for number in (0, 1)]
RECORD = ["unet.down_blocks.0.*.attn2", "unet.mid_block.resnets.0", "unet"]
ROOT = Path(__file__).parent.parent
MIDDLE = "unet.mid_block"


def paint(ours: Painter, prompt: str = "a dog", **options: Any) -> Tensor:
    """The latents of a painting, or of several."""
    settings = {"steps": 3, "sampler": "ddim", "profile": "diffusers"} | options
    return torch.stack([painting.latents for painting in ours(make_picture(), make_mask(), prompt, **settings)])


def step_by_step(ours: Painter, prompt: str = "a dog", **options: Any) -> list[Step]:
    return list(ours.steps(make_picture(), make_mask(), prompt, **{"steps": 4, "sampler": "ddim"} | options))


def paint_plainly(ours: Painter, steps: int = 3, count: int = 1, guidance: float = 7.5) -> Tensor:
    """The same as `paint` without the engine: README's script."""
    networks = PlainNetworks(ours.unet, ours.vae, ours.text_encoder, ours.tokenizer)
    canvas = reference_canvas(make_picture(), make_mask(), ours.vae_config.factor)
    schedule, noise = make_schedule(ours.scheduler_config, "ddim", steps), seeded_noise(range(count))
    scale, channels = ours.vae_config.scaling_factor, ours.unet_config.in_channels
    options: Any = {"guidance": guidance, "in_channels": channels, "scaling_factor": scale}
    with torch.inference_mode():
        *_, last = inpaint(networks, canvas, "a dog", schedule, noise, sampler=SAMPLERS["ddim"], **options)
    return last.x


def listen(ours: Painter, run: Callable[[Painter], object], keep: Callable[[Any, Tensor], Any]) -> dict[str, list[Any]]:
    """What somebody's own forward hooks keep of the inputs and outputs of a UNet's modules in a run, by name."""
    heard: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for name, module in ours.unet.named_modules():

            def hear(module: nn.Module, inputs: Any, output: Tensor, name: str = f"unet.{name}".rstrip(".")) -> None:
                heard.setdefault(name, []).append(keep(inputs, output))

            stack.callback(module.register_forward_hook(hear).remove)
        run(ours)
    return heard


@pytest.fixture
def ours(painter: Paint) -> Iterator[Painter]:
    """A painter with nothing on it that was not there before the test, however watching ended there."""
    ours = painter("small-sd1")
    around, before = ours.around, paint(ours)
    yield ours
    gc.collect()
    assert not has_hooks(ours.unet)
    assert ours.around is around
    assert torch.equal(paint(ours), before)


# What is seen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["small-sd1", "small-sd2"])
@pytest.mark.parametrize(("count", "guidance"), [(1, 7.5), (2, 7.5), (2, 1.0)])
def test_what_is_recorded_is_what_the_plain_network_computes(
    painter: Paint, family: str, count: int, guidance: float
) -> None:
    ours, options = painter(family), {"count": count, "guidance": guidance}
    plain = listen(ours, lambda ours: paint_plainly(ours, **options), lambda inputs, output: output.clone())
    with ours.watch(record=RECORD) as seen:
        paint(ours, **options)
    assert set(seen) == {*CROSS, *RECORD[1:]}
    for name in seen:
        assert len(seen[name]) == 3
        for halves, output in zip(seen[name], plain[name], strict=True):
            uncond, cond = output.split(count) if guidance > 1 else (None, output)
            assert relative_error(halves.cond, cond) < 1e-5, name
            assert relative_error(halves.whole, output) < 1e-5, name
            if uncond is None:
                assert halves.uncond is None
            else:
                assert relative_error(halves.uncond, uncond) < 1e-5, name
                assert relative_error(halves.uncond, cond) > 1e-3, name


def test_a_single_pattern_is_enough(ours: Painter) -> None:
    with ours.watch(record=f"{MIDDLE}.resnets.?") as seen:
        paint(ours)
    assert list(seen) == [f"{MIDDLE}.resnets.0", f"{MIDDLE}.resnets.1"]


def test_steps_are_counted_through_views_and_runs(ours: Painter) -> None:
    image, mask = make_picture(200, 200), Image.new("L", (200, 200))
    mask.paste(255, (5, 5, 20, 20))
    mask.paste(255, (150, 160, 170, 180))
    steps: list[int] = []
    with ours.watch(record="unet", patch={MIDDLE: lambda step, output: steps.append(step)}) as seen:
        for calls in (6, 12):
            ours(image, mask, "a dog", steps=3, separate=True)
            assert steps == list(range(calls))
            assert len(seen["unet"]) == calls
    assert seen.step is None


@pytest.mark.usefixtures("without_base")
def test_a_batch_that_the_budget_splits_is_recorded_whole(checkpoint: Folders, painter: Paint) -> None:
    ample, poor = painter("small-sd1"), open_painter(checkpoint("small-sd1"), "cpu", "fp32", None, None)
    names, rows = ["unet", MIDDLE, *CROSS, f"{CROSS[0]}.to_k"], []
    with ample.watch(record=names) as whole:
        paint(ample, count=2)
    poor.engine.budget = poor.engine.planner().least(ample.last_run.request, 0)
    with poor.watch(record=names, patch={MIDDLE: lambda step, output: rows.append(len(output))}) as split:
        paint(poor, count=2)
    assert rows == 3 * 4 * [1]
    for name in names:
        for a, b in zip(whole[name], split[name], strict=True):
            assert relative_error(a.uncond, b.uncond) < 1e-5
            assert relative_error(a.cond, b.cond) < 1e-5


@pytest.mark.parametrize("steps", [2, pytest.param(31, marks=pytest.mark.slow)])  # from 30 on, filters are cached
@pytest.mark.parametrize("family", ["small-sd1", "small-sd2", "small-sd1-4ch"])
def test_everybodys_hooks_are_called_as_often_as_by_the_plain_network(painter: Paint, family: str, steps: int) -> None:
    """Also those of layers that the engine else computes for one of two rows, or once for all steps."""
    ours, shapes = painter(family), lambda inputs, output: (inputs[0].shape, output.shape)
    plain = listen(ours, lambda ours: paint_plainly(ours, steps), shapes)
    heard = listen(ours, lambda ours: paint(ours, steps=steps), shapes)
    assert heard == plain
    lists = {f"unet.{name}" for name, each in ours.unet.named_modules() if isinstance(each, nn.ModuleList)}
    modules = {f"unet.{name}".rstrip(".") for name, _ in ours.unet.named_modules()}
    assert set(plain) == modules - lists
    assert all(len(calls) == steps and calls[0][0][0] == 2 for calls in plain.values())


@pytest.mark.parametrize("family", ["small-sd1", "small-sd2", "small-v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_has_both_predictions_that_guidance_mixes(painter: Paint, family: str, sampler: str) -> None:
    for step in step_by_step(painter(family), sampler=sampler, guidance=2.0):
        assert torch.allclose(step.eps, step.eps_uncond + 2.0 * (step.eps_cond - step.eps_uncond), 1e-4, 1e-4)
        assert relative_error(step.eps_uncond, step.eps_cond) > 1e-3
    for step in step_by_step(painter(family), sampler=sampler, guidance=1.0):
        assert step.eps_uncond is step.eps_cond is None


def test_a_step_has_both_also_at_noise_levels_between_timesteps(
    painter: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Karras' levels: the network is called at the nearest timestep, but its output is read at the level itself."""
    ours = painter("small-v")
    monkeypatch.setattr(ours, "scheduler_config", replace(ours.scheduler_config, use_karras_sigmas=True))
    for step in step_by_step(ours, sampler="dpmpp", guidance=2.0, steps=7):
        assert torch.allclose(step.eps, step.eps_uncond + 2.0 * (step.eps_cond - step.eps_uncond), 1e-4, 1e-4)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"record": ["unet", "unet.mid_blok"]}, {"patch": {"unet.mid_blok": print}}])
def test_a_name_of_no_module_is_refused_with_the_nearest(ours: Painter, arguments: dict[str, Any]) -> None:
    refused = pytest.raises(minpaint.InputError, match=r"'unet\.mid_blok'; the nearest is unet\.mid_block$")
    with refused, ours.watch(**arguments):
        pass


# What stays --------------------------------------------------------------------------------------


def fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("failing", ["attend", "patch", "on_step"])
def test_a_failure_ends_watching(ours: Painter, failing: str) -> None:
    hooks = {"attend": {"attend": fail}, "patch": {"patch": {MIDDLE: fail}}, "on_step": {}}[failing]
    with pytest.raises(ZeroDivisionError), ours.watch(record="unet*", **hooks):
        paint(ours, on_step=fail)


def test_steps_may_be_left_unfinished(ours: Painter) -> None:
    with ours.watch(record="unet*") as seen:
        next(ours.steps(make_picture(), make_mask(), "a dog"))
        paint(ours)
    assert len(seen["unet"]) == 4


def test_a_dropped_generator_ends_its_watching(ours: Painter) -> None:
    def watched() -> Iterator[Step]:
        with ours.watch(record="unet*"):
            yield from ours.steps(make_picture(), make_mask(), "a dog")

    steps = watched()
    next(steps)
    assert has_hooks(ours.unet)
    del steps


def test_one_watches_within_another(ours: Painter) -> None:
    with ours.watch(record="unet", patch={MIDDLE: lambda step, output: 2 * output}) as outer:
        with ours.watch(record=["unet", MIDDLE]) as inner:
            paint(ours)
        paint(ours)
    assert (len(outer["unet"]), len(inner["unet"])) == (6, 3)
    assert all(torch.equal(a.whole, b.whole) for a, b in zip(outer["unet"], inner["unet"], strict=False))


def test_who_began_later_may_end_later(ours: Painter) -> None:
    """As it comes with generators, which end when they are dropped."""
    first, second = ours.watch(record="unet"), ours.watch(record="unet")
    first.__enter__()
    seen = second.__enter__()
    first.__exit__(None, None, None)
    paint(ours)
    second.__exit__(None, None, None)
    assert len(seen["unet"]) == 3


def test_a_run_that_is_longer_than_watching_goes_on(ours: Painter) -> None:
    steps = ours.steps(make_picture(), make_mask(), "a dog", steps=4, sampler="ddim")
    with ours.watch(record="unet") as seen:
        next(steps)
    assert relative_error(list(steps)[-1].x, step_by_step(ours)[-1].x) < 1e-5
    assert len(seen["unet"]) == 1


# What it costs -----------------------------------------------------------------------------------


def test_watching_changes_nothing_where_the_layers_are_plain(checkpoint: Folders) -> None:
    """As they are on a GPU, and here where somebody has put in a layer."""
    ours = minpaint.load(checkpoint("small-sd1"), device="cpu", dtype="fp32")
    ours.unet.conv_out.forward = ours.unet.conv_out.forward
    assert not is_unmodified(ours.unet)
    before = paint(ours)
    with ours.watch(record="unet*", attend=lambda *_: None, patch={"unet*": lambda *_: None}):
        assert torch.equal(paint(ours), before)


# The most that was measured: 7.8e-7 on small-sd1 (ddim, 20 steps), 1.9e-6 on tiny. PNDM in 20 steps overshoots on tiny,
# and amplifies what is added: 5.4e-6 with AMX, 1.1e-5 and 2.3e-5 with the kernels of smaller processors.
OVERSHOOTS = ("tiny", "pndm", 20)


@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "dpmpp"])
@pytest.mark.parametrize("model", ["small-sd1", pytest.param("tiny", marks=pytest.mark.slow)])
def test_watching_changes_faster_layers_by_rounding(painter: Paint, model: str, sampler: str, steps: int) -> None:
    ours = minpaint.load("tiny", device="cpu", dtype="fp32") if model == "tiny" else painter(model)
    options = {"steps": steps, "sampler": sampler, "prompt": "a red tower"}
    before = paint(ours, **options)
    assert ours.last_run.plan.phases["denoise"].strategy.fast
    with ours.watch(attend=lambda *_: None):
        bound = 5e-5 if (model, sampler, steps) == OVERSHOOTS else 1e-5
        assert relative_error(paint(ours, **options), before) < bound


def test_half_precision_is_watched_too(checkpoint: Folders, painter: Paint) -> None:
    half = minpaint.load(checkpoint("small-sd1"), device="cpu", dtype="bf16")
    with half.watch(record=MIDDLE, attend=lambda name, step, q, k, v, attend: attend(q, k, v)) as seen:
        assert relative_error(paint(half), paint(painter("small-sd1"))) < 0.05
    assert [halves.cond.shape for halves in seen[MIDDLE]] == 3 * [(1, 64, 4, 4)]


def test_who_does_not_watch_imports_nothing_of_it(tmp_path: Path) -> None:
    make_picture().save(tmp_path / "picture.png")
    make_mask().save(tmp_path / "mask.png")
    code = """if True:
        import sys, minpaint
        ours = minpaint.load("tiny", device="cpu")
        ours("picture.png", "mask.png", "a red tower", steps=1)
        assert not [name for name in sys.modules if name.startswith("minpaint.study")]
        ours.watch()
        assert "minpaint.study.watch" in sys.modules"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)


def test_nnsight_traces_the_unet(checkpoint: Folders) -> None:
    nnsight = pytest.importorskip("nnsight")
    ours = minpaint.load(checkpoint("small-sd1"), device="cpu", dtype="fp32")
    inputs = torch.randn(2, 9, 8, 8), torch.tensor([501.0, 501.0]), torch.randn(2, 77, 64)
    outputs = listen(ours, lambda ours: ours.unet(*inputs), lambda _, output: output.clone())
    model = nnsight.NNsight(ours.unet)
    with model.trace(*inputs):
        inner = model.mid_block.attentions[0].transformer_blocks[0].attn2.output.save()
    [expected] = outputs["unet.mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert torch.equal(inner, expected)
