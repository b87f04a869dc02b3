"""What a run will take, found out before anything is loaded, and the fastest way that fits a budget.

The networks themselves are run on the meta device, where tensors have shapes and no numbers,
while a counter follows the bytes that are alive (measure.py); so the prediction cannot drift
from the code. What is added to that is said at the constants below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from minpaint.checkpoint.architecture import Architecture, blank_models
from minpaint.engine.banded import Bands, set_bands
from minpaint.engine.fast import Held, Prompt, accelerated, can_hold
from minpaint.engine.measure import measure
from minpaint.engine.memory import attention_is_fused, choose_arithmetic, format_size, without_gradients
from minpaint.engine.residency import Division, divide, total_size
from minpaint.errors import BudgetError
from minpaint.models.attention import Attention
from minpaint.models.vae import LATENT_CHANNELS

PHASES = {"text": "text_encoder", "encode": "encoder", "denoise": "unet", "decode": "decoder"}
FLOWING = ("text_encoder", "unet")  # the VAE's weights are little beside its feature maps
BANDS = (None, 16, 64)
QUERY_ROWS = (None, 1024, 128)  # of attention that holds its scores; a fused one needs no slices
# Where Winograd's filters are held: with more pixels in all rows of a call too little of the time is
# saved, and in fewer steps perhaps less than it takes to get memory for them.
FEW_PIXELS = 3 * 2**18
FEW_STEPS = 30
LATENTS = 24  # float32 tensors of the latents' shape around the UNet: sampler, history, conditioning

# On CUDA: cuBLAS's workspaces, and what the caching allocator cannot use of what it holds.
CUDA_LIBRARIES = 32 * 2**20
CUDA_RESERVE = 1 / 16
# On the CPU: code and stacks that the first calls bring in, what the heap keeps of the small blocks
# that were freed (at most so many times what is alive, and so many bytes), and the pictures.
CPU_LIBRARIES = 48 * 2**20
CPU_HEAP = (2.0, 224 * 2**20)
KEPT_HEAP = {"encode": 1.5, "denoise": 2.0, "decode": 1.5}  # of that, where the heap keeps all that is freed
CANVAS = 16  # bytes a pixel the network sees: the picture and where it is blanked, from encoding on
COPY = 28  # bytes a pixel the network sees: the picture blanked or filled, while it is encoded
FILLING = 144  # bytes a pixel: continuing a picture into its hole, before encoding and for the colour match
PICTURE = (24, 8)  # bytes a pixel of the picture: its copies and its file, and what each painting adds


@dataclass(frozen=True)
class Request:
    """What is to be painted: the size the network works at, in pixels, how many, and with guidance or not.

    starts: how many different pictures the paintings start from. pixels: of the whole picture, of
    which the network sees perhaps a part. again: whether the networks will be needed once more
    after the run's last phase, and had better stay. steps: calls of the UNet.
    """

    width: int
    height: int
    count: int = 1
    guided: bool = True
    starts: int = 1
    pixels: int = 0
    again: bool = True
    steps: int = 50

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch when nothing is split."""
        return self.count * (2 if self.guided else 1)


@dataclass(frozen=True)
class Phase:
    """One phase of a run, and how it is done.

    batch: rows of the UNet's batch in one call, or pictures of the VAE's. bands: of the VAE, None
    is whole. query_rows: of attention at a time, None is all. fast: accelerated (fast.py).
    keeps: with a heap that keeps what is freed (memory.keep_heap). arithmetic: the number format
    computed in, the same for every plan. held: bytes of weights that are held in other forms
    too (fast.Held). division: which weights flow; None is none. weights, others, working: bytes of
    its own network and what is held, of the other networks that are there, and of everything else.
    peak: with what comes on top.
    """

    name: str
    dtype: torch.dtype
    batch: int
    bands: int | None
    query_rows: int | None
    fast: bool
    keeps: bool
    arithmetic: torch.dtype
    held: int
    division: Division | None
    weights: int
    others: int
    working: int
    peak: int

    @property
    def how(self) -> str:
        """In words."""
        if self.division is not None:
            stay = self.weights - 2 * self.division.width
            said = [f"flows, {format_size(stay)} stay"]
        else:
            said = ["with the others" if self.others else "alone"]
        if self.name == "denoise":
            said.append("1 row at a time" if self.batch == 1 else f"{self.batch} rows at a time")
        elif self.name != "text":
            said.append("whole" if self.bands is None else f"{self.bands} bands")
        if self.query_rows is not None:
            said.append(f"attention from {self.query_rows} rows")
        if self.fast:
            said.append("accelerated")
        if self.held:
            said.append(f"{format_size(self.held)} held in other forms")
        return ", ".join(said)


