"""The pyramid of coarse keys and values, and which part of it each query sees.

Shapes: b batch, h heads, g key/value heads, n tokens, c block size, d head width,
s slots of a level, r rows of a patch.

Level l of the pyramid holds the means of 2^l neighbouring keys and values; a slot stands for the
n_l unmasked tokens behind it through a logit of ``q . K_l * scale + log(n_l)``
(Zhu & Soricut 2021). A `Patch` names the rectangles of the attention matrix that one
level fills; together the patches cover every pair of tokens exactly once:

    causal, sibling, 8 blocks          bidirectional, sibling
    0                                  0 0 1 1 2 2 2 2
    0 0                                0 0 1 1 2 2 2 2
    1 1 0                              1 1 0 0 2 2 2 2
    1 1 0 0                            1 1 0 0 2 2 2 2
    2 2 2 2 0                          2 2 2 2 0 0 1 1
    2 2 2 2 0 0                        2 2 2 2 0 0 1 1
    2 2 2 2 1 1 0                      2 2 2 2 1 1 0 0
    2 2 2 2 1 1 0 0                    2 2 2 2 1 1 0 0
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -1e30
"""Logit of a slot with no token behind it: finite, so that no row meets ``inf - inf``."""


class Patch(NamedTuple):
    """Equal rectangles of the attention matrix, `groups` of them at a fixed stride.

    Rows count tokens (slots of `level` where queries are coarse), keys count slots of `level`.
    The `diagonal` patches hold each token's own block and together every row and key of level 0.
    """

    level: int
    groups: int
    row: int
    rows: int
    row_stride: int
    key: int
    keys: int
    key_stride: int
    diagonal: bool = False


def count_levels(n: int, block_size: int) -> int:
    """Number of levels of `n` >= 1 tokens, level 0 included."""
    return max(1, ((n - 1) // block_size).bit_length())


@lru_cache(maxsize=256)
def plan(n: int, block_size: int, causal: bool, scheme: str, coarse: bool) -> tuple[Patch, ...]:
    """The patches of an attention matrix over `n` tokens, level 0 first.

    Args:
        coarse: rows count slots of the patch's level instead of tokens.
    """
    patches: list[Patch] = []
    for level in range(count_levels(n, block_size)):
        slots = -(-n >> level)
        unit = 1 if coarse else 1 << level
        limit = slots if coarse else n
        for row, rows, key, keys, period, diagonal in level_windows(
            level, block_size, causal, scheme
        ):
            window = Patch(
                level, 0, row * unit, rows * unit, period * unit, key, keys, period, diagonal
            )
            patches += _repeat(window, limit, slots)
    return tuple(patches)


class Window(NamedTuple):
    """Which rows see which keys, repeated every `period`; all in slots of one level."""

    row: int
    rows: int
    key: int
    keys: int
    period: int
    diagonal: bool = False


def level_windows(level: int, c: int, causal: bool, scheme: str) -> Iterator[Window]:
    """The windows of a level; the same for all levels above 0."""
    if level == 0 and scheme == "sibling" and not causal:
        yield Window(0, 2 * c, 0, 2 * c, 2 * c, diagonal=True)
        return
    if level == 0:
        yield Window(0, c, 0, c, c, diagonal=True)
    if scheme == "sibling":
        yield Window(c, c, 0, c, 2 * c)
        if not causal:
            yield Window(0, c, c, c, 2 * c)
        return
    if level == 0:
        yield Window(c, c, 0, c, c)
        if not causal:
            yield Window(0, c, c, c, c)
        return
    # The quadrant next to the diagonal is covered one level below.
    half = c // 2
    yield Window(c, half, 0, half, c)
    yield Window(c + half, half, 0, c, c)
    if not causal:
        yield Window(0, half, c, c, c)
        yield Window(half, half, c + half, half, c)


def _repeat(patch: Patch, row_limit: int, key_limit: int) -> Iterator[Patch]:
    """Repeats a window while it fits; the last, cut one is a patch of its own."""
    whole = min(
        (row_limit - patch.row - patch.rows) // patch.row_stride,
        (key_limit - patch.key - patch.keys) // patch.key_stride,
    )
    whole = max(whole + 1, 0)
    if whole:
        yield patch._replace(groups=whole)
    row = patch.row + whole * patch.row_stride
    key = patch.key + whole * patch.key_stride
    rows = min(patch.rows, row_limit - row)
    keys = min(patch.keys, key_limit - key)
    if rows > 0 and keys > 0:
        yield patch._replace(groups=1, row=row, rows=rows, key=key, keys=keys)


class Level(NamedTuple):
    """One level of the pyramid.

    Attributes:
        keys, values: (b, h, s, d) means over the unmasked tokens behind each slot.
        tokens: (b or 1, s) number of unmasked tokens behind each slot; None where it is 2^level
            in every slot that a query may see.
        queries: (b, h, s, d) means of the queries, where those are coarse too.
    """

    number: int
    keys: Tensor
    values: Tensor
    tokens: Tensor | None
    queries: Tensor | None = None

    def bias(self) -> Tensor | None:
        """(b or 1, s) logit of the tokens behind a slot, or None where `shift` says it."""
        return None if self.tokens is None else log_count(self.tokens)

    def shift(self) -> float:
        """The logit of the tokens behind every slot, where all count the same."""
        return self.number * math.log(2.0) if self.tokens is None else 0.0


def log_count(tokens: Tensor) -> Tensor:
    """The logit of a number of tokens; `EMPTY` for none."""
    return torch.where(tokens > 0, tokens, 1.0).log().masked_fill(tokens == 0, EMPTY)


def token_count(mask: Tensor | None, q: Tensor, causal: bool, levels: int) -> Tensor | None:
    """(b or 1, n) ones and zeros, or None where every slot that a query may see is full.

    A causal query meets only complete slots, so without a mask there is nothing to count.
    """
    n = q.shape[2]
    if mask is not None:
        return mask.to(accumulator(q.dtype))
    if causal or n % (1 << (levels - 1)) == 0:
        return None
    return torch.ones(1, n, dtype=accumulator(q.dtype), device=q.device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which counts, log-sum-exps and merged outputs are kept."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def pyramid(
    keys: Tensor, values: Tensor, count: Tensor | None, levels: int, queries: Tensor | None = None
) -> Iterator[Level]:
    """Yields levels 0, 1, ...; each is made from the one before it.

    Args:
        keys, values: (b, h, n, d), zero where `count` is zero.
        count: (b or 1, n) or None, see `Level`.
        queries: (b, h, n, d), zero where `count` is zero, to be averaged as well.
    """
    level = Level(0, keys, values, count, queries)
    yield level
    for _ in range(1, levels):
        level = coarser(level)
        yield level


def coarser(level: Level) -> Level:
    """The next level: means of pairs, each slot weighed by the tokens behind it."""
    count, weight = _odd_share(level.tokens)

    def mean(x: Tensor) -> Tensor:
        even, odd = pairs(x, -2, keep_single=count is not None)
        if isinstance(weight, Tensor):
            return torch.lerp(even, odd, weight.to(x.dtype))
        return torch.lerp(even, odd, weight)

    queries = None if level.queries is None else mean(level.queries)
    return Level(level.number + 1, mean(level.keys), mean(level.values), count, queries)


def _odd_share(count: Tensor | None) -> tuple[Tensor | None, Tensor | float]:
    """The next level's count, and the weight (b or 1, 1, s, 1) of the odd slots in its means."""
    if count is None:
        return None, 0.5
    even, odd = pairs(count, -1, keep_single=True)
    count = even + odd
    return count, (odd / count.clamp(min=1.0))[:, None, :, None]


