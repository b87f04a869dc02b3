"""Render the README's pictures with the tiny model: python -m bench.pictures"""

from __future__ import annotations

import torch
from PIL import Image, ImageChops

import minpaint
from bench.common import RESULTS
from minpaint.cli.demo import MASK, PICTURE, PROMPT
from minpaint.picture.explain import stages
from minpaint.picture.frame import open_frame
from minpaint.picture.image import open_image, strip, to_image
from minpaint.settings import Settings

PROMPTS = ("a red tower", "a purple tree", "an orange house", "a yellow boat", "a meadow by day")
SHOWN = (0, 4, 9, 14, 19)  # of 20 steps
ZOOM = 2
AMPLIFIED = 8


def save(picture: Image.Image, name: str) -> None:
    size = (ZOOM * picture.width, ZOOM * picture.height)
    picture.resize(size, Image.Resampling.BICUBIC).save(RESULTS / name, optimize=True)


def main() -> None:
    painter = minpaint.load("tiny", device="cpu", dtype="fp32")
    image, mask = open_image(PICTURE), open_image(MASK)
    paintings = [painter(image, mask, prompt, sampler="ddim", steps=20)[0].image for prompt in PROMPTS]
    save(strip([image, mask, *paintings]), "prompts.png")
    guesses = []
    for step in painter.steps(image, mask, PROMPT, sampler="ddim", steps=20):
        if step.i in SHOWN:
            with torch.inference_mode():
                guesses.append(to_image(painter.vae.decode(step.x0 / painter.vae_config.scaling_factor)[0]))
    save(strip([image, mask, *guesses]), "steps.png")

    settings = Settings("a red tower", sampler="ddim", steps=20, feather=4)
    frame = open_frame(image, mask, settings)
    [view] = painter.views(frame, settings)
    seen = stages(frame, view)
    [painting] = painter.paint(frame, settings)
    difference = ImageChops.difference(image, painting.image).point(lambda level: min(AMPLIFIED * level, 255))
    shown = {name: seen[name] for name in ("mask", "latent cells", "network sees", "cover")}
    shown |= {"before": image, "after": painting.image, f"difference x{AMPLIFIED}": difference}
    save(strip([*shown.values()], [*shown]), "stages.png")


if __name__ == "__main__":
    main()
