"""Hierarchical attention in plain differentiable operations.

Serves what the fused operator does not: attention dropout and gradients of gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from h_transformer_1d.kernels import patch_logits
from h_transformer_1d.pyramid import (
    EMPTY,
    accumulator,
    count_levels,
    patch_keys,
    patch_rows,
    plan,
    pyramid,
    token_count,
)


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    level_bias: Tensor | None,
    block_size: int,
    causal: bool,
    scheme: str,
    coarse: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """See `hierarchy.h_attention`; q (b, h, n, d), k and v (b, g, n, d) -> (b, h, n, d)."""
    _, h, n, d = q.shape
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    depth = count_levels(n, block_size)
    levels = list(pyramid(k, v, token_count(mask, q, causal, depth), depth, q if coarse else None))

    outputs: list[Tensor] = []
    normalisers: list[Tensor] = []
    for patch in plan(n, block_size, causal, scheme, coarse):
        level = levels[patch.level]
        rows = level.queries if level.queries is not None else q
        bias = level.bias()
        logits = patch_logits(
            patch_rows(rows, patch),
            patch_keys(level.keys, patch),
            None if bias is None else patch_keys(bias[:, None], patch),
            patch.diagonal and causal,
            scale,
        )
        logits = logits + level.shift()
        if level_bias is not None:
            row = min(patch.level, len(level_bias) - 1)
            logits = logits + level_bias[row, :, None, None, None]
        weight = F.dropout(logits.softmax(-1), dropout)
        output = weight.to(v.dtype) @ patch_keys(level.values, patch)

        index = patch_rows(torch.arange(rows.shape[2], device=q.device)[None, None], patch)
        index = index.flatten()
        whole = rows.shape[:3]
        output = rows.new_zeros(*whole, d).index_copy(2, index, output.flatten(2, 3))
        normaliser = logits.new_full(whole, EMPTY)
        normaliser = normaliser.index_copy(2, index, logits.logsumexp(-1).flatten(2, 3))
        if coarse:
            output, normaliser = (
                x.repeat_interleave(1 << patch.level, 2)[:, :, :n] for x in (output, normaliser)
            )
        outputs.append(output)
        normalisers.append(normaliser)

    stacked = torch.stack(normalisers)
    share = stacked.softmax(0)
    if mask is not None:
        share = share.masked_fill((stacked > EMPTY / 2).sum(0) == 0, 0.0)
    merged = sum(
        (w[..., None] * o for w, o in zip(share, outputs, strict=True)),
        torch.zeros(q.shape, dtype=accumulator(q.dtype), device=q.device),
    )
    return merged.to(q.dtype)
