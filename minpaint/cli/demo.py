"""No verb: repaint the bundled example with the tiny model, which takes seconds and no network."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from minpaint.checkpoint.hub import weights_folder
from minpaint.checkpoint.tokenizer import TOY_WORLD
from minpaint.cli.options import Note, parse
from minpaint.cli.paint import paint
from minpaint.picture.image import open_image, strip
from minpaint.picture.saving import save

PICTURE, MASK = (weights_folder() / "example" / name for name in ("picture.png", "mask.png"))
PROMPT = "a red tower in a meadow by day"
WHAT_NEXT = f"""\
Try another prompt; the toy model knows {TOY_WORLD}:

  python -m minpaint paint --image {PICTURE} --mask {MASK} --prompt "a purple tree at night" -o tree.png

Your own photo, with Stable Diffusion 1.5 inpainting (2.1 GB, fetched once):

  python -m minpaint paint --model sd15 --image photo.png --mask mask.png --prompt "two dogs on a bench" -o out.png"""


def demo(options: Namespace, note: Note) -> None:
    """Repaint the example into the current folder, with a strip of before, mask and after beside it."""
    name, number = "minpaint-example", 1
    while Path(f"{name}.png").exists() or Path(f"{name}-strip.png").exists():
        number += 1
        name = f"minpaint-example-{number}"
    target, beside = Path(f"{name}.png"), Path(f"{name}-strip.png")
    files = ["--image", str(PICTURE), "--mask", str(MASK), "-o", str(target)]
    painting = parse(["paint", *files, "--prompt", PROMPT, "--model", "tiny", "--steps", "20"])
    painting.started = options.started
    note(f"painting the bundled example: {PROMPT}")
    paint(painting, note)
    save(strip([open_image(file) for file in (PICTURE, MASK, target)]), None, None, beside)
    note(f"wrote {beside} (before, mask, after)\n\n{WHAT_NEXT}")
