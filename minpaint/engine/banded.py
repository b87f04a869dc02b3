"""The VAE in bands of rows, and attention in slices of queries: the same numbers in a fraction of the memory.

A band is a range of rows of a feature map, as wide as the map. A feature map is written as a function
that computes any of its rows, and only one whole map is in memory at a time. A convolution asks its
input for the rows that its kernel covers, so bands overlap by as much as the layers between two whole
maps need. A group norm needs the statistics of the whole picture, and first goes through all bands
for them. So no tile has statistics of its own, which would show as seams and tints; the price is that
most rows are computed two or three times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minpaint.models.attention import Attention, attend
from minpaint.models.layers import Downsample, ResidualBlock, Upsample
from minpaint.models.vae import VAE, Decoder, Encoder

LEAST_ROWS = 8  # of a band; fewer would mostly be overlap, and under 2 they could not be written in place
Bands = Callable[[int], list[tuple[int, int]]]  # of a map's height: the first row and the last row + 1 of each band


@dataclass(frozen=True)
class Map:
    """A feature map [b, c, height, x]: a function that computes its rows from `top` up to `bottom`.

    whole: all of it, where that is in memory.
    """

    height: int
    rows: Callable[[int, int], Tensor]
    whole: Tensor | None = None


def set_attention_slices(model: nn.Module, rows: int | None) -> None:
    """Let all attention of a model run from `rows` query tokens at a time; None: from all at once."""
    for module in model.modules():
        if isinstance(module, Attention):
            vars(module).pop("attend", None)
            if rows is not None:
                vars(module)["attend"] = partial(sliced_attend, rows)


def sliced_attend(rows: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """models.attention.attend for `rows` query tokens at a time; a row of the result depends on one query alone."""
    parts = torch.split(q, rows, dim=2)
    if q.is_meta and len(parts) > 1:  # one beside the others' results takes the memory that all take
        return torch.cat([torch.empty_like(q[:, :, rows:]), attend(parts[0], k, v)], dim=2)
    slices = [attend(part, k, v) for part in parts]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=2)


def set_bands(vae: VAE, count: int | None) -> None:
    """Let a VAE cut its feature maps into about `count` bands from now on; None: run as it is written."""
    for half in (vae.encoder, vae.decoder):
        vars(half).pop("forward", None)
        if count is not None:
            vars(half)["forward"] = partial(_forward, half, count)


def _cut(count: int, is_meta: bool, height: int) -> list[tuple[int, int]]:
    """About `count` bands. On the meta device only the first three and the last: they take the memory of all."""
    step = max(-(-height // count), LEAST_ROWS)
    tops = range(0, height, step)
    return [(top, min(top + step, height)) for top in ((*tops[:3], *tops[3:][-1:]) if is_meta else tops)]


def _forward(half: Encoder | Decoder, count: int, x: Tensor) -> Tensor:
    """What Encoder.forward or Decoder.forward gives for x."""
    bands = partial(_cut, count, x.is_meta)
    blocks = half.down_blocks if isinstance(half, Encoder) else half.up_blocks
    layers = [layer for block in blocks for group in block.children() for layer in group.children()]
    middle = [half.mid_block.resnets[0], half.mid_block.attentions[0], half.mid_block.resnets[1]]
    now = _convolved(half.conv_in, _in_memory(x))
    for layer in [*layers, *middle] if isinstance(half, Encoder) else [*middle, *layers]:
        if isinstance(layer, ResidualBlock):
            now = _residual(layer, now, bands)
        elif isinstance(layer, Upsample):
            now = _convolved(layer.conv, _doubled(now))
        elif isinstance(layer, Downsample):
            now = _in_memory(_computed(_convolved(layer.conv, now), bands))
        else:  # attention, at the smallest size, needs the whole map
            now = _in_memory(layer(now.whole))
    return _computed(_convolved(half.conv_out, _normed(half.conv_norm_out, now, bands)), bands)


def _residual(block: ResidualBlock, x: Map, bands: Bands) -> Map:
    """layers.ResidualBlock.forward, written over its input where that has the same shape."""
    h = _convolved(block.conv1, _normed(block.norm1, x, bands))
    h = _convolved(block.conv2, _normed(block.norm2, h, bands))
    shortcut = _convolved(block.conv_shortcut, x) if block.widens else x
    out = Map(x.height, lambda top, bottom: shortcut.rows(top, bottom) + h.rows(top, bottom))
    return _in_memory(_computed(out, bands, None if block.widens else x.whole))


def _convolved(conv: nn.Conv2d, x: Map) -> Map:
    """A convolution; the encoder's strided ones have no padding of their own, and zeros below and to the right."""
    kernel, stride, above = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    below = kernel - stride - above

    def rows(top: int, bottom: int) -> Tensor:
        first, last = top * stride - above, (bottom - 1) * stride - above + kernel
        seen = x.rows(max(first, 0), min(last, x.height))
        weight, bias = (tensor.to(seen.dtype) for tensor in conv.parameters())
        if above == below and first >= 0 and last <= x.height:
            return F.conv2d(seen, weight, bias, stride, (0, above))
        zeros = (above, below, max(-first, 0), max(last - x.height, 0))
        return F.conv2d(F.pad(seen, zeros), weight, bias, stride)

    return Map((x.height + above + below - kernel) // stride + 1, rows)


def _doubled(x: Map) -> Map:
    """Nearest-neighbour enlargement."""

    def rows(top: int, bottom: int) -> Tensor:
        seen = x.rows(top // 2, (bottom + 1) // 2)
        wide = F.interpolate(seen, scale_factor=2.0, mode="nearest")
        return wide[:, :, top % 2 : top % 2 + bottom - top]

    return Map(2 * x.height, rows)


def _normed(norm: nn.GroupNorm, x: Map, bands: Bands) -> Map:
    """silu(norm(x)), the mean and the variance merged from those of all bands (Chan et al. 1983)."""
    exact = torch.float32 if norm.weight.device.type == "mps" else torch.float64  # mps has no float64
    count, mean = 0, torch.zeros((), dtype=exact, device=norm.weight.device)
    square = mean  # the sum of squared differences from the mean
    for top, bottom in bands(x.height):
        grouped = torch.unflatten(x.rows(top, bottom), 1, (norm.num_groups, -1)).flatten(2)  # [b, g, numbers]
        variance, band_mean = torch.var_mean(grouped.float(), dim=2, correction=0)
        new, shift = grouped.shape[2], band_mean.to(exact) - mean
        del grouped
        square = square + variance.to(exact) * new + shift**2 * (count * new / (count + new))
        count += new
        mean = band_mean.to(exact) - shift * ((count - new) / count)
    width = norm.num_channels // norm.num_groups
    scale = norm.weight * (square / count + norm.eps).rsqrt().float().repeat_interleave(width, 1)  # [b, c]
    shift = norm.bias - mean.float().repeat_interleave(width, 1) * scale

    def rows(top: int, bottom: int) -> Tensor:
        seen = x.rows(top, bottom)
        return F.silu(torch.addcmul(shift[..., None, None], seen.float(), scale[..., None, None]).to(seen.dtype))

    return Map(x.height, rows)


def _computed(x: Map, bands: Bands, target: Tensor | None = None) -> Tensor:
    """All rows of a map, written over `target`, a map that it is computed from, or into new memory.

    A band is written only after the next one has been computed, which may still read two rows above it.
    """
    (top, bottom), *others = bands(x.height)
    band = x.rows(top, bottom)
    out = band.new_empty((*band.shape[:2], x.height, band.shape[3])) if target is None else target
    for next_top, bottom in others:
        next_band = x.rows(next_top, bottom)
        out[:, :, top : top + band.shape[2]] = band
        top, band = next_top, next_band
    out[:, :, top : top + band.shape[2]] = band
    return out


def _in_memory(x: Tensor) -> Map:
    return Map(x.shape[2], lambda top, bottom: x[:, :, top:bottom], x)
