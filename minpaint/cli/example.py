"""The bundled example: a picture, a mask and a prompt that the tiny model paints in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from minpaint.checkpoint.hub import weights_folder


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
