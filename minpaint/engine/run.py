"""The networks of a checkpoint on one device, run within a budget: what a plan says is done here."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from minpaint.checkpoint.load import Checkpoint
from minpaint.engine.budget import (
    capped,
    format_size,
    free_memory,
    is_out_of_memory,
    peak_memory,
    release_cached,
    reset_peak,
    tune_heap,
    used_memory,
)
from minpaint.engine.calls import Calls, Request
from minpaint.engine.cuda import Buffer, exact_float32
from minpaint.engine.device import threads_for
from minpaint.engine.plan import PHASES, Phase, Planner, round_up
from minpaint.engine.residency import NetworkWeights
from minpaint.engine.winograd import DEFAULTS
from minpaint.errors import BudgetError, MinpaintError, MinpaintWarning
from minpaint.models.networks import PlainNetworks

SMALLER = 3 / 4  # of what a phase was planned with, when the device turns out fuller than it was


class Engine:
    """A checkpoint's networks on one device, and where their weights are.

    keeps: whether all networks stay loaded from painting to painting, if the budget has room.
    thresholds: where faster ways to compute begin to pay. fast: on CUDA, use its faster forms too.
    plain: whether a GPU's special ways have failed and are not to be used any more.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, budget: int, fast: bool = False
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.budget = checkpoint, device, dtype, budget
        self.planners: dict[torch.dtype, Planner] = {}
        self.prepared: Phase | None = None  # the phase that weights and networks are ready for
        self.keeps, self.thresholds, self.fast, self.plain = False, DEFAULTS, fast, False
        vae, directories = checkpoint.vae, checkpoint.architecture.directories
        modules: dict[str, tuple[str, nn.Module, list[nn.Module]]] = {
            "text_encoder": ("text_encoder", checkpoint.text_encoder, [checkpoint.text_encoder]),
            "encoder": ("vae", vae, [vae.encoder, vae.quant_conv]),
            "unet": ("unet", checkpoint.unet, [checkpoint.unet]),
            "decoder": ("vae", vae, [vae.post_quant_conv, vae.decoder]),
        }
        self.weights = {
            key: NetworkWeights(name, model, roots, directories[key], device, dtype, self._load_for_call)
            for key, (name, model, roots) in modules.items()
        }
        # not the VAE's: its group norms may copy maps of this layout, and no plan counts these copies
        self.weights["unet"].channels_last = fast and device.type == "cuda" and dtype != torch.float32

    def planner(self, dtype: torch.dtype | None = None) -> Planner:
        """The planner for a number format of the weights; None is the engine's own."""
        dtype = dtype or self.dtype
        if dtype not in self.planners:
            architecture = self.checkpoint.architecture
            self.planners[dtype] = Planner(architecture, self.device, dtype, None, None, self.thresholds, self.fast)
        return self.planners[dtype]

    @property
    def base(self) -> int:
        """Bytes that count against the budget and are not the weights'."""
        release_cached(self.device)
        weights = sum(each.resident_size for each in self.weights.values() if not each.changed)
        return max(used_memory(self.device) - weights, 0)

    def keep_loaded(self) -> None:
        """Load all networks and keep them, if the budget holds them together; otherwise load them when needed.

        Raises:
            BudgetError: the budget cannot hold even the smallest run.
        """
        self.keeps = True
        base, factor = self.base, self.checkpoint.architecture.vae.factor
        if base + sum(each.size for each in self.weights.values()) > self.budget:
            self.planner().choose(Request(factor, factor, guided=False), self.budget, base)
            return
        for each in self.weights.values():
            each.load()

    def run(self, request: Request, networks: PlainNetworks) -> Run:
        """A run of the networks for one request, planned now; to be used in a `with` statement.

        networks: the modules to call, the checkpoint's own or others that somebody has put in.

        Raises:
            BudgetError: there is no way to keep within the budget; nothing has been done then.
        """
        return Run(self, replace(request, again=request.again or self.keeps), networks)

    def prepare(self, phase: Phase, alone: bool, calls: Calls) -> None:
        """Load a phase's weights and make its network ready to be called; alone: offload the others'."""
        tune_heap(self.device, phase.strategy.keeps_heap)
        if self.prepared is phase:
            return
        self.prepared = None
        release_cached(self.device)
        weights = self.weights[PHASES[phase.name]]
        for other in self.weights.values():
            if alone and other is not weights:
                other.offload()
        weights.load(phase.split)
        weights.convert(phase.strategy.dtype)
        calls.prepare(weights.model, phase.strategy)
        self.prepared = phase

    def restore(self, name: str) -> None:
        """Give a phase's weights the engine's number format again."""
        self.weights[PHASES[name]].convert(self.dtype)
        self.prepared = None

    def offload(self) -> None:
        """Offload all weights, so that something else finds the budget free."""
        self.prepared = None
        for weights in self.weights.values():
            weights.offload()
        release_cached(self.device)

    def require(self, what: str, size: int) -> None:
        """BudgetError if the budget could not hold something of so many bytes with all weights offloaded."""
        needed = self.base + size
        if needed > self.budget:
            raise BudgetError(
                f"budget {format_size(self.budget)} cannot hold {what}: that needs {round_up(needed)}; "
                f"raise --budget or do without it"
            )

    def make_plain(self) -> None:
        """From now on, use nothing of a GPU but what every program uses: no graphs, no copies beside the computing."""
        self.fast, self.plain, self.prepared = False, True, None
        self.planners.clear()
        for weights in self.weights.values():
            weights.offload()
            weights.channels_last, weights.new_buffer = False, partial(Buffer, aside=False)

    def _load_for_call(self, weights: NetworkWeights) -> None:
        """Load weights for a call from outside a run, and offload the others where there is no room beside them."""
        self.prepared = None
        if self.base + weights.size + sum(other.resident_size for other in self.weights.values()) > self.budget:
            for other in self.weights.values():
                other.offload()
        weights.load()


