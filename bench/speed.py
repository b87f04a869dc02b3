"""How fast minpaint is beside diffusers: each network alone, and a whole run.

    python -m bench.speed                                   # full-size SD 1.5 and 2 at 512 x 512, on the CPU
    python -m bench.speed --device cuda                     # three sizes, two batches; diffusers compiled, too
    python -m bench.speed --families small-sd1              # a minute, to see that it works

Both have the same random weights, stored in half precision as the official files are, the same
inputs and no limit of memory, and take turns (A B A B ...) in one process. minpaint's networks are
called through a Run, as a painting calls them, which is closed before the other's turn. encode and
decode are of one picture, a step is one call of the UNet with guidance, a run is all of a painting
by DDIM with profile diffusers. Every line gives both medians, the median of the ratios pair by pair
and their spread, and beside them:

differ by: the relative difference of the results; of a run the first picture's latents, as for the
others diffusers does not draw the masked picture's encoding anew and minpaint does.
peak: bytes beyond what was there before, in an untimed call with all it sets up. On a GPU the
allocator's; on the CPU those of live tensors, which what a kernel takes for itself is not among.
share: of the speed of a matrix product in the same number format, measured here, if every
multiplication of the direct algorithm were made. minpaint may exceed what it computes, as it
multiplies less than the direct algorithm. The text encoder's are left out.
from fp32: for half precision, the distance from what diffusers' networks give in float32.

A run of fewer steps than asked for is continued with the median of its own steps after the first.
The table goes to stdout, one JSON line to bench/results/, the lines as they come to stderr. Needs
the test extra and, for a full-size family, 2 GB of disk and 20 GB of memory in float32.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import minpaint
import minpaint.engine.plan
from bench.versus_diffusers import NEGATIVE, PROMPT, append, compare, make_input, relative, run_pipe, timed
from minpaint.checkpoint.architecture import Architecture, blank_models
from minpaint.checkpoint.load import outline
from minpaint.engine.measure import measure
from minpaint.engine.memory import (
    choose_device,
    choose_dtype,
    forget_peak,
    format_size,
    free_memory,
    give_back,
    is_out_of_memory,
    peak_memory,
    used_memory,
    without_gradients,
)
from minpaint.engine.plan import Request
from minpaint.engine.run import Run
from minpaint.models.vae import LATENT_CHANNELS
from minpaint.painter import Painter
from weights.random_checkpoint import FAMILIES, write_checkpoint

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
FULL_SIZE = ("sd15", "sd2")
NETWORKS = ("encode", "step", "decode")
ROWS = (*NETWORKS, "run")
TIMESTEP = 501
CAPTURE = 3  # calls until CUDA graphs are only replayed: a warm-up, the capture, a replay
OURS, THEIRS, COMPILED = "minpaint", "diffusers", "diffusers compiled"
RUN_STEPS = 6  # of a run on the CPU
HEADER = (
    f"{'':40} {'beside':18} {'minpaint s':>10} {'other s':>10} {'ratio':>6} {'min..max':>12} {'differ by':>9}"
    f"  {'peaks':>21}  {'shares':>11}  {'from fp32':>15}"
)

Work = Callable[[], Tensor]
Side = Callable[[], AbstractContextManager[Work]]


@dataclass(frozen=True)
class Case:
    """What is asked of both."""

    size: int
    batch: int
    steps: int
    device: torch.device
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Inputs:
    """What the networks are given, float32 and the same for everybody.

    pictures: an image and its mask. pixels: [1, 3, Y, X] on the CPU, where pictures are.
    latents: [1, 4, y, x], unscaled. x, context: [n, 4 or 9, y, x] and [2n, 77, D], for every picture
    a row without and a row with the prompt.
    """

    pictures: tuple[Image.Image, Image.Image]
    pixels: Tensor
    latents: Tensor
    x: Tensor
    context: Tensor


def make_inputs(architecture: Architecture, case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    side = case.size // architecture.vae.factor

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Inputs(
        make_input(case.size),
        normal(1, 3, case.size, case.size).clamp(-1, 1),
        normal(1, LATENT_CHANNELS, side, side).to(case.device),
        normal(case.batch, architecture.unet.in_channels, side, side).to(case.device),
        normal(2 * case.batch, 77, architecture.unet.context_dim).to(case.device),
    )


class Pace:
    """Each run's median seconds from the end of a step to the next one's."""

    def __init__(self) -> None:
        self.runs: list[float] = []
        self.ends: list[float] = []

    def step(self, *_: object) -> None:
        self.ends.append(time.perf_counter())

    def close(self) -> None:
        taken = [end - start for start, end in itertools.pairwise(self.ends)]
        self.runs.append(statistics.median(taken) if taken else math.nan)
        self.ends.clear()


class Ours:
    """minpaint's work, row by row."""

    def __init__(self, painter: Painter, inputs: Inputs, case: Case) -> None:
        self.painter, self.inputs, self.case, self.pace = painter, inputs, case, Pace()

    @contextmanager
    def __call__(self, row: str) -> Iterator[Work]:
        """A call ready to be made; whatever speeds it up is gone afterwards."""
        case, painter = self.case, self.painter
        again = painter.machine.settled
        request = Request(case.size, case.size, case.batch, guided=True, pixels=case.size**2, again=again)
        run = Run(painter.machine, request, painter)
        try:
            yield self.paint if row == "run" else without_gradients(self.network(run, row))
        finally:
            for made in (run, painter.last_run):
                if made is not None:
                    made.close()

    def network(self, run: Run, row: str) -> Work:
        inputs, dtype = self.inputs, self.case.dtype
        context = inputs.context.to(dtype)
        t = torch.full((len(inputs.x),), TIMESTEP, device=self.case.device)
        return {
            "encode": lambda: run.encode(inputs.pixels, dtype)[:, :LATENT_CHANNELS],
            "step": lambda: run.unet(inputs.x, t, context),
            "decode": lambda: run.decode(inputs.latents, dtype),
        }[row]

    def paint(self) -> Tensor:
        paintings = self.painter(
            *self.inputs.pictures,
            PROMPT,
            negative_prompt=NEGATIVE,
            steps=self.case.steps,
            count=self.case.batch,
            sampler="ddim",
            profile="diffusers",
            on_step=self.pace.step,
        )
        self.pace.close()
        return paintings[0].latents


