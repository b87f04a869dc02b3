"""Are kept pixels kept, and does the seam show? Beside diffusers, on the tiny model.

    python -m bench.seams                 # 100 held-out scenes, some 15 minutes on two cores
    python -m bench.seams --scenes 4      # to see that it works

Both sides have the same checkpoint, seeds, sampler (DDIM) and steps. "diffusers" is what its
pipeline returns; "pasted" is that with its own paste-back (VaeImageProcessor.apply_overlay).

seam error: seam.seam_error of the painted picture, in 8-bit levels. The control is the scene as
    its renderer draws it, which has no seam.
five rounds: five holes are painted one after the other, each into the result of the one before.
    Only the pixels outside all five holes are compared.
strokes: scratches of 1 to 7 pixels' width, in a loud colour, under a mask of the same shape. A
    stroke counts as painted if all latent cells that it touches are. What it leaves behind is the
    mean difference, in its pixels, from the scene without the scratch.

The table goes to stdout and to bench/results/seams.md, one JSON line to bench/results/.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from bench import common
from bench.scenes import HELD_OUT, Case, tiny
from minpaint.checkpoint.hub import weights_folder
from minpaint.picture.frame import open_frame
from minpaint.picture.image import to_unit
from minpaint.picture.seam import seam_error
from minpaint.settings import Settings
from weights import world

STEPS = 20
EDITS = 5
LOUD = (255, 0, 255)
TABLE = """\
| | minpaint | diffusers | diffusers, pasted back | control |
| --- | --- | --- | --- | --- |
| kept pixels changed | {edit[changed, ours]:.1%} | {edit[changed, diffusers]:.1%} | {edit[changed, pasted]:.1%} | |
| seam error, levels | {edit[seam, ours]:.2f} | {edit[seam, diffusers]:.2f} | {edit[seam, pasted]:.2f} \
| no colour match: {edit[seam, plain]:.2f}; true scene: {edit[seam, true]:.2f} |
| five rounds: untouched pixels changed | {rounds[changed, ours]:.1%} | {rounds[changed, diffusers]:.1%} \
| {rounds[changed, pasted]:.1%} | |
| five rounds: their error, levels | {rounds[levels, ours]:.2f} | {rounds[levels, diffusers]:.2f} \
| {rounds[levels, pasted]:.2f} | |
| strokes under 8 px painted | {strokes[painted, ours]:.1%} | | {strokes[painted, pasted]:.1%} | |
| what a stroke leaves behind, levels | {strokes[left, ours]:.1f} | | {strokes[left, pasted]:.1f} \
| the scratch itself: {strokes[left, scratch]:.1f} |
"""


@cache
def pipeline() -> Any:
    return common.load_pipe(weights_folder() / "tiny", torch.float32, half=False)


def ours(picture: Image.Image, mask: Image.Image, prompt: str, seed: int, **options: Any) -> Image.Image:
    [painting] = tiny()(picture, mask, prompt, seed=seed, sampler="ddim", steps=STEPS, **options)
    return painting.image


def theirs(picture: Image.Image, mask: Image.Image, prompt: str, seed: int) -> tuple[Image.Image, Image.Image]:
    """What diffusers paints, and the same with its own paste-back."""
    pipe = pipeline()
    generator = torch.Generator().manual_seed(seed)
    call = {"height": picture.height, "width": picture.width, "num_inference_steps": STEPS, "generator": generator}
    painted = pipe(prompt, picture, mask, **call).images[0]
    return painted, pipe.image_processor.apply_overlay(mask, picture, painted)


def kept(mask: Image.Image) -> Tensor:
    return to_unit(mask.convert("L"))[0, 0] < 0.5


def changed(before: Image.Image, after: Image.Image, where: Tensor) -> tuple[float, float]:
    """Share of pixels changed, and the mean difference in levels, among those of `where`."""
    difference = (to_unit(before.convert("RGB")) - to_unit(after.convert("RGB")))[0].abs()[:, where]
    return float((difference.amax(0) > 0).float().mean()), 255 * float(difference.mean())


def one_edit(number: int) -> dict[str, float]:
    case = Case(number, usual=True)
    call = case.without, case.mask, case.prompt, number
    hole = case.mask.convert("L").point(lambda level: 255 * (level >= 128))
    raw, pasted = theirs(*call)
    pictures = {"diffusers": raw, "pasted": pasted, "plain": ours(*call, color_match=False), "ours": ours(*call)}
    found = {"seam, true": seam_error(case.drawn(), hole)}
    for name, picture in pictures.items():
        found[f"seam, {name}"] = seam_error(picture, hole)
        found[f"changed, {name}"], found[f"levels, {name}"] = changed(case.without, picture, kept(case.mask))
    return found


def five_edits(number: int) -> dict[str, float]:
    rng = Random(HELD_OUT + 200_000 + number)
    scene = world.scene(rng)
    before, prompt = world.draw(scene), world.caption(scene)
    paint: dict[str, Callable[..., Image.Image]] = {
        "diffusers": lambda *call: theirs(*call)[0],
        "pasted": lambda *call: theirs(*call)[1],
        "ours": ours,
    }
    pictures, untouched = dict.fromkeys(paint, before), torch.ones(world.SIZE, world.SIZE, dtype=torch.bool)
    for edit in range(EDITS):
        side = world.SIZE // 4
        x, y = (rng.randrange(world.SIZE - side) for _ in range(2))
        mask = Image.new("L", before.size)
        ImageDraw.Draw(mask).ellipse((x, y, x + side, y + side), fill=255)
        untouched &= kept(mask)
        pictures = {name: paint[name](picture, mask, prompt, edit) for name, picture in pictures.items()}
    found = {}
    for name, picture in pictures.items():
        found[f"changed, {name}"], found[f"levels, {name}"] = changed(before, picture, untouched)
    return found


def strokes(number: int) -> dict[str, float]:
    rng = Random(HELD_OUT + 300_000 + number)
    scene = world.scene(rng, things=0)
    clean = world.draw(scene)
    mask = Image.new("L", clean.size)
    points = [(rng.randrange(world.SIZE), rng.randrange(world.SIZE)) for _ in range(2)]
    ImageDraw.Draw(mask).line(points, fill=255, width=1 + number % 7)
    scratched = Image.composite(Image.new("RGB", clean.size, LOUD), clean, mask)
    call = scratched, mask, world.caption(scene), number
    pictures = {"pasted": theirs(*call)[1], "ours": ours(*call)}

    touched = F.max_pool2d(to_unit(mask), 8) > 0
    frame, settings = open_frame(scratched, mask, Settings("")), Settings("")
    [view] = tiny().views(frame, settings)
    processed = pipeline().mask_processor.preprocess(mask, height=world.SIZE, width=world.SIZE)
    cells = {
        "ours": view.canvas([scratched]).cells,
        "pasted": F.interpolate(processed, size=touched.shape[2:]),
    }
    found = {}
    for name, picture in pictures.items():
        found[f"painted, {name}"] = float((cells[name] > 0)[touched].all())
        found[f"left, {name}"] = changed(clean, picture, ~kept(mask))[1]
    found["left, scratch"] = changed(clean, scratched, ~kept(mask))[1]
    return found


def means(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in found) / len(found) for name in found[0]}


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes of each row (default: 100)")
    options = parser.parse_args()
    began, scenes = time.monotonic(), range(options.scenes)
    with common.make_pool() as pool:
        edit, rounds, stroke = (means(list(pool.map(work, scenes))) for work in (one_edit, five_edits, strokes))
    table = TABLE.format(edit=edit, rounds=rounds, strokes=stroke)
    print(table, end="")
    (common.RESULTS / "seams.md").write_text(table, encoding="utf-8")
    record = {"scenes": options.scenes, "first_seed": HELD_OUT, "seconds": round(time.monotonic() - began)}
    figures = {"torch": torch.__version__, "one edit": edit, "five rounds": rounds, "strokes": stroke}
    common.append("seams", record | figures)


if __name__ == "__main__":
    main()
