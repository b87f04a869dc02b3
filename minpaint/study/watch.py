"""Watch a run: every output of the UNet's modules, and every attention, to be recorded or changed.

    with painter.watch(record="unet.*.attn2") as seen:
        [painting] = painter(image, mask, prompt)
    seen["unet.mid_block.attentions.0.transformer_blocks.0.attn2"][0].cond  # at step 0: [count, tokens, channels]

All of it is done by PyTorch's own forward hooks, which are taken off when the `with` statement ends in
whatever way. While a module has a hook, the engine computes what it otherwise computes once for several
rows or steps as the plain model does (engine/calls.py), so that a hook sees every call.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from minpaint.errors import InputError, MinpaintError
from minpaint.models.attention import Attention
from minpaint.models.networks import Networks

if TYPE_CHECKING:
    from minpaint.painter import Painter

PROJECTIONS = ("to_q", "to_k", "to_v")
UNET = "unet"  # the first part of every name
Patch = Callable[[int, Tensor], "Tensor | None"]  # (step, output) -> another output, or None to leave it
Attend = Callable[..., "Tensor | None"]  # (name, step, q, k, v, attend) -> the attention's result, or None to leave it


class Halves(NamedTuple):
    """A module's output in one step: without the prompt (None where the run has no guidance), and with it."""

    uncond: Tensor | None
    cond: Tensor

    @property
    def whole(self) -> Tensor:
        """Both in one batch, in the order in which the UNet has them."""
        return self.cond if self.uncond is None else torch.cat([self.uncond, self.cond])


class Seen(Mapping[str, "list[Halves]"]):
    """What was recorded, by module name: for every call of the UNet, in order, the module's output, on the CPU.

    step: the number of the call in progress, counted from 0 when watching began; None between calls.
    rows: which rows of its batch are being computed: all, unless the budget is too small for that.
    guided: whether the first half of the batch is without the prompt, and the second half with it.
    watching: until the `with` statement ends; a run that goes on after it is its own again.
    """

    def __init__(self) -> None:
        self.outputs: dict[str, list[Halves]] = {}
        self.step: int | None = None
        self.rows = slice(0, 0)
        self.guided = False
        self.calls = 0
        self.watching = True

    def __getitem__(self, name: str) -> list[Halves]:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


class WatchedNetworks:
    """A run's networks, of which the UNet tells when a call begins and ends, as long as it is watched."""

    def __init__(self, networks: Networks, seen: Seen, guided: bool, parts: dict[str, list[Tensor]]) -> None:
        self.embed, self.encode, self.decode = networks.embed, networks.encode, networks.decode
        self.networks, self.seen, self.guided, self.parts = networks, seen, guided, parts

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen = self.seen
        if not seen.watching:
            return self.networks.unet(x, t, context)
        seen.step, seen.guided, seen.rows = seen.calls, self.guided, slice(0)
        try:
            output = self.networks.unet(x, t, context)
            if seen.rows.stop != len(x):  # after a failure the engine begins again, with smaller batches
                raise MinpaintError("the device ran out of memory in a call that is watched; lower the budget")
            for name, parts in self.parts.items():
                whole = torch.cat(parts)
                uncond, cond = whole.chunk(2) if self.guided else (None, whole)
                seen.outputs[name].append(Halves(uncond, cond))
        finally:
            for parts in self.parts.values():
                parts.clear()
            seen.step = None
        seen.calls += 1
        return output


@dataclass
class Around:
    """What watching does with a run's networks; `before` is what was done with them already."""

    painter: Painter
    seen: Seen
    parts: dict[str, list[Tensor]]
    before: Callable[[Networks], Networks]

    def __call__(self, networks: Networks) -> Networks:
        run, networks = self.painter.last_run, self.before(networks)
        assert run is not None
        return WatchedNetworks(networks, self.seen, run.request.guided, self.parts)

    def end(self) -> None:
        """Stop watching; those who began later, and are not done, still come around this one until they are."""
        self.seen.watching = False
        while isinstance(self.painter.around, Around) and not self.painter.around.seen.watching:
            self.painter.around = self.painter.around.before