class Theirs:
    """diffusers' work, row by row, as its pipeline does it; perhaps with the UNet and the decoder compiled."""

    def __init__(self, pipe: Any, inputs: Inputs, case: Case, compiled: bool = False) -> None:
        self.pipe, self.inputs, self.case, self.pace = pipe, inputs, case, Pace()
        self.unet, self.decoder = pipe.unet, pipe.vae.decode
        if compiled:
            torch.compiler.reset()  # of the shapes before
            self.unet = torch.compile(self.unet, mode="reduce-overhead", fullgraph=True, dynamic=False)
            self.decoder = torch.compile(self.decoder, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @contextmanager
    def __call__(self, row: str) -> Iterator[Work]:
        """A call ready to be made."""
        yield self.paint if row == "run" else torch.no_grad()(self.network(row))

    def network(self, row: str) -> Work:
        inputs, case = self.inputs, self.case
        x, context, latents = (z.to(case.dtype) for z in (inputs.x, inputs.context, inputs.latents))
        x = torch.cat([x, x])
        t = torch.tensor(TIMESTEP, device=case.device)

        def encode() -> Tensor:
            pixels = inputs.pixels.to(case.device, case.dtype)
            mean: Tensor = self.pipe.vae.encode(pixels).latent_dist.mean.float()
            return mean

        def step() -> Tensor:
            output: Tensor = self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]
            return output.float() if output.dtype != torch.float32 else output.clone()  # a graph's own otherwise

        def decode() -> Tensor:
            return self.decode(latents).cpu().float()

        return {"encode": encode, "step": step, "decode": decode}[row]

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(latents, return_dict=False)[0]
        return pixels

    def paint(self) -> Tensor:
        pipe, case = self.pipe, self.case
        unet = pipe.unet
        pipe.unet, pipe.vae.decode = self.unet, lambda latents, **_: (self.decode(latents),)
        try:
            latents = run_pipe(pipe, *self.inputs.pictures, case.size, case.steps, case.batch, self.pace.step)
            self.pace.close()
            return latents[0]
        finally:
            pipe.unet = unet
            del pipe.vae.decode


