"""The bundled example: a picture, a mask and a prompt that the tiny model paints in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minpaint.hub import weights_folder
from minpaint.image import ImageSource, open_image

GAP = 4  # pixels between the pictures of a strip


@dataclass(frozen=True)
class Example:
    """Files of a picture and a mask, the prompt, and the command line options that suit them."""

    picture: Path
    mask: Path
    prompt: str
    options: list[str]


def bundled() -> Example:
    """The example that comes with the tiny model; it is painted with no network at all."""
    folder = weights_folder() / "example"
    told = json.loads((folder / "example.json").read_text(encoding="utf-8"))
    return Example(folder / "picture.png", folder / "mask.png", told["prompt"], told["options"])


def strip(*sources: ImageSource) -> Image.Image:
    """Pictures of one size side by side, RGB."""
    pictures = [open_image(source).convert("RGB") for source in sources]
    width, height = pictures[0].size
    joined = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for number, picture in enumerate(pictures):
        joined.paste(picture, (number * (width + GAP), 0))
    return joined
