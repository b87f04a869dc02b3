"""Kinds of files that people have: single files of many shapes, VAEs on their own, and files in repositories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import FILES, OPEN_CLIP, as_single_file, configure, edit, hollow_single_file, latents, load, refusal
from lora_files import write
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import vae_to_ldm, write_hollow, write_single_file
from test_safety import paint
from torch import Tensor

from minpaint.checkpoint.load import describe
from minpaint.cli.main import main
from minpaint.errors import InputError
from minpaint.settings import Settings
from weights.random_checkpoint import FAMILIES, write_checkpoint

Folders = Callable[[str], Path]
Change = Callable[[dict[str, Tensor]], object]


def _put(**tensors: Tensor) -> Change:
    return lambda t: t.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def _drop(beginning: str) -> Change:
    return lambda t: [t.pop(key) for key in list(t) if key.startswith(beginning)]


def _cast(t: dict[str, Tensor], *dtypes: torch.dtype) -> None:
    t.update({key: t[key].to(dtypes[n % len(dtypes)]) for n, key in enumerate(t) if t[key].is_floating_point()})


# Shapes of single files in public: what the file holds beside the three models, or holds otherwise.
SHAPES: dict[str, tuple[str, bool, Change, set[str]]] = {
    "v1-5-pruned": ("small-sd1-4ch", True, lambda t: None, {"model_ema.* (", "alphas_cumprod"}),
    "v1-5-pruned-emaonly": ("small-sd1-4ch", False, lambda t: None, set()),
    "sd-v1-5-inpainting, fp16": ("small-sd1", False, lambda t: _cast(t, torch.float16), set()),
    "bf16": ("small-sd1", False, lambda t: _cast(t, torch.bfloat16), set()),
    "merged, mixed": ("small-sd1", False, lambda t: _cast(t, torch.float16, torch.float32, torch.bfloat16), set()),
    "merged, with CLIP's scale": (
        "small-sd1",
        False,
        _put(cond_stage_model__logit_scale=torch.tensor(4.6), cond_stage_model__text_projection=torch.zeros(64, 64)),
        {"cond_stage_model.logit_scale", "cond_stage_model.text_projection"},
    ),
    "with a projection": (
        "small-sd1",
        False,
        _put(cond_stage_model__transformer__text_projection__weight=torch.zeros(64, 64)),
        {"cond_stage_model.transformer.text_projection.weight"},
    ),
    "512-inpainting-ema, SD 2": (
        "small-sd2",
        True,
        _put(
            cond_stage_model__model__logit_scale=torch.tensor(4.6),
            cond_stage_model__model__text_projection=torch.zeros(64, 64),
        ),
        {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection", "model_ema.* ("},
    ),
    "768-v-ema, SD 2": ("small-v", False, lambda t: None, set()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_single_files_of_public_shapes_open_and_say_what_they_ignored(
    shape: str, copy: Folders, tmp_path: Path
) -> None:
    family, extras, change, ignored = SHAPES[shape]
    folder = copy(family)
    path = write_single_file(folder, tmp_path / "one.safetensors", OPEN_CLIP[family], extras)
    edit(path, change)
    found = describe(path, config=folder)
    assert extras or len(found.ignored) == len(ignored)
    assert all(any(key.startswith(known) for key in found.ignored) for known in ignored)
    wanted = describe(folder).architecture.directories
    for part, directory in found.architecture.directories.items():
        assert {name: stored.shape for name, stored in directory.items()} == {
            name: stored.shape for name, stored in wanted[part].items()
        }


@pytest.mark.parametrize(
    "tensors",
    [
        {"cond_stage_model.logit_scale": torch.zeros(2, 3)},
        {"cond_stage_model.text_projection": torch.zeros(64, 63)},
        {"cond_stage_model.logit_bias": torch.tensor(1.0)},
        {"embedding_manager.x": torch.zeros(1)},
    ],
)
def test_what_only_resembles_a_leftover_is_refused(copy: Folders, tensors: dict[str, Tensor]) -> None:
    source = as_single_file(copy("small-sd1"), "small-sd1")
    edit(source["model"], lambda t: t.update(tensors))
    assert "tensors that belong to no part of the model" in refusal(**source)


def test_averaged_weights_alone_are_refused_by_what_they_are(copy: Folders) -> None:
    source = as_single_file(copy("small-sd1"), "small-sd1")
    edit(source["model"], _drop("model.diffusion_model."))
    assert "averaged weights of a training only" in refusal(**source)


def test_a_text_encoder_with_its_projection_opens(
    broken: Path, painter: Callable[[str], Any], picture: Image.Image, mask: Image.Image
) -> None:
    edit(broken / FILES["text_encoder"], _put(text_projection__weight=torch.ones(48, 64)))
    configure(broken, "text_encoder", architectures=["CLIPTextModelWithProjection"], torch_dtype="float16")
    configure(broken, "unet", torch_dtype="float16")
    configure(broken, "vae", torch_dtype="float16")
    ours = load(broken)
    assert ours.ignored(Settings("")) == ["text_encoder/text_projection.weight"]
    assert torch.equal(latents(ours, picture, mask), latents(painter("small-sd1-4ch"), picture, mask))


# ---- another VAE ----


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in diffusers layout with other weights in its VAE, and another scaling factor."""
    folder = write_checkpoint(tmp_path_factory.mktemp("other") / "model", FAMILIES["small-sd1"])
    edit(folder / FILES["vae"], lambda t: t.update({key: 0.9 * tensor for key, tensor in t.items()}))
    configure(folder, "vae", scaling_factor=0.2)
    return folder


