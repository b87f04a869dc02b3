"""The same layers computed in less time, put on a network from outside and taken off again.

Nothing is held beside the weights: what a layer wants in another form is made when it is called.

- A 3x3 convolution by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv:1509.09308,
  section 4.1): 36 products for 16 outputs where the definition takes 144. The transforms are matrix
  products themselves, and a few tiles go through at a time, which stay in the processor's cache.
- Feature maps lie with their channels together (NHWC), so that attention needs no transposition.
- Weights in half precision are widened a layer at a time where the processor is no slower in
  float32 (memory.choose_arithmetic): fewer roundings, and the memory of half precision.
- Keys and values of the prompt, the same in every step, are computed once.
- With guidance every latent goes through twice, beside either prompt: what lies before the first
  attention to the prompt is computed for one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minpaint.attention import Attention, TransformerBlock

# Lavin & Gray, section 4.2: the data's, the filter's and the output's transform in one dimension.
DATA = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)

FIRST = "down_blocks.0.attentions.0"  # of a UNet's transformers
BEFORE_PROMPT = ("conv_in", "down_blocks.0.resnets.0", f"{FIRST}.proj_in", f"{FIRST}.transformer_blocks.0.attn1")

NARROW = 128  # channels; Winograd's way pays for layers as wide as this
SMALL = 16 * 16  # cells; and for maps as large
FEWEST_TILES = 128  # that go through together: fewer make poor matrix products,
CHUNK = 2**16  # and numbers of one place of the tiles: more would leave the cache
FEW_TILES = 64  # fewer than this are the right-hand side of the products, which is quicker then
OUTPUTS = 320  # channels whose weights are transformed, or widened, at a time


@dataclass
class Prompt:
    """The prompt's embeddings in one run, the very tensor that the network is given, and what was made of it."""

    context: Tensor
    made: dict[Attention, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keys_values(self, module: Attention, context: Tensor) -> tuple[Tensor, Tensor]:
        """Attention.keys_values, computed once for the prompt."""
        if context is not self.context:
            return Attention.keys_values(module, context)
        if module not in self.made:
            self.made[module] = Attention.keys_values(module, context)
        return self.made[module]

    def fill(self, unet: nn.Module) -> None:
        """Make at once what the first call makes as it goes: from the second on all of it is there."""
        for module in unet.modules():
            if isinstance(module, TransformerBlock):
                self.keys_values(module.attn2, self.context)


@contextmanager
def accelerated(
    network: nn.Module,
    arithmetic: torch.dtype | None,
    quick: bool = True,
    prompt: Prompt | None = None,
    paired: bool = False,
) -> Iterator[None]:
    """For calls of a network: with its layers in other forms, and the prompt's keys and values known.

    arithmetic: the number format that the network then takes and gives, whatever its weights are
    in; None leaves the layers as they are written. quick: with forms that take memory of their own
    as well. paired: the second half of a UNet's rows differs from the first in its context alone.
    """
    before: list[tuple[dict[str, Any], str, dict[str, Any]]] = []

    def replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        own = vars(module)
        before.append((own, name, {name: own[name]} if name in own else {}))
        own[name] = function

    try:
        for name, module in network.named_modules():
            if arithmetic is not None and type(module) in FORMS:
                replace(module, "forward", partial(FORMS[type(module)], module, arithmetic, quick))
            if prompt is not None and isinstance(module, Attention):
                replace(module, "keys_values", partial(prompt.keys_values, module))
            if paired and name in BEFORE_PROMPT:
                replace(module, "forward", partial(_for_one_half, module.forward))
        yield
    finally:
        for own, name, there in reversed(before):
            own.pop(name)
            own.update(there)


def _for_one_half(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A function of rows of which the second half is as the first."""
    half = forward(*(x[: len(x) // 2] for x in inputs))
    return torch.cat([half, half])


def is_known(network: nn.Module) -> bool:
    """Whether all layers that have weights can be accelerated; somebody may have put in others."""
    layers = [module for module in network.modules() if module._parameters]
    return all(type(layer) in FORMS and "forward" not in vars(layer) for layer in layers)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 1, quick: bool = True) -> Tensor:
    """A convolution of [b, c, y, x] with [o, c, k, k] and [o] -> [b, o, y', x'], in x's number format."""
    (outputs, channels, kernel, _), (height, width) = weight.shape, x.shape[2:]
    small = height * width < SMALL
    if quick and (kernel, stride, padding) == (1, 1, 0):
        flat = weight.to(x.dtype).view(outputs, channels)
        return F.linear(x.permute(0, 2, 3, 1), flat, bias.to(x.dtype)).permute(0, 3, 1, 2)
    if quick and (kernel, stride, padding) == (3, 1, 1) and min(channels, outputs) >= NARROW and not small:
        return _winograd(x, weight, bias)
    if quick and small:
        x = x.contiguous()  # NCHW: the library is quicker to reorder the weights for it, which is most of the work
    parts = [(weight, bias)]
    if not quick and weight.dtype != x.dtype:  # never all of a layer in both number formats
        parts = list(zip(torch.split(weight, OUTPUTS), torch.split(bias, OUTPUTS), strict=True))
    made = [F.conv2d(x, part.to(x.dtype), add.to(x.dtype), stride, padding) for part, add in parts]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with padding 1 by F(4x4, 3x3), in float32.

    Tiles of 6x6 cells that overlap by two give 4x4 outputs each; the map is padded to whole tiles.
    """
    (batch, channels, height, width), outputs = x.shape, len(weight)
    down, across = -(-height // 4), -(-width // 4)
    around = F.pad(x.permute(0, 2, 3, 1).float(), (0, 0, 1, 4 * across + 1 - width, 1, 4 * down + 1 - height))
    tiles = around.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)  # [6, 6, b, down, across, c]
    out = torch.empty((batch, down, 4, across, 4, outputs), dtype=x.dtype, device=x.device)

    together = max(FEWEST_TILES, CHUNK // channels)
    images, rows = max(together // (down * across), 1), min(max(together // across, 1), down)
    chunks = [(image, row) for image in range(0, batch, images) for row in range(0, down, rows)]
    if x.is_meta:
        del chunks[1:]  # one takes the memory that all take
    data, result = _both_ways(DATA, x.device), _both_ways(OUTPUT, x.device)
    filters: Iterable[Tensor] = map(_transformed, torch.split(weight, OUTPUTS))
    if len(chunks) > 1:
        filters = list(filters)  # needed more than once
    bias = bias.float()
    for image, row in chunks:
        place = (slice(image, image + images), slice(row, row + rows))
        cells = tiles[:, :, place[0], place[1]]
        seen = torch.mm(data, cells.reshape(36, -1)).view(36, -1, channels)
        count, first = seen.shape[1], 0
        for transformed in filters:
            last = first + transformed.shape[1]
            if count < FEW_TILES:
                made = torch.mm(result, torch.bmm(transformed, seen.mT).view(36, -1)).view(16, -1, count).mT
            else:
                made = torch.mm(result, torch.bmm(seen, transformed.mT).view(36, -1)).view(16, count, -1)
            made = made.view(4, 4, *cells.shape[2:5], -1).permute(2, 3, 0, 4, 1, 5)
            torch.add(made, bias[first:last], out=out[(*place, ..., slice(first, last))])
            first = last
    return out.view(batch, 4 * down, 4 * across, outputs)[:, :height, :width].permute(0, 3, 1, 2)


def _transformed(weight: Tensor) -> Tensor:
    """Filters [o, c, 3, 3] -> [36, o, c] float32."""
    outputs, channels = weight.shape[:2]
    flat = weight.float().reshape(outputs * channels, 9)
    return torch.mm(_both_ways(FILTER, weight.device), flat.t()).view(36, outputs, channels)


@cache
def _both_ways(matrix: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """The transform of a square from that of its rows: its Kronecker product with itself."""
    numbers = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(numbers, numbers).float().to(device)


def _conv2d(layer: nn.Conv2d, arithmetic: torch.dtype, quick: bool, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return convolve(x.to(arithmetic), layer.weight, layer.bias, layer.stride[0], int(layer.padding[0]), quick)


def _linear(layer: nn.Linear, arithmetic: torch.dtype, quick: bool, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(arithmetic)
    return F.linear(x.to(arithmetic), layer.weight.to(arithmetic), bias)


def _group_norm(layer: nn.GroupNorm, arithmetic: torch.dtype, quick: bool, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight.to(arithmetic), layer.bias.to(arithmetic), layer.eps)


def _layer_norm(layer: nn.LayerNorm, arithmetic: torch.dtype, quick: bool, x: Tensor) -> Tensor:
    shape = list(layer.normalized_shape)
    return F.layer_norm(x, shape, layer.weight.to(arithmetic), layer.bias.to(arithmetic), layer.eps)


FORMS: dict[type, Any] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}
