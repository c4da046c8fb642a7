"""Hierarchical attention as one call of `torch.nn.attention.flex_attention`.

The levels of keys and values lie one behind the other; which rows see which slots, and the logit
of the tokens behind a slot, are the two functions that flex_attention compiles into one kernel,
forward and backward, on CUDA. On the CPU it runs unfused and forward only.

Shapes: b batch, h query heads, g key/value heads, n tokens, d head width, s slots of all levels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from h_transformer_1d.pyramid import (
    Level,
    Window,
    accumulator,
    count_levels,
    level_windows,
    pyramid,
    token_count,
)


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    level_bias: Tensor | None,
    block_size: int,
    causal: bool,
    scheme: str,
    scale: float,
) -> Tensor:
    """See `hierarchy.h_attention`; q (b, h, n, d), k and v (b, g, n, d) -> (b, h, n, d)."""
    b, h, n, _ = q.shape
    depth = count_levels(n, block_size)
    levels = list(pyramid(k, v, token_count(mask, q, causal, depth), depth))
    keys = torch.cat([level.keys for level in levels], 2)
    values = torch.cat([level.values for level in levels], 2)
    sizes = tuple(level.keys.shape[2] for level in levels)
    index, _ = _slots(sizes, q.device)

    tokens = torch.cat([_token_logit(level) for level in levels], 1)
    row = torch.arange(b, device=q.device) * (tokens.shape[0] > 1)
    kind = tokens.dtype
    per_level = torch.zeros(1, h, device=q.device) if level_bias is None else level_bias
    per_level = per_level.to(kind)
    bias_row = index.clamp(max=per_level.shape[0] - 1)

    def score(logit: Tensor, batch: Tensor, head: Tensor, _: Tensor, slot: Tensor) -> Tensor:
        return logit + tokens[row[batch], slot] + per_level[bias_row[slot], head]

    visible = _visible_slots(n, sizes, block_size, causal, scheme, q.device)
    out = _flex(q.device.type)(q, keys, values, score, visible, scale, k.shape[1] != h)
    if mask is None:
        return out
    seen = mask.cumsum(1) > 0 if causal else mask.any(1, keepdim=True)
    return out.masked_fill(~seen[:, None, :, None], 0.0)


def _token_logit(level: Level) -> Tensor:
    """(b or 1, s) the logit of the tokens behind each slot."""
    bias = level.bias()
    if bias is not None:
        return bias
    x = level.keys
    return torch.full((1, x.shape[2]), level.shift(), dtype=accumulator(x.dtype), device=x.device)


@lru_cache(maxsize=32)
def _visible_slots(
    n: int, sizes: tuple[int, ...], block_size: int, causal: bool, scheme: str, device: torch.device
) -> BlockMask:
    """Which of the slots each of the n rows sees."""
    level, slot = _slots(sizes, device)
    near = tuple(level_windows(0, block_size, causal, scheme))
    far = tuple(level_windows(1, block_size, causal, scheme))

    def inside(window: Window, row: Tensor, key: Tensor) -> Tensor:
        row, key = row - window.row, key - window.key
        found = (row >= 0) & (key >= 0)
        found = found & (row // window.period == key // window.period)
        found = found & (row % window.period < window.rows) & (key % window.period < window.keys)
        if window.diagonal and causal:
            found = found & (row >= key)
        return found

    def visible(_: Tensor, __: Tensor, row: Tensor, s: Tensor) -> Tensor:
        row, key = row >> level[s], slot[s]
        found = torch.zeros_like(row < key)
        for window in near:
            found = found | ((level[s] == 0) & inside(window, row, key))
        for window in far:
            found = found | ((level[s] > 0) & inside(window, row, key))
        return found

    return create_block_mask(visible, None, None, n, sum(sizes), device=str(device))


@lru_cache(maxsize=32)
def _slots(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(s,) the level of each slot, and its number within the level."""
    level = [torch.full((size,), i) for i, size in enumerate(sizes)]
    slot = [torch.arange(size) for size in sizes]
    return torch.cat(level).to(device), torch.cat(slot).to(device)


@lru_cache(maxsize=4)
def _flex(device_type: str) -> Callable[..., Tensor]:
    if device_type == "cuda":
        return torch.compile(_attend)
    return _attend_unfused


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[..., Tensor],
    visible: BlockMask,
    scale: float,
    grouped: bool,
) -> Tensor:
    out: Any = flex_attention(
        q, k, v, score_mod=score, block_mask=visible, scale=scale, enable_gqa=grouped
    )
    return cast("Tensor", out)


def _attend_unfused(*inputs: Any) -> Tensor:
    with warnings.catch_warnings():
        # That it is unfused here is known, and no news to the caller.
        warnings.filterwarnings("ignore", message="flex_attention called without")
        return _attend(*inputs)
