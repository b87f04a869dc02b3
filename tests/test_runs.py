"""Whole runs beside diffusers.StableDiffusionInpaintPipeline: same latents, same picture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_FAMILIES, largest_level_difference, make_mask, make_picture, relative_error
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

import minpaint
from minpaint.painter import Painter

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpmpp": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
}
STEPS = (1, 2, 3, 7, 20, 50)
STRENGTHS = (1.0, 0.99, 0.5, 0.13)
GUIDANCES = (0.0, 1.0, 7.5)
ETAS = (0.0, 0.4, 1.0)
LATENT_TOLERANCE, LEVEL_TOLERANCE = 1e-4, 1
PROMPT, NEGATIVE = "two dogs on a bench", "blurry"

# Every number of steps for every family and sampler, the other values in turn.
CASES = [
    (family, sampler, steps, STRENGTHS[(k + j) % 4], GUIDANCES[(k + 2 * j) % 3], ETAS[(k + j) % 3])
    for k, (family, sampler) in enumerate(product(SMALL_FAMILIES, SCHEDULERS))
    for j, steps in enumerate(STEPS)
]
# and every strength with every guidance at a number of steps that leaves some for all of them
CASES += [
    (SMALL_FAMILIES[k % 4], tuple(SCHEDULERS)[k % 3], 8, strength, guidance, ETAS[k % 3])
    for k, (strength, guidance) in enumerate(product(STRENGTHS, GUIDANCES))
]
CASES = [case for case in dict.fromkeys(CASES) if int(case[2] * case[3]) > 0]


@pytest.fixture(scope="module")
def pipeline(checkpoint: Callable[[str], Path]) -> Callable[..., StableDiffusionInpaintPipeline]:
    """The reference on a family's checkpoint, with the sampler asked for or the checkpoint's own."""
    made: dict[str, tuple[StableDiffusionInpaintPipeline, Any]] = {}

    def load(family: str, sampler: str | None = None) -> StableDiffusionInpaintPipeline:
        if family not in made:
            pipe = StableDiffusionInpaintPipeline.from_pretrained(checkpoint(family))
            pipe.set_progress_bar_config(disable=True)
            made[family] = pipe, pipe.scheduler
        pipe, own = made[family]
        pipe.scheduler = SCHEDULERS[sampler].from_config(own.config) if sampler else own
        return pipe

    return load


def reference_run(
    pipe: StableDiffusionInpaintPipeline, image: Image.Image, mask: Image.Image, seed: int, eta: float, **options: Any
) -> tuple[torch.Tensor, Image.Image]:
    """Final latents [4, y, x] and picture of the reference."""
    seen = {}

    def look(_pipe: object, _i: int, _t: object, values: dict[str, Any]) -> dict[str, Any]:
        seen.update(values)
        return values

    picture = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=image,
        mask_image=mask,
        width=image.width,
        height=image.height,
        generator=torch.Generator("cpu").manual_seed(seed),
        eta=eta,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents"],
        **options,
    ).images[0]
    return seen["latents"][0], picture


@pytest.mark.filterwarnings("ignore:eta has no effect")
@pytest.mark.parametrize(
    ("family", "sampler", "steps", "strength", "guidance", "eta"),
    [pytest.param(*case, marks=pytest.mark.slow if case[2] >= 8 else ()) for case in CASES],
)
def test_equals_the_reference(
    painter: Callable[[str], Painter],
    pipeline: Callable[..., StableDiffusionInpaintPipeline],
    picture: Image.Image,
    mask: Image.Image,
    family: str,
    sampler: str,
    steps: int,
    strength: float,
    guidance: float,
    eta: float,
) -> None:
    pipe = pipeline(family, sampler)
    expected, expected_picture = reference_run(
        pipe, picture, mask, 11, eta, num_inference_steps=steps, strength=strength, guidance_scale=guidance
    )
    [painting] = painter(family)(
        picture,
        mask,
        PROMPT,
        negative_prompt=NEGATIVE,
        steps=steps,
        strength=strength,
        guidance=guidance,
        eta=eta,
        sampler=sampler,
        seed=11,
        profile="diffusers",
    )
    assert relative_error(painting.latents, expected) < LATENT_TOLERANCE
    assert largest_level_difference(painting.image, expected_picture) <= LEVEL_TOLERANCE


def test_the_cases_meet_every_value() -> None:
    for position, values in enumerate((SMALL_FAMILIES, tuple(SCHEDULERS), STEPS, STRENGTHS, GUIDANCES, ETAS)):
        assert {case[position] for case in CASES} >= set(values)


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_the_checkpoints_own_sampler_is_the_default(
    painter: Callable[[str], Painter],
    pipeline: Callable[..., StableDiffusionInpaintPipeline],
    picture: Image.Image,
    mask: Image.Image,
    family: str,
) -> None:
    expected, _ = reference_run(pipeline(family), picture, mask, 5, 0.0, num_inference_steps=6)
    [painting] = painter(family)(picture, mask, PROMPT, negative_prompt=NEGATIVE, steps=6, seed=5, profile="diffusers")
    assert relative_error(painting.latents, expected) < LATENT_TOLERANCE


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SCHEDULER_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim set_alpha_to_one": ("DDIMScheduler", {"set_alpha_to_one": True}),
    "ddim clip_sample": ("DDIMScheduler", {"clip_sample": True}),
    # not 0.3: there the reference is 9e-5 from itself if its UNet's inputs are moved by half a rounding
    "ddim clip_sample_range": ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.7}),
    "ddim steps_offset 0": ("DDIMScheduler", {"steps_offset": 0}),
    "ddim trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddim linspace": ("DDIMScheduler", {"timestep_spacing": "linspace"}),
    "ddim linear betas": ("DDIMScheduler", {"beta_schedule": "linear"}),
    "ddim trailing v": ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    "pndm set_alpha_to_one": ("PNDMScheduler", {"set_alpha_to_one": True}),
    "pndm trailing": ("PNDMScheduler", {"timestep_spacing": "trailing"}),
    "pndm linspace v": ("PNDMScheduler", {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}),
    "pndm Runge-Kutta": ("PNDMScheduler", {"skip_prk_steps": False}),
    "pndm Runge-Kutta v": ("PNDMScheduler", {"skip_prk_steps": False, "prediction_type": "v_prediction"}),
    "dpmpp leading": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "dpmpp trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpmpp linspace v": ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "dpmpp Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp Karras v": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    "dpmpp zero SNR": ("DPMSolverMultistepScheduler", ZERO_SNR),
    "dpmpp Karras zero SNR": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, **ZERO_SNR}),
    "ddim zero SNR": ("DDIMScheduler", ZERO_SNR),
    "ddim zero SNR, leading": ("DDIMScheduler", {**ZERO_SNR, "timestep_spacing": "leading"}),
    "lcm": ("LCMScheduler", {}),
    "lcm v": ("LCMScheduler", {"prediction_type": "v_prediction"}),
    "lcm clip_sample": ("LCMScheduler", {"clip_sample": True, "clip_sample_range": 0.7}),
    "lcm of 30": ("LCMScheduler", {"original_inference_steps": 30}),
    "lcm zero SNR": ("LCMScheduler", ZERO_SNR),
}


@pytest.mark.parametrize("family", ["small-sd1", pytest.param("small-sd1-4ch", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=() if name.startswith("dpmpp") else pytest.mark.slow) for name in SCHEDULER_SETTINGS],
)
def test_every_scheduler_setting_equals_the_reference(
    checkpoint: Callable[[str], Path],
    pipeline: Callable[..., StableDiffusionInpaintPipeline],
    tmp_path: Path,
    picture: Image.Image,
    mask: Image.Image,
    setting: str,
    family: str,
) -> None:
    """A scheduler saved by the reference, in a checkpoint read by both."""
    name, settings = SCHEDULER_SETTINGS[setting]
    kind = {cls.__name__: cls for cls in SCHEDULERS.values()}[name]
    pipe = pipeline(family)
    # set afterwards: the pipeline's constructor overwrites steps_offset and skip_prk_steps
    pipe.scheduler = kind.from_config({**KEYS_OF_SD, **settings})
    for part in checkpoint(family).iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").unlink()
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    ours = minpaint.load(tmp_path, device="cpu", dtype="fp32")
    for steps, strength in ((8, 1.0), (17, 0.6), (30, 0.1)):
        expected, _ = reference_run(pipe, picture, mask, 2, 0.0, num_inference_steps=steps, strength=strength)
        [painting] = ours(
            picture,
            mask,
            PROMPT,
            negative_prompt=NEGATIVE,
            steps=steps,
            strength=strength,
            seed=2,
            profile="diffusers",
        )
        assert relative_error(painting.latents, expected) < LATENT_TOLERANCE, (steps, strength)


KEYS_OF_SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}


@pytest.mark.parametrize("size", [(96, 64), (40, 72), (8, 8), (24, 136)])
def test_equals_the_reference_at_other_sizes(
    painter: Callable[[str], Painter],
    pipeline: Callable[..., StableDiffusionInpaintPipeline],
    size: tuple[int, int],
) -> None:
    image, hole = make_picture(*size, seed=1), make_mask(*size)
    pipe = pipeline("small-sd1", "ddim")
    expected, expected_picture = reference_run(pipe, image, hole, 4, 0.0, num_inference_steps=4)
    [painting] = painter("small-sd1")(
        image, hole, PROMPT, negative_prompt=NEGATIVE, steps=4, seed=4, sampler="ddim", profile="diffusers"
    )
    assert painting.latents.shape == (4, size[1] // 8, size[0] // 8)
    assert relative_error(painting.latents, expected) < LATENT_TOLERANCE
    assert largest_level_difference(painting.image, expected_picture) <= LEVEL_TOLERANCE


@pytest.mark.parametrize("seed", range(2))
def test_a_grey_mask_is_cut_where_the_reference_cuts_it(
    painter: Callable[[str], Painter],
    pipeline: Callable[..., StableDiffusionInpaintPipeline],
    picture: Image.Image,
    seed: int,
) -> None:
    grey = Image.effect_noise((64, 64), 60)
    pipe = pipeline("small-sd1", "ddim")
    expected, _ = reference_run(pipe, picture, grey, seed, 0.0, num_inference_steps=3)
    [painting] = painter("small-sd1")(
        picture, grey, PROMPT, negative_prompt=NEGATIVE, steps=3, seed=seed, sampler="ddim", profile="diffusers"
    )
    assert relative_error(painting.latents, expected) < LATENT_TOLERANCE


def test_naming_pndm_does_without_the_warm_up_that_the_checkpoint_asks_for(
    checkpoint: Callable[[str], Path], tmp_path: Path, picture: Image.Image, mask: Image.Image
) -> None:
    for part in checkpoint("small-sd2").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").unlink()
    PNDMScheduler.from_config({**KEYS_OF_SD, "skip_prk_steps": False}).save_pretrained(tmp_path / "scheduler")
    ours = minpaint.load(tmp_path, device="cpu", dtype="fp32")
    [with_warm_up] = ours(picture, mask, PROMPT, steps=6)
    [without] = ours(picture, mask, PROMPT, steps=6, sampler="pndm")
    assert (with_warm_up.steps, without.steps) == (12 + 3, 7)
    with pytest.raises(minpaint.InputError, match="Runge-Kutta"):
        ours(picture, mask, PROMPT, steps=3)
