"""LoRA files of every naming beside diffusers' load_lora_weights and fuse_lora, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from diffusers import StableDiffusionInpaintPipeline
from folders import as_single_file, edit, latents, load, refusal
from lora_files import ALPHA, ATTENTION, CONVOLUTIONS, NAMINGS, OTHERS, RANK, factors, write
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from minpaint.checkpoint.load import describe, load_checkpoint
from minpaint.checkpoint.lora import split_weight
from minpaint.checkpoint.tensorfile import piece_buffer, read_into
from minpaint.errors import CheckpointError, InputError

Folders = Callable[[str], Path]
WEIGHT = 0.7


def fused(checkpoint: Path, files: dict[Path, float]) -> StableDiffusionInpaintPipeline:
    pipe = StableDiffusionInpaintPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    for path, weight in files.items():
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=weight)
        pipe.unload_lora_weights()
    return pipe


def reference(pipe: StableDiffusionInpaintPipeline, picture: Image.Image, mask: Image.Image) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    width, height = picture.size
    more: dict[str, Any] = {"num_inference_steps": 6, "generator": generator, "output_type": "latent"}
    return pipe("a dog", picture, mask, width=width, height=height, **more).images[0]


@pytest.mark.parametrize("family", ["small-sd1", pytest.param("small-sd2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("naming", NAMINGS)
def test_a_run_with_a_lora_equals_the_reference(
    checkpoint: Folders, tmp_path: Path, picture: Image.Image, mask: Image.Image, naming: str, family: str
) -> None:
    path = write(tmp_path / "lora.safetensors", checkpoint(family), naming)
    expected = reference(fused(checkpoint(family), {path: WEIGHT}), picture, mask)
    options: dict[str, Any] = {"steps": 6, "seed": 3, "profile": "diffusers", "prompt": "a dog"}
    ours = load(checkpoint(family), lora=f"{path}:{WEIGHT}")(picture, mask, **options)[0].latents
    plain = load(checkpoint(family))(picture, mask, **options)[0].latents
    assert relative_error(ours, expected) < 1e-4
    assert relative_error(plain, expected) > 1e-2  # it does something


def test_two_loras_add_up(checkpoint: Folders, tmp_path: Path, picture: Image.Image, mask: Image.Image) -> None:
    files = {write(tmp_path / "a.safetensors", checkpoint("small-sd1"), "kohya"): 0.5}
    files[write(tmp_path / "b.safetensors", checkpoint("small-sd1"), "peft", text=False)] = -0.3
    expected = reference(fused(checkpoint("small-sd1"), files), picture, mask)
    ours = load(checkpoint("small-sd1"), lora=[f"{path}:{weight}" for path, weight in files.items()])
    found = ours(picture, mask, "a dog", steps=6, seed=3, profile="diffusers")[0].latents
    assert relative_error(found, expected) < 1e-4


def merged(checkpoint: Path, entry: str, part: str = "unet", **more: Any) -> dict[str, Tensor]:
    """Every weight of a part with a LoRA, as it is read."""
    directory, found = describe(checkpoint, lora=entry, **more).architecture.directories[part], {}
    for name, stored in directory.items():
        found[name] = torch.empty(stored.shape)
        read_into(stored, found[name], piece_buffer([stored], torch.float32))
    return found


def test_every_weight_is_changed_as_the_paper_says(checkpoint: Folders, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", checkpoint("small-sd1"), "kohya")
    plain = load_checkpoint(checkpoint("small-sd1")).unet
    found = merged(checkpoint("small-sd1"), f"{path}:{WEIGHT}")
    pairs = factors(plain, (*ATTENTION, *CONVOLUTIONS, *OTHERS))
    for name, weight in plain.state_dict().items():
        expected = weight.double()
        if pair := pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None:
            change = pair[1].flatten(1).double() @ pair[0].flatten(1).double()
            expected = expected + WEIGHT * ALPHA / RANK * change.view(weight.shape)
        assert torch.allclose(found[name], expected.float(), rtol=1e-5, atol=1e-6), name


def test_a_lora_on_a_single_file_is_the_one_on_its_folder(checkpoint: Folders, tmp_path: Path, copy: Folders) -> None:
    """OpenCLIP's file has the three projections of a layer's attention in one tensor."""
    path = write(tmp_path / "lora.safetensors", checkpoint("small-sd2"), "peft")
    source = as_single_file(copy("small-sd2"), "small-sd2")
    for part in ("unet", "text_encoder"):
        apart = merged(checkpoint("small-sd2"), str(path), part)
        single = merged(source["model"], str(path), part, config=source["config"])
        assert apart.keys() == single.keys()
        assert all(torch.equal(apart[name], single[name]) for name in apart)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_lora_in_another_number_format(checkpoint: Folders, tmp_path: Path, dtype: torch.dtype) -> None:
    path = write(tmp_path / "lora.safetensors", checkpoint("small-sd1"), "kohya")
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, tmp_path / "other.safetensors")
    one, other = (merged(checkpoint("small-sd1"), str(file)) for file in (path, tmp_path / "other.safetensors"))
    assert max(relative_error(other[name], one[name]) for name in one) < 0.02


@pytest.mark.usefixtures("without_base")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_streamed_and_resident_weights_are_changed_alike(
    checkpoint: Folders, tmp_path: Path, picture: Image.Image, mask: Image.Image, dtype: str
) -> None:
    path = write(tmp_path / "lora.safetensors", checkpoint("small-sd1"), "kohya")
    painter = load(checkpoint("small-sd1"), lora=str(path), dtype=dtype)
    expected, engine = latents(painter, picture, mask), painter.engine
    assert painter.last_run is not None
    engine.budget = engine.planner().least(painter.last_run.request, engine.base)
    engine.keeps = False
    found = latents(painter, picture, mask)
    assert any(phase.split for phase in painter.last_run.plan.phases.values())
    assert relative_error(found, expected) < (1e-5 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 8, "unet.r": RANK}, 8 / RANK),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / RANK**0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}}, 2 / RANK),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_the_alpha_of_peft(checkpoint: Folders, tmp_path: Path, settings: Any, scale: float, beside: bool) -> None:
    """In the header, as diffusers writes it, or beside an adapter, as PEFT does."""
    if beside:
        settings = {k.removeprefix("unet."): v for k, v in settings.items() if k.startswith("unet.")}
        path = write(tmp_path / "adapter_model.safetensors", checkpoint("small-sd1"), "peft", text=False)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        path = write(tmp_path / "a.safetensors", checkpoint("small-sd1"), "peft", text=False, **metadata)
    directory = describe(checkpoint("small-sd1"), lora=str(path)).architecture.directories["unet"]
    [change] = next(stored for name, stored in directory.items() if name.endswith("attn1.to_q.weight")).added
    assert change.scale == pytest.approx(scale)


def change(key: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key) if tensor is None else tensors.update({key: tensor})


NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (change(f"{NAME}.lora_up.weight", None), "half of the change of down_blocks.0"),
        (change(f"{NAME}.lora_down.weight", torch.ones(4, 7)), "do not fit unet's down_blocks.0"),
        (change(f"{NAME}.alpha", torch.tensor(float("nan"))), "is not finite"),
        (change("lora_unet_no_such_block.lora_down.weight", torch.ones(4, 4)), "belong to no weight .*another family"),
        (change("lora_te2_text_model_x.alpha", torch.ones(())), "belong to no weight"),
        (change("surplus", torch.ones(3)), "belong to no weight"),
        (change(f"{NAME}.dora_scale", torch.ones(64)), "makes it a DoRA"),
        (change(f"{NAME}.hada_w1_a", torch.ones(64, 4)), "makes it a LoHa"),
        (change(f"{NAME}.lora_mid.weight", torch.ones(4, 4, 3, 3)), "makes it a LoCon"),
        (change(f"{NAME}.lora_A.weight", torch.ones(4, 64)), "stored under two names"),
        (change(f"{NAME}.lora_down.weight", torch.ones(4, 64, dtype=torch.int8)), "kind I8"),
        (change(f"{NAME}.lora_down.weight", torch.tensor(1.0)), "do not fit unet's down_blocks.0"),
        (change(f"{NAME}.lora_up.weight", torch.tensor(1.0)), "do not fit unet's down_blocks.0"),
        (change(f"{NAME}.alpha", torch.ones(4)), "an alpha is more than one number"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint: Folders, tmp_path: Path, alter: Any, told: str) -> None:
    path = write(tmp_path / "my.safetensors", checkpoint("small-sd1"), "kohya")
    edit(path, alter)
    message = refusal(checkpoint("small-sd1"), lora=str(path))
    assert message.startswith("lora my.safetensors: ")
    assert "\n" not in message
    with pytest.raises(ValueError, match=told):
        load(checkpoint("small-sd1"), lora=str(path))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ('{"unet.alpha_pattern": 5}', "alpha_pattern 5 .* not supported"),
        ('{"unet.lora_alpha": "8"}', "lora_alpha '8' are not supported"),
        ('{"unet.lora_alpha": NaN}', "alpha nan of .* is not finite"),
        ('{"unet.use_dora": true}', "use_dora.* not supported"),
        ("[" * 100_000, "lora_adapter_metadata cannot be read"),
        ("[]", "lora_adapter_metadata cannot be read"),
    ],
)
def test_bad_settings_of_peft_are_refused(checkpoint: Folders, tmp_path: Path, settings: str, told: str) -> None:
    path = write(
        tmp_path / "my.safetensors", checkpoint("small-sd1"), "peft", text=False, lora_adapter_metadata=settings
    )
    with pytest.raises(CheckpointError, match=rf"^lora my\.safetensors: .*{told}"):
        describe(checkpoint("small-sd1"), lora=str(path))


def test_an_argument_that_names_no_lora_is_refused() -> None:
    with pytest.raises(InputError, match="lora 5 is neither a file nor a list of files"):
        load("tiny", lora=5)
    with pytest.raises(InputError, match="cannot be used"):
        load("tiny", lora="x" * 5000 + ".safetensors:0.5")


def test_a_lora_of_another_family_is_refused(checkpoint: Folders, tmp_path: Path) -> None:
    path = write(tmp_path / "my.safetensors", checkpoint("small-sd2"), "kohya")
    assert "another family" in refusal(checkpoint("small-sd1"), lora=str(path))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a:b.safetensors:-1e-1", ("a:b.safetensors", -0.1)),
        ("a:b/c.safetensors", ("a:b/c.safetensors", 1.0)),
        ("owner/name:2", ("owner/name", 2.0)),
    ],
)
def test_file_and_weight(entry: str, expected: tuple[str, float]) -> None:
    assert split_weight(entry) == expected


@pytest.mark.parametrize("entry", ["a.safetensors:much", "a.safetensors:nan", "a.safetensors:inf", "a.safetensors:"])
def test_a_weight_that_is_no_number_is_refused(entry: str) -> None:
    with pytest.raises(InputError, match=r"is not a number; write it like a\.safetensors:0\.8"):
        split_weight(entry)
