"""Write the bundled example: a picture of the toy world and a mask over its house.

python -m weights.make_example
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from weights import world

FOLDER = Path(__file__).parent / "example"
SCENE = world.Scene(
    time="day",
    place="meadow",
    horizon=0.56,
    disc=(0.78, 0.2),
    waves=((0.045, 0.9, 0.1), (0.035, 1.3, 0.55), (0.03, 0.8, 0.3)),
    things=(
        world.Thing("balloon", "pink", x=0.25, y=0.44, scale=0.95, shape=0.6),
        world.Thing("house", "blue", x=0.6, y=0.86, scale=1.0, shape=0.5),
    ),
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    world.draw(SCENE).save(FOLDER / "picture.png", optimize=True)
    world.hole_over(Random(2), SCENE.things[1]).save(FOLDER / "mask.png", optimize=True)


if __name__ == "__main__":
    main()
