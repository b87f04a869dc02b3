"""The measures of bench.quality see what they are made to see: tried on pictures of which the answer is known."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from PIL import Image

from bench import judges
from bench.quality import WHOLE, continued, cut_disc, cut_hills, disc_of
from bench.scenes import Case
from minpaint.picture.fill import membrane
from minpaint.picture.image import to_image, to_pixels, to_unit
from weights import world

NUMBERS = range(8)


def with_membrane(picture: Image.Image, mask: Image.Image) -> Image.Image:
    return to_image(membrane(to_pixels(picture), to_unit(mask)[0, 0] <= 0.5)[0])


@pytest.mark.parametrize("disc", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
def test_the_true_scene_has_no_error_and_a_membrane_its_own(number: int, disc: bool) -> None:
    scene, mask = (cut_disc if disc else cut_hills)(number)
    true = world.draw(scene)
    assert continued(true, scene, mask, disc)[0] == 0
    found, filled = continued(with_membrane(true, mask), scene, mask, disc)
    assert found == pytest.approx(filled, abs=0.5)  # it is rounded to levels
    assert filled > 1


@pytest.mark.parametrize("number", NUMBERS)
def test_a_bitten_sun_is_seen(number: int) -> None:
    scene, mask = cut_disc(number)
    bitten = Image.composite(world.draw(replace(scene, disc=None)), world.draw(scene), mask)
    assert continued(bitten, scene, mask, True)[0] > 2 * WHOLE
    hidden = to_unit(mask)[0, 0] > 0.5
    assert 0.25 <= float(hidden[disc_of(scene)].float().mean()) <= 0.75


def test_broken_hills_are_seen() -> None:
    """Hills that are moved by four pixels, well within the hole too, cost about what a membrane does."""
    errors = []
    for number in NUMBERS:
        scene, mask = cut_hills(number)
        moved = replace(scene, horizon=scene.horizon + 4 / world.SIZE)
        broken = Image.composite(world.draw(moved), world.draw(scene), mask)
        errors.append(continued(broken, scene, mask, False))
    assert sum(found for found, _ in errors) > 0.3 * sum(filled for _, filled in errors)


@pytest.mark.parametrize("answer", range(4))
def test_pictures_made_for_the_counter_differ_from_one_whole_thing_as_they_should(answer: int) -> None:
    for number in NUMBERS:
        picture, empty, mask = judges.made_example(Random(number), answer)
        kept = to_unit(mask) == 0
        assert bool((to_unit(picture) == to_unit(empty)).all(1, keepdim=True)[kept].all())
        differs = ((to_unit(picture) - to_unit(empty)).abs().amax(1, keepdim=True) * 255 > judges.VISIBLE).sum()
        assert int(differs) < 400 if answer == judges.NONE else int(differs) > 200  # hills a little moved, or a thing


def test_a_sun_that_the_hole_hides_may_be_left_out_or_moved_and_no_other() -> None:
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for number in range(400):
        rng = Random(number)
        scene, mask = world.scene(rng, things=0), world.hole_anywhere(rng)
        if scene.disc is None:
            continue
        hole = to_unit(mask)[0, 0] > 0.5
        hidden, touched = bool(hole[disc_of(scene)].all()), bool(hole[disc_of(scene)].any())
        if hidden or not touched:
            disc = judges._redone(rng, scene, mask).disc
            found[hidden].add("none" if disc is None else "as it was" if disc == scene.disc else "moved")
    assert found[False] == {"as it was"}
    assert found[True] == {"none", "as it was", "moved"}


def test_the_colour_of_a_thing_is_not_that_of_a_hidden_moon_beside_it() -> None:
    cases = [case for case in (Case(number, usual=False) for number in range(60)) if case.scene.time == "night"]
    hidden = [case for case in cases if judges.hides(case.mask, case.scene.disc)]
    assert len(hidden) > 3
    for case in hidden:
        for picture in (case.drawn(), case.sunless()):
            assert judges.colour_of(picture, case, case.target.kind) == case.target.colour


def test_a_hand_less_neat_changes_the_hole_a_little_and_nothing_else() -> None:
    torch.manual_seed(0)
    squares = torch.cat([judges.around_hole(*judges.made_example(Random(number), judges.ONE)) for number in NUMBERS])
    picture, empty, hole = judges.as_painted(squares).split((3, 3, 1), dim=1)
    assert torch.equal(torch.cat([empty, hole], dim=1), squares[:, 3:])
    changed = 255 * (picture - squares[:, :3]).abs()
    inside = hole.expand_as(changed) > 0.5
    assert not changed[~inside].any()
    for each, there in zip(changed, inside, strict=True):
        assert 0.1 < float(each[there].mean()) < 20


@pytest.mark.slow
def test_the_counter_learns_to_count() -> None:
    """A short training already tells most apart; that of the bench is 24 times as long."""
    _, accuracy = judges.train_counter(800, 4)
    assert accuracy > 0.6  # always answering "one" gives 0.4
