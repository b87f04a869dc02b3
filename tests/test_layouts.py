"""The same weights paint the same, however they are stored and whoever wrote them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from conftest import SMALL_FAMILIES
from diffusers.loaders import single_file_utils as reference
from folders import (
    BASES,
    CONFIG_FILES,
    FILES,
    OFFICIAL,
    OLD_VAE_ATTENTION,
    OPEN_CLIP,
    ROOT,
    Folders,
    Json,
    alone,
    as_single_file,
    edit,
    hollow_single_file,
    latents,
    load,
    meta_models,
    shard,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import (
    bytes_of,
    header_of,
    write_aligned,
    write_hollow,
    write_raw,
    write_single_file,
    write_unaligned,
)
from torch import Tensor

from minpaint.checkpoint import hub
from minpaint.checkpoint.configs import text_config, unet_config, vae_config
from minpaint.checkpoint.load import describe
from minpaint.checkpoint.scheduler import scheduler_config
from minpaint.checkpoint.tensorfile import read_directory, read_tensors
from minpaint.errors import MinpaintWarning
from minpaint.painter import Painter
from weights.random_checkpoint import END, FAMILIES, write_checkpoint, write_tokenizer

# ---- the same weights in every layout ----


def as_shards(folder: Path, family: str) -> Json:
    for component in BASES:
        shard(folder, component)
    return {"model": folder}


def as_shards_of_a_variant(folder: Path, family: str) -> Json:
    shard(folder, "unet", variant=".fp16")
    return {"model": folder}


def with_old_vae_names(folder: Path, family: str) -> Json:
    def rename(tensors: dict[str, Tensor]) -> None:
        renamed = 0
        for key in list(tensors):
            for new, old in OLD_VAE_ATTENTION.items():
                if f"mid_block.attentions.0.{new}." in key:
                    tensors[key.replace(new, old)] = tensors.pop(key)
                    renamed += 1
        assert renamed == 16

    edit(folder / FILES["vae"], rename)
    return {"model": folder}


def without_text_prefix(folder: Path, family: str) -> Json:
    def rename(tensors: dict[str, Tensor]) -> None:
        del tensors["text_model.embeddings.position_ids"]
        for key in list(tensors):
            tensors[key.removeprefix("text_model.")] = tensors.pop(key)

    edit(folder / FILES["text_encoder"], rename)
    return {"model": folder}


def with_unaligned_headers(folder: Path, family: str) -> Json:
    for file in FILES.values():
        tensors = load_file(folder / file)
        (folder / file).unlink()
        write_unaligned(tensors, folder / file)
    return {"model": folder}


def as_another_variant(folder: Path, family: str) -> Json:
    for file in FILES.values():
        (folder / file).rename((folder / file).with_suffix(".non_ema.safetensors"))
    return {"model": folder}


def as_unaligned_single_file(folder: Path, family: str) -> Json:
    path = write_single_file(folder, folder.parent / "single" / "model.safetensors", OPEN_CLIP[family])
    return {"model": write_unaligned(load_file(path), path.with_name("odd.safetensors")), "config": folder}


def as_single_file_with_weights_only(folder: Path, family: str) -> Json:
    path = write_single_file(folder, folder.parent / "single" / "model.safetensors", OPEN_CLIP[family], extras=False)
    return {"model": path, "config": folder}


LAYOUTS = (
    as_shards,
    as_shards_of_a_variant,
    with_old_vae_names,
    without_text_prefix,
    with_unaligned_headers,
    as_another_variant,
    as_single_file,
    as_unaligned_single_file,
    as_single_file_with_weights_only,
)


CASES = [(family, layout) for family in ("small-sd1", "small-sd2") for layout in LAYOUTS]
CASES += [(family, layout) for family in ("small-sd1-4ch", "small-v") for layout in (as_shards, as_single_file)]


@pytest.fixture(scope="module")
def expected(painter: Callable[[str], Painter], picture: Image.Image, mask: Image.Image) -> Callable[[str], Tensor]:
    """The latents of a family's run from its plain folder."""
    made: dict[str, Tensor] = {}

    def run(family: str) -> Tensor:
        if family not in made:
            made[family] = latents(painter(family), picture, mask)
        return made[family]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_the_same_weights_paint_the_same(
    family: str,
    layout: Callable[[Path, str], Json],
    copy: Folders,
    expected: Callable[[str], Tensor],
    picture: Image.Image,
    mask: Image.Image,
) -> None:
    stored = load(**layout(copy(family), family))
    assert torch.equal(latents(stored, picture, mask), expected(family))


