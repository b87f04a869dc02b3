"""The safety checker beside diffusers' own on random weights, and what `--safety` does with its verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from minpaint.checkpoint.load import open_safety_checker
from minpaint.checkpoint.safety import SafetyChecker
from minpaint.cli.main import main
from minpaint.errors import CheckpointError, InputError

Folders = Callable[[str], Path]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.fixture
def reference() -> StableDiffusionSafetyChecker:
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=16)).eval()
    for name in ("concept", "special_care"):
        getattr(checker, f"{name}_embeds").data.normal_()
        getattr(checker, f"{name}_embeds_weights").data.uniform_(0.2, 0.5)
    return checker


def put(checker: StableDiffusionSafetyChecker, folder: Path) -> Path:
    checker.save_pretrained(folder / "safety_checker")
    return folder


@pytest.fixture
def model(copy: Folders, reference: StableDiffusionSafetyChecker) -> Path:
    return put(reference, copy("small-sd1"))


def loaded(model: Path) -> SafetyChecker:
    checker = open_safety_checker(model)
    checker.load()
    return checker


@pytest.mark.parametrize("care", [None, -2.0, 2.0], ids=["by chance", "always special care", "never"])
@pytest.mark.parametrize("size", [(56, 56), (100, 75), (75, 100), (513, 300), (31, 97), (5, 4), (33, 700)])
def test_scores_equal_the_reference(
    reference: StableDiffusionSafetyChecker, tmp_path: Path, size: tuple[int, int], care: float | None
) -> None:
    if care is not None:
        reference.special_care_embeds_weights.data.fill_(care)
    checker = loaded(put(reference, tmp_path))
    for seed in range(8):
        picture = make_picture(*size, seed=seed)
        processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        pixels = torch.as_tensor(processor(picture)["pixel_values"][0])[None]
        with torch.no_grad():
            vector = reference.visual_projection(reference.vision_model(pixels)[1])
            expected = cosine_distance(vector, reference.concept_embeds)[0] - reference.concept_embeds_weights
            special = cosine_distance(vector, reference.special_care_embeds)[0] - reference.special_care_embeds_weights
            _, [flagged] = reference(pixels, torch.ones(1, 2, 2, 3).numpy())
        found = checker.check(picture)
        expected = expected + (0.01 if (special > 0.0005).any() else 0.0)
        assert torch.tensor(found.scores) == pytest.approx(expected, abs=1e-4)
        assert found.flagged == flagged


def paint(model: Path, folder: Path, *more: str) -> list[str]:
    make_picture().save(folder / "photo.png")
    make_mask().save(folder / "mask.png")
    files = {"model": model, "image": folder / "photo.png", "mask": folder / "mask.png", "prompt": "x", "steps": 2}
    options = [f"--{name}={value}" for name, value in files.items()]
    return ["paint", *options, "-o", str(folder / "out.png"), *more]


def threshold(model: Path, value: float) -> None:
    path = model / "safety_checker" / "model.safetensors"
    tensors = load_file(path)
    tensors["concept_embeds_weights"].fill_(value)
    tensors["special_care_embeds_weights"].fill_(2.0)
    save_file(tensors, path)


@pytest.mark.parametrize("way", ["--safety", "--safety=refuse"])
def test_a_flagged_painting_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    threshold(model, -2.0)  # below every cosine
    assert main(paint(model, tmp_path, way, "--quiet", "--json", "--seed", "5")) == 4
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(
        "minpaint: error: the checkpoint's safety checker flags the painting with seed 5, and nothing"
    )
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"photo.png", "mask.png"}
    assert not (tmp_path / "out.png").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_flagged_painting_is_written_and_reported_if_told_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threshold(model, -2.0)
    assert main(paint(model, tmp_path, "--safety=report", "--json", "--count", "2")) == 0
    out, err = capsys.readouterr()
    assert err.count("note: the checkpoint's safety checker flags the painting with seed") == 2
    assert all(output["safety"]["flagged"] for output in json.loads(out)["outputs"])
    assert (tmp_path / "out-0.png").exists()


def test_a_painting_that_is_not_flagged_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threshold(model, 2.0)
    assert main(paint(model, tmp_path, "--safety", "--json")) == 0
    [output] = json.loads(capsys.readouterr().out)["outputs"]
    assert output["safety"]["flagged"] is False
    assert len(output["safety"]["scores"]) == 17
    before = (tmp_path / "out.png").read_bytes()
    assert main(paint(model, tmp_path, "--overwrite")) == 0  # by default nothing looks at it
    assert (tmp_path / "out.png").read_bytes() == before


def test_a_model_without_a_checker_is_refused_before_anything_is_painted(
    checkpoint: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(paint(checkpoint("small-sd1"), tmp_path, "--safety", "--quiet")) == 2
    assert "safety: no model.safetensors in" in capsys.readouterr().err
    with pytest.raises(InputError, match="name a model that has one, or leave out --safety"):
        open_safety_checker("tiny")


def test_a_budget_that_cannot_hold_the_checker_is_refused_before_anything_is_painted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(paint(model, tmp_path, "--safety", "--quiet", "--budget", "100MiB")) == 3
    assert "budget 100 MiB cannot hold the safety checker: that needs" in capsys.readouterr().err


def _vision(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["vision_config"].update(values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: config.pop("vision_config"), "vision_config is missing"),
        (_vision(num_hidden_layers=1_048_576), "num_hidden_layers 1048576 is not supported"),
        (_vision(hidden_size="32"), "hidden_size '32' is not supported"),
        (_vision(num_attention_heads=5), "num_attention_heads 5 is not supported .*must divide hidden_size"),
        (_vision(hidden_act="none"), "hidden_act 'none' is not supported"),
        (_vision(intermediate_size=65), "tensors do not fit the configuration beside it"),
    ],
)
def test_a_damaged_configuration_is_refused(model: Path, change: Any, told: str) -> None:
    path = model / "safety_checker" / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=told):
        open_safety_checker(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("concept_embeds"),
        lambda tensors: tensors.update(more=torch.ones(3)),
        lambda tensors: tensors.update(concept_embeds=torch.ones(17, 3)),
        lambda tensors: tensors.update(concept_embeds=torch.ones(17, 16, dtype=torch.int32)),
        lambda tensors: tensors.update(concept_embeds=torch.tensor(1.0)),
    ],
)
def test_weights_that_do_not_fit_are_refused(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = model / "safety_checker" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="tensors do not fit the configuration beside it"):
        open_safety_checker(model)


@pytest.mark.parametrize("key", ["concept_embeds", "concept_embeds_weights", "visual_projection.weight"])
def test_a_checker_that_could_flag_nothing_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = model / "safety_checker" / "model.safetensors"
    tensors = load_file(path)
    tensors[key].fill_(float("nan"))
    save_file(tensors, path)
    assert main(paint(model, tmp_path, "--safety", "--quiet")) == 2
    assert f"{key} holds NaN or infinity; fetch it again" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_the_middle_square_has_its_size_in_every_shape_of_picture(
    reference: StableDiffusionSafetyChecker, tmp_path: Path
) -> None:
    checker = loaded(put(reference, tmp_path))
    for side in range(1, 400):
        assert checker._pixels(make_picture(side, side + 7)).shape == (1, 3, 56, 56)
        assert (checker._pixels(Image.new("RGB", (side, side + 7), "white")) > 1).all()  # nothing black at an edge
