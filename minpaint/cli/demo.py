"""No verb: repaint the bundled example with the tiny model, which takes seconds and no network."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from minpaint.checkpoint.hub import weights_folder
from minpaint.cli import paint
from minpaint.cli.options import parse
from minpaint.cli.terminal import Note
from minpaint.picture.image import open_image, strip
from minpaint.picture.saving import save

WHAT_NEXT = """\
Try another prompt; the toy model knows a house, tree, boat, balloon, cloud and tower in eight colours:

  python -m minpaint paint --image {picture} --mask {mask} \\
      --prompt "a purple tree at night" -o tree.png

Your own photo, with Stable Diffusion 1.5 inpainting (2.1 GB, fetched once):

  python -m minpaint paint --model sd15 --image photo.png --mask mask.png \\
      --prompt "two dogs on a bench" -o out.png"""


class Example(NamedTuple):
    """Files of a picture and a mask, the prompt, and the command line options that suit them."""

    picture: Path
    mask: Path
    prompt: str
    options: list[str]


def bundled() -> Example:
    """The example that comes with the tiny model."""
    folder = weights_folder() / "example"
    told = json.loads((folder / "example.json").read_text(encoding="utf-8"))
    return Example(folder / "picture.png", folder / "mask.png", told["prompt"], told["options"])


def run(options: Namespace, note: Note) -> None:
    """Repaint the example into the current folder, with a strip of before, mask and after beside it."""
    example = bundled()
    target = _unused(Path("minpaint-example.png"))
    beside = target.with_name(f"{target.stem}-strip.png")
    files = ["--image", str(example.picture), "--mask", str(example.mask), "-o", str(target)]
    painting = parse(["paint", *files, "--prompt", example.prompt, "--model", "tiny", *example.options])
    painting.started = options.started
    paint.run(painting, note)
    save(strip([open_image(file) for file in (example.picture, example.mask, target)]), None, None, beside)
    what_next = WHAT_NEXT.format(picture=example.picture, mask=example.mask)
    note(f"wrote {beside} (before, mask, after)\n\n{what_next}")


def _unused(path: Path) -> Path:
    """The path, or the first numbered one like it, such that neither it nor its strip exists."""
    for number in itertools.count(1):
        found = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not found.exists() and not found.with_name(f"{found.stem}-strip.png").exists():
            return found
    raise AssertionError
