"""The same layers computed in less time, put on a network from outside and taken off again.

- 3x3 convolutions are Winograd's (winograd.py). On a small map most of their work is to transform the
  filters, which are cached where the plan has room; F(2x2, 3x3), whose filters take less than half of
  the memory, then pays for the smallest maps.
- Where the processor has units for bfloat16, which gain more than that, convolutions are oneDNN's. On a
  small map most of their work, and of a linear layer's, is to pack the weights into the units' order;
  packed weights are cached too.
- Feature maps lie with their channels together (NHWC), so attention needs no transposition.
- Weights in half precision are converted a layer at a time where the processor is no slower in
  float32 (device.choose_arithmetic): fewer roundings, and the memory of half precision.
- The keys and values of the prompt, the same in every step, are computed once.
- On a GPU the queries, keys and values of self-attention come from one product, by fused qkv weights.
- With guidance every latent passes twice, once with either prompt. What lies before the first
  attention to the prompt is computed for one of the two.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minpaint.engine.budget import is_out_of_memory
from minpaint.engine.device import has_bfloat16_kernels
from minpaint.engine.winograd import DEFAULTS, F2, F4, Filtering, LayerCache, Thresholds, winograd_convolve
from minpaint.errors import MinpaintWarning
from minpaint.models.attention import Attention

Cache = dict[nn.Module, LayerCache]  # weights in other forms that stay from call to call

FUSED_QKV, PACKED = "fused qkv", "packed"  # keys of a LayerCache, beside F2 and F4
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of a quick convolution, of the largest output
FIRST = "down_blocks.0.attentions.0"  # of a UNet's transformers
OF_PROMPT = (".attn2.to_k", ".attn2.to_v")  # the ends of names of layers that see nothing but the prompt
BEFORE_PROMPT = ("conv_in", "down_blocks.0.resnets.0", f"{FIRST}.proj_in", f"{FIRST}.transformer_blocks.0.attn1")


@dataclass
class PromptCache:
    """Keys and values of a run's prompt. context: the embeddings, the very tensor that the UNet is called with."""

    context: Tensor
    projected: dict[nn.Module, Tensor] = field(default_factory=dict)

    def project(self, layer: nn.Module, forward: Callable[[Tensor], Tensor], context: Tensor) -> Tensor:
        """The output of a layer that projects the context to keys or values, computed once for the prompt."""
        if context is not self.context:
            return forward(context)
        if layer not in self.projected:
            self.projected[layer] = forward(context)
        return self.projected[layer]


@contextmanager
def accelerated(
    network: nn.Module,
    arithmetic: torch.dtype | None,
    fast: bool = True,
    prompt: PromptCache | None = None,
    paired: bool = False,
    cache: Cache | None = None,
    thresholds: Thresholds = DEFAULTS,
) -> Iterator[None]:
    """Replace the forward functions of a network's layers by faster ones as long as the context is open.

    arithmetic: the number format that the network then takes and returns, whatever its weights are
    in; None leaves the layers as they are, as a GPU needs. fast: also use forms that take memory of
    their own. prompt: where the prompt's keys and values are kept. paired: the second half of a
    UNet's batch differs from the first in its context alone. cache: where weights in other forms are
    kept for the next call, but for those of the prompt's layers; they must not change meanwhile.
    """
    before = {module: vars(module).get("forward") for module in network.modules()}
    try:
        for name, module in network.named_modules():
            kind, attributes = type(module), vars(module)
            if arithmetic is None:
                if isinstance(module, Attention) and cache is not None:
                    attributes["forward"] = partial(_with_fused_qkv, module, cache.setdefault(module, {}))
            elif kind in LAYERS:
                function, layer_cache = LAYERS[kind], None
                if cache is not None and kind in (nn.Conv2d, nn.Linear) and not name.endswith(OF_PROMPT):
                    layer_cache = cache.setdefault(module, {})
                if kind is nn.Conv2d:
                    function = partial(convolve, fast=fast, cache=layer_cache, thresholds=thresholds)
                elif kind is nn.Linear:
                    function = partial(project, cache=layer_cache)
                attributes["forward"] = partial(_forward, function, module, arithmetic)
            if prompt is not None and name.endswith(OF_PROMPT):
                attributes["forward"] = partial(prompt.project, module, module.forward)
            if paired and name in BEFORE_PROMPT:
                attributes["forward"] = partial(_for_one_half, module.forward)
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def is_unmodified(network: nn.Module) -> bool:
    """Whether all layers with weights are of the kinds that can be accelerated, and nobody has put in others."""
    layers = [module for module in network.modules() if module._parameters]
    return all(type(layer) in LAYERS and "forward" not in vars(layer) for layer in layers)


