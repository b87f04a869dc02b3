"""Random LoRA files in the names of kohya's scripts, of PEFT and of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minpaint.checkpoint.load import load_checkpoint

RANK, ALPHA = 4, 2.5
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
OTHERS = ("ff.net.0.proj", "ff.net.2", "time_emb_proj")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def factors(model: nn.Module, endings: tuple[str, ...], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A random (down, up) for every module with one of these endings; as convolutions where it is one."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.endswith(endings) and isinstance(module, (nn.Linear, nn.Conv2d)):
            rows, columns, *kernel = module.weight.shape
            down = torch.randn(RANK, columns, *kernel, generator=generator) / (RANK * columns) ** 0.5
            up = torch.randn(rows, RANK, *[1 for _ in kernel], generator=generator) / RANK**0.5
            found[name] = down, up
    assert found
    return found


def kohya(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    key = f"lora_{'unet' if part == 'unet' else 'te'}_{name.replace('.', '_')}"
    names = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
    return {f"{key}.{end}": tensor for end, tensor in names.items()}


def peft(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}


def old_diffusers(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if part == "unet":
        head, _, tail = name.removesuffix(".0").rpartition(".")
        return {f"unet.{head}.processor.{tail}_lora.{end}.weight": t for end, t in (("down", down), ("up", up))}
    return {f"{part}.{name}.lora_linear_layer.{end}.weight": t for end, t in (("down", down), ("up", up))}


def new_diffusers(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if part == "text_encoder":
        return old_diffusers(part, name, down, up)
    return {f"{part}.{name}.lora.{end}.weight": tensor for end, tensor in (("down", down), ("up", up))}


NAMINGS: dict[str, tuple[Callable[..., dict[str, Tensor]], tuple[str, ...]]] = {
    "kohya": (kohya, (*ATTENTION, *CONVOLUTIONS, *OTHERS)),
    "peft": (peft, (*ATTENTION, *CONVOLUTIONS, *OTHERS)),
    "old diffusers": (old_diffusers, ATTENTION),
    "new diffusers": (new_diffusers, (*ATTENTION, *OTHERS)),
}


def official_text_name(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def write(path: Path, checkpoint: Path, naming: str, text: bool = True, **metadata: str) -> Path:
    """A random LoRA for a checkpoint."""
    models, (named, endings), tensors = load_checkpoint(checkpoint), NAMINGS[naming], {}
    for name, pair in factors(models.unet, endings).items():
        tensors |= named("unet", name, *pair)
    for name, pair in factors(models.text_encoder, TEXT, seed=1).items() if text else ():
        tensors |= named("text_encoder", official_text_name(name), *pair)
    save_file(tensors, path, metadata or None)
    return path
