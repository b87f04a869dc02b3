"""How fast minpaint is beside diffusers: each network alone, and a whole run.

    python -m bench.speed                                   # full-size SD 1.5 and 2 at 512 x 512, on the CPU
    python -m bench.speed --peers compiled,openvino,onnxruntime --rows encode,step,decode
    python -m bench.speed --device cuda                     # three sizes, two batches; diffusers compiled, too
    python -m bench.speed --families small-sd1              # a minute, to see that it works

Both sides have the same random weights, stored in half precision as the official files are, the
same inputs and no limit of memory. They take turns (A B A B ...) in one process. minpaint's networks
are called through a Run, as a painting calls them; it is closed before the other side's turn.

encode and decode work on one picture. A step is one call of the UNet with guidance. A run is a whole
painting by DDIM with profile diffusers; one of fewer steps than --steps is continued with the median
of its own steps after the first. Every line gives both medians, the median of the ratios pair by
pair, the least and the largest ratio, and then:

differ by: the relative difference of the results. Of a run it is that of the first picture, because
    diffusers encodes the masked picture once for all pictures and minpaint for each.
peaks: bytes beyond what was there before, in an untimed call with all that it sets up. On a GPU they
    are the allocator's. On the CPU they are those of live tensors, without a kernel's own workspace.
shares: of the speed of a matrix product in the same number format, measured here, as if every
    multiplication of the direct algorithm were made. minpaint makes fewer, so its share may exceed 1.
    The text encoder is left out.
from fp32: in half precision, the distance from what diffusers' networks give in float32.

The table goes to stdout, one JSON line to bench/results/, the lines as they come to stderr. Needs
the test extra and, for a full-size family, 2 GB of disk and 20 GB of memory in float32.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import minpaint
from bench import common
from bench.common import OURS, THEIRS, timed
from bench.peers import RUNTIMES, Peer
from bench.sides import Case, Ours, Side, Theirs, Work, load_pipe, make_inputs
from minpaint.checkpoint.architecture import Architecture, blank_models
from minpaint.checkpoint.load import outline
from minpaint.engine.budget import free_memory, is_out_of_memory, peak_memory, reset_peak, used_memory
from minpaint.engine.measure import measure
from minpaint.engine.winograd import Thresholds
from weights.random_checkpoint import FAMILIES

NETWORKS = ("encode", "step", "decode")
ROWS = (*NETWORKS, "run")
CAPTURE = 3  # calls until CUDA graphs are only replayed: a warm-up, the capture, a replay
FAST = "minpaint --fast"
PEERS = ("compiled", *RUNTIMES)  # diffusers' networks by torch.compile and by other runtimes
RUN_STEPS = 6  # of a run on the CPU
DEFAULTS: dict[str, tuple[Any, Any]] = {  # of options: on a GPU, on the CPU
    "batches": ([1, 4], [1]),
    "calls": (10, 1),
    "dtype": ("fp16", "fp32"),
    "peers": (["compiled"], []),
}


def float32_results(folder: Path, cases: list[Case], rows: list[str]) -> dict[tuple[int, int, str], Tensor]:
    """What diffusers' networks give in float32, by size, batch and row, as far as memory goes."""
    architecture, results = outline(folder, half=True), {}
    pipe = load_pipe(folder, cases[0].device, torch.float32)
    for case, row in itertools.product(cases, (row for row in rows if row in NETWORKS)):
        exact = replace(case, dtype=torch.float32)
        theirs = Theirs(pipe, make_inputs(architecture, exact), exact)
        with theirs(row) as work, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            try:
                results[case.size, case.batch, row] = work().cpu()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
    return results


