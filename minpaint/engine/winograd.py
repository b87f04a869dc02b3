"""A 3x3 convolution by Winograd's minimal filtering (Lavin & Gray 2016, arXiv:1509.09308).

F(4x4, 3x3) needs 36 products for 16 outputs where the definition takes 144. The transforms are matrix
products themselves, and a few tiles at a time go through them, which stay in the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]
LayerCache = dict[Any, list[Tensor]]  # one layer's weights in other forms, by the form


@dataclass(frozen=True)
class Filtering:
    """F(m x m, 3x3): a tile of (m + 2)^2 cells gives m^2 outputs.

    data, filter, output: each one's transform in one dimension, [m + 2, m + 2], [m + 2, 3], [m, m + 2].
    """

    data: Matrix
    filter: Matrix
    output: Matrix

    def filters(self, weight: Tensor, at_once: int) -> Iterator[Tensor]:
        """Transformed filters of [o, c, 3, 3], float32 [(m + 2)^2, `at_once` of o, c] each."""
        transform = _in_two_dimensions(self.filter, weight.device)
        for part in torch.split(weight, at_once):
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
    output=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)


@dataclass(frozen=True)
class Thresholds:
    """Where one way to compute a convolution becomes faster than another."""

    channels: int = 128  # of the narrowest layer that Winograd's method pays for
    f4_cells: int = 16 * 16  # of the smallest map that F(4x4) pays for
    f2_cells: int = 8 * 8  # of the smallest map that F(2x2) pays for, if its filters are cached
    tiles: int = 128  # of a group that is transformed together, at least: fewer make poor matrix products
    numbers: int = 2**16  # at one place of a group's tiles, at most: more would leave the processor's cache
    few_tiles: int = 64  # fewer tiles than this are the right operand of the products, which is faster then
    many_tiles: int = 256  # from here on, transforming filters is little of the work, and they are not cached
    outputs: int = 320  # channels whose weights are transformed, or converted, at a time
    # Transformed filters are cached for at most so many pixels in all rows of a call, and at least so many
    # steps: otherwise they save less time than it takes to get memory for them.
    cached_pixels: int = 3 * 2**18
    cached_steps: int = 30


DEFAULTS = Thresholds()


def winograd_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    form: Filtering,
    cache: LayerCache | None = None,
    thresholds: Thresholds = DEFAULTS,
) -> Tensor:
    """A convolution of [b, c, y, x] with [o, c, 3, 3] and [o], padding 1 -> [b, o, y, x], computed in float32.

    Tiles overlap by two cells; the map is padded to whole tiles.
    """
    (batch, channels, height, width), outputs, m = x.shape, len(weight), len(form.output)
    n, down, across = m + 2, -(-height // m), -(-width // m)
    padded = F.pad(x.permute(0, 2, 3, 1).float(), (0, 0, 1, m * across + 1 - width, 1, m * down + 1 - height))
    tiles = padded.unfold(1, n, m).unfold(2, n, m).permute(4, 5, 0, 1, 2, 3)  # [n, n, b, down, across, c]
    out = torch.empty((batch, down, m, across, m, outputs), dtype=x.dtype, device=x.device)

    together = max(thresholds.tiles, thresholds.numbers // channels)
    images, rows = max(together // (down * across), 1), min(max(together // across, 1), down)
    groups = [(image, row) for image in range(0, batch, images) for row in range(0, down, rows)]
    if x.is_meta:
        del groups[1:]  # one takes the memory that all take
    filters: Iterable[Tensor] = form.filters(weight, thresholds.outputs)
    if cache is not None and batch * down * across < thresholds.many_tiles:
        if form not in cache:
            cache[form] = list(filters)
        filters = cache[form]
    elif len(groups) > 1:
        filters = list(filters)  # needed more than once
    data, output = _in_two_dimensions(form.data, x.device), _in_two_dimensions(form.output, x.device)
    bias = bias.float()
    for image, row in groups:
        place = (slice(image, image + images), slice(row, row + rows))
        cells = tiles[:, :, place[0], place[1]]
        seen = torch.mm(data, cells.reshape(n * n, -1)).view(n * n, -1, channels)
        count, first = seen.shape[1], 0
        for part in filters:
            last = first + part.shape[1]
            if count < thresholds.few_tiles:
                made = torch.mm(output, torch.bmm(part, seen.mT).view(n * n, -1)).view(m * m, -1, count).mT
            else:
                made = torch.mm(output, torch.bmm(seen, part.mT).view(n * n, -1)).view(m * m, count, -1)
            made = made.view(m, m, *cells.shape[2:5], -1).permute(2, 3, 0, 4, 1, 5)
            torch.add(made, bias[first:last], out=out[(*place, ..., slice(first, last))])
            first = last
    return out.view(batch, m * down, m * across, outputs)[:, :height, :width].permute(0, 3, 1, 2)


@functools.cache
def _in_two_dimensions(matrix: Matrix, device: torch.device) -> Tensor:
    """The transform of a square from that of its rows: its Kronecker product with itself."""
    numbers = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(numbers, numbers).float().to(device)
