"""The same layers computed in less time, put on a network from outside and taken off again.

What a layer wants in another form is made when it is called, and let go after it, but for what the
plan has room to hold from step to step: filters for the first kind below, and on a GPU joined weights.

- A 3x3 convolution by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv:1509.09308):
  36 products for 16 outputs where the definition takes 144. The transforms are matrix products
  themselves, and a few tiles go through at a time, which stay in the processor's cache. On a small
  map most of the work is to transform the filters, so that it pays to hold them from step to step;
  and then, on the smallest, F(2x2, 3x3), whose filters take less than half of the memory.
- Where the processor has units for bfloat16, they gain more than that, and convolutions are the
  library's: on a small map most of their work is to put the weights into the order that these units
  want, so that it pays to hold them in it.
- Feature maps lie with their channels together (NHWC), so that attention needs no transposition.
- Weights in half precision are widened a layer at a time where the processor is no slower in
  float32 (memory.choose_arithmetic): fewer roundings, and the memory of half precision.
- Keys and values of the prompt, the same in every step, are computed once.
- On a GPU the queries, keys and values of self-attention come from one product with joined weights.
- With guidance every latent goes through twice, beside either prompt: what lies before the first
  attention to the prompt is computed for one of the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minpaint.engine.memory import has_bfloat16_kernels, is_out_of_memory
from minpaint.errors import MinpaintWarning
from minpaint.models.attention import Attention, TransformerBlock

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Filtering:
    """F(m x m, 3x3): a tile of (m + 2)^2 cells gives m^2 outputs.

    data, filter, output: each one's transform in one dimension, [m + 2, m + 2], [m + 2, 3], [m, m + 2].
    """

    data: Matrix
    filter: Matrix
    output: Matrix

    @property
    def side(self) -> int:
        """m"""
        return len(self.output)

    def filters(self, weight: Tensor) -> Iterator[Tensor]:
        """Filters [o, c, 3, 3] -> as many float32 tensors [(m + 2)^2, some of o, c] as are made at a time."""
        transform = _both_ways(self.filter, weight.device)
        for part in torch.split(weight, OUTPUTS):
            flat = part.float().reshape(-1, 9)
            yield torch.mm(transform, flat.t()).view(len(transform), len(part), -1)


# Lavin & Gray, section 4.1
F2 = Filtering(
    data=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    filter=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    output=((1, 1, 1, 0), (0, 1, -1, -1)),
)
# and section 4.2
F4 = Filtering(
    data=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    filter=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    output=(
        (1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1),
    ),
)

Held = dict[Any, list[Tensor]]  # what was made of one layer's weights, by its form
JOINED, PACKED, REFUSED = "joined", "packed", "refused"

FIRST = "down_blocks.0.attentions.0"  # of a UNet's transformers
BEFORE_PROMPT = ("conv_in", "down_blocks.0.resnets.0", f"{FIRST}.proj_in", f"{FIRST}.transformer_blocks.0.attn1")

NARROW = 128  # channels; Winograd's way pays for layers as wide as this
SMALL = 16 * 16  # cells; F(4x4) pays for maps as large,
SMALLEST = 8 * 8  # and F(2x2), with filters that are held, for these
FEWEST_TILES = 128  # that go through together: fewer make poor matrix products,
CHUNK = 2**16  # and numbers of one place of the tiles: more would leave the cache
FEW_TILES = 64  # fewer than this are the right-hand side of the products, which is quicker then
MANY_TILES = 256  # beside as many as this, transforming the filters is little work, and they are not held
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
    held: dict[nn.Module, Held] | None = None,
) -> Iterator[None]:
    """For calls of a network: with its layers in other forms, and the prompt's keys and values known.

    arithmetic: the number format that the network then takes and gives, whatever its weights are
    in; None leaves the layers as they are written. quick: with forms that take memory of their own
    as well. paired: the second half of a UNet's rows differs from the first in its context alone.
    held: where weights in other forms are kept for the next call; they must not change meanwhile.
    """
    before: list[tuple[dict[str, Any], str, dict[str, Any]]] = []

    def replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        own = vars(module)
        before.append((own, name, {name: own[name]} if name in own else {}))
        own[name] = function

    try:
        for name, module in network.named_modules():
            if arithmetic is not None and type(module) in FORMS:
                form = partial(FORMS[type(module)], module, arithmetic, quick)
                if held is not None and type(module) is nn.Conv2d:
                    form = partial(form, held=held.setdefault(module, {}))
                replace(module, "forward", form)
            if arithmetic is None and held is not None and isinstance(module, Attention):
                replace(module, "queries_keys_values", partial(_joined, module, held.setdefault(module, {})))
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


def can_hold(weights: torch.dtype, arithmetic: torch.dtype) -> bool:
    """Whether there are weights to hold on the CPU: none that are in half precision to save memory alone."""
    packs = weights == torch.bfloat16 and has_bfloat16_kernels()
    return weights == arithmetic and (weights == torch.float32 or packs)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 1,
    quick: bool = True,
    held: Held | None = None,
) -> Tensor:
    """A convolution of [b, c, y, x] with [o, c, k, k] and [o] -> [b, o, y', x'], in x's number format."""
    if x.dtype == torch.bfloat16:
        return _convolve_in_bfloat16(x, weight, bias, stride, padding, held)
    (outputs, channels, kernel, _), (height, width) = weight.shape, x.shape[2:]
    small = height * width < SMALL
    wide = (kernel, stride, padding) == (3, 1, 1) and min(channels, outputs) >= NARROW
    if quick and (kernel, stride, padding) == (1, 1, 0):
        flat = weight.to(x.dtype).view(outputs, channels)
        return F.linear(x.permute(0, 2, 3, 1), flat, bias.to(x.dtype)).permute(0, 3, 1, 2)
    if quick and wide and not small:
        return _winograd(x, weight, bias, F4, held)
    if quick and wide and held is not None and height * width >= SMALLEST:
        return _winograd(x, weight, bias, F2, held)
    if quick and small:
        x = x.contiguous()  # NCHW: the library is quicker to reorder the weights for it, which is most of the work
    parts = [(weight, bias)]
    if not quick and weight.dtype != x.dtype:  # never all of a layer in both number formats
        parts = list(zip(torch.split(weight, OUTPUTS), torch.split(bias, OUTPUTS), strict=True))
    made = [F.conv2d(x, part.to(x.dtype), add.to(x.dtype), stride, padding) for part, add in parts]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def _convolve_in_bfloat16(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, held: Held | None
) -> Tensor:
    """A convolution by the library's kernel, with channels together and, where they are held, packed weights."""
    together = torch.channels_last
    x = x.contiguous(memory_format=together)
    if held is not None and REFUSED not in held:
        try:
            return _convolve_with_packed(x, weight, bias, stride, padding, held)
        except Exception as error:  # the operators are private to PyTorch, and may refuse or change
            if is_out_of_memory(error):
                raise
            held.pop(PACKED, None)
            held[REFUSED] = []
            _tell_refusal(str(error).partition("\n")[0])
    return F.conv2d(x, weight.to(x.dtype, memory_format=together), bias.to(x.dtype), stride, padding)


