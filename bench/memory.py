"""What a memory budget costs and whether it is kept, beside diffusers with each of its modes.

    python -m bench.memory                                  # full-size SD 1.5 at 512 x 512, on the CPU
    python -m bench.memory --device cuda --dtype fp16 --steps 20
    python -m bench.memory --family small-sd1 --budgets 1GiB,2GiB    # seconds, to see that it works

Every row paints the same picture from the same random weights, stored in half precision as the
official files are: minpaint under each budget, then diffusers plain and in each of its modes that
save memory. On a GPU the rows run one after the other in one process and the peak is the
allocator's, the driver's context excluded; on the CPU each has a process of its own, whose peak is
the largest resident set, interpreter and libraries included. Ratios are to minpaint's row without
a limit; a step is the median of all but the first. The table goes to stdout, one JSON line to
bench/results/. Needs the test extra, 2 GB of disk and what the rows take.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import minpaint
from bench import common
from minpaint.engine.budget import format_size, peak_memory, reset_peak
from minpaint.painter import open_painter
from weights.random_checkpoint import FAMILIES

UNLIMITED = "no limit"
ONCE = "one painting"  # no limit either, but as the command line does it: no network stays for a second one
ON_CPU = ("plain", "slicing + VAE tiling")
MODES = (*ON_CPU, "model offload", "group offload", "sequential offload")
REPEATED = ("family", "size", "steps", "device", "dtype")  # options of a row that runs on its own
BUDGETS = {"cuda": "512MiB,1GiB,2GiB,4GiB,15GiB", "cpu": "1GiB,2GiB,15GiB"}


def save_memory(pipe: Any, mode: str, device: torch.device) -> None:
    """Put one of the reference's modes on a pipeline that is still on the CPU."""
    if mode == "slicing + VAE tiling":
        pipe.enable_attention_slicing()
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
    if mode == "model offload":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "sequential offload":
        pipe.enable_sequential_cpu_offload(device=device)
    elif mode == "group offload":
        from diffusers.hooks import apply_group_offloading  # type: ignore[attr-defined]

        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            apply_group_offloading(module, device, torch.device("cpu"), offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(device)


def run_row(row: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row's figures, and its latents as a list."""
    device, dtype = common.place(options)
    pictures, clock, started = common.make_input(options.size), common.StepClock(wait=True), time.perf_counter()
    reset_peak(device)
    planned, how = None, {}
    if row not in MODES:
        budget = None if row in (UNLIMITED, ONCE) else row
        painter = (open_painter if row == ONCE else minpaint.load)(folder, device, dtype, budget, None)
        latents = common.run_painter(painter, pictures, options.steps, on_step=clock)
        run = painter.last_run
        assert run is not None
        planned, how = run.plan.peak, {name: phase.how for name, phase in run.plan.phases.items()}
    else:
        pipe = common.load_pipe(folder, dtype)
        save_memory(pipe, row, device)
        latents = common.run_pipe(pipe, pictures, options.steps, on_step=clock).float().cpu()
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {
        "row": row,
        "planned": planned,
        "peak": peak_memory(device),
        "reserved": reserved,
        "seconds": time.perf_counter() - started,
        "step": clock.median,
        "how": how,
        "latents": latents.flatten().tolist(),
    }


def measure(row: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A row's figures, or why there are none."""
    if options.device != "cpu":
        common.free_unused(common.place(options)[0])
        try:
            return run_row(row, folder, options)
        except Exception as error:
            return {"row": row, "error": f"{type(error).__name__}: {error}"}
    repeated = [word for name in REPEATED for word in (f"--{name}", str(getattr(options, name)))]
    try:
        printed = common.in_own_process("-m", "bench.memory", "--row", row, "--folder", str(folder), *repeated)
    except RuntimeError as error:
        return {"row": row, "error": str(error)}
    return dict(json.loads(printed.splitlines()[-1]))


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--size", type=int, default=None, help="default: the family's own")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="default: bf16 on the CPU, fp16 on a GPU")
    parser.add_argument("--budgets", default=None, help=f"default: {BUDGETS}")
    help_modes = f"of diffusers; default: {','.join(MODES)} on a GPU, {','.join(ON_CPU)} on the CPU"
    parser.add_argument("--modes", type=common.names(MODES), default=None, help=help_modes)
    parser.add_argument("--row", default=None, help="run one row and print its figures (for this program's own use)")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is, for --row")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    options.size = options.size or common.native_size(options.family)
    options.dtype = options.dtype or ("fp16" if on_gpu else "bf16")
    if options.row is not None:
        print(json.dumps(run_row(options.row, options.folder, options)))
        return
    budgets = (options.budgets or BUDGETS["cuda" if on_gpu else "cpu"]).split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = common.write_model(Path(name), options.family)
        if on_gpu:
            measure(UNLIMITED, folder, options)  # a warm-up
        rows = []
        for row in (UNLIMITED, ONCE, *budgets, *(options.modes or (MODES if on_gpu else ON_CPU))):
            rows.append(measure(row, folder, options))
            common.keep({name: value for name, value in rows[-1].items() if name != "latents"})

    first = next(row for row in rows if "error" not in row)
    reference = torch.tensor(first["latents"])
    print(f"{'':32} {'planned':>10} {'peak':>10} {'planned/peak':>12} {'s':>8} {'s/step':>8} {'ratio':>6}  differs by")
    for number, row in enumerate(rows):
        name = f"{'minpaint' if number < 2 + len(budgets) else 'diffusers'}, {row['row']}"
        if "error" in row:
            print(f"{name:32} {row['error']}")
            continue
        planned = format_size(row["planned"]) if row["planned"] else ""
        share = f"{row['planned'] / row['peak']:.3f}" if row["planned"] else ""
        step, ratio = (f"{row['step']:.3f}", f"{row['step'] / first['step']:.2f}") if row["step"] else ("", "")
        difference = f"{common.relative(torch.tensor(row.pop('latents')), reference):.1e}"
        figures = f"{planned:>10} {format_size(row['peak']):>10} {share:>12} {row['seconds']:8.1f} {step:>8} {ratio:>6}"
        print(f"{name:32} {figures}  {difference}")
    asked = {name: getattr(options, name) for name in REPEATED}
    common.append("memory", common.machine() | asked | {"rows": rows})


if __name__ == "__main__":
    main()
