"""Write a checkpoint of random weights in diffusers layout, for tests and measurements.

    python -m weights.random_checkpoint sd15 FOLDER --variant fp16

The full-size families have the shapes of the official checkpoints; the small ones have their
features at a size that runs in milliseconds. Every norm and bias is randomised, so that a
swapped or forgotten one shows. A prompt is read letter by letter with a vocabulary of bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minpaint.checkpoint.architecture import blank_models
from minpaint.checkpoint.configs import text_config, unet_config, vae_config

Json = dict[str, Any]
START, END = "<|startoftext|>", "<|endoftext|>"

SCHEDULER: Json = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
PNDM: Json = SCHEDULER | {"_class_name": "PNDMScheduler"}


def unet_json(channels: list[int], heads: int | list[int], context: int, **more: Any) -> Json:
    deep = len(channels) - 1
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D"] * deep + ["DownBlock2D"],
        "in_channels": 9,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * deep,
    } | more


def vae_json(channels: list[int], **more: Any) -> Json:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    } | more


def text_json(width: int, layers: int, heads: int, act: str, vocabulary: int) -> Json:
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_act": act,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


SMALL = {"norm_num_groups": 8, "sample_size": 8}
SMALL_VAE = vae_json([16, 24, 24, 32], norm_num_groups=8, layers_per_block=1, sample_size=64)
SMALL_TEXT = text_json(64, 2, 1, "quick_gelu", 514)
SMALL_TEXT_2 = text_json(64, 2, 1, "gelu", 514)

FAMILIES: dict[str, dict[str, Json]] = {
    "sd15": {
        "unet": unet_json([320, 640, 1280, 1280], 8, 768),
        "vae": vae_json([128, 256, 512, 512]),
        "text_encoder": text_json(768, 12, 12, "quick_gelu", 49408),
        "scheduler": SCHEDULER,
    },
    "sd2": {
        "unet": unet_json([320, 640, 1280, 1280], [5, 10, 20, 20], 1024, use_linear_projection=True),
        "vae": vae_json([128, 256, 512, 512]),
        "text_encoder": text_json(1024, 23, 16, "gelu", 49408),
        "scheduler": PNDM,
    },
    "small-sd1": {
        "unet": unet_json([32, 64], 8, 64, **SMALL),
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT,
        "scheduler": SCHEDULER,
    },
    "small-sd2": {
        "unet": unet_json([64, 128], [1, 2], 64, use_linear_projection=True, **SMALL),
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT_2,
        "scheduler": PNDM,
    },
    "small-sd1-4ch": {
        "unet": unet_json([32, 64], 8, 64, **SMALL | {"in_channels": 4}),
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT,
        "scheduler": PNDM,
    },
    "small-v": {
        "unet": unet_json([64, 128], [1, 2], 64, use_linear_projection=True, **SMALL),
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT_2,
        "scheduler": SCHEDULER | {"prediction_type": "v_prediction"},
    },
}


def randomise(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random tensors for every parameter of a model on the meta device, by name.

    Weights keep the variance of what passes through them, scales are around 1 and offsets
    around 0 but never there.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            tensor *= 0.7 / math.sqrt(parameter[0].numel())
        else:
            tensor = 0.1 * tensor + ("norm" in name and name.endswith("weight"))
        tensors[name] = tensor
    return tensors


def byte_vocabulary(merges: Sequence[str] = ()) -> dict[str, int]:
    """CLIP's vocabulary: 256 bytes, the same at a word's end, what the merges join, start and end."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's printable bytes
    others = [256 + n for n in range(256 - len(plain))]
    letters = [chr(n) for n in (*plain, *others)]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(f"{x}</w>" for x in letters), *joined, START, END]
    return {token: n for n, token in enumerate(tokens)}


def write_tokenizer(folder: Path, vocabulary_size: int, pad: str, merges: Sequence[str] = ()) -> None:
    """A tokenizer in `folder`; each merge is two tokens that become one, as in merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = byte_vocabulary(merges)
    vocabulary |= {f"unused{n}": n for n in range(len(vocabulary), vocabulary_size)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_checkpoint(
    folder: Path,
    configs: dict[str, Json],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Path:
    """A checkpoint in diffusers layout with random weights; the folder."""
    unet, vae, text = (configs[component] for component in ("unet", "vae", "text_encoder"))
    models = blank_models(unet_config(unet), vae_config(vae), text_config(text))
    for number, (component, model) in enumerate(models.items()):
        tensors = {key: tensor.to(dtype) for key, tensor in randomise(model, 1000 * seed + number).items()}
        write_component(folder, component, configs[component], tensors, variant)
    sd2 = configs["unet"].get("use_linear_projection", False)
    write_tokenizer(folder / "tokenizer", configs["text_encoder"]["vocab_size"], "!" if sd2 else END)
    write_index(folder, configs["scheduler"])
    return folder


def write_component(
    folder: Path, component: str, config: Json, tensors: dict[str, Tensor], variant: str | None = None
) -> None:
    """The configuration and the weights of one of the models, under the official files' names."""
    place = folder / component
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config, indent=2))
    base = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    if component == "text_encoder":  # the official files' names, and their stray tensor
        tensors = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(config["max_position_embeddings"])[None]
    file = place / f"{base}{f'.{variant}' if variant else ''}.safetensors"
    save_file(tensors, file, {"format": "pt"})  # older transformers ask for the mark


def write_index(folder: Path, scheduler: Json) -> None:
    """The scheduler's configuration, and the file that says which class reads which folder."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=("fp16",), help="half precision, as the official fp16 files")
    options = parser.parse_args()
    dtype = torch.float16 if options.variant else torch.float32
    write_checkpoint(options.folder, FAMILIES[options.family], options.seed, dtype, options.variant)


if __name__ == "__main__":
    main()
