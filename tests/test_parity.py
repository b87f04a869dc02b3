"""`parity` names the first cause of every planted fault, and raises no alarm where nothing was planted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minpaint.inpaint
import minpaint.models.unet
from minpaint import samplers
from minpaint.checkpoint.load import Checkpoint, load_checkpoint
from minpaint.engine.device import DTYPES
from minpaint.study import parity_sides
from minpaint.study.parity_diffusers import diffusers_side
from minpaint.study.parity_record import Stage
from minpaint.study.parity_sides import Case, Side, minpaint_side, stages

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
fault("the last noise level", SD1, FP32, schedule(alpha_bar_end=lambda level: 1.0), "step 3")
fault("epsilon for v", V, FP32, schedule(prediction=lambda kind: "epsilon"), "step 0")
fault("one step too far", V, FP32, sampler("ddim", 1, 1.00001), "step 1")
fault("a coefficient of the multistep", FOUR, PNDM, multistep_weight, "step 3")
fault("noise level of what is put back", FOUR, PNDM, put_back_at_the_old_level, "step 0")
fault("brightness of the picture", SD1, FP32, darken, "picture")
fault("one weight in bf16", SD1, BF16, change("unet", f"{CONV}.bias", 1.0), f"unet.{CONV}")
fault("a step in bf16", SD1, BF16, sampler("ddim", 1, 1.1), "step 1")