def count_flops(architecture: Architecture, case: Case, steps: int) -> dict[str, int]:
    """Floating-point operations of the direct algorithm, by row; of a run with so many steps."""
    models = blank_models(architecture.unet, architecture.vae, architecture.text)
    inputs = make_inputs(architecture, replace(case, device=torch.device("meta")))
    t = torch.zeros(2 * case.batch, device="meta")
    work = {
        "encode": lambda: models["vae"].encode(inputs.pixels.to("meta")),
        "step": lambda: models["unet"](torch.cat([inputs.x, inputs.x]), t, inputs.context),
        "decode": lambda: models["vae"].decode(inputs.latents),
    }
    flops: dict[str, int] = {}
    for row, call in work.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        flops[row] = counter.get_total_flops()
    return flops | {"run": flops["encode"] + steps * flops["step"] + case.batch * flops["decode"]}


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, the best of several."""
    side, times = (4096, 10) if device.type == "cuda" else (2048, 1)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    timed(multiply)
    return 2 * side**3 * times / min(timed(multiply)[0] for _ in range(6))


def peak_of(side: Side, calls: int, device: torch.device, countable: bool) -> int | None:
    """Bytes that a side takes beyond what is there, if they can be counted; the calls are made anyway."""

    def work() -> None:
        with side() as call:
            for _ in range(calls):
                timed(call)

    with side():
        pass  # what is planned, once and on the meta device, would be counted
    common.free_unused(device)
    if not countable:
        work()
        return None
    if device.type != "cuda":
        return measure(work).live
    before = used_memory(device)
    reset_peak(device)
    work()
    return peak_memory(device) - before


def repeat(work: Work, calls: int) -> Tensor:
    """The last of so many calls."""
    for _ in range(calls - 1):
        work()
    return work()


def take_turns(sides: dict[str, Side], case: Case, row: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each side: seconds a call, round by round, peak and result; or why there are none."""
    calls, warm = (1, 0) if row == "run" else (options.calls, options.warm)
    taken: dict[str, dict[str, Any]] = {name: {"times": []} for name in sides}
    for turn in range(-1, options.rounds):
        for name, side in sides.items():
            if "error" in taken[name]:
                continue
            try:
                if turn < 0:
                    untimed = CAPTURE if case.on_gpu and row != "run" else 1
                    # nothing is compiled under a counter of tensors, which sees no other runtime's memory either
                    countable = case.on_gpu or name not in PEERS
                    taken[name]["peak"] = peak_of(side, untimed, case.device, countable)
                    continue
                taken[name].pop("result", None)  # never two of one side in memory
                with side() as work:
                    for _ in range(warm):
                        timed(work)
                    seconds, taken[name]["result"] = timed(partial(repeat, work, calls))
                taken[name]["times"].append(seconds / calls)
                taken[name]["result"] = taken[name]["result"].cpu()
            except Exception as error:
                taken[name]["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return taken


def measure_row(
    row: str,
    case: Case,
    contestants: dict[str, Any],
    flops: int,
    exact: Tensor | None,
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """A row's sides, each with all its figures. exact: what the row gives in float32."""
    sides: dict[str, Side] = {name: partial(contestant, row) for name, contestant in contestants.items()}
    if row == "encode":
        sides.pop("compiled", None)  # the encoder is as it was
    if row == "run":
        sides = {name: side for name, side in sides.items() if name not in RUNTIMES}
    taken, left = take_turns(sides, case, row, options), options.steps - case.steps
    for name, side in taken.items():
        if "error" in side:
            continue
        if row == "run" and left > 0:
            side["made"], side["pace"] = side["times"], contestants[name].paces[-options.rounds :]
            pairs = zip(side["made"], side["pace"], strict=True)
            side["times"] = [seconds + left * pace for seconds, pace in pairs]
        side["seconds"] = statistics.median(side["times"])
        side["share"] = flops / side["seconds"] / options.product_speed
        side["from_fp32"] = None if exact is None else common.relative(side["result"], exact)
    common.add_ratios(taken)
    return taken


def measure_family(options: argparse.Namespace, folder: Path, family: str) -> Iterator[dict[str, Any]]:
    """All rows of one family, one by one."""
    device, dtype = common.place(options)
    common.free_unused(device)  # what the family before left
    sizes = options.sizes or [common.native_size(family)]
    if not options.sizes and family in common.FULL_SIZE:
        sizes = [512, 768, 1024] if options.device != "cpu" else [512]
    cases = [Case(size, batch, options.run_steps, device, dtype) for size in sizes for batch in options.batches]
    exact = {} if dtype == torch.float32 else float32_results(folder, cases, options.rows)
    common.free_unused(device)
    architecture, pipe = outline(folder, half=True), load_pipe(folder, device, dtype)
    everything = used_memory(device) + free_memory(device) * 15 // 16
    painter = minpaint.load(folder, device, dtype, everything)
    fast = minpaint.load(folder, device, dtype, everything, fast=True) if options.fast else None
    # the few steps of a run stand for as many as were asked for
    painter.engine.thresholds = Thresholds(cached_steps=0)
    for case in cases:
        inputs, flops = make_inputs(architecture, case), count_flops(architecture, case, options.steps)
        contestants: dict[str, Any] = {OURS: Ours(painter, inputs, case), THEIRS: Theirs(pipe, inputs, case)}
        if fast is not None:
            contestants[FAST] = Ours(fast, inputs, case)
        for peer in options.peers:
            if peer == "compiled":
                contestants[peer] = Theirs(pipe, inputs, case, compiled=True)
            else:
                contestants[peer] = Peer(pipe, inputs, case, peer)
        for row in options.rows:
            reference = exact.get((case.size, case.batch, row))
            taken = measure_row(row, case, contestants, flops[row], reference, options)
            name = f"{family} {case.size} x{case.batch}: {row}"
            if row == "run":
                name += f", {options.steps} steps" + (f" (from {case.steps})" if case.steps < options.steps else "")
            asked = {"name": name, "family": family, "size": case.size, "batch": case.batch, "row": row}
            yield asked | {"flops": flops[row], "sides": taken}


def parse_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--families", type=common.names(FAMILIES), default=[*common.FULL_SIZE], help="default: sd15,sd2")
    add("--sizes", type=common.numbers, default=None, help="default: 512,768,1024 on a GPU, 512 on the CPU")
    add("--batches", type=common.numbers, default=None, help="pictures at once; default: 1,4 on a GPU, 1 on the CPU")
    add("--rows", type=common.names(ROWS), default=[*ROWS], help=f"default: {','.join(ROWS)}")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=50, help="of a run")
    add("--run-steps", type=int, default=None, help=f"steps really made; default: all on a GPU, {RUN_STEPS} on the CPU")
    add("--calls", type=int, default=None, help="of a network, timed together; default: 10 on a GPU, 1 on the CPU")
    add("--warm", type=int, default=1, help="untimed calls before those; default: 1")
    add("--device", default="cpu")
    add("--dtype", default=None, help="default: fp16 on a GPU, fp32 on the CPU")
    add("--fast", action="store_true", help="minpaint a second time, with the ways that --fast asks for on CUDA")
    peers_help = (
        f"diffusers' networks again, by {', '.join(PEERS)} (or none); default: compiled on a GPU, none on the CPU"
    )
    add("--peers", type=common.names([*PEERS, "none"]), default=None, help=peers_help)
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    for name, (gpu, cpu) in (DEFAULTS | {"run_steps": (options.steps, RUN_STEPS)}).items():
        if vars(options)[name] is None:
            setattr(options, name, gpu if on_gpu else cpu)
    options.peers = [peer for peer in options.peers if peer != "none"]
    options.run_steps = min(max(options.run_steps, 2), options.steps)
    return options


def main() -> None:
    options = parse_options()
    asked = dict(vars(options))
    options.product_speed = product_speed(*common.place(options))
    rows = common.measure_families(options.families, partial(measure_family, options))
    common.append("speed", common.machine() | asked | {"product_speed": options.product_speed, "rows": rows})


if __name__ == "__main__":
    main()