def can_cache(weights: torch.dtype, arithmetic: torch.dtype) -> bool:
    """Whether the CPU has a use for weights in other forms.

    Transformed filters are float32, and packed weights bfloat16 of a library that knows it. Weights
    in half precision that are computed with in float32 are there to save memory, and are not cached.
    """
    packs = weights == torch.bfloat16 and has_bfloat16_kernels()
    return weights == arithmetic and (weights == torch.float32 or packs)


def convolve(
    x: Tensor, layer: nn.Conv2d, fast: bool = True, cache: LayerCache | None = None, thresholds: Thresholds = DEFAULTS
) -> Tensor:
    """A layer's convolution of [b, c, y, x] -> [b, o, y', x'], in x's number format. The layer has a bias."""
    weight, stride, padding = layer.weight, layer.stride, layer.padding
    bias = cast(Tensor, layer.bias)
    if x.dtype == torch.bfloat16:  # oneDNN's, with the channels together
        x = x.contiguous(memory_format=torch.channels_last)
        if (quick := _packed(x, layer, cache)) is not None:
            return quick
        weight = weight.to(x.dtype, memory_format=torch.channels_last)
        return F.conv2d(x, weight, bias.to(x.dtype), stride, padding)
    (outputs, channels, kernel, _), cells = weight.shape, x.shape[2] * x.shape[3]
    form = (kernel, stride[0], padding[0])
    if fast and form == (1, 1, 0):
        flat = weight.to(x.dtype).view(outputs, channels)
        return F.linear(x.permute(0, 2, 3, 1), flat, bias.to(x.dtype)).permute(0, 3, 1, 2)
    if fast and form == (3, 1, 1) and min(channels, outputs) >= thresholds.channels:
        least = thresholds.f2_cells if cache is not None else thresholds.f4_cells
        filtering = F4 if cells >= thresholds.f4_cells else F2
        if cells >= least and (x.is_meta or is_right(filtering)):
            return winograd_convolve(x, weight, bias, filtering, cache, thresholds)
    if fast and cells < thresholds.f4_cells:
        x = x.contiguous()  # NCHW: oneDNN reorders the weights faster for it, which is most of the work
    # with little memory, never all weights of a layer in both number formats
    at_once = outputs if fast or weight.dtype == x.dtype else thresholds.outputs
    parts = zip(torch.split(weight, at_once), torch.split(bias, at_once), strict=True)
    results = [F.conv2d(x, part.to(x.dtype), add.to(x.dtype), stride, padding) for part, add in parts]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


def project(x: Tensor, layer: nn.Linear, cache: LayerCache | None = None) -> Tensor:
    """A linear layer's output for [..., n], in x's number format."""
    quick = _packed(x, layer, cache) if x.dtype == torch.bfloat16 else None
    return F.linear(x, *_converted(layer, x.dtype)) if quick is None else quick


@functools.cache
def is_right(form: Filtering | type) -> bool:
    """Whether a quick form of a layer gives what the plain one gives; if not, a warning says so.

    form: a way of filtering, or the kind of layer whose packed weights are tried. Tried on one small
    layer, once in a process, at the form's first use: what is under the quick forms can change with
    PyTorch's next release, or on a processor that nobody has tested.
    """
    generator, is_linear = torch.Generator().manual_seed(0), form is nn.Linear
    kind = torch.float32 if isinstance(form, Filtering) else torch.bfloat16
    with torch.device("meta"):
        layer = nn.Linear(128, 128, dtype=kind) if is_linear else nn.Conv2d(128, 128, 3, padding=1, dtype=kind)
    layer = layer.to_empty(device="cpu").requires_grad_(False)
    x = torch.empty((2, 64, 128) if is_linear else (1, 128, 16, 16), dtype=kind)
    for tensor in (x, *layer.parameters()):
        tensor.normal_(generator=generator)
    if isinstance(form, Filtering):
        quick = winograd_convolve(x, layer.weight, cast(Tensor, layer.bias), form)
    else:
        quick = _with_packed_weight(x if is_linear else x.contiguous(memory_format=torch.channels_last), layer, {})
    plain = layer(x).float()
    difference = float((quick.float() - plain).abs().max() / plain.abs().max())
    right = difference <= LARGEST_DIFFERENCE[kind]  # so that NaN is wrong
    if not right:
        what = "linear layer" if is_linear else "convolution"
        told = f"a quick {what} is off by {difference:.1g} here; going on with the plain one, more slowly"
        warnings.warn(told, MinpaintWarning, stacklevel=2)
    return right


