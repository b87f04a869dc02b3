"""What one implementation computes, layer by layer: recorded with hooks, and computed again on other inputs.

A stage is one call of a network: the prompt read (`text`), a picture encoded (`encode`), the UNet at a
timestep (`unet 0`, `unet 1`), latents decoded (`decode`). Layers are named after the component and the
module, as `unet.down_blocks.0.resnets.1.conv1`. They stand in the order in which they finish, so that
the parts of a layer come before it, and the whole network is the last.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minpaint.engine.device import without_gradients

UNLIKE = 1e9  # the relative error of what cannot be compared: another shape, NaN
ROLES = {  # what an argument of a module is for, by its names here and in the reference; the first is always x
    **dict.fromkeys(("temb", "emb", "time"), "time"),
    **dict.fromkeys(("encoder_hidden_states", "context"), "context"),
    **dict.fromkeys(("res_hidden_states_tuple", "skips"), "skips"),
    **dict.fromkeys(("timestep", "t"), "t"),
}

Inputs = Mapping[str, "Tensor | list[Tensor]"]  # by role: x, time, context, t; of skips a list


@dataclass
class Call:
    """One call of a module: with what, and what came out.

    arguments: as they were given; lists are copied, for a module may change its own. roles: the name of
    the argument that has each role.
    """

    name: str
    module: nn.Module
    arguments: inspect.BoundArguments
    roles: dict[str, str]
    output: Tensor

    @property
    def inputs(self) -> Inputs:
        return {role: self.arguments.arguments[name] for role, name in self.roles.items()}


@dataclass
class Layer:
    """A call as it is kept in a dump: tensors by role, and what came out.

    floor: how far the implementation is from itself when its rounding falls out differently
    (`noise_floor`); None if whoever made the dump has not measured it.
    """

    name: str
    inputs: Inputs
    output: Tensor
    floor: float | None = None


@dataclass
class Stage:
    """The layers of one call of a network; or of a whole run (`run`) tensors by name, see parity_dump.

    floors: as Layer.floor, of a run's parts.
    """

    name: str
    layers: list[Layer] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)


class Function(nn.Module):
    """A function of one tensor as a module, so that hooks see it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def named_modules(model: nn.Module, component: str, only: Collection[str] | None = None) -> dict[str, nn.Module]:
    """A model and its parts by the names of layers; transformers' versions differ in one prefix, which is left out."""
    found = {}
    for path, module in model.named_modules():
        path = path.removeprefix("text_model").removeprefix(".") if component == "text_encoder" else path
        name = f"{component}.{path}" if path else component
        if name not in found and (only is None or name in only):
            found[name] = module
    return found


def record(modules: Mapping[str, nn.Module], run: Callable[[], object], calls: list[Call]) -> None:
    """Run something, and append to `calls` every call of these modules, in the order in which they end."""
    begun: dict[str, inspect.BoundArguments] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun[name] = _copied(inspect.signature(type(module).forward).bind(module, *args, **kwargs))

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        bound, roles = begun.pop(name), {}
        for number, (parameter, value) in enumerate(bound.arguments.items()):
            role = "x" if number == 1 else ROLES.get(parameter)
            if role and isinstance(value, (Tensor, list)):
                roles[role] = parameter
        if "x" in roles:
            calls.append(Call(name, module, bound, roles, first_tensor(output)))

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, name)))
        run()
    finally:
        for handle in handles:
            handle.remove()


def _copied(bound: inspect.BoundArguments) -> inspect.BoundArguments:
    """The same arguments, with skips in a list of their own."""
    copy = bound.signature.bind_partial()
    for name, value in bound.arguments.items():
        copy.arguments[name] = list(value) if ROLES.get(name) == "skips" else value
    return copy


def first_tensor(output: Any) -> Tensor:
    """What a module is called for; the reference's return more beside it, in tuples or objects like them."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


@without_gradients
def replay(call: Call, inputs: Inputs) -> Tensor:
    """What the module of a call gives on other inputs, in the number format of its own; RuntimeError if they misfit.

    Of the skips, those that the other implementation hands to one block, only the last are replaced.
    """
    bound = _copied(call.arguments)
    for role, name in call.roles.items():
        own, given = bound.arguments[name], inputs.get(role)
        if isinstance(given, list):
            given = [tensor.to(own[-1]) for tensor in given]
            bound.arguments[name] = [*own[: len(own) - len(given)], *given]
        elif isinstance(given, Tensor):
            bound.arguments[name] = given.to(own)
    return first_tensor(call.module(*bound.args[1:], **bound.kwargs))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, Euclidean norms in float64; UNLIKE for another shape, NaN or infinity."""
    if ours.shape != reference.shape:
        return UNLIKE
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    difference, size = float((ours - reference).norm()), float(reference.norm())
    if not math.isfinite(difference) or not math.isfinite(size):
        return UNLIKE
    return difference / size if size else (UNLIKE if difference else 0.0)


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a number format: half of the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def perturbed(tensor: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Each number of a tensor moved up or down by the relative distance of two numbers of a format; others as it is."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
    return (tensor.double() * (1 + 2 * roundoff(dtype) * signs)).to(tensor.dtype)


def relaid(tensor: Tensor) -> Tensor:
    """The same feature map in the other order of memory, channels last instead of first or the reverse."""
    if tensor.ndim != 4:
        return tensor
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return tensor.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def noise_floor(call: Call, inputs: Inputs, output: Tensor, dtype: torch.dtype) -> float:
    """How far a module is from itself on inputs that are perturbed by rounding and laid out the other way in memory."""

    def other(tensor: Tensor) -> Tensor:
        return relaid(perturbed(tensor, dtype))

    changed = {
        role: value if role == "t" else [other(each) for each in value] if isinstance(value, list) else other(value)
        for role, value in inputs.items()
    }
    return relative_error(replay(call, changed), output)