@contextmanager
def watch(
    painter: Painter,
    record: str | Sequence[str] = (),
    attend: Attend | None = None,
    patch: Mapping[str, Patch] | None = None,
) -> Iterator[Seen]:
    """Record, and change, what the modules of a painter's UNet compute in all runs made meanwhile.

    Args:
        record: names of modules to record, such as "unet.mid_block.resnets.0", with * and ? for any text. They
            are those of the official checkpoints, which all of this project's modules have too.
        attend: called for every attention as attend(name, step, q, k, v, attend), where q, k, v are
            [b, heads, tokens, channels of a head] and the last argument computes what the model would. What it
            returns, of q's shape, takes the place of the model's result; None leaves that as it is.
        patch: for a module's name, with * and ?, a function of (step, output) that returns another output of
            the same shape, or None to leave it. What is recorded is the patched output.

    A batch has `count` rows, or under guidance twice as many, the first half without the prompt. Calls of the UNet
    outside a run are not seen. Watching changes no result with the plain layers, and with the engine's faster
    ones by rounding: under 1e-5 of the latents, or 5e-5 where a run is unstable itself; see tests/test_watch.py.

    Raises:
        InputError: a name fits no module.
    """
    seen, parts = Seen(), dict[str, list[Tensor]]()
    called = [(name, module) for name, module in painter.unet.named_modules() if not isinstance(module, nn.ModuleList)]
    modules = {f"{UNET}.{name}".rstrip("."): module for name, module in called}  # a list is never called
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Callable[..., object]) -> None:
            stack.callback(module.register_forward_hook(function).remove)

        stack.callback(painter.unet.register_forward_pre_hook(partial(_begin, seen)).remove)
        for pattern, function in (patch or {}).items():
            for name in find(pattern, modules):
                hook(modules[name], partial(_patch, seen, name, function))
        for pattern in [record] if isinstance(record, str) else record:
            for name in find(pattern, modules):
                if name not in parts:
                    parts[name], seen.outputs[name] = [], []
                    hook(modules[name], partial(_record, seen, parts[name]))
        for name, module in modules.items():
            if isinstance(module, Attention) and attend is not None:
                projected: dict[str, Tensor] = {}
                for key in PROJECTIONS:
                    hook(module.get_submodule(key), partial(_project, seen, projected, key))
                replace = partial(_attend, seen, projected, partial(attend, name), module)
                stack.callback(module.to_out.register_forward_pre_hook(replace).remove)
        painter.around = Around(painter, seen, parts, painter.around)
        stack.callback(painter.around.end)
        yield seen


def find(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names that fit a pattern; InputError, with the nearest, if there is none."""
    found = fnmatch.filter(modules, pattern)
    if not found:
        near = difflib.get_close_matches(pattern, modules, 1, 0) or [UNET]
        raise InputError(f"no module of the UNet is named {pattern!r}; the nearest is {near[0]}")
    return found


# What the hooks call: PyTorch adds the module, what went into it and what came out. Outside a run they do nothing.


def _begin(seen: Seen, unet: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Count the rows of a call: where the plan splits a batch, one call of a run is several of the module."""
    if seen.step is not None:
        seen.rows = slice(seen.rows.stop, seen.rows.stop + len(inputs[0]))


def _record(seen: Seen, parts: list[Tensor], module: nn.Module, inputs: object, output: Tensor) -> None:
    if seen.step is not None:
        parts.append(output.detach().to("cpu", copy=True))


def _patch(seen: Seen, name: str, function: Patch, module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
    patched = None if seen.step is None else function(seen.step, output.clone())  # it may write into what it is given
    return None if patched is None else _checked(patched, output, f"the patch of {name}")


def _checked(given: Tensor, output: Tensor, what: str) -> Tensor:
    if given.shape != output.shape:
        raise InputError(f"{what} gave the shape {list(given.shape)} in the place of {list(output.shape)}")
    return given.to(output)


def _project(
    seen: Seen, projected: dict[str, Tensor], key: str, layer: nn.Module, inputs: object, output: Tensor
) -> None:
    if seen.step is not None:
        projected[key] = output


def _attend(
    seen: Seen,
    projected: dict[str, Tensor],
    attend: Attend,
    module: Attention,
    to_out: nn.Module,
    inputs: tuple[Tensor, ...],
) -> tuple[Tensor] | None:
    """Put what `attend` gives in the place of what the attention gave, before the output projection."""
    if seen.step is None:
        return None
    q, k, v = (rearrange(projected.pop(key), "b n (h d) -> b h n d", h=module.heads) for key in PROJECTIONS)
    result = attend(seen.step, q, k, v, module.attend)
    return None if result is None else (rearrange(_checked(result, q, "attend"), "b h n d -> b n (h d)"),)