def load_pipe(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    pipe: Any = StableDiffusionInpaintPipeline.from_pretrained(folder, torch_dtype=dtype, variant="fp16")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def let_go(device: torch.device) -> None:
    gc.collect()
    give_back(device)


def float32_results(folder: Path, cases: list[Case], rows: list[str]) -> dict[tuple[int, int, str], Tensor]:
    """What diffusers' networks give in float32, by size, batch and row, as far as memory goes."""
    device, architecture, results = cases[0].device, outline(folder, half=True), {}
    pipe = load_pipe(folder, device, torch.float32)
    for case, row in itertools.product(cases, rows):
        if row not in NETWORKS:
            continue
        exact = Case(case.size, case.batch, case.steps, device, torch.float32)
        theirs = Theirs(pipe, make_inputs(architecture, exact), exact)
        with theirs(row) as work, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            try:
                results[case.size, case.batch, row] = work().cpu()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
    del pipe
    return results


def count_flops(architecture: Architecture, case: Case, steps: int) -> dict[str, int]:
    """Floating-point operations of the direct algorithm, by row; of a run with so many steps."""
    models = blank_models(architecture.unet, architecture.vae, architecture.text)
    inputs = make_inputs(architecture, Case(case.size, case.batch, steps, torch.device("meta"), torch.float32))
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
    let_go(device)
    if not countable:
        work()
        return None
    if device.type != "cuda":
        return measure(work).live
    before = used_memory(device)
    forget_peak(device)
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
                    countable = case.on_gpu or name != COMPILED  # nothing is compiled under a counter of tensors
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


def measure_case(
    case: Case, painter: Painter, pipe: Any, exact: dict[tuple[int, int, str], Tensor], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one size and batch, one by one."""
    architecture = painter.machine.checkpoint.architecture
    inputs, flops = make_inputs(architecture, case), count_flops(architecture, case, options.steps)
    contestants: dict[str, Any] = {OURS: Ours(painter, inputs, case), THEIRS: Theirs(pipe, inputs, case)}
    if options.compiled:
        contestants[COMPILED] = Theirs(pipe, inputs, case, compiled=True)
    left = options.steps - case.steps
    for row in options.rows:
        sides: dict[str, Side] = {name: partial(contestant, row) for name, contestant in contestants.items()}
        if row == "encode":
            sides.pop(COMPILED, None)  # the encoder is as it was
        taken = take_turns(sides, case, row, options)
        for name, side in taken.items():
            if "error" in side:
                continue
            if row == "run" and left > 0:
                side["made"], side["pace"] = side["times"], contestants[name].pace.runs[-options.rounds :]
                side["times"] = [
                    seconds + left * pace for seconds, pace in zip(side["made"], side["pace"], strict=True)
                ]
            side["seconds"] = statistics.median(side["times"])
            side["share"] = flops[row] / side["seconds"] / options.product_speed
            reference = exact.get((case.size, case.batch, row))
            side["from_fp32"] = None if reference is None else relative(side["result"], reference)
        add_ratios(taken)
        called = row if row != "run" else f"run, {options.steps} steps" + (f" (from {case.steps})" if left > 0 else "")
        name = f"{options.family} {case.size} x{case.batch}: {called}"
        yield {"name": name, "family": options.family, "size": case.size, "batch": case.batch, "row": row} | {
            "flops": flops[row],
            "sides": taken,
        }


def add_ratios(taken: dict[str, dict[str, Any]]) -> None:
    """Minpaint's times to everybody else's, and the difference of the results, which are let go."""
    ours = taken[OURS]
    for name, side in taken.items():
        if name != OURS and "error" not in ours and "error" not in side:
            side |= compare(ours["times"], side["times"])
            if "result" in side:
                side["difference"] = relative(ours["result"], side["result"])
    for side in taken.values():
        side.pop("result", None)


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A row of the table: minpaint beside diffusers, and beside diffusers compiled."""
    sides, name = dict(row["sides"]), row["name"]
    ours = sides.pop(OURS)
    for other, side in sides.items():
        if "error" in ours or "error" in side:
            told = f"{OURS}: {ours['error']}" if "error" in ours else side["error"]
            yield f"{name:40} {other:18} {told}"
            continue
        spread = "{:.2f}..{:.2f}".format(*side["spread"])
        figures = f"{ours['seconds']:10.4f} {side['seconds']:10.4f} {side['ratio']:6.2f} {spread:>12}"
        pairs = [
            f"{side['difference']:9.1e}" if "difference" in side else "",
            f"{format_size(ours['peak']):>10} {format_size(side['peak']):>10}" if side.get("peak") else f"{'':21}",
            f"{ours['share']:5.2f} {side['share']:5.2f}" if "share" in side else "",
            f"{ours['from_fp32']:7.1e} {side['from_fp32']:7.1e}" if side.get("from_fp32") is not None else "",
        ]
        yield f"{name:40} {other:18} {figures} {'  '.join(pairs)}".rstrip()


def measure_family(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows of one family, one by one."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    own = 8 * FAMILIES[options.family]["unet"]["sample_size"]
    sizes = options.sizes or (options.own_sizes if options.family in FULL_SIZE else [own])
    cases = [Case(size, batch, options.run_steps, device, dtype) for size in sizes for batch in options.batches]
    write_checkpoint(folder, FAMILIES[options.family], dtype=torch.float16, variant="fp16")
    exact = {} if dtype == torch.float32 else float32_results(folder, cases, options.rows)
    let_go(device)
    pipe = load_pipe(folder, device, dtype)
    everything = used_memory(device) + free_memory(device) * 15 // 16
    painter = minpaint.load(folder, device, dtype, everything)
    for case in cases:
        yield from measure_case(case, painter, pipe, exact, options)


def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A list of words as an option's type."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: unknown; use {', '.join(known)}")
        return words

    return parse


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--families", type=names(tuple(FAMILIES)), default=[*FULL_SIZE], help="default: sd15,sd2")
    add("--sizes", type=numbers, default=None, help="default: 512,768,1024 on a GPU, 512 on the CPU")
    add("--batches", type=numbers, default=None, help="pictures at once; default: 1,4 on a GPU, 1 on the CPU")
    add("--rows", type=names(ROWS), default=[*ROWS], help=f"default: {','.join(ROWS)}")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=50, help="of a run")
    add("--run-steps", type=int, default=None, help=f"steps really made; default: all on a GPU, {RUN_STEPS} on the CPU")
    add("--calls", type=int, default=None, help="of a network, timed together; default: 10 on a GPU, 1 on the CPU")
    add("--warm", type=int, default=1, help="untimed calls before those; default: 1")
    add("--device", default="cpu")
    add("--dtype", default=None, help="default: fp16 on a GPU, fp32 on the CPU")
    add(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="diffusers a second time, compiled; default: on a GPU",
    )
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    defaults: dict[str, tuple[Any, Any]] = {
        "batches": ([1, 4], [1]),
        "run_steps": (options.steps, RUN_STEPS),
        "calls": (10, 1),
        "dtype": ("fp16", "fp32"),
        "compiled": (True, False),
    }
    for name, (gpu, cpu) in defaults.items():
        if vars(options)[name] is None:
            setattr(options, name, gpu if on_gpu else cpu)
    options.run_steps = min(max(options.run_steps, 2), options.steps)
    options.own_sizes = [512, 768, 1024] if on_gpu else [512]
    return options


def main() -> None:
    options = parse_options()
    minpaint.engine.plan.FEW_STEPS = 0  # the few steps of a run stand for as many as were asked for
    device = choose_device(options.device)
    asked = {name: value for name, value in vars(options).items() if name != "own_sizes"}
    options.product_speed = product_speed(device, choose_dtype(options.dtype, device))
    rows = []
    for family in options.families:
        options.family = family
        with tempfile.TemporaryDirectory() as folder:
            for row in measure_family(Path(folder), options):
                rows.append(row)
                print(*lines(row), sep="\n", file=sys.stderr, flush=True)
        let_go(device)
    print(HEADER, *(line for row in rows for line in lines(row)), sep="\n")
    append(RESULTS, asked | {"product_speed": options.product_speed, "rows": rows})


if __name__ == "__main__":
    main()
