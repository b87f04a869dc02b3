"""What the tests of checkpoints share: folders to change, and the refusals they end in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import (
    to_ldm,
    write_hollow,
    write_single_file,
)
from torch import Tensor, nn

import minpaint
from minpaint.checkpoint.architecture import blank_models
from minpaint.checkpoint.configs import text_config, unet_config, vae_config
from minpaint.painter import Painter
from weights.random_checkpoint import FAMILIES, PNDM, SCHEDULER

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = ROOT.parent / "shared" / "official"
BASES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FILES = {component: f"{component}/{base}.safetensors" for component, base in BASES.items()}
OPEN_CLIP = {"small-sd1": False, "small-sd1-4ch": False, "small-sd2": True, "small-v": True}
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

CONFIG_FILES = dict.fromkeys(BASES, "config.json") | {"scheduler": "scheduler_config.json"}

Json = dict[str, Any]
Folders = Callable[[str], Path]


def load(model: str | Path, **more: Any) -> Painter:
    return minpaint.load(model, **{"device": "cpu", "dtype": "fp32"} | more)


def latents(painter: Painter, picture: Image.Image, mask: Image.Image, **more: Any) -> Tensor:
    settings: Any = {"negative_prompt": "blurry", "steps": 2, "seed": 3} | more
    return painter(picture, mask, "two dogs", **settings)[0].latents


def refusal(model: str | Path, **more: Any) -> str:
    """What a bad checkpoint is refused with: CheckpointError, in one line of bearable length."""
    with pytest.raises(minpaint.CheckpointError) as caught:
        load(model, **more)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return message


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors in a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # the file may be linked and mapped elsewhere
    save_file(tensors, path)


def configure(folder: Path, component: str, **values: Any) -> None:
    """Put values into a component's configuration."""
    path = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def meta_models(configs: Mapping[str, Json]) -> dict[str, nn.Module]:
    unet, vae, text = (configs[component] for component in BASES)
    return blank_models(unet_config(unet), vae_config(vae), text_config(text))


def hollow_single_file(configs: Mapping[str, Json], folder: Path, extras: bool = True) -> Path:
    """A single file with the shapes of these configurations and no numbers."""
    unet, vae, text = (dict(model.state_dict()) for model in meta_models(configs).values())
    open_clip = configs["unet"].get("use_linear_projection", False)
    tensors = to_ldm(unet, vae, text, configs["unet"]["layers_per_block"], open_clip, extras)
    return write_hollow(tensors, folder / "model.safetensors")


def shard(folder: Path, component: str, count: int = 3, variant: str = "") -> Path:
    """Spread a component's weights over several files; the index."""
    path = folder / FILES[component]
    tensors = load_file(path)
    names = [f"{BASES[component]}{variant}-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    weight_map = {key: names[n % count] for n, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, path.parent / name)
    path.unlink()
    index = path.parent / f"{BASES[component]}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def as_single_file(folder: Path, family: str) -> Json:
    path = write_single_file(folder, folder.parent / "single" / "model.safetensors", OPEN_CLIP[family])
    return {"model": path, "config": folder}


def alone(channels: list[int], in_channels: int, linear: bool, layers: int = 2, text: int = 64) -> dict[str, Json]:
    """Configurations in which all that shapes cannot tell is as in the official files."""
    like = FAMILIES["sd2" if linear else "sd15"]
    deep = len(channels) - 1
    return {
        "unet": like["unet"]
        | {
            "attention_head_dim": [c // 64 for c in channels] if linear else 8,
            "block_out_channels": channels,
            "cross_attention_dim": text,
            "down_block_types": ["CrossAttnDownBlock2D"] * deep + ["DownBlock2D"],
            "in_channels": in_channels,
            "layers_per_block": layers,
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * deep,
        },
        "vae": like["vae"] | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1},
        "text_encoder": like["text_encoder"]
        | {
            "hidden_size": text,
            "intermediate_size": 96,
            "num_attention_heads": text // 64,
            "num_hidden_layers": 2,
            "vocab_size": 514,
        },
        "scheduler": PNDM if linear or in_channels == 4 else SCHEDULER,
    }