def test_a_repository_of_fp16_files_only_paints_as_the_same_numbers_in_plain_files(
    tmp_path: Path, picture: Image.Image, mask: Image.Image
) -> None:
    configs = FAMILIES["small-sd1"]
    variant = write_checkpoint(tmp_path / "variant", configs, dtype=torch.float16, variant="fp16")
    plain = write_checkpoint(tmp_path / "plain", configs, dtype=torch.float16)
    full = Path(shutil.copytree(plain, tmp_path / "full"))
    for file in FILES.values():
        tensors = load_file(full / file)
        save_file({k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}, full / file)
    results = [latents(load(folder), picture, mask) for folder in (variant, plain, full)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_half_precision_run_takes_the_half_precision_file_where_there_are_both(copy: Folders) -> None:
    folder = copy("small-sd1")
    plain = folder / FILES["unet"]
    half = {key: tensor.half() + 1 for key, tensor in load_file(plain).items()}
    save_file(half, plain.with_suffix(".fp16.safetensors"))
    key = "conv_in.bias"
    assert torch.equal(load(folder, dtype="fp16").unet.state_dict()[key], half[key])
    for dtype in ("fp32", "bf16"):
        weight = load(folder, dtype=dtype).unet.state_dict()[key]
        assert torch.equal(weight, load_file(plain)[key].to(weight.dtype))


def test_text_encoder_alone_in_full_precision_is_taken_beside_half_precision_parts(copy: Folders) -> None:
    folder = copy("small-sd1")
    for component in ("unet", "vae"):
        file = folder / FILES[component]
        half = {key: tensor.half() for key, tensor in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"))
        file.unlink()
    painter = load(folder)
    assert {p.dtype for model in (painter.unet, painter.vae, painter.text_encoder) for p in model.parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unaligned_tensors_read_bitwise_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{n}": torch.randn(3, n, 5, generator=generator).to(dtype) for n in range(1, 6)}
    path = write_unaligned(tensors, tmp_path / "odd.safetensors")
    read = dict(read_tensors(read_directory(path)))
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        assert tensor.dtype == dtype
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x010280])
def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(length: int, tmp_path: Path) -> None:
    tensor = torch.arange(8.0)
    header = json.dumps(header_of({"tensor": tensor})).encode().ljust(length)
    path = write_raw(tmp_path / "model.safetensors", header, bytes_of(tensor))
    assert path.read_bytes()[:2] == bytes([0x80, length >> 8 & 0xFF])
    assert torch.equal(dict(read_tensors(read_directory(path)))["tensor"], tensor)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_stored_positions_are_no_surplus_whatever_they_are_called(prefix: str, copy: Folders) -> None:
    folder = copy("small-sd1")
    without_text_prefix(folder, "small-sd1")

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[f"{prefix}{key}"] = tensors.pop(key)
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]

    edit(folder / FILES["text_encoder"], rename)
    load(folder)


@pytest.mark.parametrize("family", ["small-sd1", "small-sd2"])
def test_every_parameter_arrives_bitwise_and_nothing_stays_on_the_meta_device(
    family: str, checkpoint: Folders, painter: Callable[[str], Painter]
) -> None:
    loaded = painter(family)
    for component, file in FILES.items():
        model = getattr(loaded, component)
        stored = load_file(checkpoint(family) / file)
        stored = {key.removeprefix("text_model."): t for key, t in stored.items() if not key.endswith("position_ids")}
        found = {key.removeprefix("text_model."): parameter for key, parameter in model.named_parameters()}
        assert found.keys() == stored.keys()
        for key, parameter in found.items():
            assert torch.equal(parameter, stored[key]), key
            assert not parameter.requires_grad
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert not model.training


# ---- single files without configuration ----


ALONE = {
    "sd1": alone([32, 64], 9, linear=False),
    "sd1-4ch": alone([32, 64], 4, linear=False, layers=1),
    "sd2": alone([64, 128], 9, linear=True, layers=1),
    "sd2-4ch": alone([64, 64], 4, linear=True, layers=1),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tokenizer"), [("sd1", "tokenizer"), ("sd1-4ch", "."), ("sd2", "."), ("sd2-4ch", "tokenizer")]
)
def test_a_single_file_alone_paints_as_its_folder(
    kind: str, tokenizer: str, tmp_path: Path, picture: Image.Image, mask: Image.Image
) -> None:
    open_clip = kind.startswith("sd2")
    folder = write_checkpoint(tmp_path / "folder", ALONE[kind])
    path = write_single_file(folder, tmp_path / "single" / "model.safetensors", open_clip)
    write_tokenizer(path.parent / tokenizer, 514, END)  # SD 2 pads with "!" even where this is not said
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", MinpaintWarning)
        alone = load(path)
    told = [str(warning.message) for warning in warned if warning.category is MinpaintWarning]
    assert ["epsilon is assumed" in message for message in told] == ([True] if kind == "sd2-4ch" else [])
    assert torch.equal(latents(alone, picture, mask), latents(load(folder), picture, mask))


