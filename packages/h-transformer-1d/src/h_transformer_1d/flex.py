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
from importlib.util import find_spec
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from h_transformer_1d.fused import attend_fused
from h_transformer_1d.pyramid import (
    Level,
    Window,
    accumulator,
    count_levels,
    level_windows,
    plan,
    pyramid,
    token_count,
)

TILE = 128
"""Rows and slots of the tiles in which the kernel skips what is not seen."""


def flex_serves(q: Tensor) -> bool:
    """Whether the flex_attention kernel is the one to take for queries like q (b, h, n, d).

    On CUDA with Triton, for the types and widths of head that all its versions take. Not while
    compiling or exporting: there the fused operator, opaque and open to any length, is taken.
    """
    if q.device.type != "cuda" or not _holds_numbers(q) or not _has_triton(q.device):
        return False
    d = q.shape[-1]
    return q.dtype != torch.float64 and d >= 16 and d & (d - 1) == 0


@lru_cache(maxsize=32)
def _has_triton(device: torch.device) -> bool:
    """Whether Triton is there, and knows the device."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


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
    """See `hierarchy.h_attention`; q (b, h, n, d), k and v (b, g, n, d) -> (b, h, n, d).

    While compiling or exporting it is the fused operator that runs.
    """
    if not _holds_numbers(q):
        out: Tensor = attend_fused(
            q, k, v, mask, level_bias, block_size, causal, scheme, False, scale
        )[0]
        return out
    b, h, n, d = q.shape
    depth = count_levels(n, block_size)
    levels = list(pyramid(k, v, token_count(mask, q, causal, depth), depth))
    keys = torch.cat([level.keys for level in levels], 2)
    values = torch.cat([level.values for level in levels], 2)
    sizes = tuple(level.keys.shape[2] for level in levels)
    visible, index = _visible_slots(n, sizes, block_size, causal, scheme, q.device)

    tokens = torch.cat([_token_logit(level) for level in levels], 1)
    row = torch.arange(b, device=q.device) * (tokens.shape[0] > 1)
    kind = tokens.dtype
    per_level = torch.zeros(1, h, device=q.device) if level_bias is None else level_bias
    per_level = per_level.to(kind)
    bias_row = index.clamp(max=per_level.shape[0] - 1)

    def score(logit: Tensor, batch: Tensor, head: Tensor, _: Tensor, slot: Tensor) -> Tensor:
        return logit + tokens[row[batch], slot] + per_level[bias_row[slot], head]

    attend = _attend_unfused
    if q.device.type != "cpu":
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, per_level))
        attend = _compiled(
            (block_size, causal, scheme, scale),
            (q.dtype, h, k.shape[1], d, per_level.shape[0]),
            (b == 1, tokens.shape[0] == 1, n <= TILE, n % TILE == 0, sum(sizes) % TILE == 0),
            (learning, level_bias is None),
        )
    out = attend(q, keys, values, score, visible, scale, k.shape[1] != h)
    if mask is None:
        return out
    seen = mask.cumsum(1) > 0 if causal else mask.any(1, keepdim=True)
    return out.masked_fill(~seen[:, None, :, None], 0.0)


def _holds_numbers(q: Tensor) -> bool:
    """Whether q is an ordinary tensor, and so are those that are made now.

    Not while compiling or exporting, nor with the tensors of a fake mode or a transformation.
    """
    if torch.compiler.is_compiling() or type(q) not in (Tensor, nn.Parameter):
        return False
    made = torch.empty(0, device="cpu")
    if type(made) is not Tensor:
        return False
    try:
        made.data_ptr()
    except RuntimeError:
        # Wrapped by a transformation of torch.func.
        return False
    return True


def _token_logit(level: Level) -> Tensor:
    """(b or 1, s) the logit of the tokens behind each slot."""
    bias = level.bias()
    if bias is not None:
        return bias
    x = level.keys
    return torch.full((1, x.shape[2]), level.shift(), dtype=accumulator(x.dtype), device=x.device)


@lru_cache(maxsize=8)
def _visible_slots(
    n: int, sizes: tuple[int, ...], block_size: int, causal: bool, scheme: str, device: torch.device
) -> tuple[BlockMask, Tensor]:
    """Which of the slots each of the n rows sees, and (s,) the level of each slot."""
    # What is made within inference mode could not be used for training later.
    with torch.inference_mode(False):
        level = torch.cat([torch.full((size,), i, device=device) for i, size in enumerate(sizes)])
        slot = torch.cat([torch.arange(size, device=device) for size in sizes])
        partial, full = _touched_tiles(n, sizes, block_size, causal, scheme)
        shape = -(-n // TILE), -(-sum(sizes) // TILE)
        visible = BlockMask.from_kv_blocks(
            *_tile_lists(partial, *shape, device),
            *_tile_lists(full, *shape, device),
            BLOCK_SIZE=TILE,
            mask_mod=_visible(level, slot, block_size, causal, scheme),
        )
    visible.seq_lengths = n, sum(sizes)
    return visible, level


def _visible(
    level: Tensor, slot: Tensor, block_size: int, causal: bool, scheme: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a row sees a slot, of which (s,) `level` and (s,) its number there are known."""
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

    return visible


