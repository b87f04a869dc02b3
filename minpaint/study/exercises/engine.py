"""Chapters 8 and 9: memory and speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minpaint.engine.measure import measure
from minpaint.study.exercises.lab import Answer, Lab, Result, apart, exercise

MEMORY, SPEED = "8 memory", "9 speed"


@exercise(MEMORY)
def bytes_of_scores(lab: Lab, answer: Answer) -> Result:
    """bytes_of_scores(width, height, heads, rows) -> bytes of the scores q k^T of the UNet's first self-attention.

    width and height are the picture's in pixels, of which a latent cell has 8 x 8; rows are those of the batch. A
    score is four bytes. For 512 x 512 pixels, 8 heads and 2 rows it is a gigabyte: why attention is sliced, or fused.
    """
    wrong = 0
    for width, height, heads, rows in ((512, 512, 8, 2), (768, 512, 5, 1), (64, 64, 8, 2)):
        q = torch.empty(rows, heads, width // 8 * (height // 8), 1, device="meta")
        wrong += answer(width, height, heads, rows) != (q @ q.transpose(2, 3)).nbytes
    return Result(wrong, 0, "wrong of 3")


@exercise(MEMORY)
def sliced_attention(lab: Lab, answer: Answer) -> Result:
    """sliced_attention(q, k, v, rows) -> the same as `attention`, for `rows` query tokens at a time.

    Each query has a softmax of its own, so nothing changes but the memory: measured here in shares of what all at once
    takes, on tensors without numbers.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 8, generator=generator) for _ in range(3))
    if apart(answer(q, k, v, 32), F.scaled_dot_product_attention(q, k, v)) > 1e-5:
        return Result(float("inf"), 0.3, "another result;")
    q, k, v = (torch.empty(1, 8, 1024, 40, device="meta") for _ in range(3))
    sliced = measure(lambda: answer(q, k, v, 32)).live
    whole = measure(lambda: (q @ k.transpose(2, 3)).softmax(-1) @ v, fused=False).live
    return Result(sliced / whole, 0.3, "peak in shares of the whole's")


class _Number:
    """A number that counts how often it is multiplied."""

    products = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __add__(self, other: Any) -> _Number:
        return _Number(self.value + _value(other))

    def __sub__(self, other: Any) -> _Number:
        return _Number(self.value - _value(other))

    def __rsub__(self, other: Any) -> _Number:
        return _Number(_value(other) - self.value)

    def __neg__(self) -> _Number:
        return _Number(-self.value)

    def __mul__(self, other: Any) -> _Number:
        _Number.products += 1
        return _Number(self.value * _value(other))

    __radd__, __rmul__ = __add__, __mul__


def _value(number: Any) -> float:
    return number.value if isinstance(number, _Number) else float(number)


@exercise(SPEED)
def winograd(lab: Lab, answer: Answer) -> Result:
    """winograd(d, g) -> two outputs of a filter of three taps: d0 g0 + d1 g1 + d2 g2, and d1 g0 + d2 g1 + d3 g2.

    d has four numbers and counts its products; g has three, and what depends on g alone is free, as filters are
    transformed once. The definition needs six products, Winograd's F(2, 3) four: Lavin & Gray 2016
    (arXiv:1509.09308), section 4.1.
    """
    d, g = [3.0, -1.0, 4.0, 1.5], [0.5, -2.0, 7.0]
    expected = torch.tensor([sum(d[i + j] * g[j] for j in range(3)) for i in range(2)])
    _Number.products = 0
    found = answer([_Number(value) for value in d], g)
    if apart(torch.tensor([_value(each) for each in found]), expected) > 1e-6:
        return Result(float("inf"), 4, "another result;")
    return Result(_Number.products, 4, "products")


@exercise(SPEED)
def once(lab: Lab, answer: Answer) -> Result:
    """once(function) -> a function that gives the same, but calls `function` only when its tensor is another one.

    The prompt's keys and values are the same in every step. The very same tensor object needs no second call; an equal
    one may get one.
    """
    calls: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    remembered: Callable[[Tensor], Tensor] = answer(double)
    contexts = [lab.noise(1), lab.noise(2)]
    errors = [apart(remembered(contexts[i]), 2 * contexts[i]) for i in (0, 0, 0, 1, 1, 0)]
    if max(errors) > 0:
        return Result(float("inf"), 3, "another result;")
    return Result(len(calls), 3, "calls for six questions")
