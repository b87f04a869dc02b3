"""The toy world: what the tiny model is trained and judged on."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from PIL import ImageChops

from minpaint.picture.image import to_unit
from weights import world


def scenes(count: int) -> list[world.Scene]:
    return [world.scene(Random(seed)) for seed in range(count)]


def test_a_seed_is_a_scene() -> None:
    first, second = (world.scene(Random(7)) for _ in range(2))
    assert first == second
    assert world.draw(first).tobytes() == world.draw(second).tobytes()
    assert world.scene(Random(8)) != first


def test_pictures_come_in_any_size_and_show_the_same_scene() -> None:
    scene = world.scene(Random(1))
    small, large = world.draw(scene), world.draw(scene, 256)
    assert (small.size, large.size) == ((128, 128), (256, 256))
    difference = (to_unit(large.reduce(2)) - to_unit(small)).abs().mean()
    assert float(difference) < 0.01


def test_things_stand_apart_and_inside_the_picture() -> None:
    for scene in scenes(200):
        for n, thing in enumerate(scene.things):
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
            assert all(world.apart(thing.box, other.box) for other in scene.things[n + 1 :])


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_thing_is_drawn_in_its_box_and_nowhere_else(kind: str) -> None:
    rng = Random(3)
    empty = replace(world.scene(rng), things=())
    thing = world.thing(rng, empty, kind, usual=True, colour="red")
    changed = ImageChops.difference(world.draw(empty), world.draw(replace(empty, things=(thing,)))).getbbox()
    assert changed is not None
    for edge, limit in zip(changed, thing.box, strict=True):
        assert abs(edge / world.SIZE - limit) < 0.04


def test_an_unlikely_thing_is_far_from_where_it_belongs() -> None:
    rng = Random(0)
    for scene in scenes(20):
        for kind in world.KINDS:
            feet = [world.thing(rng, scene, kind, usual=True).y for _ in range(20)]
            found = world.unlikely(rng, scene, kind)
            assert found.y < min(feet) - 0.15 or found.y > max(feet) + 0.15


def test_captions_say_what_they_are_asked_to() -> None:
    scene = world.Scene("night", "lake", 0.6, (0.5, 0.2), ((0.03, 1.0, 0.0),) * 3, ())
    house = world.Thing("house", "orange", 0.2, 0.95, 1.0, 0.0)
    boat = world.Thing("boat", "blue", 0.5, 0.8, 1.0, 0.0)
    told = world.caption(scene, [house, boat], disc=True, sides=True)
    assert told == "an orange house on the left and a blue boat in the middle by a lake at night under the moon"
    assert world.caption(scene, [boat], place=False, time=False) == "a blue boat"
    assert world.caption(scene) == "a lake at night"
    assert world.caption(replace(scene, time="day", place="meadow"), [house]) == "an orange house in a meadow by day"


def test_a_hole_hides_its_thing_and_its_size_does_not_tell_which() -> None:
    rng = Random(0)
    areas: dict[str, list[float]] = {kind: [] for kind in world.KINDS}
    hidden: list[float] = []
    empty = replace(world.scene(rng), things=())
    for n in range(600):
        kind = world.KINDS[n % 6]
        thing = world.thing(rng, empty, kind, usual=True)
        hole = to_unit(world.hole_over(rng, thing))[0, 0]
        left, top, right, bottom = (round(world.SIZE * edge) for edge in thing.box)
        hidden.append(float(hole[top:bottom, left:right].mean()))
        areas[kind].append(float(hole.sum()))
    assert sum(hidden) / len(hidden) > 0.9
    means = [sum(values) / len(values) for values in areas.values()]
    assert max(means) < 1.25 * min(means)


def test_most_holes_beside_a_sun_or_moon_cut_it() -> None:
    """Of holes anywhere 12 % do, of these 92 %."""
    cut = []
    for seed in range(300):
        rng = Random(seed)
        if disc := world.scene(rng).disc:
            x, y = (round(world.SIZE * v) for v in disc)
            hidden = to_unit(world.hole_beside(rng, disc))[0, 0][y - 5 : y + 6, x - 5 : x + 6].mean()
            cut.append(0.02 < float(hidden) < 0.98)
    assert sum(cut) > 0.75 * len(cut)


def test_what_a_hole_over_the_ground_leaves_does_not_tell_meadow_from_lake() -> None:
    for seed in range(40):
        rng = Random(seed)
        scene = world.scene(rng, things=0)
        meadow, lake = (world.draw(replace(scene, place=place)) for place in world.PLACES)
        different = ImageChops.difference(meadow, lake)
        assert different.getbbox()
        different.paste(0, mask=world.hole_over_ground(rng, scene))
        assert not different.getbbox()


def test_holes_elsewhere_come_in_all_sizes() -> None:
    shares = [float(to_unit(world.hole_anywhere(Random(seed))).mean()) for seed in range(200)]
    assert min(shares) < 0.05
    assert max(shares) > 0.5