def _ldm(folder: Path, path: Path, beginning: str = "") -> Path:
    named = vae_to_ldm(load_file(folder / FILES["vae"]))
    save_file({beginning + name: tensor.contiguous() for name, tensor in named.items()}, path)
    return path


VAES: dict[str, Callable[[Path, Path], Path]] = {
    "a checkpoint's folder": lambda folder, place: folder,
    "a folder of its own": lambda folder, place: folder / "vae",
    "a file in diffusers' names": lambda folder, place: folder / FILES["vae"],
    "a file in latent diffusion's names": lambda folder, place: _ldm(folder, place / "vae-ft-mse.safetensors"),
    "with the beginning of a checkpoint's": lambda f, place: _ldm(f, place / "v.safetensors", "first_stage_model."),
    "a whole single file": lambda folder, place: write_single_file(folder, place / "one.safetensors", False),
}


@pytest.mark.parametrize("kind", VAES)
def test_another_vae_takes_the_place_of_the_models_own(
    kind: str, copy: Folders, other_vae: Path, tmp_path: Path, picture: Image.Image, mask: Image.Image
) -> None:
    place, model = VAES[kind](other_vae, tmp_path), copy("small-sd1")
    found = load(model, vae=place)
    assert found.vae_config.scaling_factor == (0.2 if place.is_dir() else 0.18215)  # no file tells it
    [ours] = found(picture, mask, "two dogs", steps=2)
    configure(model, "vae", scaling_factor=found.vae_config.scaling_factor)
    edit(model / FILES["vae"], lambda t: t.update(load_file(other_vae / FILES["vae"])))
    [expected] = load(model)(picture, mask, "two dogs", steps=2)
    assert torch.equal(ours.latents, expected.latents)
    assert ours.image.tobytes() == expected.image.tobytes()


def test_a_single_file_without_a_vae_takes_another(
    copy: Folders, other_vae: Path, picture: Image.Image, mask: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    source = as_single_file(copy("small-sd1"), "small-sd1")
    edit(source["model"], _drop("first_stage_model."))
    assert refusal(**source).endswith("name one with --vae, a file, a folder or a hub id")
    both = load(**source, vae=other_vae), load(copy("small-sd2").parent / "small-sd1", vae=other_vae)
    assert torch.equal(*(latents(each, picture, mask) for each in both))
    call = ["plan", "--model", str(source["model"]), "--config", str(source["config"]), "--budget", "4GiB"]
    assert main([*call, "--vae", str(other_vae)]) == 0
    assert "predicted peak" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["sd15", "sd2"])