@dataclass(frozen=True)
class Plan:
    """How a run is done within a budget, in bytes. base: what is taken before it begins."""

    budget: int
    base: int
    phases: dict[str, Phase]

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases.values())

    @property
    def resident(self) -> bool:
        """Whether all networks stay on the device."""
        return all(phase.others for phase in self.phases.values())

    def table(self) -> str:
        """The phases in lines for people."""
        lines = [f"{'phase':8} {'weights':>10} {'others':>10} {'working':>10} {'peak':>10}  how"]
        for phase in self.phases.values():
            sizes = (phase.weights, phase.others, phase.working, phase.peak)
            lines.append(f"{phase.name:8} " + " ".join(f"{format_size(n):>10}" for n in sizes) + f"  {phase.how}")
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """The same as numbers of bytes."""
        shown = ("name", "how", "batch", "bands", "query_rows", "fast", "weights", "others", "working", "peak")
        phases = [{key: getattr(phase, key) for key in shown} for phase in self.phases.values()]
        return {"budget": self.budget, "base": self.base, "peak": self.peak, "phases": phases}


@dataclass(frozen=True)
class _Way:
    """How a phase can be done; the fields are Phase's."""

    batch: int = 1
    bands: int | None = None
    query_rows: int | None = None
    fast: bool = False
    keeps: bool = False
    holds: bool = False  # weights in other forms


SPEEDS = (  # the fastest first; the last takes least
    _Way(fast=True, keeps=True, holds=True),
    _Way(fast=True, keeps=True),
    _Way(fast=True),
    _Way(),
)


