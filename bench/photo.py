"""What a hole in a 24-megapixel photo costs, beside the same hole in a 512 x 512 picture.

    python -m bench.photo                      # full-size SD 1.5, random weights, on the CPU
    python -m bench.photo --device cuda --dtype fp16 --steps 50
    python -m bench.photo --family small-sd1   # seconds, to see that it works

The small picture is the middle of the photo, of the network's native size. The two take turns (A
B A B ...) in one process after a warm-up, with the same seed. The clock runs during the call, from
pictures in memory to pictures in memory. Reading the file, and writing it with the check after
saving, are timed once and apart.
One JSON line goes to bench/results/.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

import minpaint
from bench import common
from minpaint.picture.frame import open_frame
from minpaint.picture.saving import save
from minpaint.settings import Settings
from weights.random_checkpoint import FAMILIES

PHOTO = (6000, 4000)


def make_photo() -> Image.Image:
    """Grain on gradients, 24 megapixels."""
    bands = [Image.linear_gradient("L").rotate(angle).resize(PHOTO) for angle in (0, 90, 180)]
    return Image.blend(Image.merge("RGB", bands), Image.effect_noise(PHOTO, 60).convert("RGB"), 0.3)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    options = parser.parse_args()
    native = common.native_size(options.family)
    left, top = (PHOTO[0] - native) // 2, (PHOTO[1] - native) // 2
    photo, mask = make_photo(), Image.new("L", PHOTO)
    middle, radius = (PHOTO[0] // 2, PHOTO[1] // 2), native // 6
    ImageDraw.Draw(mask).ellipse([m + s for s in (-radius, radius) for m in middle], fill=255)
    box = (left, top, left + native, top + native)
    small, small_mask = photo.crop(box), mask.crop(box)

    with tempfile.TemporaryDirectory() as folder:
        common.write_model(Path(folder), options.family, half=options.family in common.FULL_SIZE)
        painter = minpaint.load(folder, *common.place(options))

    def paint(image: Image.Image, hole: Image.Image) -> Image.Image:
        [painting] = painter(image, hole, common.PROMPT, steps=options.steps, context="auto", seed=0)
        return painting.image

    paint(small, small_mask)
    row = common.alternate(lambda: paint(photo, mask), lambda: paint(small, small_mask), options.rounds)
    large_result, small_result = row.pop("results")
    row["photo"], row["small"] = row.pop("ours"), row.pop("diffusers")
    same = large_result.crop(box).tobytes() == small_result.tobytes()

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.png", Path(folder) / "out.png"
        photo.save(source)
        reading, frame = common.timed(lambda: open_frame(source, mask, Settings("")))
        writing, receipt = common.timed(lambda: save(large_result, frame, {}, target))
    print(f"photo of {PHOTO[0]}x{PHOTO[1]}: {row['photo']:.2f} s; picture of {native}x{native}: {row['small']:.2f} s")
    print(f"ratio {row['ratio']:.3f} ({row['spread'][0]:.3f}..{row['spread'][1]:.3f}); the same pixels: {same}")
    print(f"reading {reading:.1f} s, writing {writing:.1f} s; {receipt}")
    seen = {"same": same, "reading": reading, "writing": writing, "changed": receipt.changed}
    common.append("photo", common.machine() | vars(options) | row | seen)


if __name__ == "__main__":
    main()