def _touched_tiles(
    n: int, sizes: tuple[int, ...], block_size: int, causal: bool, scheme: str
) -> tuple[Tensor, Tensor]:
    """The tiles of which something is seen, but not all, and those of which all is.

    A tile is the number row * columns + column. The time grows with the tiles touched.
    """
    columns = -(-sum(sizes) // TILE)
    tiles, areas = [], []
    for patch in plan(n, block_size, causal, scheme, False):
        rows = _spans(patch.row, patch.rows, patch.row_stride, patch.groups)
        first = sum(sizes[: patch.level]) + patch.key
        keys = _spans(first, patch.keys, patch.key_stride, patch.groups)
        # (groups, tiles of rows, tiles of keys)
        rows = _Spans(*(x[:, :, None] for x in rows))
        keys = _Spans(*(x[:, None, :] for x in keys))
        area = (rows.stop - rows.start).clamp(min=0) * (keys.stop - keys.start).clamp(min=0)
        if patch.diagonal and causal:
            # Level 0 comes first, so its slots bear the numbers of their tokens.
            area = area.masked_fill(rows.stop <= keys.start, 0)
            cut = rows.start < keys.stop - 1
            area = torch.where(cut, area.clamp(max=1), area)
        tile = rows.tile * columns + keys.tile
        tiles.append(tile[area > 0])
        areas.append(area[area > 0])
    # The rectangles of all patches are disjoint.
    found, where = torch.cat(tiles).unique(return_inverse=True)
    covered = torch.zeros_like(found).index_add(0, where, torch.cat(areas))
    return found[covered < TILE**2], found[covered == TILE**2]


class _Spans(NamedTuple):
    """(groups, tiles) the tiles that spans may touch, and where they start and stop there."""

    tile: Tensor
    start: Tensor
    stop: Tensor


def _spans(start: int, length: int, stride: int, groups: int) -> _Spans:
    begin = start + stride * torch.arange(groups, device="cpu")[:, None]
    tile = begin // TILE + torch.arange((length - 1) // TILE + 2, device="cpu")
    return _Spans(
        tile,
        torch.maximum(begin, tile * TILE),
        torch.minimum(begin + length, (tile + 1) * TILE),
    )


def _tile_lists(
    tiles: Tensor, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How many `tiles`, in rising order, each row holds, (1, 1, rows), and their columns."""
    row, column = tiles // columns, tiles % columns
    number = torch.bincount(row, minlength=rows)
    place = torch.arange(len(tiles), device="cpu") - (number.cumsum(0) - number)[row]
    lists = torch.zeros(rows, columns, dtype=torch.int32, device="cpu")
    lists[row, place] = column.int()
    return number.int().to(device)[None, None], lists.to(device)[None, None]


@lru_cache(maxsize=64)
def _compiled(*variety: tuple[object, ...]) -> Callable[..., Tensor]:
    """The kernel for one variety of inputs.

    torch.compile counts the kernels of a code object, and past its limit runs the code as it is,
    which for flex_attention means a matrix of all scores. So each variety has a code object of
    its own, known by its name. What is left to vary are lengths, and those soon become dynamic;
    with fullgraph the limit would raise.
    """
    code: CodeType = _attend.__code__
    own = FunctionType(code.replace(co_name=f"_attend{variety}"), globals())
    attend: Callable[..., Tensor] = torch.compile(own, fullgraph=True)
    return attend


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[..., Tensor],
    visible: BlockMask,
    scale: float,
    grouped: bool,
) -> Any:
    return flex_attention(
        q, k, v, score_mod=score, block_mask=visible, scale=scale, enable_gqa=grouped
    )


def _attend_unfused(*inputs: Any) -> Tensor:
    with warnings.catch_warnings():
        # That it is unfused here is known, and no news to the caller.
        warnings.filterwarnings("ignore", message="flex_attention called without")
        out: Tensor = _attend(*inputs)
    return out