SHAPES = {
    "official sd15": FAMILIES["sd15"],
    "official sd2": FAMILIES["sd2"],
    "one level": alone([64], 9, linear=False),
    "three levels, one layer": alone([64, 64, 128], 9, linear=True, layers=1),
    "five levels, three layers": alone([32, 64, 64, 96, 128], 4, linear=False, layers=3, text=128),
}


@pytest.mark.parametrize(
    "shapes", [pytest.param(name, marks=() if name.startswith("three") else pytest.mark.slow) for name in SHAPES]
)
def test_the_architecture_is_told_from_shapes(shapes: str, tmp_path: Path) -> None:
    configs = SHAPES[shapes]
    told = describe(hollow_single_file(configs, tmp_path))
    assert told.architecture.unet == unet_config(configs["unet"])
    assert told.architecture.vae == vae_config(configs["vae"])
    assert told.scheduler_config == scheduler_config(configs["scheduler"])
    assert told.architecture.text == text_config(configs["text_encoder"])


def test_attention_at_other_levels_is_told_from_shapes(tmp_path: Path) -> None:
    configs = alone([64, 64, 64], 9, linear=False)
    configs["unet"]["down_block_types"] = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    configs["unet"]["up_block_types"] = ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"]
    told = describe(hollow_single_file(configs, tmp_path))
    assert told.architecture.unet == unet_config(configs["unet"])


def test_what_the_configuration_folder_says_goes_over_what_shapes_tell(copy: Folders) -> None:
    source = as_single_file(copy("small-v"), "small-v")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MinpaintWarning)
        painter = load(**source)
    assert painter.scheduler_config.prediction == "v_prediction"
    assert painter.unet_config == unet_config(FAMILIES["small-v"]["unet"])


def test_a_single_file_whose_last_text_layer_was_already_dropped_keeps_its_layers(tmp_path: Path) -> None:
    # diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py writes SD 2 like this
    told = describe(hollow_single_file(FAMILIES["sd2"], tmp_path, extras=False))
    assert told.architecture.text.num_hidden_layers == 23


# ---- the writers of these tests themselves ----


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_the_reference_reads_the_single_files_of_these_tests_as_the_same_tensors(
    family: str, checkpoint: Folders, tmp_path: Path
) -> None:
    folder, configs = checkpoint(family), FAMILIES[family]
    official = {component: load_file(folder / file) for component, file in FILES.items()}
    official["text_encoder"].pop("text_model.embeddings.position_ids")
    single = load_file(write_single_file(folder, tmp_path / "model.safetensors", OPEN_CLIP[family]))
    assert any(key.startswith("model_ema.") for key in single)
    text_encoder = meta_models(configs)["text_encoder"]
    converted = {
        "unet": reference.convert_ldm_unet_checkpoint(dict(single), configs["unet"]),
        "vae": reference.convert_ldm_vae_checkpoint(dict(single), configs["vae"]),
        "text_encoder": reference.convert_open_clip_checkpoint(text_encoder, dict(single))
        if OPEN_CLIP[family]
        else reference.convert_ldm_clip_checkpoint(dict(single)),
    }
    if OPEN_CLIP[family]:  # the reference knows the layer too many by its number in the real files
        layers = configs["text_encoder"]["num_hidden_layers"]
        surplus = {key for key in converted["text_encoder"] if f".layers.{layers}." in key}
        assert surplus
        for key in surplus:
            del converted["text_encoder"][key]
        converted["text_encoder"].pop("text_projection.weight", None)
    converted["text_encoder"].pop("text_model.embeddings.position_ids", None)
    for component, tensors in converted.items():
        assert tensors.keys() == official[component].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, official[component][key]), key


