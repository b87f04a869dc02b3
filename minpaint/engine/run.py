"""The networks of a checkpoint on one device, run within a budget: what a plan says is done here."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minpaint.checkpoint.load import Checkpoint
from minpaint.engine.banded import Bands, set_bands
from minpaint.engine.fast import Held, Prompt, accelerated, is_known
from minpaint.engine.memory import (
    Replay,
    capped,
    exact,
    forget_peak,
    format_size,
    free_memory,
    give_back,
    is_out_of_memory,
    is_watched,
    keep_heap,
    peak_memory,
    used_memory,
)
from minpaint.engine.plan import PHASES, Phase, Planner, Request, set_query_rows, split
from minpaint.engine.residency import Part
from minpaint.errors import BudgetError, MinpaintWarning
from minpaint.models.text import encode_prompt
from minpaint.models.vae import VAE

SMALLER = 3 / 4  # of what a phase was planned with, when the device turns out fuller than it was


class Networks(Protocol):
    """What a run calls: a painter, whose networks somebody may have replaced."""

    unet: nn.Module
    vae: VAE
    text_encoder: nn.Module
    tokenizer: Any


class Machine:
    """A checkpoint's networks, and where their weights are."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, budget: int) -> None:
        self.checkpoint, self.device, self.dtype, self.budget = checkpoint, device, dtype, budget
        self.planners: dict[torch.dtype, Planner] = {}
        self.now: Phase | None = None  # what the networks are set up for
        self.settled = False
        vae, directories = checkpoint.vae, checkpoint.architecture.directories
        models: dict[str, tuple[str, nn.Module, list[nn.Module]]] = {
            "text_encoder": ("text_encoder", checkpoint.text_encoder, [checkpoint.text_encoder]),
            "encoder": ("vae", vae, [vae.encoder, vae.quant_conv]),
            "unet": ("unet", checkpoint.unet, [checkpoint.unet]),
            "decoder": ("vae", vae, [vae.post_quant_conv, vae.decoder]),
        }
        self.parts = {
            key: Part(name, model, roots, directories[key], device, dtype, self.need)
            for key, (name, model, roots) in models.items()
        }

    @property
    def planner(self) -> Planner:
        """The planner for the networks' own number format."""
        return self.planner_in(self.dtype)

    def planner_in(self, dtype: torch.dtype) -> Planner:
        if dtype not in self.planners:
            self.planners[dtype] = Planner(self.checkpoint.architecture, self.device, dtype)
        return self.planners[dtype]

    @property
    def base(self) -> int:
        """Bytes that count against the budget and are not the weights'."""
        give_back(self.device)
        weights = sum(part.held for part in self.parts.values() if not part.changed)
        return max(used_memory(self.device) - weights, 0)

    def settle(self) -> None:
        """Bring all networks in if the budget holds them; they come and go as they are needed otherwise.

        Raises:
            BudgetError: the budget cannot hold even the smallest run.
        """
        self.settled = True
        base, factor = self.base, self.checkpoint.architecture.vae.factor
        if base + sum(part.size for part in self.parts.values()) > self.budget:
            self.planner.choose(Request(factor, factor, guided=False), self.budget, base)
            return
        for part in self.parts.values():
            part.come()

    def set_up(self, phase: Phase, alone: bool) -> None:
        """Bring a phase's network in, ready to run as the phase says; alone: send the others away."""
        if self.now is phase:
            return
        self.now = None
        give_back(self.device)
        part = self.parts[PHASES[phase.name]]
        for other in self.parts.values():
            if alone and other is not part:
                other.go()
        part.come(phase.division)
        part.convert(phase.dtype)
        set_query_rows(part.model, phase.query_rows)
        set_bands(self.checkpoint.vae, Bands(phase.bands) if phase.bands else None)
        self.now = phase

    def need(self, part: Part) -> None:
        """Bring a network in for a call from outside a run, where there is no room in place of others."""
        self.now = None
        if self.base + part.size + sum(other.held for other in self.parts.values()) > self.budget:
            for other in self.parts.values():
                other.go()
        part.come()


