"""`parity` names the first cause of every planted fault, and raises no alarm where nothing was planted."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import diffusers
import lora_files
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minpaint.inpaint
import minpaint.models.unet
from minpaint import samplers
from minpaint.checkpoint.load import Checkpoint, load_checkpoint
from minpaint.cli.main import main
from minpaint.engine.device import DTYPES
from minpaint.study import parity_record, parity_sides
from minpaint.study.parity import compare
from minpaint.study.parity_diffusers import diffusers_side
from minpaint.study.parity_dump import write_dump
from minpaint.study.parity_record import Layer, Stage
from minpaint.study.parity_sides import Case, Side, minpaint_side, stages
from weights.random_checkpoint import FAMILIES, write_checkpoint

CPU = torch.device("cpu")
Patch = pytest.MonkeyPatch


@pytest.fixture
def opened(checkpoint: Callable[[str], Path]) -> Callable[..., tuple[Checkpoint, Side]]:
    """A family's checkpoint, to be changed, and minpaint's side of it."""

    def load(family: str, case: Case) -> tuple[Checkpoint, Side]:
        loaded = load_checkpoint(checkpoint(family))
        return loaded, minpaint_side(loaded, case, CPU, DTYPES[case.dtype])

    return load


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str, Case], list[Stage]]:
    """What diffusers computes, recorded once for all faults that are planted on minpaint's side."""
    made: dict[tuple[str, Case], list[Stage]] = {}

    def recorded(family: str, case: Case) -> list[Stage]:
        if (family, case) not in made:
            made[family, case] = list(their_stages(checkpoint(family), case))
        return made[family, case]

    return recorded


def their_stages(folder: Path, case: Case, plant: Callable[[Side], object] = lambda side: None) -> Iterator[Stage]:
    loaded, dtype = load_checkpoint(folder), DTYPES[case.dtype]
    names = minpaint_side(loaded, case, CPU, dtype).modules
    side = diffusers_side(loaded, case, CPU, dtype, names)
    plant(side)
    return stages(side, loaded, case)


# Planted faults ----------------------------------------------------------------------------------------------------


def change(part: str, name: str, by: float, at: tuple[int, ...] = (0,)) -> Callable[[Checkpoint, Patch], None]:
    """One number of one parameter."""

    def plant(checkpoint: Checkpoint, patch: Patch) -> None:
        getattr(checkpoint, part).get_parameter(name).data[at] += by

    return plant


def set_to(part: str, name: str, **attributes: Any) -> Callable[[Checkpoint, Patch], None]:
    """Attributes of one module."""

    def plant(checkpoint: Checkpoint, patch: Patch) -> None:
        module = getattr(checkpoint, part).get_submodule(name)
        for attribute, value in attributes.items():
            assert getattr(module, attribute) != value
            setattr(module, attribute, value)

    return plant


def forward(part: str, name: str, change: Callable[[nn.Module, Any], Any]) -> Callable[[Checkpoint, Patch], None]:
    """Another forward of one module, given the module and its present one."""

    def plant(checkpoint: Checkpoint, patch: Patch) -> None:
        module = getattr(checkpoint, part).get_submodule(name)
        patch.setattr(module, "forward", change(module, module.forward))

    return plant


def swap_q_and_k(checkpoint: Checkpoint, patch: Patch) -> None:
    attention = checkpoint.unet.get_submodule("up_blocks.1.attentions.1.transformer_blocks.0.attn1")
    q, k = attention.to_q.weight, attention.to_k.weight
    q.data, k.data = k.data, q.data


