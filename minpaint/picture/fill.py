"""Continuing a picture into its hole from what is known around it.

Pictures are [n, c, Y, X] of any scale; `known` is [Y, X], True where a pixel may be used.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

COARSEST = 4  # pixels on the short side of the membrane's smallest grid
SWEEPS = 32  # conjugate gradient steps on the finest grid; twice as many on each coarser one


def membrane(x: Tensor, known: Tensor, reach: float = math.inf, sweeps: int = SWEEPS) -> Tensor:
    """x with its unknown pixels on a membrane stretched over the known ones: Laplace's equation.

    The unknown part is as smooth as the known values around it allow, and stays between their
    least and largest. At the picture's own border the membrane is free (no flow across). Solved
    by conjugate gradients on ever finer grids, each starting from the one before (cascadic
    multigrid, Bornemann & Deuflhard 1996). With nothing known it is 0.

    reach: pixels over which the membrane falls back to 0, by a factor of e (the screened Poisson
    equation, Bhat et al. 2008); infinite for none. sweeps: steps on this grid.
    """
    if not bool(known.any()):
        return torch.zeros_like(x)
    x = x.float() * known
    if bool(known.all()):
        return x
    share = F.avg_pool2d(known[None, None].float(), 2, ceil_mode=True)
    mean = F.avg_pool2d(x, 2, ceil_mode=True) / share.clamp(min=1e-6)
    if min(x.shape[2:]) > COARSEST:
        guess = membrane(mean, share[0, 0] > 0, reach / 2, 2 * sweeps)
        guess = F.interpolate(guess, size=x.shape[2:], mode="bilinear")
    else:
        guess = (x.sum((2, 3), keepdim=True) / known.sum()).expand_as(x)
    x = torch.where(known, x, guess)
    del guess, mean, share  # of a large picture they take much memory
    return _relax(x, ~known, sweeps, reach**-2)


def _relax(x: Tensor, unknown: Tensor, sweeps: int, pull: float) -> Tensor:
    """x after conjugate gradient steps towards Laplacian(x) = pull * x on the unknown pixels.

    As many steps as there are unknown pixels solve it exactly. They are changed in place, as is all
    that is as large as x, because that may be a whole photo.
    """
    rows, columns = _reach(unknown.any(1)), _reach(unknown.any(0))
    around, unknown = x[..., rows, columns], unknown[rows, columns]  # the rest does not change
    residual = _laplacian(around).sub_(pull * around).mul_(unknown)
    direction, size = residual.clone(), residual.square().sum((2, 3), keepdim=True)
    for _ in range(min(sweeps, int(unknown.sum()))):
        image = (pull * direction).sub_(_laplacian(direction)).mul_(unknown)
        step = size / (direction * image).sum((2, 3), keepdim=True).clamp(min=1e-20)
        around += step * direction
        residual -= image.mul_(step)
        before, size = size, residual.square().sum((2, 3), keepdim=True)
        direction.mul_(size / before.clamp(min=1e-20)).add_(residual)
    return x


def _reach(marked: Tensor) -> slice:
    """From one place before the first that is marked to one after the last."""
    first, last = marked.nonzero()[[0, -1], 0].tolist()
    return slice(max(first - 1, 0), last + 2)


def _laplacian(x: Tensor) -> Tensor:
    """Sum of the differences to the four neighbours, [n, c, Y, X]; none across the border."""
    out = torch.zeros_like(x)
    step = x.diff(dim=3)
    out[..., :-1] += step
    out[..., 1:] -= step
    del step  # before the next one is made
    step = x.diff(dim=2)
    out[..., :-1, :] += step
    out[..., 1:, :] -= step
    return out


def nearest(known: Tensor) -> tuple[Tensor, Tensor]:
    """For every pixel the flat index of the nearest known one, and its distance in pixels, both [Y, X].

    Jump flooding (Rong & Tan 2006, with the extra first pass of their "1+JFA"). With nothing
    known the index is -1 and the distance infinite.
    """
    height, width = known.shape
    places = (torch.arange(side, dtype=torch.int32) for side in (height, width))  # half the memory of int64
    rows, columns = torch.meshgrid(*places, indexing="ij")
    found = torch.where(known.cpu(), rows * width + columns, -1)
    distance = torch.where(known.cpu(), 0.0, torch.inf)
    largest = max((max(height, width) - 1).bit_length() - 1, 0)
    jumps = [1, *(2**power for power in range(largest, -1, -1))]
    for jump, down, right in itertools.product(jumps, (-1, 0, 1), (-1, 0, 1)):
        here = _overlap(height, jump * down), _overlap(width, jump * right)
        there = _overlap(height, -jump * down), _overlap(width, -jump * right)
        candidate = found[there]
        y, x = ((candidate // width - rows[here]).float(), (candidate % width - columns[here]).float())
        away = y.hypot_(x).masked_fill_(candidate < 0, torch.inf)
        del x
        closer = away < distance[here]
        found[here] = torch.where(closer, candidate, found[here])
        distance[here] = torch.where(closer, away, distance[here])
    return found, distance


def _overlap(size: int, shift: int) -> slice:
    """The positions whose neighbour `shift` before them exists; empty if none has one."""
    return slice(min(max(shift, 0), size), max(min(size, size + shift), 0))


def from_nearest(x: Tensor, known: Tensor) -> Tensor:
    """x with each unknown pixel a copy of the nearest known one; 0 with nothing known."""
    if not bool(known.any()):
        return torch.zeros_like(x)
    found, _ = nearest(known)
    return x.flatten(2)[:, :, found.to(x.device)]
