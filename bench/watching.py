"""What it costs to look into a run, and that it costs nothing not to: python -m bench.watching [--family sd15]

In one process, in turns with a run that is not watched (A B A B ...): another such run, which shows the noise; one
watched with a hook on every attention to the prompt; one with every output recorded; a traced run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minpaint
from bench.common import PROMPT, alternate, append, machine, make_input, make_parser, relative, write_model
from minpaint.picture.frame import open_frame
from minpaint.settings import Settings
from minpaint.study.trace import trace_run
from weights.random_checkpoint import FAMILIES


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--family", default="small-sd1", choices=sorted(FAMILIES))
    parser.add_argument("--size", type=int, default=256, help="side of the picture (default: 256)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pictures, settings = make_input(options.size), Settings(PROMPT, steps=options.steps)
    with tempfile.TemporaryDirectory() as folder:
        painter = minpaint.load(write_model(Path(folder), options.family), device="cpu", dtype="fp32")

        def run() -> Any:
            return painter(*pictures, PROMPT, steps=options.steps)[0].latents

        def watched(**what: Any) -> Callable[[], Any]:
            def work() -> Any:
                with painter.watch(**what):
                    return run()

            return work

        def traced() -> Any:
            trace = trace_run(painter, open_frame(*pictures, settings), painter.complete(settings))
            return trace.paintings[0].latents

        run()  # what the first run prepares is nobody's
        sides = {
            "not watched either": run,
            "attention to the prompt watched": watched(record="unet.*.attn2"),
            "every output recorded": watched(record="unet*"),
            "traced": traced,
        }
        rows = {}
        print(f"{'':34}{'seconds':>9}{'unwatched':>11}{'ratio':>7}{'min..max':>12}{'differ by':>11}")
        for name, work in sides.items():
            row = alternate(work, run, options.rounds)
            row["difference"] = relative(*row.pop("results"))
            rows[name] = row
            spread = "{:.2f}..{:.2f}".format(*row["spread"])
            figures = f"{row['ours']:9.2f}{row['diffusers']:11.2f}{row['ratio']:7.2f}{spread:>12}"
            print(f"{name:34}{figures}{row['difference']:11.1e}", flush=True)
    append("watching", machine() | vars(options) | {"rows": rows})


if __name__ == "__main__":
    main()
