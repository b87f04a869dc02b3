"""Continuing a picture into its hole."""

from __future__ import annotations

import pytest
import torch

from minpaint.picture.fill import from_nearest, membrane, nearest


def solve(x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Laplace's equation for one channel [Y, X], by dense elimination."""
    height, width = known.shape
    unknown = {(y, c): k for k, (y, c) in enumerate((~known).nonzero().tolist())}
    a, b = torch.zeros(len(unknown), len(unknown), dtype=torch.double), torch.zeros(len(unknown), dtype=torch.double)
    for (y, c), k in unknown.items():
        for neighbour in ((y, c + 1), (y, c - 1), (y + 1, c), (y - 1, c)):
            if 0 <= neighbour[0] < height and 0 <= neighbour[1] < width:
                a[k, k] += 1
                if neighbour in unknown:
                    a[k, unknown[neighbour]] -= 1
                else:
                    b[k] += x[neighbour].double()
    solved = x.double().clone()
    solved[~known] = torch.linalg.solve(a, b)
    return solved


def hole(height: int, width: int) -> torch.Tensor:
    known = torch.ones(height, width, dtype=torch.bool)
    known[height // 6 : -2, 3 : -width // 5] = False
    known[height // 2, width // 2] = True  # an island
    return known


@pytest.mark.parametrize("size", [(40, 56), (33, 17), (9, 9)])
def test_the_membrane_solves_laplaces_equation(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, known = torch.rand(1, 2, *size, generator=generator), hole(*size)
    filled = membrane(x, known)
    assert torch.equal(filled[..., known], x[..., known])
    for channel in range(2):
        assert float((filled[0, channel] - solve(x[0, channel], known)).abs().max()) < 0.03


def test_a_hole_at_the_border_is_free_there() -> None:
    known = torch.ones(24, 24, dtype=torch.bool)
    known[:, 10:] = False
    rows = torch.linspace(0, 1, 24)[:, None].expand(24, 24)
    filled = membrane(rows[None, None], known)[0, 0]
    assert float((filled - solve(rows, known)).abs().max()) < 0.02
    assert float(membrane(torch.full((1, 1, 24, 24), 0.3), known).sub(0.3).abs().max()) < 1e-5


def test_a_large_slope_is_continued_across_a_large_hole() -> None:
    known = torch.ones(256, 256, dtype=torch.bool)
    known[3:-3, 3:-3] = False
    slope = (torch.arange(256) / 256).expand(1, 1, 256, 256)
    assert float((membrane(slope, known) - slope).abs().max()) < 0.005


@pytest.mark.parametrize("reach", [2.0, 6.0])
def test_a_membrane_of_some_reach_falls_off_by_a_factor_of_e(reach: float) -> None:
    """In one dimension the screened equation's solution is exp(-distance / reach)."""
    known = torch.zeros(8, 120, dtype=torch.bool)
    known[:, 0] = True
    fallen = membrane(torch.ones(1, 1, 8, 120), known, reach)[0, 0, 4]
    assert bool((fallen[: int(4 * reach)] - torch.exp(-torch.arange(120) / reach)[: int(4 * reach)]).abs().max() < 0.03)
    assert float(fallen[100:].abs().max()) < 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (70, 33), (5, 2)])
def test_the_nearest_known_pixel_is_found(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    known = torch.rand(size, generator=generator) < 0.05
    known[0, 0] = True
    found, distance = nearest(known)
    ys, xs = known.nonzero(as_tuple=True)
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    true = torch.hypot((rows[..., None] - ys).float(), (columns[..., None] - xs).float()).amin(-1)
    assert float((distance - true).max()) < 0.1  # jump flooding is at times a hair off
    assert bool(known.flatten()[found].all())
    assert torch.equal(torch.hypot((found // size[1] - rows).float(), (found % size[1] - columns).float()), distance)


def test_with_nothing_known_there_is_nothing_to_continue() -> None:
    x, known = torch.rand(1, 3, 12, 10), torch.zeros(12, 10, dtype=torch.bool)
    assert float(membrane(x, known).abs().max()) == 0
    assert float(from_nearest(x, known).abs().max()) == 0


def test_with_everything_known_nothing_changes() -> None:
    x, known = torch.rand(1, 3, 12, 10), torch.ones(12, 10, dtype=torch.bool)
    assert torch.equal(membrane(x, known), x)
    assert torch.equal(from_nearest(x, known), x)
