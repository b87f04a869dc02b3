"""The seam: what its measure sees, and what colour matching does to it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_mask, make_picture
from PIL import Image, ImageDraw

from minpaint.picture.seam import SHIFT, match_colour, seam_error


def test_a_picture_without_an_edge_at_the_hole_has_no_seam() -> None:
    assert seam_error(Image.linear_gradient("L").resize((64, 64)), make_mask()) < 0.1
    assert seam_error(Image.new("RGB", (64, 64), "teal"), make_mask()) == 0


@pytest.mark.parametrize("step", [2, 10, 60])
def test_a_step_at_the_hole_is_measured_in_levels(step: int) -> None:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    picture = Image.composite(Image.new("L", (64, 64), 100 + step), Image.new("L", (64, 64), 100), mask)
    assert seam_error(picture, mask) == pytest.approx(step, rel=0.1)


def test_an_edge_that_is_everywhere_is_no_seam() -> None:
    picture = make_picture()
    errors = []
    for seed in range(50):  # of grain of 80 levels it sees 2.7 on average, and 12.1 at most
        grain = 128 + 80 * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        noisy = Image.frombytes("L", (64, 64), bytes(grain.clamp(0, 255).byte().flatten().tolist()))
        errors.append(seam_error(noisy.convert("RGB"), make_mask()))
    assert sum(errors) / len(errors) < 0.05 * 80
    assert max(errors) < 0.2 * 80
    stepped = Image.composite(picture.point(lambda v: min(v + 40, 255)), picture, make_mask())
    assert seam_error(stepped, make_mask()) > seam_error(picture, make_mask()) + 10


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 3), (4, 4), (50, 2)])
@pytest.mark.parametrize("level", [0, 255])
def test_tiny_pictures_and_holes_without_an_edge_have_none(size: tuple[int, int], level: int) -> None:
    assert seam_error(make_picture(*size), Image.new("L", size, level)) == 0.0


def test_matching_takes_out_a_smooth_shift_and_leaves_what_was_painted() -> None:
    original = torch.rand(3, 48, 48) * 0.5
    kept = torch.ones(48, 48, dtype=torch.bool)
    kept[12:36, 12:36] = False
    new = original.clone()
    new[:, 20:28, 20:28] = 0.9  # what was asked for, away from the edge
    tint = 0.2 * torch.linspace(-1, 1, 48)
    matched = match_colour(new + tint, original, kept)
    assert float((matched - new).abs().max()) < 0.01


def test_an_object_cut_by_the_edge_does_not_tint_the_hole() -> None:
    original, painted = torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)
    kept = torch.ones(64, 64, dtype=torch.bool)
    kept[16:48, 16:48] = False
    original[0, :, :16] = 1.0  # which the painting does not continue
    matched = match_colour(painted, original, kept)
    assert float(matched[0, 24:40, 16].min()) > 0.5  # no step where they meet
    assert float(matched[0, 16:48, 30:48].max()) < SHIFT
    assert float(matched[1:].abs().max()) == 0


def test_with_nothing_kept_there_is_nothing_to_match() -> None:
    painted = torch.rand(3, 9, 9)
    assert torch.equal(match_colour(painted, torch.rand(3, 9, 9), torch.zeros(9, 9, dtype=torch.bool)), painted)