class Planner:
    """Plans for one checkpoint on one device; measures each piece of work once."""

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        self.architecture, self.device, self.dtype = architecture, device, dtype
        self.on_cuda = device.type == "cuda"
        self.arithmetic = choose_arithmetic(device, dtype)
        self.fused = attention_is_fused(device, self.arithmetic)
        self.reserve = CUDA_RESERVE if self.on_cuda else 0.0
        self.measured: dict[Any, tuple[int, int]] = {}
        self.orders: dict[str, list[str]] = {}
        self.speeds = list(SPEEDS)
        if self.on_cuda:
            self.speeds = list(dict.fromkeys(replace(way, keeps=False) for way in SPEEDS))
        elif not can_hold(dtype, self.arithmetic):
            self.speeds = [way for way in SPEEDS if not way.holds]

    def choose(self, request: Request, budget: int, base: int) -> Plan:
        """The fastest plan that fits.

        All networks stay if they are needed again and everything fits beside them without being
        split. Otherwise each comes for its phase, which is done in the first way that fits: with
        all the weights in, then with weights that flow, each time in ever smaller batches or bands.

        Raises:
            BudgetError: none fits; it names the smallest budget that does.
        """
        together = sum(self._size(name) for name in PHASES)
        for holds in (True, False) if request.again else ():
            ways = {name: next(self._ways(name, request, holds)) for name in PHASES}
            phases = [self._phase(name, request, way, together - self._size(name), base) for name, way in ways.items()]
            if all(phase.peak <= budget for phase in phases):
                break
        else:
            phases = [self.phase(name, request, budget, base) for name in PHASES]
        return Plan(budget, base, {phase.name: phase for phase in phases})

    def phase(self, name: str, request: Request, budget: int, base: int) -> Phase:
        """One phase alone, done in the first way that fits; BudgetError if none does."""
        for flowing in (False, True)[: 1 + (PHASES[name] in FLOWING)]:
            for way in self._ways(name, request, holds=not flowing):
                phase = self._phase(name, request, way, 0, base, budget if flowing else None)
                if phase.peak <= budget:
                    return phase
        size = f"{request.count} pictures" if request.count > 1 else "a picture"
        raise BudgetError(
            f"budget {format_size(budget)} cannot hold {size} of {request.width}x{request.height} with "
            f"{self.architecture.name} as {str(self.dtype).removeprefix('torch.')}: the smallest budget that can "
            f"is {round_up(self.least(request, base))}; raise --budget or paint smaller"
        )

    def least(self, request: Request, base: int) -> int:
        """The smallest budget in bytes that a request can be done with."""
        return max(self._leanest(name, request, base).peak for name in PHASES)

    def largest(self, request: Request, budget: int, base: int) -> tuple[int, int] | None:
        """Width and height of the largest picture of a request's shape that fits; None if none does.

        What a phase takes grows as a constant and a share of the area, told from two sizes; the
        answer is then held against a plan of its own, and made smaller until it fits.
        """
        factor = self.architecture.vae.factor

        def scaled(scale: float) -> Request:
            width, height = (max(int(side * scale) // factor, 1) * factor for side in (request.width, request.height))
            return replace(request, width=width, height=height, pixels=width * height)

        near, far = scaled(1.0), scaled(2.0)
        areas = [size.width * size.height for size in (near, far)]
        room = []
        for name in PHASES:
            a, b = (self._leanest(name, size, base).peak for size in (near, far))
            slope = (b - a) / (areas[1] - areas[0])
            room.append((budget - a) / slope + areas[0] if slope > 0 else math.inf)
        scale = math.sqrt(max(min(room), 0.0) / (request.width * request.height))
        while (found := scaled(scale)) != scaled(0.0):
            if self.least(found, base) <= budget:
                return found.width, found.height
            scale -= max(scale / 50, factor / max(request.width, request.height))
        return (found.width, found.height) if self.least(found, base) <= budget else None

    def order(self, part: str) -> list[str]:
        """The layers of a network that have weights, in the order of their calls."""
        if part not in self.orders:
            called: list[str] = []
            hooks = [
                module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
                for name, module in self.models[part].named_modules()
                if module._parameters
            ]
            self._run("denoise" if part == "unet" else "text", Request(64, 64, guided=False), _Way())
            for hook in hooks:
                hook.remove()
            self.orders[part] = called
        return self.orders[part]

    @cached_property
    def models(self) -> dict[str, Any]:
        config = self.architecture
        models = blank_models(config.unet, config.vae, config.text)
        return {name: model.to(self.dtype) for name, model in models.items()}

    def _ways(self, name: str, request: Request, holds: bool = False) -> Iterator[_Way]:
        """From the fastest to the one that takes least; holds: with those that hold weights in other forms."""
        slices = (None,) if self.fused else QUERY_ROWS
        if name == "denoise":
            pays = request.rows * request.area <= FEW_PIXELS and request.steps >= FEW_STEPS
            holds = holds and (pays or self.on_cuda or self.arithmetic != torch.float32)
            for speed in self.speeds:
                batch = request.rows if holds or not speed.holds else 0
                while batch:
                    yield from (replace(speed, batch=batch, query_rows=rows) for rows in slices)
                    batch = 0 if speed.holds else batch // 2
        elif name == "text":
            yield _Way()
        else:
            if not self.on_cuda:
                yield from (speed for speed in self.speeds if speed.fast and not speed.holds)
            yield from (_Way(1, bands, rows) for bands in BANDS for rows in slices)

    def _leanest(self, name: str, request: Request, base: int) -> Phase:
        """The last of a phase's ways; a small picture may take less whole than in bands."""
        ways, flowing = list(self._ways(name, request)), 0 if PHASES[name] in FLOWING else None
        return min(
            (self._phase(name, request, way, 0, base, flowing) for way in {ways[0], ways[-1]}),
            key=lambda phase: phase.peak,
        )

    def _phase(
        self, name: str, request: Request, way: _Way, others: int, base: int, flowing: int | None = None
    ) -> Phase:
        """flowing: the budget that the weights which stay may fill; None has all of them stay."""
        working, held = self._working(name, request, way)
        extra = self._extra(name, request, working, way)
        division, weights = None, self._size(name) + held
        if flowing is not None:
            part = PHASES[name]
            room = int((flowing - base - extra) / (1 + self.reserve)) - working - others
            division = divide(self.architecture.directories[part], self.dtype, self.order(part), room)
            weights = division.size
        counted = weights + others + working
        peak = base + extra + counted + math.ceil(counted * self.reserve)
        done = (way.batch, way.bands, way.query_rows, way.fast, way.keeps, self.arithmetic, held)
        return Phase(name, self.dtype, *done, division, weights, others, working, peak)

    def _extra(self, name: str, request: Request, working: int, way: _Way) -> int:
        """Bytes that come on top of weights and tensors."""
        if self.on_cuda:
            return CUDA_LIBRARIES
        pictures = max(request.pixels, request.area) * (PICTURE[0] + PICTURE[1] * request.count)
        heap = int(KEPT_HEAP[name] * working) if way.keeps else min(int(CPU_HEAP[0] * working), CPU_HEAP[1])
        return CPU_LIBRARIES + heap + pictures

    def _size(self, name: str) -> int:
        return total_size(self.architecture.directories[PHASES[name]], self.dtype)

    def _working(self, name: str, request: Request, way: _Way) -> tuple[int, int]:
        """Bytes that a phase takes beside weights, and those of weights that it holds in other forms."""
        key = (name, name if name == "text" else replace(request, steps=0), replace(way, keeps=False))
        if key not in self.measured:
            _ = self.models  # made before what they take is measured
            held: dict[nn.Module, Held] | None = {} if way.holds else None
            taken = measure(partial(self._run, name, request, way, held), self.fused).total
            made = sum(part.nbytes for forms in (held or {}).values() for parts in forms.values() for part in parts)
            taken -= made
            if name == "denoise":
                taken += LATENTS * request.count * LATENT_CHANNELS * 4 * request.area // self.architecture.vae.factor**2
            if not self.on_cuda and name != "text":  # the pictures are in the same memory
                filled = {"encode": request.starts * request.area, "decode": max(request.pixels, request.area)}
                copies = COPY * filled["encode"] if name == "encode" else 0
                taken = max(taken + copies, FILLING * filled.get(name, 0)) + CANVAS * request.starts * request.area
            self.measured[key] = taken, made
        return self.measured[key]

    @without_gradients
    def _run(self, name: str, request: Request, way: _Way, held: dict[nn.Module, Held] | None = None) -> None:
        """One call of a phase's network on tensors without numbers."""
        config, factor = self.architecture, self.architecture.vae.factor
        small = (request.height // factor, request.width // factor)
        forms = (None if self.on_cuda else self.arithmetic, way.fast)

        def empty(*shape: int, dtype: torch.dtype = self.arithmetic) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        unet, vae, text_encoder = (self.models[name] for name in ("unet", "vae", "text_encoder"))
        set_query_rows(unet if name == "denoise" else vae, way.query_rows)
        set_bands(vae, Bands(way.bands, some=True) if way.bands else None)
        if name == "text":
            text_encoder(torch.zeros(1, config.text.max_position_embeddings, dtype=torch.long, device="meta"))
        elif name == "encode":
            with accelerated(vae, *forms):
                vae.encode(empty(1, 3, request.height, request.width))
        elif name == "decode":
            with accelerated(vae, *forms):
                vae.decode(empty(1, LATENT_CHANNELS, *small)).float()
        else:
            # what Run.unet does: the whole batch is there, and goes through in parts
            tokens = config.text.max_position_embeddings
            x = torch.empty((request.rows, config.unet.in_channels, *small), device="meta")
            context = empty(request.rows, tokens, config.unet.context_dim, dtype=self.dtype)
            t = torch.zeros(request.rows, device="meta")
            parts = zip(*(split(each, way.batch) for each in (x.to(self.arithmetic), t, context)), strict=True)
            prompt, whole = Prompt(context) if way.fast else None, way.batch >= request.rows
            with accelerated(unet, *forms, prompt, way.fast and whole and request.guided, held):
                if prompt is not None and whole:
                    prompt.fill(unet)
                first = list(itertools.islice(parts, 2))
                if held is not None:
                    unet(*first[0])  # from now on all of them are there
                outputs = [unet(*part).float() for part in first]
            torch.cat(outputs)


def split(x: Tensor, batch: int) -> tuple[Tensor, ...]:
    """A batch in parts of so many rows; the very tensor, if that is all (see fast.Prompt)."""
    return (x,) if batch >= len(x) else torch.split(x, batch)


def set_query_rows(model: nn.Module, rows: int | None) -> None:
    """Let all attention of a model run from so many query rows at a time; None: from all."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.query_rows = rows


def round_up(size: int) -> str:
    """Bytes for people who will ask for as much: up to 16 MiB more, as what a process takes varies a little."""
    mib = math.ceil(size / 2**20 / 8 + 1) * 8
    return f"{mib}MiB" if mib < 2**11 else f"{math.ceil(mib / 2**10 * 100) / 100:.2f}GiB"