def sines_first(checkpoint: Checkpoint, patch: Patch) -> None:
    right = minpaint.models.unet.timestep_embedding
    patch.setattr(minpaint.models.unet, "timestep_embedding", lambda t, dim: right(t, dim).roll(dim // 2, -1))


def sampler(name: str, at: int, factor: float) -> Callable[[Checkpoint, Patch], None]:
    """A sampler whose one step goes a little too far."""

    def plant(checkpoint: Checkpoint, patch: Patch) -> None:
        right = samplers.SAMPLERS[name]

        def wrong(model: Any, x: Tensor, schedule: Any, eta: float, noise: Any, keep: Any) -> Iterator[Any]:
            calls = iter(range(100))
            yield from right(
                model, x, schedule, eta, noise, lambda x, t: keep(x * (factor if next(calls) == at else 1), t)
            )

        patch.setitem(samplers.SAMPLERS, name, wrong)

    return plant


def multistep_weight(checkpoint: Checkpoint, patch: Patch) -> None:
    right = samplers._multistep

    def wrong(outputs: list[Tensor]) -> Tensor:
        return right(outputs) + (len(outputs) == 3) * outputs[0] / 120

    patch.setattr(samplers, "_multistep", wrong)


def schedule(**changes: Callable[[Any], Any]) -> Callable[[Checkpoint, Patch], None]:
    """Fields of the schedule."""

    def plant(checkpoint: Checkpoint, patch: Patch) -> None:
        right = parity_sides.make_schedule

        def wrong(*args: Any, **options: Any) -> Any:
            made = right(*args, **options)
            return replace(made, **{name: change(getattr(made, name)) for name, change in changes.items()})

        patch.setattr(parity_sides, "make_schedule", wrong)

    return plant


def algorithm(**changes: Any) -> Callable[[Checkpoint, Patch], None]:
    """Arguments of inpaint.inpaint."""

    def plant(checkpoint: Checkpoint, patch: Patch) -> None:
        right = parity_sides.inpaint
        patch.setattr(parity_sides, "inpaint", lambda *args, **options: right(*args, **options | changes))

    return plant


def swap_prompts(checkpoint: Checkpoint, patch: Patch) -> None:
    right = parity_sides.inpaint

    def wrong(networks: Any, canvas: Any, prompt: str, *args: Any, **options: Any) -> Any:
        return right(networks, canvas, options["negative_prompt"], *args, **options | {"negative_prompt": prompt})

    patch.setattr(parity_sides, "inpaint", wrong)


def draw_in_another_order(checkpoint: Checkpoint, patch: Patch) -> None:
    right = parity_sides.seeded_noise

    def wrong(seeds: Any) -> Any:
        noise, held = right(seeds), []

        def draw(shape: tuple[int, ...]) -> Tensor:
            if not held:
                first = noise(shape)
                held.append(first)
                return noise(shape)
            return held.pop()

        return draw

    patch.setattr(parity_sides, "seeded_noise", wrong)


def keep_a_wider_hole(checkpoint: Checkpoint, patch: Patch) -> None:
    right = parity_sides.reference_canvas

    def wrong(*args: Any) -> Any:
        canvas = right(*args)
        return replace(canvas, blanked=F.max_pool2d(canvas.blanked, 3, 1, 1))

    patch.setattr(parity_sides, "reference_canvas", wrong)


def mask_another_cell(checkpoint: Checkpoint, patch: Patch) -> None:
    right = parity_sides.reference_canvas

    def wrong(*args: Any) -> Any:
        canvas = right(*args)
        return replace(canvas, cells=F.max_pool2d(canvas.cells, (1, 3), 1, (0, 1)))

    patch.setattr(parity_sides, "reference_canvas", wrong)


def put_back_at_the_old_level(checkpoint: Checkpoint, patch: Patch) -> None:
    right = minpaint.inpaint.put_back

    def wrong(picture: Tensor, noise: Tensor, cells: Tensor, schedule: Any, x: Tensor, t: float | None) -> Tensor:
        return right(picture, noise, cells, schedule, x, t and t + schedule.stride)

    patch.setattr(minpaint.inpaint, "put_back", wrong)


def pad_with_something_else(checkpoint: Checkpoint, patch: Patch) -> None:
    checkpoint.tokenizer.pad_token = "!"


def swap_mean_and_variance(checkpoint: Checkpoint, patch: Patch) -> None:
    right = checkpoint.vae.encode
    patch.setattr(checkpoint.vae, "encode", lambda pixels: right(pixels)[::-1])


def darken(checkpoint: Checkpoint, patch: Patch) -> None:
    import minpaint.study.parity as module

    right = module.to_image
    patch.setattr(module, "to_image", lambda pixels: right(pixels - 0.02))


def linear(module: Any, right: Any) -> Any:
    def wrong(x: Tensor, size: Any = None) -> Tensor:
        out: Tensor = module.conv(F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="bilinear"))
        return out

    return wrong


def scaled(module: Any, right: Any) -> Any:
    return lambda *args, **options: 0.999 * right(*args, **options)


BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"
SD1, FOUR, V = "small-sd1", "small-sd1-4ch", "small-v"
FAULTS: dict[str, tuple[str, Case, Callable[[Checkpoint, Patch], None], str]] = {}
FP32, BF16, PNDM = Case(64, 64, 4), Case(64, 64, 3, dtype="bf16"), Case(64, 64, 5)


def fault(name: str, family: str, case: Case, plant: Callable[[Checkpoint, Patch], None], cause: str) -> None:
    FAULTS[name] = family, case, plant, cause


CONV, NORM = "down_blocks.0.resnets.0.conv1", "decoder.up_blocks.1.resnets.0.norm2"
DOWN, EMBEDDING = "encoder.down_blocks.1.downsamplers.0", "embeddings.position_embedding"
MIDDLE, UP, ACT = "encoder.mid_block.resnets.1.norm1", "up_blocks.0.upsamplers.0", "encoder.layers.1.mlp.activation_fn"
DEEP, CROSS = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0"


def louder(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(1.01 * q, k, v)


# fmt: off
fault("one weight", SD1, FP32, change("unet", f"{CONV}.weight", 0.01, (3, 2, 1, 1)), f"unet.{CONV}")
fault("one weight of the decoder", SD1, FP32, change("vae", f"{NORM}.bias", 0.01), f"vae.{NORM}")
fault("one weight of the encoder", V, FP32, change("vae", "quant_conv.weight", 0.01, (1, 1, 0, 0)), "vae.quant_conv")
fault("one number of an embedding", SD1, FP32,
      change("text_encoder", f"{EMBEDDING}.weight", 0.1, (3, 3)), f"text_encoder.{EMBEDDING}")
fault("epsilon of a group norm", SD1, FP32, set_to("unet", f"{CROSS}.norm", eps=1e-5), f"unet.{CROSS}.norm")
fault("epsilon of a layer norm", V, FP32, set_to("unet", f"{BLOCK}.norm2", eps=1e-6), f"unet.{BLOCK}.norm2")
fault("epsilon in the encoder", SD1, FP32, set_to("vae", MIDDLE, eps=1e-5), f"vae.{MIDDLE}")
fault("one-sided padding", SD1, FP32, set_to("vae", DOWN, one_sided=False), f"vae.{DOWN}")
fault("padding by the edge", SD1, FP32, set_to("unet", "conv_out", padding_mode="replicate"), "unet.conv_out")
fault("swapped q and k", SD1, FP32, swap_q_and_k, f"unet.{DEEP}")
fault("number of heads", SD1, FP32, set_to("unet", f"{BLOCK}.attn2", heads=4), f"unet.{BLOCK}.attn2")
fault("scale of attention", V, FP32, set_to("unet", f"{BLOCK}.attn1", attend=louder), f"unet.{BLOCK}.attn1")
fault("another activation", SD1, FP32,
      forward("text_encoder", ACT, lambda *_: lambda x: F.gelu(x)), f"text_encoder.{ACT}")
fault("a residual too small", V, FP32, forward("vae", f"decoder.{CROSS}", scaled), f"vae.decoder.{CROSS}")
fault("smooth enlargement", SD1, FP32, forward("unet", UP, linear), f"unet.{UP}")
fault("sines before cosines", SD1, FP32, sines_first, "unet")
fault("mean and variance swapped", SD1, FP32, swap_mean_and_variance, "vae.encode")
fault("another padding token", SD1, FP32, pad_with_something_else, "tokens")
fault("pixels hidden", SD1, FP32, keep_a_wider_hole, "canvas")
fault("order of the draws", SD1, FP32, draw_in_another_order, "draws")
fault("order of the draws, 4 channels", FOUR, PNDM, draw_in_another_order, "draws")
fault("one cell of the mask", SD1, FP32, mask_another_cell, "conditioning")
fault("scaling factor", SD1, FP32, algorithm(scaling_factor=0.1825), "conditioning")
fault("weight of the guidance", SD1, FP32, algorithm(guidance=7.501), "guidance")
fault("order of the guidance", SD1, FP32, swap_prompts, "guidance")
fault("one timestep", SD1, FP32, schedule(timesteps=lambda t: (*t[:2], t[2] + 1, *t[3:])), "step 2")
fault("a step too few", SD1, FP32, schedule(timesteps=lambda t: t[1:]), "timesteps")
fault("the last noise level", SD1, FP32, schedule(alpha_bar_end=lambda level: 1.0), "step 3")
fault("epsilon for v", V, FP32, schedule(prediction=lambda kind: "epsilon"), "step 0")
fault("one step too far", V, FP32, sampler("ddim", 1, 1.00001), "step 1")
fault("a coefficient of the multistep", FOUR, PNDM, multistep_weight, "step 3")
fault("noise level of what is put back", FOUR, PNDM, put_back_at_the_old_level, "step 0")
fault("brightness of the picture", SD1, FP32, darken, "picture")
fault("one weight in bf16", SD1, BF16, change("unet", f"{CONV}.bias", 1.0), f"unet.{CONV}")
fault("a step in bf16", SD1, BF16, sampler("ddim", 1, 1.1), "step 1")
# fmt: on


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(
    opened: Callable[..., tuple[Checkpoint, Side]],
    reference: Callable[[str, Case], list[Stage]],
    monkeypatch: Patch,
    name: str,
) -> None:
    family, case, plant, cause = FAULTS[name]
    theirs = reference(family, case)
    checkpoint, side = opened(family, case)
    plant(checkpoint, monkeypatch)
    report = compare(theirs, side, checkpoint, case)
    assert report.cause is not None
    assert report.cause.name == cause, report.table()


def worse_reference_step(patch: Patch) -> None:
    right = diffusers.DDIMScheduler.step

    def wrong(self: Any, output: Tensor, t: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        return right(self, output * (1.00001 if int(t) == 501 else 1), t, sample, *args, **options)

    wrong.__signature__ = inspect.signature(right)  # type: ignore[attr-defined]
    patch.setattr(diffusers.DDIMScheduler, "step", wrong)


@pytest.mark.parametrize("cause", ["unet.up_blocks.0.resnets.1.conv1", "vae.post_quant_conv", "step 1"])
def test_a_fault_of_the_reference_is_named(
    checkpoint: Callable[[str], Path],
    opened: Callable[..., tuple[Checkpoint, Side]],
    monkeypatch: Patch,
    cause: str,
) -> None:
    def plant(side: Side) -> None:
        if cause in side.modules:
            next(iter(side.modules[cause].parameters())).data.view(-1)[7] += 0.01

    if cause == "step 1":
        worse_reference_step(monkeypatch)
    loaded, side = opened("small-sd1", FP32)
    report = compare(their_stages(checkpoint("small-sd1"), FP32, plant), side, loaded, FP32)
    assert report.cause is not None
    assert report.cause.name == cause


def test_a_fault_of_the_engine_is_named(
    opened: Callable[..., tuple[Checkpoint, Side]], reference: Callable[[str, Case], list[Stage]]
) -> None:
    checkpoint, side = opened("small-sd1", FP32)
    theirs = reference("small-sd1", FP32)
    latents = theirs[-1].tensors["step.3.latents"]
    assert compare(theirs, side, checkpoint, FP32, lambda: latents).cause is None
    report = compare(theirs, side, checkpoint, FP32, lambda: latents * 1.001)
    assert report.cause is not None
    assert report.cause.name == "engine"


# Clean runs --------------------------------------------------------------------------------------------------------

CLEAN = [
    ("small-sd1", Case(64, 64, 4)),
    ("small-sd1", Case(64, 64, 3, dtype="bf16")),
    ("small-sd1-4ch", Case(64, 64, 5)),
    ("small-sd1", Case(96, 40, 7, "dpmpp", 3)),
    ("small-sd1", Case(40, 72, 3, "lcm", 4, "bf16")),
    ("small-sd1", Case(64, 64, 12, "pndm", 5, "bf16")),
    ("small-sd1", Case(64, 64, 1, "ddim", 6)),
    ("small-sd1-4ch", Case(64, 64, 4, "ddim", 1, "bf16")),
    ("small-sd1-4ch", Case(48, 64, 6, "dpmpp", 2)),
    ("small-sd1-4ch", Case(64, 48, 6, "dpmpp", 3, "bf16")),
    ("small-sd1-4ch", Case(64, 64, 3, "lcm", 4)),
    ("small-sd2", Case(64, 64, 5, None, 1)),
    ("small-sd2", Case(64, 64, 5, None, 1, "bf16")),
    ("small-sd2", Case(72, 40, 4, "ddim", 2)),
    ("small-sd2", Case(40, 40, 8, "dpmpp", 3, "bf16")),
    ("small-v", Case(64, 64, 4)),
    ("small-v", Case(64, 64, 4, "ddim", 1, "bf16")),
    ("small-v", Case(64, 72, 6, "dpmpp", 2)),
    ("small-v", Case(64, 64, 2, "lcm", 3, "bf16")),
    ("small-v", Case(56, 56, 9, "pndm", 7)),
    ("small-v", Case(64, 64, 20, "dpmpp", 8, "bf16")),
    ("small-sd1", Case(64, 64, 2, "ddim", 9, "fp16")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "case"),
    [pytest.param(*clean, marks=pytest.mark.slow if k >= 6 else ()) for k, clean in enumerate(CLEAN)],
)
def test_no_alarm_where_nothing_is_planted(
    opened: Callable[..., tuple[Checkpoint, Side]],
    reference: Callable[[str, Case], list[Stage]],
    family: str,
    case: Case,
) -> None:
    checkpoint, side = opened(family, case)
    report = compare(reference(family, case), side, checkpoint, case)
    assert report.cause is None, report.verdict()
    assert len(report.rows) > 380
    worst = max(row.own / row.tolerance for row in report.rows)
    print(f"{family} {case.dtype} {case.sampler}: nearest to an alarm {worst:.2f}")


def test_there_are_twenty_of_each() -> None:
    assert len(FAULTS) >= 20
    assert len(CLEAN) >= 20
    assert {case.dtype for _, case in CLEAN} >= {"fp32", "bf16"}


# The command, and dumps --------------------------------------------------------------------------------------------


def parity(*words: object) -> int:
    return main(["parity", "--device", "cpu", "--steps", "2", *map(str, words)])


@pytest.fixture
def without_diffusers(monkeypatch: Patch) -> None:
    """As where the test extra is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("diffusers", "peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)


def weaken(folder: Path) -> None:
    """Change one weight in a checkpoint's file."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["mid_block.resnets.0.conv2.weight"][1, 2, 0, 1] += 0.02
    file.unlink()  # it may be a link
    save_file(tensors, file, {"format": "pt"})


def test_the_command_agrees(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert parity("--model", checkpoint("small-sd1"), "--json", "--html", page) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["agree"] is True
    assert report["first_cause"] is None
    names = [layer["name"] for layer in report["layers"]]
    assert len(names) == len(set(names)) > 380
    assert {"text_encoder", "unet.conv_in", "vae.encode", "vae.decode", "step 1", "picture", "engine"} <= set(names)
    for layer in report["layers"]:
        assert set(layer) == {"name", "drift", "own", "tolerance"}
        assert all(math.isfinite(layer[key]) for key in ("drift", "own", "tolerance"))
    assert "done in" in err
    rows = ElementTree.parse(page).getroot().findall(".//tr")
    assert [row[0].text for row in rows[1:]] == names
    assert parity("--model", checkpoint("small-sd1"), "--html", page) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_a_dump_is_compared_without_diffusers(
    checkpoint: Callable[[str], Path],
    copy: Callable[[str], Path],
    tmp_path: Path,
    without_diffusers: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, dump = checkpoint("small-sd1-4ch"), tmp_path / "dump"
    assert parity("--model", model, "--dump", dump) == 0
    assert parity("--model", model, "--against", dump) == 0
    assert "agree: " in capsys.readouterr().out
    changed = copy("small-sd1-4ch")
    weaken(changed)
    assert parity("--model", changed, "--against", dump, "--json") == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["agree"], report["first_cause"]) == (False, "unet.mid_block.resnets.0.conv2")
    assert "error" not in err
    assert parity("--model", model) == 2
    assert 'pip install "minpaint[test]"' in capsys.readouterr().err
    assert parity("--model", model, "--dump", tmp_path / "other", "--side", "diffusers") == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("family", "dtype"), [("small-v", "fp32"), ("small-sd1", "bf16")])
def test_a_dump_of_diffusers_agrees_and_its_fault_is_named(
    checkpoint: Callable[[str], Path], copy: Callable[[str], Path], tmp_path: Path, family: str, dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, dump = checkpoint(family), tmp_path / "dump"
    assert parity("--model", model, "--dump", dump, "--side", "diffusers", "--dtype", dtype) == 0
    assert parity("--model", model, "--against", dump) == 0
    if dtype == "fp32":
        changed = copy(family)
        weaken(changed)
        assert parity("--model", changed, "--against", dump) == 1
        assert "the first cause is unet.mid_block.resnets.0.conv2" in capsys.readouterr().out


def test_a_third_implementation_agrees(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that computes in float64 and has measured no floors; its noise it takes from a dump."""
    folder, case = checkpoint("small-sd1"), replace(FP32, noise="its own")
    loaded = load_checkpoint(folder)
    made, right = [], parity_sides.seeded_noise
    monkeypatch.setattr(parity_sides, "seeded_noise", lambda seeds: right([seed + 99 for seed in seeds]))
    for stage in stages(minpaint_side(loaded, case, CPU, torch.float64), loaded, case):
        layers = [
            Layer(layer.name, {role: single(value) for role, value in layer.inputs.items()}, single(layer.output))
            for layer in stage.layers
        ]
        made.append(Stage(stage.name, layers, {name: single(tensor) for name, tensor in stage.tensors.items()}))
    monkeypatch.undo()
    (tmp_path / "dump").mkdir()
    write_dump(tmp_path / "dump", "a port", case, loaded.architecture, made)
    assert parity("--model", folder, "--steps", 4, "--against", tmp_path / "dump") == 0, capsys.readouterr().out


def single(value: Any) -> Any:
    if isinstance(value, list):
        return [single(each) for each in value]
    return value.float() if value.is_floating_point() else value


def test_a_repository_of_half_precision_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model", FAMILIES["small-sd1"], dtype=torch.float16, variant="fp16")
    (folder / "model_index.json").unlink()  # which minpaint does not fetch
    assert parity("--model", folder) == 0
    assert parity("--model", folder, "--dtype", "bf16") == 0
    capsys.readouterr()


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_a_lora_and_another_vae_are_on_both_sides(
    checkpoint: Callable[[str], Path], tmp_path: Path, naming: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = lora_files.write(tmp_path / "lora.safetensors", checkpoint("small-sd1"), naming)
    other = write_checkpoint(tmp_path / "other", FAMILIES["small-sd1"], seed=5)
    dtype = "bf16" if naming == "peft" else "fp32"
    words = ("--model", checkpoint("small-sd1"), "--vae", other, "--dtype", dtype)
    assert parity(*words, "--lora", f"{lora}:0.7") == 0, capsys.readouterr().out
    if naming == "kohya":
        assert parity(*words, "--lora", f"{lora}:0.7", "--dump", tmp_path / "dump") == 0
        assert parity(*words, "--lora", f"{lora}:0.6", "--against", tmp_path / "dump") == 1
    capsys.readouterr()


def empty(dump: Path) -> None:
    for file in dump.iterdir():
        file.unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda dump: (dump / name).write_bytes((dump / name).read_bytes()[:-100])


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edited(dump: Path) -> None:
        manifest = json.loads((dump / "parity.json").read_text())
        change(manifest)
        (dump / "parity.json").write_text(json.dumps(manifest))

    return edited


def drop(name: str) -> Callable[[Path], object]:
    def dropped(dump: Path) -> None:
        tensors = load_file(dump / "run.safetensors")
        del tensors[name]
        save_file(tensors, dump / "run.safetensors")

    return dropped


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "nothing there": (empty, (), "has no parity.json"),
    "a cut file": (cut("unet-0.safetensors"), (), "unet-0.safetensors is damaged"),
    "a missing file": (lambda dump: (dump / "run.safetensors").unlink(), (), "run.safetensors is missing"),
    "a cut manifest": (cut("parity.json"), (), "parity.json is damaged"),
    "no stages": (edit(lambda it: it.pop("stages")), (), "parity.json is damaged"),
    "a layer without inputs": (edit(lambda it: it["stages"][0]["layers"][0].pop("inputs")), (), "is damaged"),
    "a layer of no tensor": (edit(lambda it: it["stages"][0]["layers"][0].update(output="none")), (), "is damaged"),
    "a case of text": (edit(lambda it: it["case"].update(steps="two")), (), "parity.json is damaged"),
    "no picture": (edit(lambda it: it["case"].update(width=0)), (), "parity.json is damaged"),
    "a later format": (edit(lambda it: it.update(format=2)), (), "is of format 2"),
    "other layers": (edit(lambda it: [layer.update(name="x") for stage in it["stages"] for layer in stage["layers"]]
        and it["stages"].pop()), (), "no layer of this model"),
    "a run without its picture": (drop("picture"), (), "the recorded run has no picture"),
    "a run without its last step": (drop("step.1.guided"), (), "the recorded run has no step.1.guided"),
    "another size": (lambda dump: None, ("--size", "72x64"), "was made with size 64x64"),
    "other steps": (lambda dump: None, ("--steps", "3"), "was made with steps 2"),
    "another dtype": (lambda dump: None, ("--dtype", "bf16"), "was made with dtype fp32"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_dump(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    dump = tmp_path_factory.mktemp("dumps") / "dump"
    assert parity("--model", checkpoint("small-sd1"), "--dump", dump, "--quiet") == 0
    return dump


@pytest.mark.parametrize("name", DAMAGES)
def test_a_dump_that_cannot_be_used_is_one_line(
    checkpoint: Callable[[str], Path], good_dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, words, told = DAMAGES[name]
    dump = shutil.copytree(good_dump, tmp_path / "dump")
    damage(dump)
    given = ["parity", "--model", str(checkpoint("small-sd1")), "--device", "cpu", "--quiet", "--against", str(dump)]
    assert main([*given, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minpaint: error: ")
    assert err.count("\n") == 1
    assert told in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--size", "64"), "is not WIDTHxHEIGHT"),
        (("--size", "60x64"), "use multiples of 8"),
        (("--steps", "0"), "steps must be"),
        (("--seed", "-1"), "seed must be"),
        (("--side", "diffusers"), "add --dump"),
        (("--dump", "a", "--against", "b"), "leave one of them out"),
        (("--html", "no/such/page.html"), "folder"),
        (("--against", "no/such/dump"), "has no parity.json"),
        (("--sampler", "pndm", "--steps", "2000"), "more than the 1000"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["parity", "--model", str(checkpoint("small-sd1")), "--device", "cpu", "--quiet", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("minpaint: error: ")
    assert err.count("\n") == 1
    assert told in err
    assert list(tmp_path.iterdir()) == []


def test_a_dump_of_another_model_is_refused(
    checkpoint: Callable[[str], Path], good_dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity("--model", checkpoint("small-sd2"), "--against", good_dump) == 2
    assert "is of another model (unet channels [32, 64] there, [64, 128] here)" in capsys.readouterr().err
    assert parity("--model", checkpoint("small-sd1"), "--dump", good_dump) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_blanked_picture_has_a_noise_floor_of_its_own() -> None:
    """One channel a group and no contrast: what the norm divides by is rounding, and the floor must tell."""
    norm = nn.GroupNorm(8, 8, eps=1e-12)
    calls: list[parity_record.Call] = []
    x = torch.full((1, 8, 16, 16), 0.1) + 1e-7 * torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        parity_record.record({"norm": norm}, lambda: norm(x), calls)
        [call] = calls
        floor = parity_record.noise_floor(call, call.inputs, call.output, torch.float32)
        ordinary = parity_record.noise_floor(call, {"x": torch.randn(1, 8, 16, 16)}, call.output, torch.float32)
    assert floor > 0.01
    assert ordinary > 0.5  # against another output, as a check of the check
