"""The bundled checkpoint really paints: quick bounds that a broken program does not meet.

`python -m bench.quality` measures the same things, and more, on many scenes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

import minpaint
from bench.judges import colour_of
from bench.quality import psnr
from bench.scenes import HELD_OUT, Case
from minpaint.checkpoint.hub import weights_folder
from minpaint.checkpoint.tokenizer import load_tokenizer, unknown_words
from minpaint.errors import MinpaintWarning
from minpaint.painter import Painter, Painting
from minpaint.picture.image import to_image, to_unit
from minpaint.samplers import SAMPLERS
from minpaint.settings import Settings
from tests.conftest import largest_level_difference, relative_error
from weights import world

Paints = Callable[..., list[Painting]]
FOLDER = weights_folder() / "tiny"
CASES = 12


@pytest.fixture(scope="module")
def tiny() -> Painter:
    return minpaint.load("tiny", device="cpu", dtype="fp32")


def cases() -> Iterator[Case]:
    return (Case(number, usual=True) for number in range(CASES))


# What a working program does ---------------------------------------------------------------------


def the_prompt_is_followed(painter: Paints) -> None:
    right = 0
    for case in cases():
        [painting] = painter(case.without, case.mask, case.prompt, sampler="dpmpp", steps=10, seed=case.number)
        right += colour_of(painting.image, case, case.target.kind) == case.target.colour
    assert right >= CASES - 2, f"{right} of {CASES} things have the colour asked for"


def the_place_is_heard(painter: Paints) -> None:
    """Where a hole hides all the ground and nothing else, only the prompt tells meadow from lake."""
    right = 0
    for number in range(4):
        rng = Random(HELD_OUT + 800_000 + number)
        scene = world.scene(rng, things=0)
        picture, mask = world.draw(scene), world.hole_over_ground(rng, scene)
        asked = [replace(scene, place=place) for place in world.PLACES]
        for wanted in asked:
            [painting] = painter(picture, mask, world.caption(wanted), sampler="dpmpp", steps=10, seed=number)
            errors = [float((to_unit(painting.image) - to_unit(world.draw(each))).abs().mean()) for each in asked]
            right += asked[errors.index(min(errors))] is wanted
    assert right >= 7, f"{right} of 8 grounds are of the place asked for"


def the_kept_part_is_known(painter: Paints) -> None:
    """Before anything is pasted back, the picture outside the hole is the picture that was given."""
    errors = []
    for case in list(cases())[:4]:
        picture = case.without
        [painting] = painter(picture, case.mask, case.prompt, sampler="dpmpp", steps=10, profile="diffusers")
        outside = to_unit(case.mask)[0, 0] < 0.5
        errors.append((to_unit(painting.image) - to_unit(picture))[0][:, outside].square().mean())
    found = psnr(float(torch.stack(errors).mean()))
    assert found >= 24, f"the kept part comes back at {found:.1f} dB"


def samplers_agree(painter: Paints) -> None:
    """Few steps of each sampler end near many of DDIM; the median, for now and then one settles elsewhere."""
    differences: dict[str, list[float]] = {"pndm": [], "dpmpp": []}
    for case in list(cases())[:3]:
        hole = to_unit(case.mask)[0, 0] > 0.5

        def run(sampler: str, steps: int, case: Case = case) -> Tensor:
            [painting] = painter(case.without, case.mask, case.prompt, sampler=sampler, steps=steps, seed=case.number)
            return 255 * to_unit(painting.image)[0]

        reference = run("ddim", 40)
        for sampler, steps in (("pndm", 25), ("dpmpp", 15)):
            differences[sampler].append(float((run(sampler, steps) - reference)[:, hole].abs().mean()))
    found = {sampler: statistics.median(values) for sampler, values in differences.items()}
    assert max(found.values()) <= 5, f"the samplers differ in the hole by levels {found}"


CHECKS = (the_prompt_is_followed, the_place_is_heard, the_kept_part_is_known, samplers_agree)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tiny_model(check: Callable[[Paints], None], tiny: Painter) -> None:
    check(tiny)


# What a broken one does --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "fault"), [(the_prompt_is_followed, "colour asked for"), (the_place_is_heard, "place asked for")]
)
def test_an_ignored_prompt_shows(check: Callable[[Paints], None], fault: str, tiny: Painter) -> None:
    def ignorant(image: Image.Image, mask: Image.Image, prompt: str, **options: Any) -> Any:
        return tiny(image, mask, "", **options)

    with pytest.raises(AssertionError, match=fault):
        check(ignorant)


def test_a_swapped_mask_shows(tiny: Painter) -> None:
    def swapped(image: Image.Image, mask: Image.Image, prompt: str, **options: Any) -> Any:
        return tiny(image, ImageOps.invert(mask.convert("L")), prompt, **options)

    with pytest.raises(AssertionError, match="kept part"):
        the_kept_part_is_known(swapped)


@pytest.mark.slow
def test_a_broken_sampler_shows(tiny: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    ddim = SAMPLERS["ddim"]

    def confused(model: Any, x: Tensor, schedule: Any, *rest: Any) -> Any:
        """alpha taken for alpha_bar: the papers' notations differ by a square root."""
        return ddim(model, x, replace(schedule, alpha_bar=tuple(a**0.5 for a in schedule.alpha_bar)), *rest)

    monkeypatch.setitem(SAMPLERS, "ddim", confused)
    with pytest.raises(AssertionError, match="samplers differ"):
        samplers_agree(tiny)