def _packed(x: Tensor, layer: Any, cache: LayerCache | None) -> Tensor | None:
    """The output of a convolution or a linear layer by packed weights, if it has a cache for them and they can be used.

    The operators for packed weights are private to PyTorch, and may refuse or change. If they fail,
    an empty list in the cache says so, and the layer is computed with its weights as they are.
    """
    if cache is None or cache.get(PACKED) == []:
        return None
    kind: Any = type(layer)
    try:
        if x.is_meta or is_right(kind):
            return _with_packed_weight(x, layer, cache)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cache[PACKED] = []
        _warn_of_refusal(str(error).partition("\n")[0])
    return None


def _with_packed_weight(x: Tensor, layer: Any, cache: LayerCache) -> Tensor:
    """The output for [b, c, y, x], channels together, or [..., n]; the weights are in the order of the units."""
    mkldnn, is_linear = torch.ops.mkldnn, isinstance(layer, nn.Linear)
    form = () if is_linear else (layer.padding, layer.stride, layer.dilation, layer.groups)
    if PACKED not in cache:
        if x.is_meta:
            cache[PACKED] = [layer.weight.clone()]
        elif is_linear:
            cache[PACKED] = [mkldnn._reorder_linear_weight(layer.weight, x.numel() // x.shape[-1])]
        else:
            cache[PACKED] = [torch.ops.aten.mkldnn_reorder_conv2d_weight(layer.weight.to_mkldnn(), *form, x.shape)]
    if x.is_meta:
        plain = F.linear if is_linear else partial(F.conv2d, stride=layer.stride, padding=layer.padding)
        return plain(x, layer.weight, layer.bias)
    call = mkldnn._linear_pointwise if is_linear else mkldnn._convolution_pointwise
    out: Tensor = call(x, cache[PACKED][0], layer.bias, *form, "none", [], "")
    return out


@functools.cache
def _warn_of_refusal(reason: str) -> None:
    """Warn once in a process for each reason."""
    told = f"PyTorch refuses packed bfloat16 weights ({reason[:200]}); going on with weights as they are, more slowly"
    warnings.warn(told, MinpaintWarning, stacklevel=2)


def _with_fused_qkv(module: Attention, cache: LayerCache, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Attention.forward; of self-attention with one product for queries, keys and values."""
    if context is not None:
        return Attention.forward(module, x, context)
    if FUSED_QKV not in cache:
        cache[FUSED_QKV] = [torch.cat([layer.weight for layer in (module.to_q, module.to_k, module.to_v)])]
    qkv = F.linear(x, cache[FUSED_QKV][0])
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=module.heads)
    out: Tensor = module.to_out(rearrange(module.attend(q, k, v), "b h n d -> b n (h d)"))
    return out


def _for_one_half(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A layer's output for a batch whose second half equals the first."""
    half = forward(*(x[: len(x) // 2] for x in inputs))
    return torch.cat([half, half])


def _forward(function: Callable[..., Tensor], layer: nn.Module, arithmetic: torch.dtype, x: Tensor) -> Tensor:
    return function(x.to(arithmetic), layer)


def _converted(layer: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Weight and bias of a layer, which may have no bias."""
    return layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)


LAYERS: dict[type, Callable[..., Tensor]] = {
    nn.Conv2d: convolve,
    nn.Linear: project,
    nn.GroupNorm: lambda x, layer: F.group_norm(x, layer.num_groups, *_converted(layer, x.dtype), layer.eps),
    nn.LayerNorm: lambda x, layer: F.layer_norm(x, layer.normalized_shape, *_converted(layer, x.dtype), layer.eps),
}
