"""The official shapes, with random weights: same keys, same numbers as the reference."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture, relative_error
from diffusers import AutoencoderKL, UNet2DConditionModel

from minpaint.checkpoint.configs import unet_config, vae_config
from minpaint.engine.measure import measure
from minpaint.models.unet import UNet
from minpaint.models.vae import VAE
from minpaint.painter import open_painter
from minpaint.picture.frame import open_frame
from minpaint.settings import Settings
from weights.random_checkpoint import FAMILIES, randomise, write_checkpoint

pytestmark = [pytest.mark.full_size, pytest.mark.slow]
TOLERANCE = 2e-5
OFFICIAL = Path(__file__).parent.parent.parent / "shared" / "official"


def reference_and_ours(kind: Any, ours: Any, config: dict[str, Any]) -> tuple[Any, Any]:
    """Both models on one set of random tensors."""
    with torch.device("meta"):
        reference, mine = kind.from_config(config), ours
    weights = randomise(reference, seed=1)
    reference.load_state_dict(weights, assign=True)
    mine.load_state_dict(weights, assign=True)
    return reference.eval(), mine.eval()


@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_unet_equals_the_reference_at_full_size(family: str) -> None:
    config = FAMILIES[family]["unet"]
    with torch.device("meta"):
        ours = UNet(unet_config(config))
    reference, ours = reference_and_ours(UNet2DConditionModel, ours, config)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 9, 32, 32, generator=generator)
    context = torch.randn(1, 77, config["cross_attention_dim"], generator=generator)
    with torch.inference_mode():
        expected = reference(x, torch.tensor([801]), context).sample
        error = relative_error(ours(x, torch.tensor([801]), context), expected)
    print(f"{family}: UNet at 32 x 32 latents differs by {error:.1e}")
    assert error < TOLERANCE
    del reference, ours
    gc.collect()


def test_vae_equals_the_reference_at_full_size() -> None:
    config = FAMILIES["sd15"]["vae"]
    with torch.device("meta"):
        ours = VAE(vae_config(config))
    reference, ours = reference_and_ours(AutoencoderKL, ours, config)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 128, 192, generator=generator) * 2 - 1
    with torch.inference_mode():
        expected = reference.encode(pixels).latent_dist
        mean, logvar = ours.encode(pixels)
        errors = [relative_error(mean, expected.mean), relative_error(logvar, expected.logvar)]
        latents = torch.randn(1, 4, 16, 24, generator=generator)
        errors.append(relative_error(ours.decode(latents), reference.decode(latents).sample))
    print(f"VAE at 192 x 128 differs by {errors}")
    assert max(errors) < TOLERANCE


@pytest.mark.usefixtures("without_base")
def test_a_run_at_full_size_takes_what_was_planned(tmp_path: Path) -> None:
    """From files in half precision as the official ones, so that no weight is mapped and none uncounted."""
    folder = write_checkpoint(tmp_path, FAMILIES["sd15"], dtype=torch.float16, variant="fp16")
    settings = Settings("two dogs on a bench", steps=1)
    frame = open_frame(make_picture(256, 256), make_mask(256, 256), settings)
    ours = open_painter(folder, "cpu", "bf16", "1.5GiB", None)
    request = ours.request(frame, settings, ours.views(frame, settings))
    ours.engine.planner().choose(request, 2**50, 0)  # measured once, on the meta device
    taken = measure(partial(ours.paint, frame, settings)).total
    assert ours.last_run is not None
    plan = ours.last_run.plan
    planned = max(phase.weights + phase.others + phase.activations for phase in plan.phases.values())
    print(f"{plan.phases['denoise'].how}: planned {planned / 2**20:.1f} MiB, taken {taken / 2**20:.1f} MiB")
    assert plan.phases["denoise"].split is not None
    assert 0.9 * planned <= taken <= planned


@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_our_shapes_are_the_official_ones(family: str) -> None:
    """Keys and shapes of diffusers' model under the published configuration, without weights."""
    folder = OFFICIAL / f"{family}-inpainting"
    if not folder.is_dir():
        pytest.skip("the official configurations are not beside this clone")
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    with torch.device("meta"):
        pairs = (
            (UNet(unet_config(unet)), UNet2DConditionModel.from_config(unet)),
            (VAE(vae_config(vae)), AutoencoderKL.from_config(vae)),
        )
    for ours, reference in pairs:
        expected = {key: tensor.shape for key, tensor in reference.state_dict().items()}
        assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected
