"""A watched run can be changed: what a module gives, what an attention gives, and the edits made of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mask, make_picture, relative_error
from torch import Tensor

import minpaint
from minpaint.painter import Painter, open_painter
from minpaint.samplers import Step
from minpaint.study.attention import (
    Weights,
    ablate,
    attention_weights,
    positions_of,
    prompt_to_prompt,
    remember,
    reweight,
    word_positions,
)
from minpaint.study.watch import Seen

Paint = Callable[[str], Painter]
Folders = Callable[[str], Path]
MIDDLE = "unet.mid_block"


@pytest.fixture
def ours(painter: Paint) -> Painter:
    return painter("small-sd1")


def paint(ours: Painter, prompt: str = "a dog", **options: Any) -> Tensor:
    [painting] = ours(make_picture(), make_mask(), prompt, steps=3, sampler="ddim", **options)
    return painting.latents


def step_by_step(ours: Painter, prompt: str = "a dog", **options: Any) -> list[Step]:
    return list(ours.steps(make_picture(), make_mask(), prompt, steps=4, sampler="ddim", **options))


# Modules -----------------------------------------------------------------------------------------


def patches(first: Seen) -> dict[str, Any]:
    """For every module that was recorded, what it gave then."""
    return {name: lambda step, output, name=name: first[name][step].whole for name in first}


@pytest.mark.parametrize("names", ["unet*", "unet.*.attn2", "unet.*.attn2.to_[kv]"])
def test_a_run_put_into_one_of_another_prompt_paints_the_first_again(ours: Painter, names: str) -> None:
    """All of it, or no more than what comes from the prompt."""
    with ours.watch(record=names) as first:
        before, other = (paint(ours, prompt, seed=1) for prompt in ("a dog", "a cat"))
    with ours.watch(patch=patches(first)):
        assert torch.equal(paint(ours, "a cat", seed=1), before)
    assert relative_error(other, before) > 1e-3


def test_a_run_put_into_one_of_another_seed_predicts_what_the_first_did(painter: Paint) -> None:
    ours = painter("small-sd2")
    with ours.watch(record="unet*") as first:
        before = step_by_step(ours, "a dog", seed=1)
    with ours.watch(patch=patches(first)):
        after = step_by_step(ours, "a cat", seed=2)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.eps, b.eps)
        assert not torch.equal(a.x, b.x)


def test_a_patch_of_some_steps_changes_them_and_what_follows(ours: Painter) -> None:
    with ours.watch(record=MIDDLE, patch={MIDDLE: lambda step, output: None}) as seen:
        before = step_by_step(ours)
    with ours.watch(record=MIDDLE, patch={MIDDLE: lambda step, output: 0 * output if step == 2 else None}) as patched:
        after = step_by_step(ours)
    assert [torch.equal(a.x, b.x) for a, b in zip(before, after, strict=True)] == [True, True, False, False]
    assert [bool(halves.whole.any()) for halves in patched[MIDDLE]] == [True, True, False, True]
    assert all(halves.whole.any() for halves in seen[MIDDLE])


def test_a_patch_that_writes_into_its_output_and_gives_nothing_changes_nothing(ours: Painter) -> None:
    """Keys and values of the prompt are computed once for all steps."""

    def erase(step: int, output: Tensor) -> None:
        output.zero_()

    with ours.watch():
        before = paint(ours)
    with ours.watch(patch={"unet.*.attn2.to_?": erase}):
        after = paint(ours)
    assert relative_error(after, before) < 1e-5


def test_an_output_of_another_shape_is_refused_by_name(ours: Painter) -> None:
    with (
        ours.watch(patch={"unet.mid_block.resnets.1": lambda step, output: output[:1]}),
        pytest.raises(minpaint.InputError, match=r"patch of unet\.mid_block\.resnets\.1 gave .* \[1, 64, 4, 4\]"),
    ):
        paint(ours)


# Attention ---------------------------------------------------------------------------------------


def attended(ours: Painter, prompt: str = "a dog", attend: Any = lambda *_: None, **options: Any) -> Tensor:
    """The latents of watched paintings."""
    settings = {"steps": 4, "sampler": "ddim"} | options
    with ours.watch(attend=attend):
        return torch.stack([painting.latents for painting in ours(make_picture(), make_mask(), prompt, **settings)])


def test_every_attention_is_seen_with_what_it_computes(ours: Painter) -> None:
    seen = set()

    def look(name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: Any) -> None:
        seen.add((name, step))
        heads = ours.unet.get_submodule(name.removeprefix("unet.")).heads
        assert q.shape[:2] == k.shape[:2] == (4, heads)
        assert k.shape == v.shape == (4, heads, 77 if name.endswith("attn2") else q.shape[2], q.shape[3])
        weights = attention_weights(q, k)
        assert weights.shape == (*q.shape[:3], k.shape[2])
        assert relative_error(weights.sum(-1), torch.ones(q.shape[:3])) < 1e-5
        assert relative_error(weights @ v, attend(q, k, v)) < 1e-5

    attended(ours, attend=look, count=2)
    names = {f"unet.{name}" for name, _ in ours.unet.named_modules() if name.endswith(("attn1", "attn2"))}
    assert seen == {(name, step) for name in names for step in range(4)}


def test_what_attend_gives_takes_the_models_place(ours: Painter) -> None:
    before = attended(ours)
    assert torch.equal(attended(ours, attend=lambda name, step, q, k, v, attend: attend(q, k, v)), before)
    assert relative_error(attended(ours, attend=lambda name, step, q, k, v, attend: 0 * q), before) > 1e-2


def test_what_attend_writes_into_its_inputs_is_forgotten(ours: Painter) -> None:
    """Keys and values of the prompt are computed once for all steps."""

    def erase(name: str, step: int, q: Tensor, k: Tensor, v: Tensor, attend: Any) -> None:
        for each in (q, k, v):
            each.zero_()

    assert torch.equal(attended(ours, attend=erase), attended(ours))


def test_a_result_of_another_shape_is_refused(ours: Painter) -> None:
    with pytest.raises(minpaint.InputError, match=r"^attend gave the shape \[2, 8, 64, 3\] in the place of"):
        attended(ours, attend=lambda name, step, q, k, v, attend: q[..., :3])


def test_an_attention_that_is_ablated_gives_its_bias_in_the_chosen_steps(ours: Painter) -> None:
    with ours.watch(record="unet.*.attn?", attend=ablate("*.attn2", steps=[1, 2])) as seen:
        ours(make_picture(), make_mask(), "a dog", steps=4)
    for name, outputs in seen.items():
        bias = ours.unet.get_submodule(f"{name}.to_out.0".removeprefix("unet.")).bias
        gone = [torch.allclose(halves.whole, bias.expand_as(halves.whole)) for halves in outputs]
        assert gone == [False, name.endswith("attn2"), name.endswith("attn2"), False], name


@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0])
def test_a_word_is_weighted(factor: float) -> None:
    q, k, v = (torch.randn(2, 3, tokens, 4) for tokens in (5, 7, 7))
    attend = reweight([2, 6], factor)
    assert attend("unet.attn1", 0, q, k, v, None) is None
    scores, factors = ((q @ k.transpose(2, 3)) / 2).exp(), torch.tensor([1, 1, factor, 1, 1, 1, factor])
    expected = scores / scores.sum(-1, True) * factors @ v
    assert torch.allclose(attend("unet.attn2", 0, q, k, v, None), expected, 1e-4, 1e-5)


def test_the_same_prompt_with_its_own_weights_gives_the_same_picture(ours: Painter) -> None:
    weights: Weights = {}
    first = attended(ours, attend=remember(weights), seed=1)
    assert torch.equal(first, attended(ours, seed=1))
    assert relative_error(attended(ours, attend=prompt_to_prompt(weights, 4, 4), seed=1), first) < 1e-5
    other = attended(ours, "a cat", seed=1)
    assert torch.equal(attended(ours, "a cat", prompt_to_prompt(weights, 0, 0), seed=1), other)
    for cross, own in ((1, 0), (0, 1)):
        assert relative_error(attended(ours, "a cat", prompt_to_prompt(weights, cross, own), seed=1), other) > 1e-5


@pytest.mark.usefixtures("without_base")
def test_a_batch_that_the_budget_splits_is_remembered(checkpoint: Folders, ours: Painter) -> None:
    poor = open_painter(checkpoint("small-sd1"), "cpu", "fp32", None, None)
    kept, latents = [], []
    for each in (ours, poor):
        kept.append(weights := Weights())
        attended(each, attend=remember(weights, "*.attn?"), count=2)
        latents.append(attended(each, "a cat", prompt_to_prompt(weights, 3, 2), count=2))
        poor.engine.budget = poor.engine.planner().least(ours.last_run.request, 0)
    assert poor.last_run.plan.phases["denoise"].strategy.batch == 1
    assert kept[0].keys() == kept[1].keys()
    assert all(relative_error(kept[1][key], kept[0][key]) < 1e-5 for key in kept[0])
    assert relative_error(latents[1], latents[0]) < 1e-5


@pytest.mark.parametrize("changed", [{"steps": 5}, {"count": 2}, {"guidance": 1.0}])
def test_what_is_not_remembered_cannot_be_put_back(ours: Painter, changed: dict[str, Any]) -> None:
    weights: Weights = {}
    attended(ours, attend=remember(weights))
    with pytest.raises(minpaint.InputError, match=r"nothing .* is remembered of unet\.\S+attn[12] at step [014]"):
        attended(ours, attend=prompt_to_prompt(weights, 9, 9), **changed)


def test_a_word_is_found_among_the_tokens(ours: Painter) -> None:
    prompt = "a dog, a cat"
    tokens = ours.tokenizer.convert_ids_to_tokens(ours.tokenizer(prompt).input_ids)
    found = word_positions(ours.tokenizer, prompt)
    assert [word for word, _ in found] == ["a", "dog,", "a", "cat"]
    for word, positions in found:
        assert "".join(tokens[position] for position in positions).replace("</w>", "") == word
    assert positions_of(ours.tokenizer, prompt, "a") == found[0][1] + found[2][1]
    assert all(position < 76 for _, positions in word_positions(ours.tokenizer, 50 * "dog ") for position in positions)
    with pytest.raises(minpaint.InputError, match="no word 'tower'"):
        positions_of(ours.tokenizer, prompt, "tower")
