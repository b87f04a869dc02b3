"""Acceleration gives what the plain layers give, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_mask, make_picture, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import minpaint
from minpaint.engine import fast, run
from minpaint.engine.calls import Request
from minpaint.engine.cuda import GraphReplay, exact_float32, has_hooks
from minpaint.engine.device import choose_arithmetic, has_bfloat16_units
from minpaint.engine.fast import Cache, PromptCache, accelerated, can_cache, convolve, is_unmodified
from minpaint.engine.plan import Planner
from minpaint.engine.winograd import F2, F4, Filtering, LayerCache, Thresholds, winograd_convolve
from minpaint.errors import MinpaintWarning
from minpaint.models.attention import TransformerBlock

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 40),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    together=st.sampled_from([1, 5, 128]),
    few=st.sampled_from([0, 10**6]),
    form=st.sampled_from([F2, F4]),
)
def test_winograds_convolution_is_a_convolution(
    batch: int, channels: int, outputs: int, height: int, width: int, together: int, few: int, form: Filtering
) -> None:
    generator = torch.Generator().manual_seed(batch * height + width)
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight, bias = torch.randn(outputs, channels, 3, 3, generator=generator), torch.randn(outputs, generator=generator)
    thresholds, cache = Thresholds(tiles=together, few_tiles=few, numbers=1, outputs=32), LayerCache()
    found, again, anew = (winograd_convolve(x, weight, bias, form, kept, thresholds) for kept in (cache, cache, None))
    exact = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    size = x.abs().max() * weight.flatten(1).norm(dim=1).max()  # of what comes out, unless its terms cancel
    assert torch.equal(found, again)
    assert torch.equal(found, anew)
    assert found.shape == exact.shape
    assert float((found - exact).abs().max() / size) < 1e-5


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "padding", "side"),
    [
        (128, 144, 3, 1, 1, 18),
        (128, 128, 3, 1, 1, 7),
        (9, 128, 3, 1, 1, 20),
        (128, 128, 3, 2, 1, 17),
        (64, 96, 1, 1, 0, 5),
    ],
)
def test_every_shape_of_convolution_finds_a_form(
    channels: int,
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
    side: int,
    kind: torch.dtype,
    quick: bool,
) -> None:
    thresholds = Thresholds(outputs=50)
    x = torch.randn(2, channels, side, side)
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dtype=kind).requires_grad_(False)
    weight, bias = nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    exact = nn.functional.conv2d(x, weight.float(), bias.float(), stride, padding)
    wide = convolve(x, layer, quick, None, thresholds)
    assert wide.dtype == torch.float32
    assert relative_error(wide, exact) < 1e-5
    assert convolve(x.to(kind), layer, quick, None, thresholds).dtype == kind


# Small networks are too narrow for Winograd's method otherwise.
EVERYWHERE = Thresholds(channels=8, f4_cells=4)


def inputs(painter: minpaint.Painter) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, painter.unet_config.in_channels, 12, 9, generator=generator)
    context = torch.randn(2, 77, painter.unet_config.context_dim, generator=generator)
    return x, torch.tensor([801.0, 801.0]), context


@pytest.mark.parametrize("family", ["small-sd1", "small-sd2"])
def test_a_network_gives_the_same_and_keeps_no_trace(checkpoint: Callable[[str], Path], family: str) -> None:
    painter = minpaint.load(checkpoint(family), "cpu", "fp32")
    x, t, context = inputs(painter)
    plain, before = painter.unet(x, t, context), [dict(vars(module)) for module in painter.unet.modules()]
    prompt = PromptCache(context)
    for _ in range(2):
        with accelerated(painter.unet, torch.float32, prompt=prompt, thresholds=EVERYWHERE):
            found = painter.unet(x, t, context)
        assert 0 < relative_error(found, plain) < 1e-5
    assert [vars(module).keys() for module in painter.unet.modules()] == [attributes.keys() for attributes in before]
    assert torch.equal(painter.unet(x, t, context), plain)
    latents = torch.randn(1, 4, 12, 9)
    with accelerated(painter.vae, torch.float32, thresholds=EVERYWHERE):
        decoded = painter.vae.decode(latents)
    assert 0 < relative_error(decoded, painter.vae.decode(latents)) < 1e-4


def test_half_precision_computed_in_float32_is_nearer_to_it(checkpoint: Callable[[str], Path]) -> None:
    half, full = (minpaint.load(checkpoint("small-sd1"), "cpu", dtype) for dtype in ("bf16", "fp32"))
    x, t, context = inputs(full)
    exact = full.unet(x, t, context)
    plain = half.unet(x.bfloat16(), t, context.bfloat16())
    with accelerated(half.unet, torch.float32, thresholds=EVERYWHERE):
        found = half.unet(x, t, context)
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < relative_error(plain.float(), exact)


def test_keys_and_values_of_the_prompt_alone_are_remembered(checkpoint: Callable[[str], Path]) -> None:
    painter = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    x, t, context = inputs(painter)
    prompt = PromptCache(context)
    with accelerated(painter.unet, None, prompt=prompt):
        painter.unet(x, t, context)
        made = dict(prompt.projected)
        assert made
        context += 1  # nobody else has this tensor: that it is not looked at again shows
        painter.unet(x, t, context)
        assert prompt.projected == made
        other = context.clone()
        assert relative_error(painter.unet(x, t, other), painter.unet(x, t, context)) > 1e-6
    assert torch.equal(painter.unet(x, t, other), painter.unet(x, t, context))


@pytest.mark.parametrize("family", ["small-sd1", "small-sd2"])
def test_queries_keys_and_values_of_self_attention_are_one_product(
    checkpoint: Callable[[str], Path], family: str
) -> None:
    painter = minpaint.load(checkpoint(family), "cpu", "fp32")
    x, t, context = inputs(painter)
    plain, cache = painter.unet(x, t, context), Cache()
    queried: list[nn.Module] = []
    itself = [module.attn1 for module in painter.unet.modules() if isinstance(module, TransformerBlock)]
    for attention in itself:
        attention.to_q.register_forward_hook(lambda layer, *_: queried.append(layer))
    for _ in range(2):
        with accelerated(painter.unet, None, cache=cache):
            assert relative_error(painter.unet(x, t, context), plain) < 1e-5
    assert not queried
    fused = [tensor for forms in cache.values() for made in forms.values() for tensor in made]
    planner = Planner(painter.engine.checkpoint.architecture, torch.device("cuda"), torch.float32, fast=True)
    assert len(fused) == len(itself)
    assert planner.choose(Request(64, 64), 2**40, 0).phases["denoise"].cached == sum(tensor.nbytes for tensor in fused)
    painter.unet(x, t, context)
    assert queried == [attention.to_q for attention in itself]


def test_a_changed_layer_is_not_accelerated(checkpoint: Callable[[str], Path]) -> None:
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    painter = minpaint.load(checkpoint("small-sd1"), "cpu", "bf16")
    assert is_unmodified(painter.unet)
    layer = painter.unet.time_embedding.linear_1
    louder = Louder(layer.in_features, layer.out_features, dtype=torch.bfloat16)
    louder.load_state_dict(layer.state_dict())
    painter.unet.time_embedding.linear_1 = louder
    assert not is_unmodified(painter.unet)
    [painting] = painter(make_picture(), make_mask(), "a dog", steps=2)
    assert painting.latents.isfinite().all()


def test_a_run_uses_it_and_lets_go(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool | None] = []
    monkeypatch.setattr(run, "tune_heap", lambda device, keep: kept.append(keep))
    painter = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    steps = painter.steps(make_picture(), make_mask(), "a dog", steps=3)
    next(steps)
    assert painter.last_run is not None
    assert all(
        phase.strategy.fast and phase.strategy.keeps_heap
        for name, phase in painter.last_run.plan.phases.items()
        if name != "text"
    )
    assert painter.last_run.calls.prompt is not None
    assert kept[-1] is True
    steps.close()
    assert painter.last_run.calls.prompt is None
    assert kept[-1] is None


def test_guidance_towards_the_same_prompt_is_not_computed(checkpoint: Callable[[str], Path]) -> None:
    painter = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    rows: list[int] = []
    painter.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    [same] = painter(make_picture(), make_mask(), "a dog", negative_prompt="a dog", guidance=9, steps=3)
    [without] = painter(make_picture(), make_mask(), "a dog", guidance=1, steps=3)
    assert set(rows) == {1}
    assert torch.equal(same.latents, without.latents)


@pytest.mark.parametrize("family", ["small-sd1", "small-sd2", "small-sd1-4ch"])
def test_what_comes_before_the_prompt_is_computed_once(checkpoint: Callable[[str], Path], family: str) -> None:
    painter = minpaint.load(checkpoint(family), "cpu", "fp32")
    x, t, context = inputs(painter)
    x = torch.cat([x[:1], x[:1]])
    plain, attn1 = painter.unet(x, t, context), painter.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    rows: list[int] = []

    def watch(x: Tensor) -> Tensor:
        rows.append(len(x))
        return type(attn1).forward(attn1, x)

    attn1.forward = watch
    with accelerated(painter.unet, torch.float32, paired=True):
        assert relative_error(painter.unet(x, t, context), plain) < 1e-5
    assert attn1.forward is watch
    painter(make_picture(), make_mask(), "a dog", steps=1, count=2)
    painter(make_picture(), make_mask(), "a dog", steps=1, count=2, guidance=1)
    assert rows == [1, 2, 2]
    attn1.register_forward_hook(lambda *_: None)  # who looks sees all rows
    painter(make_picture(), make_mask(), "a dog", steps=1, count=2)
    assert rows[3:] == [4]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes PyTorch say of the processor what a test wants."""

    def be(kernels: bool, **capabilities: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels, raising=False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return be


def test_the_processor_is_asked_for_units(processor: Callable[..., None]) -> None:
    for kernels, amx, avx512, chosen in (
        (True, True, True, torch.bfloat16),
        (True, False, True, torch.bfloat16),
        (True, False, False, torch.float32),  # AVX-512 alone: converted to float32 and back
        (False, False, False, torch.float32),  # AVX2
        (False, True, True, torch.float32),  # the library was told to do without its units
    ):
        processor(kernels, amx_bf16=amx, avx512_bf16=avx512, avx2=True)
        assert choose_arithmetic(CPU, torch.bfloat16) == chosen
        assert can_cache(torch.bfloat16, torch.bfloat16) == kernels
        assert not can_cache(torch.bfloat16, torch.float32)
    for bf16 in (True, False):
        processor(True, neon=True, bf16=bf16)  # ARM
        assert choose_arithmetic(CPU, torch.bfloat16) == (torch.bfloat16 if bf16 else torch.float32)
    assert choose_arithmetic(CPU, torch.float16) == torch.float16
    assert choose_arithmetic(torch.device("cuda"), torch.bfloat16) == torch.bfloat16


def test_a_pytorch_that_cannot_tell_is_taken_to_lack_bfloat16_units(
    processor: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(True, amx_bf16=True)
    assert has_bfloat16_units()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_bfloat16_units()
    assert choose_arithmetic(CPU, torch.bfloat16) == torch.float32


@pytest.mark.parametrize("form", [F2, F4, nn.Conv2d, nn.Linear])
def test_a_quick_layer_that_is_wrong_gives_way_to_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, form: Filtering | type
) -> None:
    """As if another release of PyTorch, or another processor, gave something else: said once, and computed plainly."""
    if isinstance(form, Filtering):
        right = fast.winograd_convolve
        monkeypatch.setattr(fast, "winograd_convolve", lambda *given: 1.1 * right(*given))
    else:
        monkeypatch.setattr(fast, "_with_packed_weight", lambda x, layer, cache: 1.1 * layer(x))
    kind = torch.float32 if isinstance(form, Filtering) else torch.bfloat16
    generator, side = torch.Generator().manual_seed(3), 8 if form == F2 else 32
    call: Any = fast.project if form == nn.Linear else convolve
    layer: Any = nn.Linear(side, 128) if form == nn.Linear else nn.Conv2d(128, 128, 3, padding=1)
    layer = layer.to(kind).requires_grad_(False)
    x = torch.randn((2, 128, side, side), generator=generator).to(kind)
    fast.is_right.cache_clear()
    try:
        with pytest.warns(MinpaintWarning, match="a quick .* is off by 0.1 here") as told:
            found = [call(x, layer, cache=LayerCache()) for _ in range(3)]
        assert len(told) == 1
    finally:
        fast.is_right.cache_clear()
    assert all(relative_error(out, layer(x)) < (1e-6 if isinstance(form, Filtering) else 1e-2) for out in found)


@pytest.mark.parametrize("form", [F2, F4, nn.Conv2d, nn.Linear])
def test_the_quick_layers_are_right_on_this_machine(form: Filtering | type) -> None:
    if isinstance(form, type) and not can_cache(torch.bfloat16, torch.bfloat16):
        pytest.skip("this processor has no packed bfloat16 weights")
    fast.is_right.cache_clear()
    assert fast.is_right(form)


PRIVATE: dict[str, tuple[Any, Any, type]] = {  # where it is, what stands in for it, the kind of layer that calls it
    "mkldnn_reorder_conv2d_weight": (torch.ops.aten, lambda weight, *_: weight, nn.Conv2d),
    "_convolution_pointwise": (
        torch.ops.mkldnn,
        lambda x, weight, bias, padding, stride, *_: F.conv2d(x, weight, bias, stride, padding),
        nn.Conv2d,
    ),
    "_reorder_linear_weight": (torch.ops.mkldnn, lambda weight, _: weight, nn.Linear),
    "_linear_pointwise": (torch.ops.mkldnn, lambda x, weight, bias, *_: F.linear(x, weight, bias), nn.Linear),
}


@pytest.mark.parametrize("refused", PRIVATE)
def test_packed_weights_that_are_refused_end_in_the_plain_layer(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    painter = minpaint.load(checkpoint("small-sd1"), "cpu", "bf16")
    x, t, context = inputs(painter)
    asked: list[Tensor] = []
    refusal: Exception = RuntimeError("the processor lacks what it needs\nand more")

    def refuse(x: Tensor, *_: object) -> Tensor:
        asked.append(x)
        raise refusal

    # stand-ins, so that on any processor only the one that refuses fails
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda weight: weight)
    for name, (place, stand_in, _) in PRIVATE.items():
        monkeypatch.setattr(place, name, refuse if name == refused else stand_in)
    monkeypatch.setattr(fast, "is_right", lambda kind: True)
    fast._warn_of_refusal.cache_clear()
    cache, kind = Cache(), PRIVATE[refused][2]

    def call(cache: Cache | None) -> Tensor:
        with accelerated(painter.unet, torch.bfloat16, prompt=PromptCache(context), cache=cache):
            return painter.unet(x.bfloat16(), t, context.bfloat16())

    plain = call(None)
    with pytest.warns(MinpaintWarning, match="refuses packed bfloat16 weights .the processor lacks") as told:
        found = [call(cache) for _ in range(2)]
    assert all(torch.equal(each, plain) for each in found)
    assert len(told) == 1
    layers = [(name, type(layer)) for name, layer in painter.unet.named_modules()]
    packed = [its for name, its in layers if its in (nn.Conv2d, nn.Linear) and not name.endswith(fast.OF_PROMPT)]
    assert len(cache) == len(packed)
    assert len(asked) == packed.count(kind)  # once for each layer
    assert all((forms[fast.PACKED] == []) == isinstance(layer, kind) for layer, forms in cache.items())
    refusal = MemoryError()
    with pytest.raises(MemoryError):  # is no refusal, and there is a plan for it
        call({})


def test_a_replay_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the graph that runs the function again, as the recorded kernels would."""
    ran: list[str] = []

    class Graph:
        def replay(self) -> None:
            ran.append("replay")
            assert replay.output is not None
            replay.output.copy_(double(*replay.inputs))

    class Recording:
        def __init__(self, graph: Graph) -> None:
            ran.append("record")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def double(x: Tensor, t: Tensor) -> Tensor:
        return 2 * x + t

    for name, stand_in in (("CUDAGraph", Graph), ("graph", Recording), ("device", Recording)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replay = GraphReplay(double, CPU)
    results = [replay(torch.full((2,), float(x)), torch.tensor(1.0)) for x in range(4)]
    assert [ran.count(name) for name in ("record", "replay")] == [1 + 3, 3]  # the device is entered three times
    assert [float(result[0]) for result in results] == [1.0, 3.0, 5.0, 7.0]


def test_float32_on_a_gpu_is_float32() -> None:
    for device, inside in ((torch.device("cuda"), False), (CPU, True)):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True
        try:
            with exact_float32(device, torch.float32):
                assert torch.backends.cudnn.allow_tf32 is inside
            assert torch.backends.cudnn.allow_tf32 is True
        finally:
            torch.backends.cudnn.allow_tf32 = before


def test_a_picture_that_is_all_hole_is_encoded_once(checkpoint: Callable[[str], Path]) -> None:
    painter = minpaint.load(checkpoint("small-sd1"), "cpu", "fp32")
    calls: list[int] = []
    painter.vae.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for mask, times in ((Image.new("L", (64, 64), 255), 1), (make_mask(64, 64), 2)):
        calls.clear()
        painter(make_picture(64, 64), mask, "a dog", steps=1)
        assert len(calls) == times


def test_hooks_are_noticed() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not has_hooks(network)
    hook = network[1].register_forward_hook(lambda *_: None)
    assert has_hooks(network)
    hook.remove()
    assert not has_hooks(network)
