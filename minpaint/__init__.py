"""Stable Diffusion inpainting from scratch in plain PyTorch.

    import minpaint
    painter = minpaint.load("sd15")
    paintings = painter(image, mask, "two dogs on a bench")

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minpaint.errors import BudgetError, CheckpointError, InputError, MinpaintError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from minpaint.painter import Painter

__version__ = "0.1.0"
__all__ = ["BudgetError", "CheckpointError", "InputError", "MinpaintError", "load"]


def load(
    model: str | Path = "tiny",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    budget: str | int | None = None,
    config: str | Path | None = None,
    fast: bool = False,
    vae: str | Path | None = None,
    lora: str | Path | Iterable[str | Path] | None = None,
) -> Painter:
    """Load a checkpoint and return the Painter that runs it.

    Args:
        model: a name of the catalogue ("sd15", "sd2"), a hub id ("owner/name[@revision]"), a
            folder in diffusers layout, or one safetensors file in latent diffusion's names.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N", "xpu", "xpu:N" or "mps".
        dtype: of the networks, "auto", "fp32", "bf16", "fp16" or a torch dtype. Latents and the
            samplers' arithmetic stay float32.
        budget: memory to keep within, like "15GiB" (the default) or a number of bytes: on CUDA
            that of all tensors, on the CPU the whole process's.
        config: a folder in diffusers layout whose configurations and tokenizer describe a
            single file; without it the architecture is told from the tensors' shapes.
        fast: on CUDA, also use recorded graphs, fused layers and weights with channels last, which
            no GPU has tested yet; the CPU has its fast layers anyway.
        vae: a file, a folder or a hub id to take the VAE from, instead of the model's own.
        lora: small changes of the weights, "FILE[:WEIGHT]" or several of them; FILE is a safetensors
            file of kohya's scripts, PEFT or diffusers, here or in a repository of the hub.

    All weights are loaded and checked here if the budget can hold them together; otherwise when
    they are needed.

    Raises:
        InputError: an argument that cannot be used. CheckpointError: weights or configurations that are
            missing, damaged or not supported. BudgetError: the budget cannot hold even the smallest picture.
    """
    from minpaint.painter import open_painter

    painter = open_painter(model, device, dtype, budget, config, fast, vae, lora)
    painter.engine.keep_loaded()
    return painter