class Run:
    """One painting's calls of the networks, phase by phase.

    Raises:
        BudgetError: there is no way to keep within the budget.
    """

    def __init__(self, machine: Machine, request: Request, networks: Networks) -> None:
        self.machine, self.request, self.networks, self.device = machine, request, networks, machine.device
        self.plan = machine.planner.choose(request, machine.budget, machine.base)
        self.fallen_back = False
        self.prompt: Prompt | None = None
        self.held: dict[nn.Module, Held] = {}
        self.replay: Replay | None = None
        forget_peak(self.device)

    @property
    def measured(self) -> int:
        """The most bytes taken since the run began, comparable with `plan.peak`."""
        return peak_memory(self.device)

    def embed(self, prompt: str) -> Tensor:
        """A prompt's embeddings, [1, 77, D]."""
        tokenizer, text_encoder = self.networks.tokenizer, self.networks.text_encoder
        return self._do("text", lambda phase: encode_prompt(tokenizer, text_encoder, prompt), self.machine.dtype)

    def encode(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels [n, 3, Y, X] -> the VAE's mean and log variance, [n, 8, y, x] float32 on the device."""
        vae = self.networks.vae
        return self._vae("encode", lambda x: torch.cat(vae.encode(x), dim=1).float(), pixels, dtype)

    def decode(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Unscaled latents [n, 4, y, x] -> pixels [n, 3, Y, X] float32, on the CPU, where pictures are."""
        vae = self.networks.vae
        return self._vae("decode", lambda z: vae.decode(z).cpu().float(), latents, dtype)

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The UNet's prediction in float32, for a batch that may be split.

        x [n, 4 or 9, y, x], t [n], context [n or 2n, 77, D]: of twice as many rows the first n and
        the last n are for the same x. The same context tensor in every call means that what
        depends on it alone is computed once.
        """
        unet, guided = self.networks.unet, len(context) > len(x)
        if guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])

        def call(phase: Phase) -> Tensor:
            if self.prompt is None or self.prompt.context is not context:
                self._ask(phase, context)
            watched = is_watched(unet)
            paired = guided and phase.batch >= len(x) and not watched
            held = self.held if phase.held and not watched else None
            with self._accelerated(phase, unet, paired, held) as arithmetic:
                if self.replay is not None and not watched:
                    return self.replay(x.to(arithmetic), t).float()
                batches = (split(tensor, phase.batch) for tensor in (x.to(arithmetic), t, context))
                outputs = [unet(*batch).float() for batch in zip(*batches, strict=True)]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return self._do("denoise", call, self.machine.dtype)

    def close(self) -> None:
        """Let go of what was kept between calls; more of them may follow."""
        self._forget()
        keep_heap(self.device, None)

    def _forget(self) -> None:
        self.prompt, self.held, self.replay = None, {}, None

    def _ask(self, phase: Phase, context: Tensor) -> None:
        unet = self.networks.unet
        self.prompt, self.replay = Prompt(context), None
        whole = phase.batch >= len(context) and phase.division is None
        if self.device.type == "cuda" and phase.fast and whole and self._knows(unet):
            self.replay = Replay(lambda x, t: unet(x, t, context), self.device)

    @contextmanager
    def _accelerated(
        self, phase: Phase, network: nn.Module, paired: bool = False, held: dict[nn.Module, Held] | None = None
    ) -> Iterator[torch.dtype]:
        """For a call of a network; gives the number format that it then takes."""
        if not self._knows(network):
            yield phase.dtype
            return
        keep_heap(self.device, phase.keeps)
        arithmetic = None if self.device.type == "cuda" else phase.arithmetic
        prompt = self.prompt if phase.fast else None
        with accelerated(network, arithmetic, phase.fast, prompt, paired and phase.fast, held):
            yield phase.arithmetic

    def _knows(self, network: nn.Module) -> bool:
        """Whether a network is the checkpoint's own, as it is written."""
        return network in (self.machine.checkpoint.unet, self.machine.checkpoint.vae) and is_known(network)

    def _vae(self, name: str, call: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
        """A pass of the VAE, one picture at a time; perhaps in another number format than planned."""
        vae = self.networks.vae

        def one(row: Tensor) -> Callable[[Phase], Tensor]:
            def run(phase: Phase) -> Tensor:
                with self._accelerated(phase, vae) as arithmetic:
                    return call(row[None].to(self.device, arithmetic))

            return run

        self._forget()  # the UNet's weights may go, and the prompt's are needed no more
        try:
            pictures = [self._do(name, one(row), dtype) for row in x]
        finally:
            if dtype != self.machine.dtype:
                self.machine.parts[PHASES[name]].convert(self.machine.dtype)
                self.machine.now = None
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _do(self, name: str, call: Callable[[Phase], Tensor], dtype: torch.dtype) -> Tensor:
        """A call of a phase's network. Once in a run one that finds no memory is made again in less."""
        try:
            return self._attempt(name, call, dtype)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # out of the handler, where nothing of the failed call is held any more
        if not self.fallen_back:
            self._fall_back(name)
            try:
                return self._attempt(name, call, dtype)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        raise BudgetError(
            f"{self.device} ran out of memory in the phase {name}, planned with "
            f"{format_size(self.plan.phases[name].peak)}; lower --budget to what is really free, or free some"
        )

    def _attempt(self, name: str, call: Callable[[Phase], Tensor], dtype: torch.dtype) -> Tensor:
        phase = self.plan.phases[name]
        if dtype != phase.dtype:
            planner = self.machine.planner_in(dtype)
            phase = planner.phase(name, self.request, self.plan.budget, self.plan.base)
        with capped(self.device, self.machine.budget), exact(self.device, phase.dtype):
            self.machine.set_up(phase, alone=not self.plan.resident)
            return call(phase)

    def _fall_back(self, name: str) -> None:
        """A plan for less memory than the one that failed; for as little as is possible, if there is none."""
        machine, before = self.machine, self.plan
        self.fallen_back = True
        self._forget()
        gc.collect()
        give_back(self.device)
        there = used_memory(self.device) + free_memory(self.device)
        budget = min(machine.budget, there, int(SMALLER * before.phases[name].peak))
        budget = max(budget, machine.planner.least(self.request, before.base))
        self.plan = machine.planner.choose(self.request, budget, before.base)
        told = (
            f"{self.device} has less free memory than it had; going on within {format_size(self.plan.peak)} "
            f"instead of {format_size(before.peak)}, with the same result"
        )
        warnings.warn(told, MinpaintWarning, stacklevel=2)