def add_gradient_of_means(finer: Tensor, coarser: Tensor, count: Tensor | None) -> None:
    """Adds to `finer` (b, h, s, d) what the gradient `coarser` of its means asks of it.

    Args:
        count: (b or 1, s) of the finer level.
    """
    _, weight = _odd_share(count)
    slots = finer.shape[2]
    finer[:, :, 0 : 2 * coarser.shape[2] : 2] += coarser * (1.0 - weight)
    odd = coarser * weight
    finer[:, :, 1::2] += odd[:, :, : slots // 2]


def pairs(x: Tensor, dim: int, keep_single: bool) -> tuple[Tensor, Tensor]:
    """Even and odd entries along `dim` < 0; a last single one is paired with zero or left out."""
    size = x.shape[dim]
    if size % 2 and keep_single:
        x = torch.cat((x, torch.zeros_like(x.narrow(dim, 0, 1))), dim)
    elif size % 2:
        x = x.narrow(dim, 0, size - 1)
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    return even, odd


def strided_windows(x: Tensor, start: int, length: int, stride: int, groups: int) -> Tensor:
    """A view of windows over dim 2: (b, h, n, ...) -> (b, h, groups, length, ...)."""
    span = x.narrow(2, start, (groups - 1) * stride + length)
    return span.unfold(2, length, stride).movedim(-1, 3)


def patch_rows(x: Tensor, patch: Patch) -> Tensor:
    """A view of the rows of `patch`: (b, h, n, ...) -> (b, h, groups, rows, ...)."""
    return strided_windows(x, patch.row, patch.rows, patch.row_stride, patch.groups)


def patch_keys(x: Tensor, patch: Patch) -> Tensor:
    """A view of the keys of `patch`: (b, h, s, ...) -> (b, h, groups, keys, ...)."""
    return strided_windows(x, patch.key, patch.keys, patch.key_stride, patch.groups)