# What it says ------------------------------------------------------------------------------------


def test_words_that_it_was_never_taught_are_said(tiny: Painter) -> None:
    case = Case(0, usual=True)
    with pytest.warns(MinpaintWarning, match="no words for: two, houses, 3;"):
        tiny(case.without, case.mask, "Two red houses, 3 a red lake", steps=1)


def test_it_has_a_word_for_all_in_its_world(tiny: Painter) -> None:
    for number in range(200):
        scene = world.scene(Random(number))
        words = world.caption(scene, scene.things, disc=True, sides=True)
        assert unknown_words(tiny.tokenizer, words) == []


# The checkpoint ----------------------------------------------------------------------------------


def test_pictures_survive_the_autoencoder(tiny: Painter) -> None:
    errors = []
    for number in range(16):
        pixels = to_unit(world.draw(world.scene(Random(HELD_OUT + 700_000 + number))))
        with torch.inference_mode():
            rebuilt = to_unit(to_image(tiny.vae.decode(tiny.vae.encode(2 * pixels - 1)[0])[0]))
        errors.append((rebuilt - pixels).square().mean())
    assert psnr(float(torch.stack(errors).mean())) >= 32


def test_diffusers_paints_the_same_picture(tiny: Painter) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(FOLDER, safety_checker=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    case = Case(0, usual=True)
    call = {"image": case.without, "mask_image": case.mask, "height": world.SIZE, "width": world.SIZE}
    call |= {"prompt": case.prompt, "num_inference_steps": 20, "guidance_scale": 7.5}
    [theirs] = pipeline(**call, generator=torch.Generator().manual_seed(3)).images
    latents = pipeline(**call, generator=torch.Generator().manual_seed(3), output_type="latent").images[0]
    [ours] = tiny(case.without, case.mask, case.prompt, steps=20, seed=3, profile="diffusers")
    assert relative_error(ours.latents, latents) <= 1e-4
    assert largest_level_difference(ours.image, theirs) <= 1


def test_the_checkpoint_is_small_and_in_half_precision() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 18_000_000
    from safetensors import safe_open

    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}


def test_every_word_of_the_toy_world_is_one_token() -> None:
    tokenizer = load_tokenizer(FOLDER / "tokenizer")
    words = {*world.COLOURS, *world.KINDS, *world.TIMES, *world.PLACES, "left", "right", "middle", "sun", "moon"}
    assert {word for word in words if len(tokenizer(word).input_ids) != 3} == set()


def test_the_training_is_on_record() -> None:
    lines = [json.loads(line) for line in (FOLDER / "training.jsonl").read_text().splitlines()]
    for training, term in (("vae", "pixels"), ("unet", "hole")):
        losses = [line[term] for line in lines if line["training"] == training]
        assert losses[-1] < 0.5 * losses[0]
        assert all(math.isfinite(loss) for loss in losses)


# The demo ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_runs_from_any_folder_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "minpaint-example.png").write_text("mine")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-m", "minpaint"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert "minpaint-example-2.png" in run.stderr
    assert "--prompt" in run.stderr  # what to try next
    assert (tmp_path / "minpaint-example.png").read_text() == "mine"
    with Image.open(tmp_path / "minpaint-example-2.png") as painting:
        assert painting.size == (world.SIZE, world.SIZE)
    with Image.open(tmp_path / "minpaint-example-2-strip.png") as strip:
        assert strip.width > 3 * world.SIZE
    assert len(list(tmp_path.iterdir())) == 3


def test_the_example_is_for_the_model(tiny: Painter) -> None:
    from minpaint.cli.demo import MASK, PICTURE, PROMPT

    Settings(PROMPT)
    with Image.open(PICTURE) as picture, Image.open(MASK) as mask:
        assert picture.size == mask.size == (world.SIZE, world.SIZE)