# ---- no second copy ----


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("single", [False, True])
def test_parameters_are_views_of_the_mapped_file_where_they_are_aligned(
    dtype: str, single: bool, tmp_path: Path
) -> None:
    kind = torch.float32 if dtype == "fp32" else torch.float16
    source: Json = {"model": write_checkpoint(tmp_path / "sd2", ALONE["sd2"], dtype=kind)}
    if single:
        source = {
            "model": write_single_file(source["model"], tmp_path / "model.safetensors", open_clip=True),
            "config": source["model"],
        }
    for path in tmp_path.rglob("*.safetensors"):
        tensors = load_file(path)
        path.unlink()
        write_aligned(tensors, path)
    painter = load(**source, dtype=dtype)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path) in line:
            ranges.append(tuple(int(end, 16) for end in line.split()[0].split("-")))
    parts = {"unet": painter.unet, "encoder": painter.vae, "decoder": painter.vae, "text_encoder": painter.text_encoder}
    kinds = set()
    for part, model in parts.items():
        for name, stored in painter.engine.weights[part].directory.items():
            place = model.get_parameter(name).data_ptr()
            assert place % 64 == 0, name
            assert any(start <= place < end for start, end in ranges) == (stored.start % 64 == 0), name
            kinds.add(stored.start % 64 == 0)
    assert kinds == {True, False}, "some tensors are so small that the next is not aligned"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_no_memory_of_its_own_for_weights_that_are_aligned(tmp_path: Path, checkpoint: Folders) -> None:
    configs = FAMILIES["small-sd1"] | {
        "unet": FAMILIES["small-sd1"]["unet"] | {"block_out_channels": [96, 320, 320], "norm_num_groups": 32}
    }
    for key, kind in (("down_block_types", "Down"), ("up_block_types", "Up")):
        configs["unet"][key] = [f"CrossAttn{kind}Block2D"] * 3
    folders = [write_checkpoint(tmp_path / "aligned", configs), tmp_path / "unaligned"]
    shutil.copytree(*folders)
    for folder, write in zip(folders, (write_aligned, write_unaligned), strict=True):
        tensors = load_file(folder / FILES["unet"])
        (folder / FILES["unet"]).unlink()
        write(tensors, folder / FILES["unet"])
    size = (folders[0] / FILES["unet"]).stat().st_size
    assert size > 150e6
    program = """
import re, sys, minpaint
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
kept = [minpaint.load(sys.argv[1], device="cpu", dtype="fp32")]
for folder in sys.argv[2:]:
    before = anonymous()
    kept.append(minpaint.load(folder, device="cpu", dtype="fp32"))
    print(anonymous() - before)
"""
    command = [sys.executable, "-c", program, str(checkpoint("small-sd1")), *map(str, folders)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    aligned, unaligned = map(int, ran.stdout.split())
    assert aligned < size / 10
    assert 0.9 * size < unaligned < 1.1 * size  # what lies at odd addresses can only be copied, and is once


# ---- what others have written ----


needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official configurations are not here")


def _official(name: str) -> dict[str, Json]:
    return {
        component: json.loads((OFFICIAL / name / component / file).read_text())
        for component, file in CONFIG_FILES.items()
    }


@needs_official
@pytest.mark.parametrize(("name", "family"), [("sd15-inpainting", "sd15"), ("sd2-inpainting", "sd2")])
def test_the_official_configurations_say_what_the_full_size_families_say(name: str, family: str) -> None:
    official, ours = _official(name), FAMILIES[family]
    assert unet_config(official["unet"]) == unet_config(ours["unet"])
    assert vae_config(official["vae"]) == vae_config(ours["vae"])
    assert scheduler_config(official["scheduler"]) == scheduler_config(ours["scheduler"])
    assert official["text_encoder"] == official["text_encoder"] | ours["text_encoder"]


@pytest.mark.slow
@needs_official
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["sd15-inpainting", "sd2-inpainting"])
def test_official_folders_are_described_as_they_are_published(name: str, half: bool, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OFFICIAL / name, tmp_path / name))
    for component, model in meta_models(_official(name)).items():
        tensors = dict(model.state_dict())
        if component == "text_encoder":
            tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        path = folder / FILES[component]
        small = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
        write_hollow(small, path.with_suffix(".fp16.safetensors"))
        if name == "sd2-inpainting":
            for new, old in OLD_VAE_ATTENTION.items():
                for key in [key for key in tensors if f"mid_block.attentions.0.{new}." in key and component == "vae"]:
                    tensors[key.replace(new, old)] = tensors.pop(key)
            write_hollow(tensors, path)
    description = describe(folder, half)
    assert description.architecture.unet.in_channels == 9
    suffix = "safetensors" if name == "sd2-inpainting" and not half else "fp16.safetensors"
    directories = description.architecture.directories
    for directory in directories.values():
        assert {stored.file.name.partition(".")[2] for stored in directory.values()} == {suffix}
    assert sum(torch.Size(s.shape).numel() for s in directories["unet"].values()) in (859_535_364, 865_925_124)


