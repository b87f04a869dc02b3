"""Scheduler files as people have them: which sampler they are run with, what is said of it, and what is refused.

data/configurations.json holds configurations of public repositories, each with the repository it was read from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import configure, latents, load
from PIL import Image

import minpaint
from minpaint.checkpoint.configs import text_config, unet_config, vae_config
from minpaint.checkpoint.scheduler import scheduler_config
from minpaint.errors import CheckpointError, InputError, MinpaintWarning
from minpaint.painter import Painter
from minpaint.samplers import SAMPLERS
from minpaint.schedule import make_schedule
from minpaint.settings import Settings
from weights.random_checkpoint import SCHEDULER

CORPUS = json.loads((Path(__file__).parent / "data" / "configurations.json").read_text(encoding="utf-8"))
OURS = {"DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"}
FLAX = {"FlaxDDIMScheduler", "FlaxPNDMScheduler"}


def corpus(kind: str, *families: str) -> list[dict[str, Any]]:
    return [entry for entry in CORPUS if entry["kind"] == kind and entry["family"] in (families or ("sd1", "sd2"))]


def own_sampler(content: dict[str, Any], steps: int = 20) -> str:
    """The sampler that a file is run with; CheckpointError if it cannot be."""
    config = scheduler_config(content)
    make_schedule(config, config.sampler, steps)
    return config.sampler


def test_schedulers_of_public_repositories_open() -> None:
    schedulers = corpus("scheduler")
    assert len(schedulers) >= 30
    assert all(make_schedule(scheduler_config(entry["content"]), "ddim", 20).timesteps for entry in schedulers)
    failed = []
    for entry in schedulers:
        try:
            own_sampler(entry["content"])
        except CheckpointError as error:
            failed.append(f"{entry['repository']}: {error}")
    assert len(failed) <= 0.05 * len(schedulers), failed


def test_substitutions_of_public_schedulers_are_said(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    painter = load(checkpoint("small-sd1"))
    classes = set()
    for entry in corpus("scheduler"):
        painter.scheduler_config = config = scheduler_config(entry["content"])
        if config.named not in config.refused:
            told = painter.ignored(Settings("a dog"))
            nearest = [line for line in told if line.startswith(f"{config.class_name} is none of the samplers here; ")]
            assert len(nearest) == (config.class_name not in OURS | FLAX), entry
            classes.add(config.class_name)
    assert len(classes) >= 10


@pytest.mark.parametrize(("kind", "read"), [("unet", unet_config), ("vae", vae_config), ("text_encoder", text_config)])
def test_other_configurations_of_public_repositories_open(kind: str, read: Callable[[Any], object]) -> None:
    entries = corpus(kind)
    assert len(entries) >= 5
    depth = [entry for entry in entries if entry["content"].get("in_channels") == 5]  # which paints no holes
    for entry in entries:
        if entry not in depth:
            read(entry["content"])
    for entry in [*depth, *(corpus("unet", "other") if kind == "unet" else ())]:
        with pytest.raises(CheckpointError):
            read(entry["content"])


def test_model_indices_of_public_repositories_name_schedulers_that_open() -> None:
    entries = corpus("model_index")
    assert len(entries) >= 5
    for entry in entries:
        assert own_sampler(SCHEDULER | {"_class_name": entry["content"]["scheduler"][1]}) in SAMPLERS


# ---- one file for all: what is asked of samplers ----

REALISTIC = SCHEDULER | {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}
NEAREST = {
    **dict.fromkeys(
        ("DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"), ("dpmpp", 0)
    ),
    **dict.fromkeys(("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"), ("ddim", 0)),
    **dict.fromkeys(("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), ("ddim", 1)),
}


@pytest.mark.parametrize("name", NEAREST)
def test_another_class_takes_the_nearest_sampler_and_says_so(
    name: str, broken: Path, painter: Callable[[str], Painter], picture: Image.Image, mask: Image.Image
) -> None:
    """The fixture `broken` is a copy of small-sd1-4ch."""
    configure(broken, "scheduler", _class_name=name)
    sampler, eta = NEAREST[name]
    with pytest.warns(MinpaintWarning, match=f"^{name} is none of the samplers here; {sampler}.* comes nearest"):
        found = latents(load(broken), picture, mask)
    assert torch.equal(found, latents(painter("small-sd1-4ch"), picture, mask, sampler=sampler, eta=eta))
    options = {"sampler": "ddim", "eta": 0.0}
    chosen = latents(load(broken), picture, mask, **options)
    assert torch.equal(chosen, latents(painter("small-sd1-4ch"), picture, mask, **options))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "Nonsense"])
def test_a_class_that_nothing_is_near_needs_a_sampler(
    name: str, broken: Path, painter: Callable[[str], Painter], picture: Image.Image, mask: Image.Image
) -> None:
    configure(broken, "scheduler", _class_name=name, use_karras_sigmas=True, interpolation_type="linear")
    stranger = load(broken)
    known = latents(painter("small-sd1-4ch"), picture, mask, sampler="ddim")
    with pytest.warns(MinpaintWarning, match=r"ddim takes no notice of use_karras_sigmas True, interpolation_type"):
        assert torch.equal(latents(stranger, picture, mask, sampler="ddim"), known)
    with pytest.raises(minpaint.CheckpointError, match=rf"_class_name '{name}'") as caught:
        latents(stranger, picture, mask)
    assert len(str(caught.value).splitlines()) == 1


REFUSED = [
    *(("DDIMScheduler", {"thresholding": True}), ("LCMScheduler", {"thresholding": True})),
    ("LCMScheduler", {"timestep_scaling": 5.0}),
    ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "euler"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "half"}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}),
    ("DPMSolverMultistepScheduler", {"solver_type": "none"}),
    *(("DPMSolverMultistepScheduler", {f"use_{kind}": True}) for kind in ("beta_sigmas", "lu_lambdas", "flow_sigmas")),
]


@pytest.mark.parametrize(("name", "settings"), REFUSED, ids=[f"{name} {settings}" for name, settings in REFUSED])
def test_what_the_named_sampler_cannot_do_is_refused_until_one_is_chosen(name: str, settings: dict[str, Any]) -> None:
    content, [(key, value)] = SCHEDULER | {"_class_name": name, **settings}, settings.items()
    with pytest.raises(CheckpointError, match=f"{key} {value!r} is not supported .*choose a sampler"):
        own_sampler(content)
    for sampler in SAMPLERS:
        make_schedule(scheduler_config(content), sampler, 20)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}),
        ("DDIMScheduler", {"interpolation_type": "linear", "variance_type": "fixed_small"}),
        ("PNDMScheduler", {"solver_type": "bh2", "solver_order": 2, "original_inference_steps": 50}),
        ("DDIMScheduler", {"a_key_of_the_future": 1, "use_karras_sigmas": True, "thresholding": None}),
    ],
)
def test_settings_without_effect_are_said_and_ignored(name: str, settings: dict[str, Any]) -> None:
    plain, config = (scheduler_config(SCHEDULER | {"_class_name": name} | more) for more in ({}, settings))
    sampler = config.sampler
    assert make_schedule(config, sampler, 20) == make_schedule(plain, sampler, 20)
    assert sampler not in plain.ignored
    assert all(f"{key} {value!r}" in config.ignored[sampler] for key, value in settings.items() if value is not None)


def test_official_files_say_nothing_with_any_sampler() -> None:
    for name in ("DDIMScheduler", "PNDMScheduler"):
        assert not scheduler_config(SCHEDULER | {"_class_name": name}).ignored


def test_a_zero_signal_needs_v_prediction_and_another_sampler_than_pndm() -> None:
    zero = SCHEDULER | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(CheckpointError, match=r"rescale_betas_zero_snr True .* \(only with v_prediction\)"):
        scheduler_config(zero)
    config = scheduler_config(zero | {"prediction_type": "v_prediction"})
    schedule = make_schedule(config, "ddim", 10)
    assert schedule.level(schedule.timesteps[0]) == 0
    with pytest.raises(CheckpointError, match="not supported by pndm; choose another sampler"):
        make_schedule(config, "pndm", 10)


def test_steps_and_eta_follow_the_sampler(painter: Callable[[str], Painter], broken: Path) -> None:
    known = painter("small-sd1-4ch")
    for sampler, steps in ((None, 50), ("ddim", 50), ("dpmpp", 50), ("lcm", 4)):
        settings = known.complete(Settings("a dog", sampler=sampler))
        assert (settings.steps, settings.eta) == (steps, 0.0)
    assert known.complete(Settings("", sampler="lcm", steps=7, eta=0.5)) == Settings(
        "", sampler="lcm", steps=7, eta=0.5
    )
    configure(broken, "scheduler", _class_name="EulerAncestralDiscreteScheduler")
    assert load(broken).complete(Settings("")).eta == 1.0
    assert load(broken).complete(Settings("", sampler="ddim")).eta == 0.0
    configure(broken, "scheduler", _class_name="LCMScheduler")
    assert load(broken).complete(Settings("")).steps == 4


def test_guidance_that_burns_is_said(
    painter: Callable[[str], Painter], picture: Image.Image, mask: Image.Image
) -> None:
    with pytest.warns(MinpaintWarning, match="guidance 7.5 is much for lcm"):
        latents(painter("small-sd1"), picture, mask, sampler="lcm", guidance=7.5)


def test_more_steps_than_a_consistency_model_was_trained_at_are_refused() -> None:
    config = scheduler_config(SCHEDULER | {"_class_name": "LCMScheduler", "original_inference_steps": 20})
    assert len(make_schedule(config, "lcm", 20).timesteps) == 20
    with pytest.raises(InputError, match="steps 21 is more than the 20 that lcm can place"):
        make_schedule(config, "lcm", 21)


def test_few_steps_without_noise_are_refused() -> None:
    schedule = make_schedule(scheduler_config(SCHEDULER), "lcm", 2)
    with pytest.raises(InputError, match="lcm adds noise between its steps"):
        list(SAMPLERS["lcm"](lambda x, t: x, torch.ones(1, 4, 2, 2), schedule))
