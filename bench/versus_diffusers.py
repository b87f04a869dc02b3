"""minpaint beside diffusers on the same random weights: import, load and a whole run.

    python -m bench.versus_diffusers                       # full-size SD 1.5 at 512 x 512, on the CPU
    python -m bench.versus_diffusers --device cuda --dtype fp16 --steps 50
    python -m bench.versus_diffusers --family small-sd1    # seconds, to see that it works

The two take turns (A B A B ...) in one process, the run after a warm-up each; imports are timed
in processes of their own. Every row gives both medians, the median of the ratios pair by pair,
and the difference of the results. The table goes to stdout, one JSON line to bench/results/.
Needs the test extra (diffusers) and, for a full-size family in float32, 10 GB of memory and 2 GB
of disk for the time of the run.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import minpaint
from bench import common
from weights.random_checkpoint import FAMILIES

STARTS = {
    "bare Python": (("-c", "pass"), ("-c", "pass")),
    "paint --help": (("-m", "minpaint", "paint", "--help"), ("-c", "pass")),
    "import": (
        ("-c", "import minpaint.painter; from transformers import CLIPTextModel, CLIPTokenizer"),
        ("-c", "from diffusers import StableDiffusionInpaintPipeline"),
    ),
}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """All rows, by name."""
    rows = {}
    for name, starts in STARTS.items():
        start_ours, start_theirs = (partial(common.in_own_process, *arguments) for arguments in starts)
        rows[name] = common.alternate(start_ours, start_theirs, options.rounds)

    device, dtype = common.place(options)
    half = options.family in common.FULL_SIZE
    common.write_model(folder, options.family, half)
    common.import_pipeline()  # now, so that loading does not count it

    def load_theirs() -> Any:
        return common.load_pipe(folder, dtype, half).to(device)

    rows["load"] = common.alternate(lambda: minpaint.load(folder, device, dtype), load_theirs, options.rounds)
    painter, pipe = rows["load"]["results"]
    pictures = common.make_input(options.size)
    ours = partial(common.run_painter, painter, pictures, options.steps)
    theirs = partial(common.run_pipe, pipe, pictures, options.steps)
    ours(), theirs()
    name = f"run {options.size}x{options.size}, {options.steps} steps"
    rows[name] = common.alternate(ours, theirs, options.rounds)
    rows[name]["difference"] = common.relative(*rows[name]["results"])
    return rows


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--size", type=int, default=None, help="default: the family's own")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    options = parser.parse_args()
    options.size = options.size or common.native_size(options.family)

    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))

    print(f"{'':28} {'minpaint s':>11} {'diffusers s':>11} {'ratio':>7}   {'min..max':>12}   latents differ by")
    for name, row in rows.items():
        del row["results"]
        spread = "{:.2f}..{:.2f}".format(*row["spread"])
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        figures = f"{row['ours']:11.3f} {row['diffusers']:11.3f} {row['ratio']:7.2f}"
        print(f"{name:28} {figures}   {spread:>12}   {difference}")
    common.append("versus_diffusers", common.machine() | vars(options) | {"rows": rows})


if __name__ == "__main__":
    main()
