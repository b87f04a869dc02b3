"""What attention tells about a prompt's words, and edits by it: functions for `painter.watch(attend=...)`.

    weights = {}
    with painter.watch(attend=remember(weights)):
        painter(image, mask, "a red tower", steps=20)
    with painter.watch(attend=prompt_to_prompt(weights, cross=16, own=8)):
        painter(image, mask, "a red tree", steps=20)  # in the place, the light and the pose of the tower

The names of attentions end in attn1, where the picture attends to itself, and attn2, where it attends to the
prompt. Shapes as in models/attention.py: b batch, h heads, n query tokens, m key tokens, d channels of a head.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from minpaint.errors import InputError
from minpaint.study.watch import Attend

TO_ITSELF, TO_PROMPT = "attn1", "attn2"
Weights = dict[tuple[str, int], Tensor]  # by name and step: [b, h, n, m]


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """How much of its result each of n tokens takes from each of m: softmax(q k^T / sqrt(d)), [b, h, n, m] float32.

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1. The sum over m is 1.
    """
    products = q.float() @ k.float().transpose(-1, -2)
    return (products / math.sqrt(q.shape[-1])).softmax(dim=-1)


def word_positions(tokenizer: Any, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, as written, each with the positions of its tokens in the text encoder's input.

    A word can have several tokens. Words past the length that the encoder takes are left out.
    """
    found: list[tuple[str, list[int]]] = []
    position, longest = 1, tokenizer.model_max_length - 1  # the first token and the last are the prompt's ends
    for word in prompt.split():
        count = len(tokenizer(word, add_special_tokens=False).input_ids)
        positions = [each for each in range(position, position + count) if each < longest]
        if positions:
            found.append((word, positions))
        position += count
    return found


def positions_of(tokenizer: Any, prompt: str, word: str) -> list[int]:
    """The positions of a word's tokens, wherever it stands in a prompt; InputError if it does not."""
    positions = [each for found, tokens in word_positions(tokenizer, prompt) if found == word for each in tokens]
    if not positions:
        raise InputError(f"the prompt {prompt!r} has no word {word!r}")
    return positions


def remember(weights: Weights, names: str = "*") -> Attend:
    """Keep the weights of the attentions whose names fit, and change nothing."""
    progress = _Progress()

    def attend(name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: object) -> None:
        if fnmatch.fnmatchcase(name, names):
            part, rows = attention_weights(q, k), progress.rows(name, step, len(q))
            weights[name, step] = torch.cat([weights[name, step], part]) if rows.start else part

    return attend


def prompt_to_prompt(weights: Weights, cross: int, own: int) -> Attend:
    """Paint another prompt with the attention that was remembered of a first run of the same settings.

    Hertz et al. 2022 (arXiv:2208.01626), section 3.2, word swap: both prompts need the same number of tokens.
    cross, own: in how many of the first steps the weights are replaced in attention to the prompt, which says
    where each word goes, and in the picture's attention to itself, which holds its shapes.
    """
    progress = _Progress()

    def attend(name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: object) -> Tensor | None:
        if step >= (cross if name.endswith(TO_PROMPT) else own):
            return None
        rows, kept, before = progress.rows(name, step, len(q)), weights.get((name, step)), (name, step - 1)
        short = before in progress.done and progress.done[before] < len(weights[before])
        if kept is None or short or kept[rows].shape != (*q.shape[:3], k.shape[2]):
            raise InputError(f"nothing of this shape is remembered of {name} at step {step}; repeat the first run's")
        return kept[rows].to(v) @ v

    return attend


class _Progress:
    """How many rows each attention has computed in each step: some at a time where the budget splits the batch."""

    def __init__(self) -> None:
        self.done: dict[tuple[str, int], int] = {}
        self.step = 0

    def rows(self, name: str, step: int, count: int) -> slice:
        """Which rows are the next ones."""
        if step < self.step:  # another run
            self.done.clear()
        self.step, first = step, self.done.get((name, step), 0)
        self.done[name, step] = first + count
        return slice(first, first + count)


def reweight(positions: Collection[int], factor: float) -> Attend:
    """Multiply the weight of a word by its tokens' positions: over 1 for more of it, under 1 for less.

    Hertz et al. 2022, section 3.2, attention re-weighting. Tokens of a negative prompt are weighted too.
    """

    def attend(name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: object) -> Tensor | None:
        if not name.endswith(TO_PROMPT):
            return None
        weights = attention_weights(q, k)
        weights[..., list(positions)] *= factor
        return weights.to(v) @ v

    return attend


def ablate(names: str, steps: Collection[int] = range(10**9)) -> Attend:
    """Let the attentions whose names fit give nothing, in all steps or in some."""

    def attend(name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: object) -> Tensor | None:
        return torch.zeros_like(q) if fnmatch.fnmatchcase(name, names) and step in steps else None

    return attend
