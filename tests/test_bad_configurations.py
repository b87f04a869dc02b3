"""Configurations, tokenizers and models that cannot be used: refused by key, folder or name."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import (
    CONFIG_FILES,
    Folders,
    configure,
    latents,
    load,
    refusal,
)
from PIL import Image

import minpaint
import minpaint.checkpoint.load as load_module
from minpaint.checkpoint import hub
from minpaint.checkpoint.architecture import blank_models
from minpaint.checkpoint.configs import parse_configs
from minpaint.checkpoint.load import describe
from weights.random_checkpoint import FAMILIES, write_tokenizer

# ---- bad configurations ----


@pytest.mark.parametrize("component", CONFIG_FILES)
def test_a_missing_or_unreadable_configuration_is_refused_by_name(component: str, broken: Path) -> None:
    path = broken / component / CONFIG_FILES[component]
    for content in (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"\xef\xbb\xbf{}"):
        path.write_bytes(content)
        message = refusal(broken)
        assert component in message
        assert path.name in message
    path.unlink()
    message = refusal(broken)
    assert f"{component}/{path.name}" in message
    path.mkdir()
    assert path.name in refusal(broken)


def test_json_nested_beyond_reading_is_refused(broken: Path) -> None:
    (broken / "unet" / "config.json").write_text("[" * 100_000)
    assert "config.json" in refusal(broken)


def _values(key: str, *values: Any) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}={value!r:.40}") for value in values]


UNSUPPORTED_UNET = [
    *_values("act_fn", "gelu", "mish", 3),
    *_values("addition_embed_type", "text", "text_time"),
    *_values("addition_embed_type_num_heads", 32),
    *_values("addition_time_embed_dim", 256),
    *_values("attention_head_dim", [8], [8, 8, 8], [8, 0], [8, "8"], [8, True], [], 0, -8, 7, 8.0, "8", [5, 8]),
    *_values("attention_type", "gated"),
    *_values("block_out_channels", [], 32, [32, -64], [32, 64.0], "32", None),
    *_values("center_input_sample", True),
    *_values("class_embed_type", "timestep", "projection", "identity"),
    *_values("class_embeddings_concat", True),
    *_values("conv_in_kernel", 1),
    *_values("conv_out_kernel", 5),
    *_values("cross_attention_dim", 0, -64, [64, 64], 64.0, "64", True),
    *_values("cross_attention_norm", "group_norm"),
    *_values(
        "down_block_types",
        ["CrossAttnDownBlock2D"],
        ["CrossAttnDownBlock2D", "AttnDownBlock2D"],
        ["CrossAttnDownBlock2D", "UpBlock2D"],
        ["CrossAttnDownBlock2D", None],
        "CrossAttnDownBlock2D",
    ),
    *_values("downsample_padding", 0),
    *_values("dropout", 0.1),
    *_values("dual_cross_attention", True),
    *_values("encoder_hid_dim", 4096),
    *_values("encoder_hid_dim_type", "text_proj"),
    *_values("flip_sin_to_cos", False),
    *_values("freq_shift", 1),
    *_values("in_channels", 8, 5, 0, 9.0, "9", True, [4]),
    *_values("layers_per_block", 0, -1, 2.0, [2, 2], "2"),
    *_values("mid_block_only_cross_attention", True),
    *_values("mid_block_scale_factor", 2),
    *_values("mid_block_type", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"),
    *_values("norm_eps", 1e-6),
    *_values("norm_num_groups", 7, 5, 64, 0, -8, 8.0),
    *_values("num_attention_heads", 8, [1, 2]),
    *_values("num_class_embeds", 1000),
    *_values("only_cross_attention", True, [False, True]),
    *_values("out_channels", 8, 3),
    *_values("projection_class_embeddings_input_dim", 2816),
    *_values("resnet_out_scale_factor", 0.7),
    *_values("resnet_skip_time_act", True),
    *_values("resnet_time_scale_shift", "scale_shift"),
    *_values("reverse_transformer_layers_per_block", [1, 1]),
    *_values("sample_size", 0, "64"),
    *_values("time_cond_proj_dim", 256),
    *_values("time_embedding_act_fn", "silu"),
    *_values("time_embedding_dim", 64),
    *_values("time_embedding_type", "fourier"),
    *_values("timestep_post_act", "silu"),
    *_values("transformer_layers_per_block", 2, [1, 2]),
    *_values("up_block_types", ["UpBlock2D"], ["UpBlock2D", "AttnUpBlock2D"], ["UpBlock2D", "DownBlock2D"]),
    *_values("use_linear_projection", "true", 1),
    *_values("a_key_of_the_future", 1, "x", [], 0, {}),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED_UNET)
def test_an_unsupported_value_for_the_unet_is_refused_by_its_key(key: str, value: Any, broken: Path) -> None:
    configure(broken, "unet", **{key: value})
    message = refusal(broken)
    assert "unet/config.json" in message
    assert key in message


UNSUPPORTED_VAE = [
    *_values("act_fn", "gelu", "mish"),
    *_values("block_out_channels", [], 32, [16, 24, 24, 0], "16", None),
    *_values("down_block_types", ["DownEncoderBlock2D"] * 3, ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
    *_values("in_channels", 4, 1),
    *_values("latent_channels", 16, 8),
    *_values("latents_mean", [0.0] * 4),
    *_values("latents_std", [1.0] * 4),
    *_values("layers_per_block", 0, "2", 2.0),
    *_values("mid_block_add_attention", False),
    *_values("norm_num_groups", 7, 0, 16),
    *_values("out_channels", 6),
    *_values("scaling_factor", 0, -1, "0.18215", float("nan"), float("inf"), True),
    *_values("shift_factor", 0.06),
    *_values("up_block_types", ["UpDecoderBlock2D"], ["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"], None),
    *_values("use_post_quant_conv", False),
    *_values("use_quant_conv", False),
    *_values("a_key_of_the_future", 1),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED_VAE)
def test_an_unsupported_value_for_the_vae_is_refused_by_its_key(key: str, value: Any, broken: Path) -> None:
    configure(broken, "vae", **{key: value})
    message = refusal(broken)
    assert "vae/config.json" in message
    assert key in message


UNSUPPORTED_SCHEDULER = [
    *_values("_class_name", None, 3, ["DDIMScheduler"]),
    *_values("beta_end", 0, -1, 1.0, 2, "0.012", float("inf")),
    *_values("beta_schedule", "squaredcos_cap_v2", "sigmoid", "laplace", 3),
    *_values("beta_start", 0, -1, "0.00085", float("nan")),
    *_values("clip_sample", "false", 0),
    *_values("clip_sample_range", 0, "1"),
    *_values("num_train_timesteps", 0, -1, "1000", 1000.0),
    *_values("prediction_type", "sample", "flow_prediction", 1),
    *_values("rescale_betas_zero_snr", True, 1),
    *_values("use_karras_sigmas", "true"),
    *_values("original_inference_steps", 0, "50"),
    *_values("set_alpha_to_one", "true", 1),
    *_values("skip_prk_steps", "true", 0),
    *_values("steps_offset", -1, "1", 1.0, True),
    *_values("timestep_spacing", "karras", 3),
    *_values("trained_betas", [0.1, 0.2], []),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED_SCHEDULER)
def test_an_unsupported_value_for_the_scheduler_is_refused_by_its_key(key: str, value: Any, broken: Path) -> None:
    configure(broken, "scheduler", **{key: value})
    message = refusal(broken)
    assert "scheduler/scheduler_config.json" in message
    assert key in message


@pytest.mark.parametrize("key", ["trained_betas", "rescale_betas_zero_snr"])
def test_a_noise_schedule_that_is_not_supported_is_refused_for_every_class(key: str, broken: Path) -> None:
    value = [0.001] * 1000 if key == "trained_betas" else True
    configure(broken, "scheduler", _class_name="EulerDiscreteScheduler", **{key: value})
    assert key in refusal(broken)


UNSUPPORTED_TEXT = [
    *_values("architectures", ["CLIPModel"], "CLIPTextModelWithProjection", 5, [5]),
    *_values("model_type", "bert", 7),
    *_values("text_config", {"hidden_size": 64}),
    *_values("hidden_act", "no such function", 3),
    *_values("hidden_size", 0, -64, "64", 64.5, [64], 96),
    *_values("intermediate_size", -1, "256", 1.5),
    *_values("layer_norm_eps", "small", [1], 0),
    *_values("max_position_embeddings", -1, "77"),
    *_values("num_attention_heads", 0, 3, "1", -1),
    *_values("num_hidden_layers", "2", -1, 1.5),
    *_values("vocab_size", -1, "514", 1.5),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED_TEXT)
def test_an_unsupported_value_for_the_text_encoder_is_refused_by_its_key(key: str, value: Any, broken: Path) -> None:
    configure(broken, "text_encoder", **{key: value})
    message = refusal(broken)
    assert "text_encoder" in message or "text encoder" in message
    assert key in message


def test_what_else_a_text_encoder_configuration_says_changes_nothing(
    broken: Path, picture: Image.Image, mask: Image.Image
) -> None:
    expected = latents(load(broken), picture, mask)
    configure(
        broken,
        "text_encoder",
        attn_implementation="flash_attention_2",
        bos_token_id=3,
        dtype="float16",
        id2label=3,
        layer_norm_eps=None,
        output_attentions=True,
        quantization_config={"bits": 4},
        return_dict=False,
        use_return_dict=False,
    )
    assert torch.equal(latents(load(broken), picture, mask), expected)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("width", [2**31, 2**40, 2**70])
def test_absurd_sizes_are_refused(component: str, width: int, broken: Path) -> None:
    keys = {"unet": "cross_attention_dim", "vae": "block_out_channels", "text_encoder": "vocab_size"}
    configure(broken, component, **{keys[component]: [width] * 4 if component == "vae" else width})
    refusal(broken)


@pytest.mark.parametrize(
    ("component", "values"),
    [
        ("text_encoder", {"num_hidden_layers": 2**20}),
        ("text_encoder", {"num_hidden_layers": 257}),
        ("unet", {"layers_per_block": 17}),
        ("vae", {"layers_per_block": 17}),
        ("vae", {"block_out_channels": [32] * 9}),
        ("unet", {"cross_attention_dim": 2**16 + 1}),
        ("text_encoder", {"vocab_size": 2**20 + 1}),
        ("scheduler", {"num_train_timesteps": 2**17 + 1}),
        ("scheduler", {"beta_start": 1.5}),
        ("vae", {"scaling_factor": 10**400}),
    ],
)
def test_more_than_a_model_can_have_is_refused_before_it_is_built(
    component: str, values: dict[str, Any], broken: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(load_module, "blank_models", lambda *_: pytest.fail("built"))
    configure(broken, component, **values)
    assert f"{component}/{CONFIG_FILES[component]}: {next(iter(values))}" in refusal(broken)


def test_the_largest_models_that_configurations_can_ask_for_are_built_in_seconds() -> None:
    like = FAMILIES["small-sd1"]
    unet = {"block_out_channels": [65536] * 8, "layers_per_block": 16, "cross_attention_dim": 65536}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D"] * 8, "up_block_types": ["CrossAttnUpBlock2D"] * 8}
    vae = {"block_out_channels": [65536] * 8, "layers_per_block": 16}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 8, "up_block_types": ["UpDecoderBlock2D"] * 8}
    text = {"num_hidden_layers": 256, "hidden_size": 65536, "intermediate_size": 65536, "vocab_size": 2**20}
    started = time.process_time()
    configs = parse_configs(like["unet"] | unet, like["vae"] | vae, like["text_encoder"] | text, like["scheduler"])
    blank_models(configs.unet, configs.vae, configs.text)
    assert time.process_time() - started < 10


def test_a_whole_number_is_as_good_as_another(broken: Path) -> None:
    configure(broken, "text_encoder", layer_norm_eps=1)
    load(broken)


def test_json_longer_than_any_is_refused_unread(broken: Path) -> None:
    os.truncate(broken / "unet" / "config.json", 2**40)
    assert "unet/config.json" in refusal(broken)


def test_a_very_long_value_is_not_printed_whole(broken: Path) -> None:
    configure(broken, "scheduler", trained_betas=[0.001 * n for n in range(1000)])
    assert "trained_betas" in refusal(broken)


def test_a_prompt_width_that_does_not_fit_the_text_encoder_is_refused(broken: Path) -> None:
    configure(broken, "unet", cross_attention_dim=96)
    message = refusal(broken)
    assert "cross_attention_dim 96" in message
    assert "hidden_size 64" in message


# ---- bad tokenizers ----


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_missing_tokenizer_is_refused_by_its_folder(file: str, broken: Path) -> None:
    (broken / "tokenizer" / file).unlink()
    assert str(broken / "tokenizer") in refusal(broken)
    shutil.rmtree(broken / "tokenizer")
    assert str(broken / "tokenizer") in refusal(broken)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("merges.txt", "one two three four\n\0\n"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("special_tokens_map.json", '{"bos_token": "<|endoftext|>", "pad_token": null}'),
        ("vocab.json", "{}"),
        ("vocab.json", '{"a</w>": 0}'),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_its_folder(file: str, content: str, broken: Path) -> None:
    (broken / "tokenizer" / file).write_text(content)
    assert str(broken / "tokenizer") in refusal(broken)


def test_a_vocabulary_larger_than_the_text_encoder_is_refused(
    broken: Path, picture: Image.Image, mask: Image.Image
) -> None:
    write_tokenizer(broken / "tokenizer", 700, "unused699")
    with pytest.raises(minpaint.CheckpointError, match="tokenizer"):
        latents(load(broken), picture, mask)


@pytest.mark.parametrize("length", [0, 1, -1, "x"])
def test_a_tokenizer_without_room_for_a_prompt_is_refused(
    length: object, broken: Path, picture: Image.Image, mask: Image.Image
) -> None:
    path = broken / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    with pytest.raises(minpaint.CheckpointError, match="tokenizer"):
        latents(load(broken), picture, mask)


# ---- wrong arguments ----


@pytest.mark.parametrize(
    "model", ["", 5, None, "nowhere", "no/where/here", "./nowhere", "x" * 5000, "~nobody-here/x", "a\0b"]
)
def test_a_model_that_is_none_is_a_wrong_argument(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(minpaint.InputError) as caught:
        load(model)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("owner/name", None),
        ("owner/name@main", "main"),
        ("owner/name@refs/pr/1", "refs/pr/1"),
        ("owner/name-2.1", None),
        ("owner/name_V5.1-inpainting", None),
        ("owner/name@v1.0", "v1.0"),
    ],
)
def test_hub_ids_may_hold_dots(name: str, revision: str | None, monkeypatch: Any, checkpoint: Folders) -> None:
    asked = []

    def fetch(repository: str, revision: str | None, half: bool, known: object = None) -> Path:
        asked.append((repository, revision))
        return checkpoint("small-sd1")

    monkeypatch.setattr(hub, "fetch", fetch)
    describe(name)
    assert asked == [(name.partition("@")[0], revision)]


@pytest.mark.parametrize("name", ["folder/model.safetensors", "folder/model.ckpt", "./folder/model", "/folder/model"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(minpaint.InputError, match="model"):
        describe(name)


def test_configuration_for_a_folder_is_a_wrong_argument(checkpoint: Folders) -> None:
    with pytest.raises(minpaint.InputError, match="config"):
        load(checkpoint("small-sd1"), config=checkpoint("small-sd2"))
