"""What a run will take, known before anything is loaded, and the fastest way to do it within a budget.

The networks themselves are called on the meta device, where tensors have shapes and no numbers,
while a counter follows the bytes that are alive (measure.py). On a CPU additions.py says what comes
on top of that, on CUDA the constants below do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minpaint.checkpoint.architecture import Architecture, blank_models
from minpaint.checkpoint.tensorfile import merge_size
from minpaint.engine.additions import additions
from minpaint.engine.budget import format_size
from minpaint.engine.calls import Calls, Request, Strategy
from minpaint.engine.cuda import attention_is_fused
from minpaint.engine.device import choose_arithmetic, dtype_name, without_gradients
from minpaint.engine.fast import can_cache
from minpaint.engine.measure import measure
from minpaint.engine.residency import Split, split_weights, total_size
from minpaint.engine.winograd import DEFAULTS, Thresholds
from minpaint.errors import BudgetError
from minpaint.models.networks import PlainNetworks
from minpaint.models.vae import LATENT_CHANNELS

PHASES = {"text": "text_encoder", "encode": "encoder", "denoise": "unet", "decode": "decoder"}  # and their weights
STREAMED = ("text_encoder", "unet")  # the VAE's weights are little beside its feature maps
BANDS = (None, 16, 64)
QUERY_ROWS = (None, 1024, 128)  # of attention that keeps its scores; a fused kernel does not
LATENTS = 24  # float32 tensors of the latents' shape around the UNet: sampler, history, conditioning

# On a GPU: the workspaces of its library, and the share that the caching allocator cannot use of what it holds.
GPU_LIBRARIES = 32 * 2**20
GPU_RESERVE = 1 / 16


@dataclass(frozen=True)
class Phase:
    """One phase of a run: how its network is called, and what that takes in bytes.

    split: which weights are streamed; None is none. weights: of the phase's own network, with
    `cached` bytes of them in other forms. others: the other networks' weights that stay loaded.
    activations: all other tensors. peak: all of it, with what libraries and the system add.
    """

    name: str
    strategy: Strategy
    split: Split | None
    weights: int
    cached: int
    others: int
    activations: int
    peak: int

    @property
    def how(self) -> str:
        """The strategy in words."""
        strategy, said = self.strategy, ["with the others" if self.others else "alone"]
        if self.split is not None:
            said = [f"streamed, {mib(self.weights - 2 * self.split.buffer_size)} resident"]
        if self.name == "denoise":
            said.append("1 row at a time" if strategy.batch == 1 else f"{strategy.batch} rows at a time")
        elif self.name != "text":
            said.append("whole" if strategy.bands is None else f"{strategy.bands} bands")
        if strategy.query_rows is not None:
            said.append(f"attention from {strategy.query_rows} rows")
        if strategy.fast:
            said.append("accelerated")
        if self.cached:
            said.append(f"{mib(self.cached)} cached in other forms")
        return ", ".join(said)


@dataclass(frozen=True)
class Plan:
    """How a run is done within a budget, in bytes. base: what is taken before it begins."""

    budget: int
    base: int
    phases: dict[str, Phase]

    @property
    def peak(self) -> int:
        """The most bytes that the run will take."""
        return max(phase.peak for phase in self.phases.values())

    @property
    def resident(self) -> bool:
        """Whether all networks stay on the device."""
        return all(phase.others for phase in self.phases.values())

    def table(self) -> str:
        """The phases in lines for people, in MiB; each row adds up to its peak."""
        lines = ["MiB       base weights others activations   rest   peak  how"]
        for phase in self.phases.values():
            sizes = (self.base, phase.weights, phase.others, phase.activations, phase.peak)
            base, weights, others, activations, peak = (round(size / 2**20) for size in sizes)
            rest = peak - base - weights - others - activations  # what libraries, heap and pictures take, and rounding
            figures = f"{base:6} {weights:7} {others:6} {activations:11} {rest:6} {peak:6}"
            lines.append(f"{phase.name:7} {figures}  {phase.how}")
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """The same for programs, in bytes."""
        phases = [
            {"name": phase.name, "how": phase.how}
            | {key: getattr(phase.strategy, key) for key in ("batch", "bands", "query_rows", "fast")}
            | {"weights": phase.weights, "others": phase.others, "working": phase.activations, "peak": phase.peak}
            for phase in self.phases.values()
        ]
        return {"budget": self.budget, "base": self.base, "peak": self.peak, "phases": phases}


class Planner:
    """Plans for one checkpoint on one device; measures each call once.

    arithmetic: the number format computed in; None leaves it to the processor. fused: whether
    attention has a kernel that does not keep all scores; None asks the device. thresholds: where
    faster ways to compute begin to pay. fast: on CUDA, use its faster forms too.
    """

    def __init__(
        self,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        arithmetic: torch.dtype | None = None,
        fused: bool | None = None,
        thresholds: Thresholds = DEFAULTS,
        fast: bool = False,
    ) -> None:
        self.architecture, self.device, self.dtype, self.thresholds = architecture, device, dtype, thresholds
        self.on_gpu, self.fast = device.type != "cpu", fast and device.type == "cuda"
        self.arithmetic = arithmetic or choose_arithmetic(device, dtype)
        self.fused = attention_is_fused(device, self.arithmetic) if fused is None else fused
        self.reserve = GPU_RESERVE if self.on_gpu else 0.0
        self.measured: dict[Any, tuple[int, int]] = {}
        self.orders: dict[str, list[str]] = {}

    def choose(self, request: Request, budget: int, base: int) -> Plan:
        """The fastest plan that fits.

        All networks stay if they are needed again and everything fits beside them without being
        split. Otherwise each is loaded for its phase, which is done in the first way that fits: with
        all weights loaded, then with streamed weights, each time in ever smaller batches or bands.

        Raises:
            BudgetError: none fits; it names the smallest budget that does.
        """
        together = sum(self._size(name) for name in PHASES)
        for caches in (True, False) if request.again else ():
            ways = [(name, next(self._strategies(name, request, caches)), self._size(name)) for name in PHASES]
            phases = [self._phase(name, request, way, together - size, base) for name, way, size in ways]
            if all(phase.peak <= budget for phase in phases):
                break
        else:
            phases = [self.phase(name, request, budget, base) for name in PHASES]
        return Plan(budget, base, {phase.name: phase for phase in phases})

    def phase(self, name: str, request: Request, budget: int, base: int) -> Phase:
        """One phase with no other network loaded, in the first way that fits; BudgetError if none does."""
        for streamed in (False, True) if PHASES[name] in STREAMED else (False,):
            for strategy in self._strategies(name, request, caches=not streamed):
                if streamed and strategy.keeps_heap:
                    continue  # what is read in a thread tears a kept heap up a little more at every step
                phase = self._phase(name, request, strategy, 0, base, budget if streamed else None)
                if phase.peak <= budget:
                    return phase
        size, way_out = f"{request.count} pictures" if request.count > 1 else "a picture", "paint smaller"
        size += f" of {request.width}x{request.height}"
        if request.pixels > request.area:
            size += f", which the network sees of the {request.photo[0]}x{request.photo[1]} photo,"
            if self.least(replace(request, photo=(0, 0), part=0, seam=0, started=0), base) <= budget:
                size = f"the photo of {request.photo[0]}x{request.photo[1]} pixels"
                way_out = "make the photo smaller"
        raise BudgetError(
            f"budget {format_size(budget)} cannot hold {size} with "
            f"{self.architecture.name} as {dtype_name(self.dtype)}: the smallest budget that can "
            f"is {round_up(self.least(request, base))}; raise --budget or {way_out}"
        )

    def least(self, request: Request, base: int) -> int:
        """The smallest budget in bytes that a request can be done with."""
        return max(self._leanest(name, request, base).peak for name in PHASES)

    def largest(self, request: Request, budget: int, base: int) -> tuple[int, int] | None:
        """Width and height of the largest picture of a request's shape that fits; None if none does.

        What a phase takes is a constant and a share of the area, which two sizes tell. The size
        found from them is planned in turn, and made smaller until it fits.
        """
        factor = self.architecture.vae.factor

        def scaled(scale: float) -> Request:
            width, height = (max(int(side * scale) // factor, 1) * factor for side in (request.width, request.height))
            return replace(request, width=width, height=height, photo=(width, height))

        near, far = scaled(1.0), scaled(2.0)
        areas = []
        for name in PHASES:
            a, b = (self._leanest(name, size, base).peak for size in (near, far))
            slope = (b - a) / (far.area - near.area)
            areas.append((budget - a) / slope + near.area if slope > 0 else math.inf)
        scale = math.sqrt(max(min(areas), 0.0) / request.area)
        while self.least(found := scaled(scale), base) > budget:
            if found == scaled(0.0):
                return None
            scale -= max(scale / 50, factor / max(request.width, request.height))
        return found.width, found.height

    def order(self, part: str) -> list[str]:
        """The layers of a network that have weights, in the order of their calls."""
        if part not in self.orders:
            called: list[str] = []
            name = next(name for name, its in PHASES.items() if its == part)
            hooks = [
                module.register_forward_pre_hook(lambda *_, layer=layer: called.append(layer))
                for layer, module in getattr(self.networks, part).named_modules()
                if module._parameters
            ]
            self._call(name, Request(64, 64, guided=False), Strategy(self.dtype, self.arithmetic))
            for hook in hooks:
                hook.remove()
            self.orders[part] = called
        return self.orders[part]

    @cached_property
    def networks(self) -> PlainNetworks:
        """The checkpoint's networks on the meta device."""
        config = self.architecture
        models = blank_models(config.unet, config.vae, config.text)
        return PlainNetworks(**{name: model.to(self.dtype) for name, model in models.items()}, tokenizer=None)

    def _strategies(self, name: str, request: Request, caches: bool = False) -> Iterator[Strategy]:
        """From the fastest to the one that takes least; caches: with those that keep weights in other forms."""
        plain, limits = Strategy(self.dtype, self.arithmetic), self.thresholds
        slices = [replace(plain, query_rows=rows) for rows in ((None,) if self.fused else QUERY_ROWS)]
        speeds: list[dict[str, Any]] = [{"fast": True}, {}]
        if not self.on_gpu:
            speeds.insert(0, {"fast": True, "keeps_heap": True})
        elif not self.fast:
            del speeds[0]
        if name == "text":
            yield plain
        elif name == "denoise":
            many, long = request.rows * request.area > limits.cached_pixels, request.steps >= limits.cached_steps
            pays = long and not many
            on_cpu = can_cache(self.dtype, self.arithmetic) and (pays or self.arithmetic != torch.float32)
            if caches and (self.fast if self.on_gpu else on_cpu):
                yield from (replace(each, batch=request.rows, caches=True, **speeds[0]) for each in slices)
            for speed in speeds:
                batch = request.rows
                while batch:
                    yield from (replace(each, batch=batch, **speed) for each in slices)
                    batch //= 2
        else:
            if not self.on_gpu:
                yield from (replace(plain, **speed) for speed in speeds[:-1])
            yield from (replace(each, bands=bands) for bands in BANDS for each in slices)

    def _leanest(self, name: str, request: Request, base: int) -> Phase:
        """The phase in the way that takes least; a small picture may take less whole than in bands."""
        ways, streamed = list(self._strategies(name, request)), 0 if PHASES[name] in STREAMED else None
        phases = [self._phase(name, request, strategy, 0, base, streamed) for strategy in {ways[0], ways[-1]}]
        return min(phases, key=lambda phase: phase.peak)

    def _phase(
        self, name: str, request: Request, strategy: Strategy, others: int, base: int, budget: int | None = None
    ) -> Phase:
        """budget: of streamed weights as many stay resident as it has room for; None loads all of them."""
        activations, cached = self._measure(name, request, strategy)
        extra = GPU_LIBRARIES
        if not self.on_gpu:
            activations, extra = additions(name, request, strategy, activations)
            extra += merge_size(self.architecture.directories[PHASES[name]].values())
        split, weights = None, self._size(name) + cached
        if budget is not None:
            part, room = PHASES[name], int((budget - base - extra) / (1 + self.reserve)) - activations - others
            split = split_weights(self.architecture.directories[part], self.dtype, self.order(part), room)
            weights = split.size
        counted = weights + others + activations
        peak = base + extra + counted + math.ceil(counted * self.reserve)
        return Phase(name, strategy, split, weights, cached, others, activations, peak)

    def _size(self, name: str) -> int:
        return total_size(self.architecture.directories[PHASES[name]], self.dtype)

    def _measure(self, name: str, request: Request, strategy: Strategy) -> tuple[int, int]:
        """Bytes of the tensors of a phase's call, and of weights that it caches in other forms."""
        alike = Request(request.width, request.height, request.count, request.guided)  # the rest is not the network's
        key = (name, name if name == "text" else alike, replace(strategy, keeps_heap=False))
        if key not in self.measured:
            _ = self.networks  # made before what they take is measured
            calls: list[Calls] = []
            taken = measure(lambda: calls.append(self._call(name, request, strategy)), self.fused).total
            cached = sum(part.nbytes for forms in calls[0].cache.values() for parts in forms.values() for part in parts)
            taken -= cached
            if name in ("denoise", "decode"):  # the sampler keeps them until all pictures are decoded
                cells = request.area // self.architecture.vae.factor**2
                taken += LATENTS * request.count * LATENT_CHANNELS * 4 * cells
            self.measured[key] = taken, cached
        return self.measured[key]

    @without_gradients
    def _call(self, name: str, request: Request, strategy: Strategy) -> Calls:
        """One call of a phase's network on tensors without numbers."""
        config, factor, networks = self.architecture, self.architecture.vae.factor, self.networks
        own, nowhere = (networks.unet, networks.vae), torch.device("meta")
        calls = Calls(networks, own, nowhere, request.guided, self.on_gpu, self.thresholds)
        calls.prepare(networks.unet if name == "denoise" else networks.vae, strategy)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        height, width, tokens = request.height, request.width, config.text.max_position_embeddings
        if name == "text":
            networks.text_encoder(empty(1, tokens, dtype=torch.long))
        elif name == "encode":
            calls.encode(strategy, empty(1, 3, height, width, dtype=self.arithmetic))
        elif name == "decode":
            calls.decode(strategy, empty(1, LATENT_CHANNELS, height // factor, width // factor)).float()
        else:
            x = empty(request.rows, config.unet.in_channels, height // factor, width // factor)
            prompts = empty(request.rows // request.count, tokens, config.unet.context_dim, dtype=self.dtype)
            context = prompts.repeat_interleave(request.count, dim=0)
            for _ in range(2 if strategy.fast else 1):  # the first call makes what is kept for the others
                calls.unet(strategy, x, empty(request.rows), context)
        return calls


def mib(size: int) -> str:
    """Bytes in the unit of the table."""
    return f"{round(size / 2**20)} MiB"


def round_up(size: int) -> str:
    """Bytes for people who will ask for as much: up to 16 MiB more, as what a process takes varies a little."""
    rounded = math.ceil(size / 2**20 / 8 + 1) * 8
    return f"{rounded}MiB" if rounded < 2**11 else f"{math.ceil(rounded / 2**10 * 100) / 100:.2f}GiB"
