"""The UNet equals diffusers' on the same weights: same keys, same output."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import relative_error
from diffusers import UNet2DConditionModel

from minpaint.checkpoint.configs import unet_config
from minpaint.models.unet import UNet, timestep_embedding
from weights.random_checkpoint import FAMILIES, randomise

TOLERANCE = 2e-5
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"

SD1, SD2 = FAMILIES["small-sd1"]["unet"], FAMILIES["small-sd2"]["unet"]
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "SD 1": SD1,
    "SD 2": SD2,
    "4 channels": SD1 | {"in_channels": 4},
    "one level": SD1 | {"block_out_channels": [32], "down_block_types": [CROSS_DOWN], "up_block_types": [CROSS_UP]},
    "one plain level": SD1 | {"block_out_channels": [32], "down_block_types": [DOWN], "up_block_types": [UP]},
    "attention below": SD1 | {"down_block_types": [DOWN, CROSS_DOWN], "up_block_types": [CROSS_UP, UP]},
    "unlike mirrors": SD1 | {"down_block_types": [DOWN, DOWN], "up_block_types": [CROSS_UP, UP]},
    "three levels": SD2
    | {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 8],
        "down_block_types": [CROSS_DOWN, DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, UP, CROSS_UP],
        "layers_per_block": 1,
    },
    "four levels": SD1
    | {
        "block_out_channels": [16, 24, 32, 40],
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "layers_per_block": 3,
        "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    },
}


def pair(config: dict[str, Any]) -> tuple[UNet, UNet2DConditionModel]:
    """Our UNet and the reference's with the same random weights, each key of both accounted for."""
    reference = UNet2DConditionModel.from_config(config).eval()
    reference.load_state_dict(randomise(reference, seed=1))
    ours = UNet(unet_config(config)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_equals_the_reference_at_any_size(topology: str) -> None:
    config = TOPOLOGIES[topology]
    ours, reference = pair(config)
    generator = torch.Generator().manual_seed(2)
    # multiples of what the levels halve, odd sizes, and a size smaller than the levels
    for height, width in ((16, 16), (8, 24), (9, 13), (7, 1), (3, 2)):
        x = torch.randn(2, config["in_channels"], height, width, generator=generator)
        context = torch.randn(2, 77, 64, generator=generator)
        for t in (torch.tensor([0, 999]), torch.tensor([501, 1])):
            with torch.inference_mode():
                expected = reference(x, t, context).sample
                assert relative_error(ours(x, t, context), expected) < TOLERANCE, (height, width, t)


def test_prompt_and_timestep_matter() -> None:
    ours, _ = pair(SD1)
    x, context = torch.randn(1, 9, 8, 8), torch.randn(1, 77, 64)
    with torch.inference_mode():
        out = ours(x, torch.tensor([500]), context)
        assert relative_error(ours(x, torch.tensor([500]), context.flip(1) * 2), out) > 1e-3
        assert relative_error(ours(x, torch.tensor([100]), context), out) > 1e-3


def test_timestep_embedding_equals_the_reference() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 17, 999])
    expected = get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, 320), expected)


def test_the_docstring_picture_tells_the_shapes_of_sd15() -> None:
    """The table at the top of unet.py, checked with hooks on the model it describes."""
    import minpaint.models.unet as module

    with torch.device("meta"):
        unet = UNet(unet_config(FAMILIES["sd15"]["unet"]))
        shapes: dict[str, str] = {}
        named = {"conv_in": unet.conv_in, "mid": unet.mid_block, "output": unet.conv_out}
        named |= {f"down {i}": block.resnets[-1] for i, block in enumerate(unet.down_blocks)}
        named |= {f"up {i}": block.resnets[-1] for i, block in enumerate(unet.up_blocks)}
        for name, part in named.items():
            part.register_forward_hook(
                lambda _m, _i, out, name=name: shapes.update({name: "x".join(map(str, out.shape[1:]))})
            )
        unet(torch.zeros(1, 9, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
    lines = {}
    for line in (module.__doc__ or "").splitlines():
        match = re.match(r" {4}(conv_in|mid|output|down \d|up \d) +(\d+ x +\d+ x +\d+)", line)
        if match:
            lines[match[1]] = match[2].replace(" ", "")
    assert lines == shapes
