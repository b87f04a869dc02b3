"""The VAE in bands of rows: the same numbers in a fraction of the memory.

A feature map is written as a rule that makes any rows of it, and only one whole map is held at
a time. A convolution asks its input for the rows it covers, so bands overlap by as much as the
layers between two held maps need; a group norm, whose statistics are those of the whole picture,
first goes through all bands once. So there are no tiles that could show a seam or a tint; what
it costs is that most rows are made two or three times.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minpaint.models.attention import Attention, attend
from minpaint.models.layers import Downsample, ResidualBlock, Upsample
from minpaint.models.vae import VAE, Decoder, DecoderBlock, Encoder, EncoderBlock, MidBlock

LEAST_ROWS = 8  # of a band; fewer would mostly be overlap, and under 2 they could not be put back in place


@dataclass(frozen=True)
class Bands:
    """Into about how many bands a feature map is cut.

    some: the first three and the last only, which take the memory that all take; to measure it
    on the meta device, where nothing is computed.
    """

    count: int
    some: bool = False

    def of(self, height: int) -> Iterator[tuple[int, int]]:
        """First and last row + 1 of each band."""
        step = max(-(-height // self.count), LEAST_ROWS)
        tops = range(0, height, step)
        for top in (*tops[:3], *tops[3:][-1:]) if self.some else tops:
            yield top, min(top + step, height)


@dataclass(frozen=True)
class Map:
    """A feature map [b, c, height, x]: a rule that makes its rows from `top` up to `bottom`.

    held: the whole of it, where that is in memory.
    """

    height: int
    rows: Callable[[int, int], Tensor]
    held: Tensor | None = None


def set_attention_slices(model: nn.Module, rows: int | None) -> None:
    """Let all attention of a model run from `rows` query tokens at a time; None: from all at once."""
    for module in model.modules():
        if isinstance(module, Attention):
            vars(module).pop("attend", None)
            if rows is not None:
                vars(module)["attend"] = sliced_attend(rows)


def sliced_attend(rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """models.attention.attend with the scores of `rows` query tokens in memory at a time.

    A token of the result depends on one query only, so the slices together give the same.
    """

    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if rows >= q.shape[2]:
            return attend(q, k, v)
        return torch.cat([attend(part, k, v) for part in torch.split(q, rows, dim=2)], dim=2)

    return sliced


def set_bands(vae: VAE, bands: Bands | None) -> None:
    """Let a VAE run in bands from now on; None: whole, as it is written."""
    for module in (vae.encoder, vae.decoder):
        vars(module).pop("forward", None)
    if bands is not None:
        vars(vae.encoder)["forward"] = partial(encode, vae.encoder, bands)
        vars(vae.decoder)["forward"] = partial(decode, vae.decoder, bands)


def encode(encoder: Encoder, bands: Bands, x: Tensor) -> Tensor:
    """What the encoder gives: pixels [b, 3, Y, X] -> moments [b, 8, y, x]."""
    now = _convolved(encoder.conv_in, _hold(x))
    for block in encoder.down_blocks:
        assert isinstance(block, EncoderBlock)
        for module in itertools.chain(block.resnets, block.downsamplers):
            now = _through(module, now, bands)
    now = _through_middle(encoder.mid_block, now, bands)
    return _made(_convolved(encoder.conv_out, _normed(encoder.conv_norm_out, now, bands)), bands)


def decode(decoder: Decoder, bands: Bands, x: Tensor) -> Tensor:
    """What the decoder gives: latents [b, 4, y, x] -> pixels [b, 3, Y, X]."""
    now = _through_middle(decoder.mid_block, _convolved(decoder.conv_in, _hold(x)), bands)
    for block in decoder.up_blocks:
        assert isinstance(block, DecoderBlock)
        for module in itertools.chain(block.resnets, block.upsamplers):
            now = _through(module, now, bands)
    return _made(_convolved(decoder.conv_out, _normed(decoder.conv_norm_out, now, bands)), bands)


def _through_middle(block: MidBlock, x: Map, bands: Bands) -> Map:
    """The smallest maps: here the attention needs all of one."""
    x = _through(block.resnets[0], x, bands)
    return _through(block.resnets[1], _hold(block.attentions[0](x.held)), bands)


def _through(module: nn.Module, x: Map, bands: Bands) -> Map:
    if isinstance(module, ResidualBlock):
        return _residual(module, x, bands)
    if isinstance(module, Upsample):
        return _convolved(module.conv, _doubled(x))
    assert isinstance(module, Downsample)
    return _hold(_made(_convolved(module.conv, x, before=0), bands))


def _residual(block: ResidualBlock, x: Map, bands: Bands) -> Map:
    """layers.ResidualBlock.forward, put in the place of its input where that has the same shape."""
    h = _convolved(block.conv1, _normed(block.norm1, x, bands))
    h = _convolved(block.conv2, _normed(block.norm2, h, bands))
    shortcut = _convolved(block.conv_shortcut, x) if block.widens else x
    out = Map(x.height, lambda top, bottom: shortcut.rows(top, bottom) + h.rows(top, bottom))
    return _hold(_made(out, bands, None if block.widens else x.held))


def _convolved(conv: nn.Module, x: Map, before: int | None = None) -> Map:
    """A convolution; zeros around the map. `before`: how many at the top and the left, as its padding says."""
    assert isinstance(conv, nn.Conv2d)
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    above = int(conv.padding[0]) if before is None else before
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
        return wide[:, :, top % 2 :][:, :, : bottom - top]

    return Map(2 * x.height, rows)


def _normed(norm: nn.Module, x: Map, bands: Bands) -> Map:
    """silu(norm(x)) by the mean and the variance of all bands together (Chan et al. 1983)."""
    assert isinstance(norm, nn.GroupNorm)
    count, mean, square = 0, torch.zeros(()), torch.zeros(())  # square: the sum of squared differences from the mean
    for top, bottom in bands.of(x.height):
        grouped = torch.unflatten(x.rows(top, bottom), 1, (norm.num_groups, -1)).flatten(2)  # [b, g, numbers]
        variance, here = torch.var_mean(grouped.float(), dim=2, correction=0)
        fresh, shift = grouped.shape[2], here.double() - mean.to(here.device)
        del grouped
        square = square.to(here.device) + variance.double() * fresh + shift**2 * (count * fresh / (count + fresh))
        count += fresh
        mean = here.double() - shift * ((count - fresh) / count)
    width = norm.num_channels // norm.num_groups
    scale = norm.weight * (square / count + norm.eps).rsqrt().float().repeat_interleave(width, 1)  # [b, c]
    shift = norm.bias - mean.float().repeat_interleave(width, 1) * scale

    def rows(top: int, bottom: int) -> Tensor:
        seen = x.rows(top, bottom)
        return F.silu(torch.addcmul(shift[..., None, None], seen.float(), scale[..., None, None]).to(seen.dtype))

    return Map(x.height, rows)


def _made(x: Map, bands: Bands, place: Tensor | None = None) -> Tensor:
    """All rows of a map, in `place` of a map it is made from or in memory of their own.

    A band is put down when the next one is made: that may still look two rows back.
    """
    late: tuple[int, Tensor] | None = None
    for top, bottom in bands.of(x.height):
        band = x.rows(top, bottom)
        if place is None:
            place = band.new_empty((*band.shape[:2], x.height, band.shape[3]))
        if late is not None:
            _put(place, *late)
        late = top, band
    assert place is not None
    assert late is not None
    _put(place, *late)
    return place


def _put(place: Tensor, top: int, band: Tensor) -> None:
    place[:, :, top : top + band.shape[2]] = band


def _hold(x: Tensor) -> Map:
    return Map(x.shape[2], lambda top, bottom: x[:, :, top:bottom], x)