class Run:
    """One painting's calls of the networks, which inpaint.Networks describes, phase by phase.

    plan: how they are done. A call that finds no memory is made again in a smaller plan, once in a
    run, and one whose faster form fails on a GPU in the plain form; a pass of the VAE that overflows
    in half precision is made again in float32. Every output is checked for NaN and infinity.
    work: the UNet's average layer in multiply-adds.
    """

    def __init__(self, engine: Engine, request: Request, networks: PlainNetworks) -> None:
        self.engine, self.request, self.device = engine, request, engine.device
        planner, own = engine.planner(), (engine.checkpoint.unet, engine.checkpoint.vae)
        self.plan = planner.choose(request, engine.budget, engine.base)
        self.calls = Calls(networks, own, self.device, request.guided, planner.on_gpu, planner.thresholds)
        self.embeddings: dict[str, Tensor] = {}
        self.unchecked: list[tuple[Tensor, Tensor]] = []  # of outputs of the UNet: whether finite, and their timesteps
        weights, factor = engine.weights["unet"].directory.values(), engine.checkpoint.architecture.vae.factor
        self.work = request.rows * request.area // factor**2 * sum(stored.count for stored in weights) // len(weights)
        self.fallen_back = False
        reset_peak(self.device)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Free what was kept between the calls."""
        self.calls.forget()
        self.embeddings.clear()
        tune_heap(self.device, None)
        if kind is None:
            self._check_steps()
            self.engine.checkpoint.refuse_changed()

    @property
    def measured(self) -> int:
        """The most bytes taken since the run began, comparable with `plan.peak`."""
        return peak_memory(self.device)

    def embed(self, prompt: str) -> Tensor:
        """A prompt's embeddings [1, tokens, D] in the engine's number format, computed once in a run."""
        if prompt not in self.embeddings:
            dtype = self.engine.dtype
            embeddings = self._do("text", dtype, lambda phase: self.calls.networks.embed(prompt))
            _check(embeddings.isfinite().all(), "text encoder", dtype)
            self.embeddings[prompt] = embeddings.to(dtype)
        return self.embeddings[prompt]

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [n, 3, Y, X] -> the VAE's mean and log variance, [n, 4, y, x] float32 on the device."""
        moments = self._vae("encode", pixels, lambda x, phase: self.calls.encode(phase.strategy, x))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [n, 4, y, x] -> pixels [n, 3, Y, X] float32, on the CPU, where pictures are."""
        return self._vae("decode", latents, lambda z, phase: self.calls.decode(phase.strategy, z).cpu().float())

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The UNet's prediction [b, 4, y, x] float32 (calls.Calls.unet), checked without waiting for a GPU."""

        def call(phase: Phase) -> Tensor:
            return self.calls.unet(phase.strategy, x, t, context, streamed=phase.split is not None)

        output = self._do("denoise", self.engine.dtype, call)
        self.unchecked.append((output.isfinite().all(), t))
        if not self.calls.on_gpu:
            self._check_steps()
        return output

    def _check_steps(self) -> None:
        """Raise if an output of the UNet was not finite; asks a GPU once for all steps, as it waits for each answer."""
        if self.unchecked and not bool(torch.stack([finite for finite, _ in self.unchecked]).all()):
            for finite, t in self.unchecked:
                _check(finite, "UNet", self.engine.dtype, f" at timestep {int(t[0])}")
        self.unchecked.clear()

    def _vae(self, name: str, x: Tensor, call: Callable[[Tensor, Phase], Tensor]) -> Tensor:
        """A pass of the VAE, one picture at a time; in float32 if half precision overflows."""
        self._check_steps()
        self.calls.forget()  # the UNet's weights may be offloaded, and the prompt's part is over

        def passed(dtype: torch.dtype) -> Tensor:
            return torch.cat([self._do(name, dtype, partial(call, row[None])) for row in x])

        out, dtype, part = passed(self.engine.dtype), self.engine.dtype, f"VAE's {PHASES[name]}"
        if dtype != torch.float32 and not bool(out.isfinite().all()):
            told = f"the {part} overflowed in half precision; done again in float32"
            warnings.warn(told, MinpaintWarning, stacklevel=2)
            dtype = torch.float32
            try:
                out = passed(dtype)
            finally:
                self.engine.restore(name)
        _check(out.isfinite().all(), part, dtype)
        tune_heap(self.device, None)  # a large picture that is put together in a heap that is kept would tear it up
        return out

    def _do(self, name: str, dtype: torch.dtype, call: Callable[[Phase], Tensor]) -> Tensor:
        """A call of a phase's network with weights in a number format, made again in another way if it fails."""
        while True:
            try:
                return self._attempt(name, dtype, call)
            except Exception as error:
                if not is_out_of_memory(error):
                    if isinstance(error, MinpaintError) or not self._is_special(name):
                        raise
                    self._make_plain(name, f"{type(error).__name__}: {error}")
                    continue
            # out of the handler, where nothing of the failed call is alive any more
            if self.fallen_back:
                break
            self._fall_back(name)
        raise BudgetError(
            f"{self.device} ran out of memory in the phase {name}, planned with "
            f"{format_size(self.plan.phases[name].peak)}; lower --budget to what is really free, or free some"
        )

    def _attempt(self, name: str, dtype: torch.dtype, call: Callable[[Phase], Tensor]) -> Tensor:
        phase = self.plan.phases[name]
        if dtype != phase.strategy.dtype:
            phase = self.engine.planner(dtype).phase(name, self.request, self.plan.budget, self.plan.base)
        with capped(self.device, self.engine.budget), exact_float32(self.device, dtype), threads_for(self.work):
            self.engine.prepare(phase, not self.plan.resident, self.calls)
            return call(phase)

    def _is_special(self, name: str) -> bool:
        """Whether a phase runs on a GPU in another than the plain form, which is the place to look for a fault."""
        phase = self.plan.phases[name]
        special = phase.strategy.fast or phase.strategy.caches or phase.split is not None
        return self.calls.on_gpu and special

    def _make_plain(self, name: str, fault: str) -> None:
        """Plan without what has failed; MinpaintError if nothing plainer fits the budget."""
        streamed, fault = self.plan.phases[name].split is not None, fault[:200]
        if self.engine.plain:
            need = "streaming the weights, which this budget needs,"
            raise MinpaintError(f"{need} failed on {self.device} in the phase {name} ({fault}); raise --budget")
        self.calls.forget()
        self.engine.make_plain()
        self.plan = self.engine.planner().choose(self.request, self.plan.budget, self.plan.base)
        what = "streaming the weights beside the computing" if streamed else "--fast"
        told = f"{what} failed on {self.device} ({fault}); going on in the plain way, with the same result"
        warnings.warn(told, MinpaintWarning, stacklevel=2)

    def _fall_back(self, name: str) -> None:
        """Make a plan for less memory than the one that failed; for the least possible, if there is none."""
        engine, before = self.engine, self.plan
        self.fallen_back = True
        self.calls.forget()
        gc.collect()
        release_cached(self.device)
        there = used_memory(self.device) + free_memory(self.device)
        budget = min(engine.budget, there, int(SMALLER * before.phases[name].peak))
        budget = max(budget, engine.planner().least(self.request, before.base))
        self.plan = engine.planner().choose(self.request, budget, before.base)
        told = (
            f"{self.device} has less free memory than it had; going on within {format_size(self.plan.peak)} "
            f"instead of {format_size(before.peak)}, with the same result"
        )
        warnings.warn(told, MinpaintWarning, stacklevel=2)


def _check(finite: Tensor, what: str, dtype: torch.dtype, when: str = "") -> None:
    """MinpaintError if an output was not finite."""
    if not bool(finite):
        way_out = "the checkpoint is damaged" if dtype == torch.float32 else "use dtype fp32"
        raise MinpaintError(f"the {what} gave NaN or infinity{when}; {way_out}")