def test_the_architecture_of_a_file_without_a_vae_is_told_with_another(kind: str, tmp_path: Path) -> None:
    configs = FAMILIES[kind]
    hollow = describe(hollow_single_file(configs, tmp_path)).architecture
    path = tmp_path / "vae.safetensors"
    vae = {
        name: torch.empty(stored.shape, device="meta")
        for part in ("encoder", "decoder")
        for name, stored in hollow.directories[part].items()
    }
    found = describe(hollow_single_file(configs, tmp_path / "again"), vae=write_hollow(vae, path)).architecture
    assert (found.unet, found.vae, found.text) == (hollow.unet, hollow.vae, hollow.text)


def test_a_vae_that_cannot_be_used_is_refused(copy: Folders, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vae /no/such: no such file or folder; name one, or owner/name of the hub"):
        load("tiny", vae="/no/such")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refusal("tiny", vae=tmp_path / "empty")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "vae (a.safetensors): tensors do not fit the configuration" in refusal(
        "tiny", vae=tmp_path / "a.safetensors"
    )
    folder = copy("small-sd1")
    edit(folder / FILES["vae"], _drop("post_quant_conv"))
    assert "post_quant_conv" in refusal("tiny", vae=folder)


# ---- the command line ----


def test_what_was_used_is_in_the_record_and_repeated(
    copy: Folders, other_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy("small-sd1")
    lora = write(tmp_path / "style.safetensors", model, "kohya")
    configure(model, "scheduler", _class_name="EulerAncestralDiscreteScheduler", a_leftover=3)
    edit(model / FILES["text_encoder"], _put(text_projection__weight=torch.ones(64, 64)))
    call = [*paint(model, tmp_path), "--vae", str(other_vae), "--lora", f"{lora}:0.5", "--json"]
    assert main(call) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["lora"] == [f"{lora}:0.5"]
    assert report["vae"] == str(other_vae)
    assert (report["steps"], report["eta"], report["sampler"]) == (2, 1.0, "ddim")
    nearest, leftover, tensor = report["ignored"]
    assert nearest.startswith("EulerAncestralDiscreteScheduler is none of the samplers here; ddim with eta 1")
    assert leftover == "scheduler_config.json: ddim takes no notice of a_leftover 3"
    assert tensor == "text_encoder/text_projection.weight"
    assert f"note: {nearest}" in err

    painted = tmp_path / "out.png"
    assert main(["info", str(painted), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["lora"], record["vae"], record["ignored"]) == (report["lora"], report["vae"], report["ignored"])
    assert len(record["lora_sha256"]) == 1
    again = painted.with_name("again.png")
    assert main(["paint", "--like", str(painted), "-o", str(again)]) == 0
    assert "is not what it was" not in capsys.readouterr().err
    with Image.open(painted) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes()
    write(lora, model, "peft")
    assert main(["paint", "--like", str(painted), "-o", str(again), "--overwrite"]) == 0
    assert f"note: lora ['{lora}:0.5'] is not what it was when the picture was painted first" in capsys.readouterr().err


def test_a_mistyped_file_in_a_folder_here_is_not_looked_for_in_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd").mkdir(parents=True)
    for option in ({"model": "models/sd/typo.safetensors"}, {"model": "tiny", "vae": "models/sd/typo.safetensors"}):
        with pytest.raises(InputError, match="no such file or folder"):
            load(**option)


@pytest.mark.parametrize("entry", ["/no/such.safetensors", "./no.safetensors:2", "no such file"])
def test_a_lora_that_is_not_there_is_refused(entry: str) -> None:
    with pytest.raises(InputError, match=r"no such file; name one, or owner/name\[/file\.safetensors\] of the hub"):
        load("tiny", lora=entry)
