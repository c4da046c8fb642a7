"""Hierarchical attention: fine queries, coarse keys and values, one exact softmax.

`pyramid` says what is seen; `plain`, `fused` and `flex` are three ways to compute it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from h_transformer_1d.checks import IMPLEMENTATIONS, check_options
from h_transformer_1d.flex import attend_flex, flex_serves
from h_transformer_1d.fused import attend_fused
from h_transformer_1d.plain import attend_plain
from h_transformer_1d.pyramid import accumulator, count_levels
from shared_core import transformed
from shared_core.checks import check_choice, check_dropout, check_mask


def h_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    block_size: int,
    scheme: str = "sibling",
    query_resolution: str = "fine",
    level_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Hierarchical attention (Zhu & Soricut 2021) with one softmax over all levels.

    Nearby tokens are seen one by one, tokens at a distance as means of 2, 4, 8, ...; a mean of
    n tokens carries a logit of log(n), so that every row is a weighted mean over all tokens
    it may see. The paper sums values and normalises each level by itself; here the rows of the
    attention matrix sum to one.

    Args:
        q: (b, h, n, d), any n >= 1.
        k, v: (b, g, n, d); h is a multiple of g, and h / g neighbouring query heads share one.
        causal: a token sees itself and what is before it.
        mask: (b, n) boolean, True = take part. Masked tokens are seen by no one and ask with a
            query of 0; what they hold, NaN included, changes nothing. A row with nothing to see
            gives 0.
        block_size: tokens that are seen one by one around each token.
        scheme: "sibling" halves the sequence again and again, "neighbor" is the paper's
            partition: more accurate, about 1.5 times the work, needs an even block size.
        query_resolution: "fine", or "coarse" to average queries at the level of the keys they
            meet, the paper's O(n) form; not with `causal`, where a mean would see later queries.
        level_bias: (levels, h), finite, added to the logits of each level; levels beyond use the
            last row.
        scale: factor of the logits, 1 / sqrt(d) by default.
        dropout: probability of dropping an attention weight.
        impl: "auto" (the fastest; for up to two blocks without gradients it is PyTorch's own exact
            attention, which is the same there), "fused" (own backward pass, memory linear in n),
            "plain" (differentiable operations), or "flex"
            (`torch.nn.attention.flex_attention`, made for CUDA, without
            `query_resolution="coarse"`, dropout and double backward).

    Returns:
        (b, h, n, d) in the type of q.

    Raises:
        TypeError: a tensor or a number has the wrong type.
        ValueError: a shape or an option is out of range.
    """
    _check_tensors(q, k, v, mask, level_bias)
    check_options(block_size, scheme, query_resolution, causal)
    check_dropout(dropout=dropout)
    check_choice("impl", impl, IMPLEMENTATIONS)
    coarse = query_resolution == "coarse"
    if impl == "flex" and (coarse or dropout):
        raise ValueError(
            "impl 'flex' has neither coarse queries nor dropout, got "
            f"query_resolution={query_resolution!r} and dropout={dropout}"
        )
    if impl == "fused" and dropout:
        raise ValueError(f"impl 'fused' has no dropout, got {dropout}; use 'plain'")
    if q.numel() == 0:
        return q * 1.0
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if level_bias is not None:
        level_bias = level_bias.to(accumulator(q.dtype))
    if mask is not None:
        q, k, v = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (q, k, v))
    if impl in ("auto", "fused") and transformed(q, k, v, level_bias):
        impl = "plain"
    if impl == "auto":
        plain = dropout == 0.0 and mask is None and level_bias is None
        if plain and _is_exact(q, k, v, block_size):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
            )
        impl = _fastest(q, coarse, dropout)
    options = (block_size, causal, scheme, coarse, scale)
    if impl == "plain":
        return attend_plain(q, k, v, mask, level_bias, *options, dropout)
    if impl == "flex":
        return attend_flex(q, k, v, mask, level_bias, block_size, causal, scheme, scale)
    out: Tensor = attend_fused(q, k, v, mask, level_bias, *options)[0]
    return out


def _is_exact(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> bool:
    """Whether PyTorch's attention serves: two blocks have no coarse level, so it is the same.

    Not for gradients, since its backward pass is slow in bf16 and has none of its own; nor under
    autocast, which would round its inputs and does not for longer sequences; nor while tracing,
    where it would tie a dynamic length to two blocks.
    """
    if torch.compiler.is_compiling() or count_levels(q.shape[2], block_size) > 1:
        return False
    if torch.is_autocast_enabled(q.device.type):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


def _fastest(q: Tensor, coarse: bool, dropout: float) -> str:
    """The implementation that serves these inputs best."""
    if dropout:
        return "plain"
    return "flex" if not coarse and flex_serves(q) else "fused"


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, level_bias: Tensor | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (b, h, n, d), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must share a type, got {q.dtype} and {name} {x.dtype}")
    b, h, n, d = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k and v must share a shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if (k.shape[0], k.shape[2], k.shape[3]) != (b, n, d):
        raise ValueError(
            f"k must match q in b, n and d, got {tuple(k.shape)} for q {tuple(q.shape)}"
        )
    if k.shape[1] < 1 or h % k.shape[1]:
        raise ValueError(f"{h} query heads cannot share {k.shape[1]} key/value heads")
    if n < 1:
        raise ValueError(f"the sequence must hold at least 1 token, got shape {tuple(q.shape)}")
    check_mask("mask", mask, (b, n))
    if level_bias is not None and not level_bias.is_floating_point():
        raise TypeError(f"level_bias must be floating point, got {level_bias.dtype}")
    if level_bias is not None and (
        level_bias.dim() != 2 or level_bias.shape[0] < 1 or level_bias.shape[1] != h
    ):
        raise ValueError(
            f"level_bias must be (levels, {h} heads), got shape {tuple(level_bias.shape)}"
        )
