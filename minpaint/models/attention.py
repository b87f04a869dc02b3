"""Attention: one `attend` for the whole project, and the two modules built on it.

Axes: b batch, n query tokens, m key tokens, h heads, d channels of a head, c channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over [b, h, n, d], [b, h, m, d], [b, h, m, d] -> [b, h, n, d].

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention from tokens [b, n, c] to a context [b, m, context_dim].

    Without a context the tokens attend to themselves. `bias` is for the projections of q, k
    and v; the output projection always has one. `attend` may be replaced on an instance, by a
    function that gives the same in another way.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(attend)

    def __init__(self, channels: int, heads: int, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        projections = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in projections)
        out: Tensor = self.to_out(rearrange(self.attend(q, k, v), "b h n d -> b n (h d)"))
        return out


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020, arXiv:2002.05202): [b, n, c] -> [b, n, out]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """[b, n, c] -> [b, n, c] through 4c gated channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The middle place was a dropout in training; it keeps the official key of the last.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each added to its input."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """A transformer block over the cells of a feature map [b, c, y, x], added to it.

    `linear`: the projections in and out are linear layers (SD 2) or 1x1 convolutions (SD 1);
    the same function, stored differently.
    """

    def __init__(self, channels: int, heads: int, context_dim: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        # 1e-6, unlike the residual blocks' 1e-5: diffusers/models/transformers/transformer_2d.py
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        to_tokens = partial(rearrange, pattern="b c y x -> b (y x) c")
        to_map = partial(rearrange, pattern="b (y x) c -> b c y x", y=x.shape[2])
        residual, x = x, self.norm(x)
        x = self.proj_in(to_tokens(x)) if self.linear else to_tokens(self.proj_in(x))
        for block in self.transformer_blocks:
            x = block(x, context)
        x = to_map(self.proj_out(x)) if self.linear else self.proj_out(to_map(x))
        return x + residual


class SpatialSelfAttention(Attention):
    """Single-head self-attention over a feature map [b, c, y, x], added to it (VAE)."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c y x -> b (y x) c")
        out = rearrange(super().forward(tokens), "b (y x) c -> b c y x", y=x.shape[2])
        return x + out