def _convolve_with_packed(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, held: Held) -> Tensor:
    """A convolution with weights in the order that the processor's units want, made by the first call."""
    shape = [2 * [padding], 2 * [stride], [1, 1], 1]  # with the dilation and the groups
    if PACKED not in held:
        pack = torch.ops.aten.mkldnn_reorder_conv2d_weight
        held[PACKED] = [weight.clone() if x.is_meta else pack(weight.to_mkldnn(), *shape, x.shape)]
    [packed] = held[PACKED]
    if x.is_meta:
        return F.conv2d(x, packed, bias, stride, padding)
    made: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *shape, "none", [], "")
    return made


@cache
def _tell_refusal(reason: str) -> None:
    """Say so, once in a process for one reason."""
    told = f"PyTorch refuses packed bfloat16 weights ({reason[:200]}); going on with weights as they are, more slowly"
    warnings.warn(told, MinpaintWarning, stacklevel=2)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor, form: Filtering, held: Held | None = None) -> Tensor:
    """A 3x3 convolution with padding 1 by minimal filtering, in float32.

    Tiles overlap by two cells; the map is padded to whole tiles.
    """
    (batch, channels, height, width), outputs, m, n = x.shape, len(weight), form.side, form.side + 2
    down, across = -(-height // m), -(-width // m)
    around = F.pad(x.permute(0, 2, 3, 1).float(), (0, 0, 1, m * across + 1 - width, 1, m * down + 1 - height))
    tiles = around.unfold(1, n, m).unfold(2, n, m).permute(4, 5, 0, 1, 2, 3)  # [n, n, b, down, across, c]
    out = torch.empty((batch, down, m, across, m, outputs), dtype=x.dtype, device=x.device)

    together = max(FEWEST_TILES, CHUNK // channels)
    images, rows = max(together // (down * across), 1), min(max(together // across, 1), down)
    chunks = [(image, row) for image in range(0, batch, images) for row in range(0, down, rows)]
    if x.is_meta:
        del chunks[1:]  # one takes the memory that all take
    data, result = _both_ways(form.data, x.device), _both_ways(form.output, x.device)
    filters: Iterable[Tensor] = form.filters(weight)
    if held is not None and batch * down * across < MANY_TILES:
        if form not in held:
            held[form] = list(filters)
        filters = held[form]
    elif len(chunks) > 1:
        filters = list(filters)  # needed more than once
    bias = bias.float()
    for image, row in chunks:
        place = (slice(image, image + images), slice(row, row + rows))
        cells = tiles[:, :, place[0], place[1]]
        seen = torch.mm(data, cells.reshape(n * n, -1)).view(n * n, -1, channels)
        count, first = seen.shape[1], 0
        for transformed in filters:
            last = first + transformed.shape[1]
            if count < FEW_TILES:
                made = torch.mm(result, torch.bmm(transformed, seen.mT).view(n * n, -1)).view(m * m, -1, count).mT
            else:
                made = torch.mm(result, torch.bmm(seen, transformed.mT).view(n * n, -1)).view(m * m, count, -1)
            made = made.view(m, m, *cells.shape[2:5], -1).permute(2, 3, 0, 4, 1, 5)
            torch.add(made, bias[first:last], out=out[(*place, ..., slice(first, last))])
            first = last
    return out.view(batch, m * down, m * across, outputs)[:, :height, :width].permute(0, 3, 1, 2)


@cache
def _both_ways(matrix: Matrix, device: torch.device) -> Tensor:
    """The transform of a square from that of its rows: its Kronecker product with itself."""
    numbers = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(numbers, numbers).float().to(device)


def _joined(module: Attention, held: Held, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention.queries_keys_values; where all three are of the same tokens, by one product."""
    if context is not None:
        return Attention.queries_keys_values(module, x, context)
    if JOINED not in held:
        held[JOINED] = [torch.cat([layer.weight for layer in (module.to_q, module.to_k, module.to_v)])]
    q, k, v = rearrange(F.linear(x, held[JOINED][0]), "b n (three h d) -> three b h n d", three=3, h=module.heads)
    return q, k, v


def _conv2d(layer: nn.Conv2d, arithmetic: torch.dtype, quick: bool, x: Tensor, held: Held | None = None) -> Tensor:
    assert layer.bias is not None
    return convolve(x.to(arithmetic), layer.weight, layer.bias, layer.stride[0], int(layer.padding[0]), quick, held)


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
