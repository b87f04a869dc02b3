"""Damaged, disguised and ill-fitting weights: one clear line each, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import (
    BASES,
    FILES,
    Folders,
    Json,
    alone,
    as_single_file,
    edit,
    latents,
    load,
    refusal,
    shard,
)
from PIL import Image
from safetensors.torch import load_file
from single_file import (
    write_raw,
    write_single_file,
)
from torch import Tensor

import minpaint
from minpaint.checkpoint import hub
from minpaint.checkpoint.tensorfile import piece_buffer, read_directory, read_into
from minpaint.painter import open_painter
from weights.random_checkpoint import write_checkpoint

# ---- bad weights ----


class Bomb:
    """Does something when unpickled: creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def _raw(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> Callable[[Path], object]:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: write_raw(path, content, data, length)


def _tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _truncate(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _lfs_pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3438167534\n")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "one byte": (lambda path: path.write_bytes(b"\x80"), "damaged"),
    "seven bytes": (lambda path: path.write_bytes(b"\1\0\0\0\0\0\0"), "damaged"),
    "truncated by a byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "truncated by half": (_truncate(0.5), "damaged"),
    "truncated in the header": (_truncate(0.001), "damaged"),
    "a byte too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "damaged"),
    "Git LFS pointer": (_lfs_pointer, "git lfs pull"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "damaged"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 100), "damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "damaged"),
    "an absurd header length": (_raw({}, length=2**63), "damaged"),
    "a header length of all ones": (_raw({}, length=2**64 - 1), "damaged"),
    "a header longer than the file": (_raw({}, length=10**6), "damaged"),
    "no header": (_raw(b"", data=b""), "damaged"),
    "a header that is no JSON": (_raw(b"{weights}"), "damaged"),
    "a header that is no object": (_raw([1, 2]), "damaged"),
    "a header that is not UTF-8": (_raw(b'{"\xff\xfe": 1}'), "damaged"),
    "a header without end": (_raw(b'{"a":' * 1000), "damaged"),
    "no tensors": (_raw({}, data=b""), "no tensors"),
    "no tensors but data": (_raw({}), "damaged"),
    "overlapping tensors": (_raw({"a": _tensor(0, 8, [2]), "b": _tensor(4, 8, [1])}), "damaged"),
    "a gap between tensors": (_raw({"a": _tensor(0, 4, [1]), "b": _tensor(6, 8, [1], "F16")}), "damaged"),
    "a tensor outside the file": (_raw({"a": _tensor(0, 80, [20])}), "damaged"),
    "a tensor before the file": (_raw({"a": _tensor(-8, 0, [2])}), "damaged"),
    "a tensor that ends before it begins": (_raw({"a": _tensor(8, 0, [2])}), "damaged"),
    "a shape that does not fill its bytes": (_raw({"a": _tensor(0, 8, [3])}), "damaged"),
    "a negative shape": (_raw({"a": _tensor(0, 8, [-1, -2])}), "damaged"),
    "a shape beyond numbers": (_raw({"a": _tensor(0, 8, [2**40, 2**40])}), "damaged"),
    "a tensor without a number": (_raw({"a": _tensor(0, 8, [2]), "b": _tensor(8, 8, [0, 4])}), "1 (b)"),
    "a header longer than any": (_raw({}, length=2**24 + 1), "16777217 bytes"),
    "an unknown kind": (_raw({"a": _tensor(0, 8, [1], "F1000")}), "damaged"),
    "a tensor without a kind": (_raw({"a": {"shape": [2], "data_offsets": [0, 8]}}), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_damaged_file_is_refused_by_name(component: str, damage: str, broken: Path) -> None:
    path = broken / FILES[component]
    edit(path, lambda tensors: None)  # a file of its own
    change, why = DAMAGES[damage]
    change(path)
    message = refusal(broken)
    assert str(path) in message
    assert why in message


def _torch_zip(bomb: Bomb, path: Path) -> None:
    torch.save(bomb, path)


def _torch_legacy(bomb: Bomb, path: Path) -> None:
    torch.save(bomb, path, _use_new_zipfile_serialization=False)


def _plain_pickle(protocol: int) -> Callable[[Bomb, Path], object]:
    return lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol))


PICKLES = {"torch zip": _torch_zip, "torch legacy": _torch_legacy}
PICKLES |= {f"protocol {n}": _plain_pickle(n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", [FILES["unet"], "model.safetensors", "model.ckpt", "model.bin"])
def test_a_pickle_is_never_opened_whatever_it_is_called(kind: str, name: str, broken: Path, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", broken / name
    path.unlink(missing_ok=True)
    PICKLES[kind](Bomb(mark), path)
    message = refusal(broken if name == FILES["unet"] else path)
    assert str(path) in message
    if kind not in ("protocol 0", "protocol 1"):  # these begin like any text
        assert "pickle" in message
    assert not mark.exists()


def test_the_pickles_of_these_tests_are_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("component", BASES)
def test_only_pickles_there_is_said(component: str, broken: Path, tmp_path: Path) -> None:
    path = broken / FILES[component]
    path.unlink()
    _torch_zip(Bomb(tmp_path / "executed"), path.with_suffix(".bin"))
    message = refusal(broken)
    assert str(path.parent) in message
    assert path.with_suffix(".bin").name in message
    assert "pickle" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("component", BASES)
def test_missing_weights_are_said(component: str, broken: Path) -> None:
    (broken / FILES[component]).unlink()
    assert str((broken / FILES[component]).parent) in refusal(broken)


def test_two_unknown_variants_are_not_chosen_between(broken: Path) -> None:
    path = broken / FILES["unet"]
    shutil.copy(path, path.with_suffix(".ema.safetensors"))
    path.rename(path.with_suffix(".non_ema.safetensors"))
    assert str(path.parent) in refusal(broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_found_and_named(value: float, dtype: torch.dtype, broken: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["conv_in.weight"] = tensors["conv_in.weight"].to(dtype)
        tensors["conv_in.weight"].view(-1)[-1] = value

    edit(broken / FILES["unet"], change)
    message = refusal(broken)
    assert "conv_in.weight" in message
    assert "NaN" in message
    assert "diffusion_pytorch_model.safetensors" in message
    assert "unet" in message


def test_opposite_infinities_do_not_hide_each_other(broken: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["conv_in.bias"][0], tensors["conv_in.bias"][1] = float("inf"), float("-inf")

    edit(broken / FILES["unet"], change)
    assert "conv_in.bias" in refusal(broken)


def test_large_weights_whose_sum_overflows_are_no_infinities(broken: Path) -> None:
    edit(broken / FILES["unet"], lambda tensors: tensors["conv_in.bias"].fill_(3e38))
    assert bool((load(broken).unet.state_dict()["conv_in.bias"] == 3e38).all())


def test_weights_beyond_half_precision_are_not_called_a_damaged_file(broken: Path) -> None:
    edit(broken / FILES["unet"], lambda tensors: tensors["conv_in.bias"].fill_(1e6))
    message = refusal(broken, dtype="fp16")
    assert "conv_in.bias" in message
    assert "fetch" not in message


def _fit(component: str, change: Callable[[dict[str, Tensor]], object], *words: str) -> Any:
    return pytest.param(component, change, words)


def _drop(*keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in keys]


def _put(**values: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key.replace("__", "."): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("component", "change", "words"),
    [
        _fit("unet", _drop("conv_in.bias"), "missing: 1 (conv_in.bias)"),
        _fit("vae", _drop("decoder.conv_out.bias"), "missing: 1 (decoder.conv_out.bias)"),
        _fit("text_encoder", _drop("text_model.final_layer_norm.bias"), "missing: 1", "final_layer_norm.bias"),
        _fit(
            "unet",
            _drop("conv_in.bias", "conv_in.weight", "conv_out.bias", "conv_out.weight"),
            "missing: 4 (conv_in.bias, conv_in.weight, conv_out.bias, ...)",
        ),
        _fit("unet", _put(a=torch.zeros(1), b=torch.zeros(1)), "surplus: 2 (a, b)"),
        _fit("vae", _put(loss__logvar=torch.zeros(1)), "surplus: 1 (loss.logvar)"),
        _fit("text_encoder", _put(text_projection__weight=torch.zeros(64, 65)), "surplus: 1", "text_projection.weight"),
        _fit("unet", _put(conv_in__bias=torch.zeros(31)), "misshapen: 1 (conv_in.bias [31] instead of [32])"),
        _fit("unet", _put(conv_in__bias=torch.zeros(1, 32)), "misshapen: 1", "[1, 32]"),
        _fit("unet", _put(conv_in__bias=torch.tensor(1.0)), "misshapen: 1", "[] instead of [32]"),
        _fit("unet", _put(conv_in__weight=torch.zeros(32, 9, 3, 3)), "misshapen: 1", "[32, 9, 3, 3]"),
        _fit("unet", _put(conv_in__bias=torch.zeros(32, dtype=torch.int64)), "conv_in.bias I64"),
        _fit("unet", _put(conv_in__bias=torch.zeros(32, dtype=torch.bool)), "conv_in.bias BOOL"),
        _fit("unet", _put(conv_in__bias=torch.zeros(32, dtype=torch.float8_e4m3fn)), "conv_in.bias F8_E4M3"),
        _fit("unet", _put(conv_in__bias=torch.zeros(32, dtype=torch.complex64)), "conv_in.bias C64"),
        _fit("unet", lambda t: t.update(a=t.pop("conv_in.bias")), "missing: 1 (conv_in.bias)", "surplus: 1 (a)"),
        _fit("unet", lambda t: t.update({"two\nlines": torch.zeros(1)}), "surplus: 1 (two lines)"),
    ],
)
def test_tensors_that_do_not_fit_are_counted_and_named(
    component: str, change: Callable[[dict[str, Tensor]], object], words: tuple[str, ...], broken: Path
) -> None:
    edit(broken / FILES[component], change)
    message = refusal(broken)
    assert component in message
    assert Path(FILES[component]).name in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("component", "old", "new"),
    [
        ("vae", "encoder.mid_block.attentions.0.to_q.weight", "encoder.mid_block.attentions.0.query.weight"),
        ("text_encoder", "text_model.final_layer_norm.bias", "final_layer_norm.bias"),
    ],
)
def test_one_parameter_stored_under_two_names_is_refused(component: str, old: str, new: str, broken: Path) -> None:
    edit(broken / FILES[component], lambda tensors: tensors.update({new: tensors[old] + 1}))
    assert component in refusal(broken)


def test_weights_of_another_model_are_refused(broken: Path, checkpoint: Folders) -> None:
    (broken / FILES["unet"]).unlink()
    shutil.copy(checkpoint("small-sd2") / FILES["unet"], broken / FILES["unet"])
    message = refusal(broken)
    assert message.startswith("unet (diffusion_pytorch_model.safetensors)")
    assert "misshapen" in message


@pytest.mark.parametrize("name", [FILES["unet"], "unet/config.json"])
def test_a_pipe_is_not_waited_for(name: str, broken: Path) -> None:
    (broken / name).unlink()
    os.mkfifo(broken / name)
    assert Path(name).parent.name in refusal(broken)


# ---- files that change while they are in use ----


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def _rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced by its like": _replace,
    "written to": _rewrite,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "made longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # as they lie in the mapped file, and converted
def test_a_file_that_changed_since_its_header_was_read_is_not_read(
    dtype: str, change: str, broken: Path, picture: Image.Image, mask: Image.Image
) -> None:
    path = broken / FILES["unet"]
    edit(path, lambda tensors: None)  # a file of its own
    painter = open_painter(broken, "cpu", dtype, None, None)  # which loads weights when they are needed
    CHANGES[change](path)
    with pytest.raises(minpaint.CheckpointError, match=re.escape(str(path))) as caught:
        painter(picture, mask, "two dogs", steps=1)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("change", ["written to", "deleted"])
def test_weights_that_were_written_to_while_they_are_resident_are_not_painted_with(
    change: str, broken: Path, picture: Image.Image, mask: Image.Image
) -> None:
    path = broken / FILES["unet"]
    edit(path, lambda tensors: None)
    painter = load(broken)
    expected = latents(painter, picture, mask)
    CHANGES[change](path)
    if change == "deleted":  # its content stays for whoever has mapped it
        assert torch.equal(latents(painter, picture, mask), expected)
        return
    with pytest.raises(minpaint.CheckpointError, match=re.escape(str(path))):
        latents(painter, picture, mask)


@pytest.mark.parametrize("change", ["replaced by its like", "written to", "deleted"])
def test_a_file_that_changes_between_two_of_its_streamed_weights_is_not_mixed(change: str, broken: Path) -> None:
    path = broken / FILES["unet"]
    edit(path, lambda tensors: None)
    first, second, *_ = read_directory(path).values()
    for stored in (first, second):
        target, buffer = torch.empty(stored.shape), piece_buffer([stored], torch.float32)
        if stored is first:
            read_into(stored, target, buffer)
            CHANGES[change](path)
        else:
            with pytest.raises(minpaint.CheckpointError, match=re.escape(str(path))):
                read_into(stored, target, buffer)


# ---- bad indices ----


def _bad_index(name: str, content: object, word: str) -> Any:
    return pytest.param(content, word, id=name)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        _bad_index("not an object", [], "JSON object"),
        _bad_index("no map", {}, "weight_map"),
        _bad_index("an empty map", {"weight_map": {}}, "weight_map"),
        _bad_index("a list", {"weight_map": ["a.safetensors"]}, "weight_map"),
        _bad_index("no such shard", {"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
        _bad_index("outside", {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}, "beside it"),
        _bad_index("absolute", {"weight_map": {"a": "/etc/passwd"}}, "/etc/passwd"),
        _bad_index("a folder", {"weight_map": {"a": "."}}, "beside it"),
        _bad_index("a pickle", {"weight_map": {"a": "weights.bin"}}, "weights.bin"),
        _bad_index("a number", {"weight_map": {"a": 7}}, "'7'"),
        _bad_index("nothing", {"weight_map": {"a": None}}, "None"),
        _bad_index("too little", {"weight_map": {"conv_in.bias": "whole.safetensors"}}, "agree"),
    ],
)
def test_a_bad_index_is_refused_by_name(content: object, word: str, broken: Path) -> None:
    path = broken / FILES["unet"]
    path.rename(path.with_name("whole.safetensors"))
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps(content))
    message = refusal(broken)
    assert str(path.parent) in message
    assert word in message


def test_an_index_that_is_no_json_is_refused_by_name(broken: Path) -> None:
    index = shard(broken, "unet")
    index.write_text("{")
    assert index.name in refusal(broken)


def test_an_index_that_disagrees_with_its_shards_is_refused(broken: Path) -> None:
    index = shard(broken, "unet")
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    moved = dict(content["weight_map"])
    key = next(key for key in moved if moved[key] == shards[0])
    moved[key] = shards[1]
    for weight_map in (moved, content["weight_map"] | {"more": shards[0]}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        message = refusal(broken)
        assert index.name in message
        assert "agree" in message


def test_a_damaged_or_missing_shard_is_refused_by_name(broken: Path) -> None:
    shard(broken, "unet")
    path = broken / "unet" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    _truncate(0.5)(path)
    assert path.name in refusal(broken)
    path.unlink()
    assert path.name in refusal(broken)


def test_a_tensor_that_two_shards_hold_is_refused(broken: Path) -> None:
    index = shard(broken, "unet", count=2)
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))
    key = next(key for key in weight_map if weight_map[key] == first)
    edit(index.with_name(second), lambda tensors: tensors.update({key: load_file(index.with_name(first))[key] + 1}))
    assert index.name in refusal(broken)


def test_a_tensor_that_an_earlier_shard_holds_too_is_refused(broken: Path) -> None:
    index = shard(broken, "unet", count=2)
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))
    key = next(key for key in weight_map if weight_map[key] == second)
    edit(index.with_name(first), lambda tensors: tensors.update({key: load_file(index.with_name(second))[key] + 1}))
    assert index.name in refusal(broken)


# ---- bad single files ----


@pytest.fixture
def single(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file to be broken, its tokenizer beside it, and `configs` without weights."""
    made = tmp_path_factory.getbasetemp() / "single"
    if not made.exists():
        write_checkpoint(made / "configs", alone([32, 64], 9, linear=False, layers=1))
        write_single_file(made / "configs", made / "model.safetensors", open_clip=False)
        for file in FILES.values():
            (made / "configs" / file).unlink()
    shutil.copytree(made / "configs", tmp_path / "configs")
    shutil.copytree(made / "configs" / "tokenizer", tmp_path / "tokenizer")
    os.link(made / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_drop("model.diffusion_model.out.2.bias"), "conv_out.bias"),
        (_drop("model.diffusion_model.input_blocks.0.0.weight"), ""),
        (_drop("model.diffusion_model.middle_block.1.proj_in.weight"), ""),
        (_drop("first_stage_model.encoder.down.0.block.0.conv1.weight"), ""),
        (_drop("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"), ""),
        (_put(model__diffusion_model__label_emb=torch.zeros(3)), "label_emb"),
        (_put(first_stage_model__loss=torch.zeros(3)), "loss"),
        (_put(control_model__zero=torch.zeros(3)), "control_model.zero"),
        (_put(model__diffusion_model__out__2__bias=torch.zeros(5)), "conv_out.bias"),
        (_put(model__diffusion_model__input_blocks__0__0__weight=torch.zeros(())), ""),
        (_put(model__diffusion_model__input_blocks__0__0__weight=torch.zeros(0)), ""),
        (_put(model__diffusion_model__input_blocks__0__0__weight=torch.zeros(0, 0, 3, 3)), ""),
        (_put(model__diffusion_model__input_blocks__0__0__weight=torch.zeros(32, 8, 3, 3)), ""),
        (_put(cond_stage_model__transformer__text_model__embeddings__token_embedding__weight=torch.zeros(9)), ""),
        (_put(cond_stage_model__transformer__text_model__embeddings__token_embedding__weight=torch.zeros(0, 0)), ""),
        (_put(first_stage_model__encoder__down__0__block__0__conv1__weight=torch.zeros(())), ""),
        (_put(first_stage_model__encoder__mid__attn_1__q__weight=torch.zeros(32, 32, 3, 3)), ""),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("cond_stage_model.")], ""),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("first_stage_model.")], ""),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("model.diffusion_model.")], ""),
        (lambda t: [t.pop(key) for key in list(t) if not key.startswith("model_ema.")], ""),
    ],
)
def test_a_bad_single_file_is_refused(
    change: Callable[[dict[str, Tensor]], object], word: str, with_config: bool, single: Path
) -> None:
    edit(single, change)
    message = refusal(single, config=single.with_name("configs") if with_config else None)
    assert word in message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_drop("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"), "q_proj.bias"),
        (_put(cond_stage_model__model__transformer__resblocks__0__attn__in_proj_bias=torch.zeros(191)), "q_proj.bias"),
        (_put(cond_stage_model__model__transformer__resblocks__0__attn__in_proj_bias=torch.zeros(194)), "q_proj.bias"),
        (_put(cond_stage_model__model__transformer__resblocks__0__attn__in_proj_bias=torch.zeros(())), "q_proj.bias"),
        (_put(cond_stage_model__model__ln_final__bias=torch.zeros(3)), "final_layer_norm.bias"),
        (_put(cond_stage_model__model__visual__proj=torch.zeros(3)), "visual.proj"),
        (_put(cond_stage_model__model__transformer__resblocks__0__more__bias=torch.zeros(3)), "more.bias"),
    ],
)
def test_a_bad_open_clip_encoder_is_refused(
    change: Callable[[dict[str, Tensor]], object], word: str, copy: Folders
) -> None:
    source = as_single_file(copy("small-sd2"), "small-sd2")
    edit(source["model"], change)
    assert word in refusal(**source)


def test_a_part_in_diffusers_names_is_not_taken_for_a_whole_checkpoint(checkpoint: Folders) -> None:
    path = checkpoint("small-sd1") / FILES["unet"]
    message = refusal(path)
    assert str(path) in message
    assert "folder" in message


def test_a_single_file_asks_the_hub_for_a_tokenizer_only_where_there_is_none(single: Path, monkeypatch: Any) -> None:
    def offline() -> Path:
        raise minpaint.CheckpointError("the tokenizer cannot be fetched")

    monkeypatch.setattr(hub, "fetch_tokenizer", offline)
    load(single)
    shutil.rmtree(single.with_name("tokenizer"))
    load(single, config=single.with_name("configs"))
    assert refusal(single) == "the tokenizer cannot be fetched"
    shutil.rmtree(single.with_name("configs") / "tokenizer")
    assert refusal(single, config=single.with_name("configs")) == "the tokenizer cannot be fetched"


@pytest.mark.parametrize("config", ["nowhere", "model.safetensors"])
def test_a_configuration_folder_that_is_none_is_a_wrong_argument(config: str, single: Path) -> None:
    with pytest.raises(minpaint.InputError, match=config):
        load(single, config=single.parent / config)