@needs_official
@pytest.mark.parametrize(("name", "pad"), [("sd15-inpainting", 49407), ("sd2-inpainting", 0)])
def test_the_official_tokenizers_pad_as_published(name: str, pad: int, tmp_path: Path) -> None:
    from minpaint.checkpoint.tokenizer import load_tokenizer

    folder = Path(shutil.copytree(OFFICIAL / name / "tokenizer", tmp_path / "tokenizer"))
    shutil.copytree(OFFICIAL / "clip-tokenizer", folder, dirs_exist_ok=True)
    ids = load_tokenizer(folder)("two dogs", padding="max_length", max_length=77).input_ids
    assert ids == [49406, 1237, 3255, 49407] + [pad] * 73


REFERENCE_SCHEDULERS = (
    diffusers.DDIMScheduler,
    diffusers.PNDMScheduler,
    diffusers.DPMSolverMultistepScheduler,
)


def _reference_models(family: str) -> dict[str, Any]:
    configs = FAMILIES[family]
    torch.manual_seed(0)
    text = {key: value for key, value in configs["text_encoder"].items() if key != "architectures"}
    return {
        "unet": diffusers.UNet2DConditionModel.from_config(configs["unet"]),
        "vae": diffusers.AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
    }


@pytest.mark.parametrize(
    ("family", "scheduler", "saving"),
    [
        ("small-sd1", diffusers.DDIMScheduler, {}),
        ("small-sd2", diffusers.PNDMScheduler, {"variant": "fp16"}),
        ("small-sd1-4ch", diffusers.DPMSolverMultistepScheduler, {"max_shard_size": "1MB"}),
        ("small-v", diffusers.DPMSolverMultistepScheduler, {"variant": "fp16", "max_shard_size": "1MB"}),
    ],
)
def test_what_the_reference_saves_loads_with_every_weight(
    family: str, scheduler: Any, saving: Json, tmp_path: Path
) -> None:
    models = _reference_models(family)
    for component, model in models.items():
        model.save_pretrained(tmp_path / component, **saving)
    if "max_shard_size" in saving:
        assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    # all keys of the class with their defaults, beside what the family says
    scheduler.from_config(FAMILIES[family]["scheduler"]).save_pretrained(tmp_path / "scheduler")
    write_tokenizer(tmp_path / "tokenizer", 514, END)
    painter = load(tmp_path)
    assert painter.unet_config == unet_config(FAMILIES[family]["unet"])
    assert painter.vae_config == vae_config(FAMILIES[family]["vae"])
    assert painter.scheduler_config.class_name == scheduler.__name__
    stated = scheduler_config(FAMILIES[family]["scheduler"])
    assert painter.scheduler_config.prediction == stated.prediction
    assert painter.scheduler_config.beta_schedule == stated.beta_schedule
    for component, model in models.items():
        theirs = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("position_ids")}
        ours = getattr(painter, component).state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("scheduler", REFERENCE_SCHEDULERS, ids=lambda kind: kind.__name__)
def test_the_reference_defaults_of_a_scheduler_are_taken_or_refused_by_key(scheduler: Any, tmp_path: Path) -> None:
    scheduler().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "scheduler_config.json").read_text())
    config = scheduler_config(content)
    assert config.class_name == scheduler.__name__
    for key in ("steps_offset", "set_alpha_to_one", "clip_sample", "skip_prk_steps", "beta_start", "beta_end"):
        if key in content:
            assert getattr(config, key) == content[key]
    assert config.spacing == content["timestep_spacing"]


def test_a_file_written_with_metadata_loads(broken: Path) -> None:
    path = broken / FILES["unet"]
    tensors = load_file(path)
    path.unlink()
    header = {"__metadata__": {"format": "pt", "note": "two\nlines"}} | header_of(tensors)
    write_raw(path, json.dumps(header).encode(), b"".join(map(bytes_of, tensors.values())))
    load(broken)


@pytest.mark.parametrize("name", ["model.safetensors.index.fp16.json", "model.safetensors.fp16.index.json"])
def test_an_index_of_half_precision_shards_is_found_by_either_name(name: str) -> None:
    names = {f"text_encoder/{name}", "text_encoder/model-00001-of-00001.fp16.safetensors"}
    assert hub.choose_weights(names, "text_encoder", half=False) == f"text_encoder/{name}"
