"""Finding the relevant chunks of a memory, and attending to their tokens without projecting it.

Lampinen et al. 2021 (arXiv 2105.14039). A query's relevance to a chunk is (W_q q + b_q) . (W_k s
+ b_k) / sqrt(d) with s the mean of the chunk's tokens, and its score for a token m is (W_q q) .
(W_k m): both are a vector made of the query alone, times what lies in the memory. So the memory is
never projected; the sum of its tokens is, once for each query.

Shapes: b batch, n queries, m memory tokens, d width, c tokens a chunk, j chunks, k of them chosen,
h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_core import masked_mean, transformed

NOTHING = -1e30
"""Score of what is not to be seen: finite, so that no row meets ``inf - inf``."""

# Scores of queries and chunks that are kept at a time while searching.
_SEARCHED = 2**22

# Elements that are converted to a wider type at a time: what a core's cache holds.
_CONVERTED = 2**18


class Summary(NamedTuple):
    """What is known of chunks.

    Attributes:
        means: (b, j, d) of their unmasked tokens, float32 or wider; where there is none, of no
            importance.
        some: (b, j) boolean, whether there is one; None where all have one.
    """

    means: Tensor
    some: Tensor | None


def count_chunks(m: int, c: int) -> int:
    """Number of chunks of m tokens, the last one perhaps cut."""
    return -(-m // c)


def in_chunks(x: Tensor, c: int) -> Tensor:
    """Chunks of tokens (b, m, ...): (b, j, c, ...), zeros at the end of the last one."""
    m = x.shape[1]
    # Not -m % c: from a product, export sees that the new length is a multiple.
    missing = (m + c - 1) // c * c - m
    # While tracing, this comparison would tie a dynamic length to one of its two outcomes.
    if torch.compiler.is_compiling() or missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    chunks: Tensor = x.unflatten(1, (-1, c))
    return chunks


def in_full(x: Tensor) -> AbstractContextManager[object]:
    """No autocast of products of x: half precision would mistake chunks for each other."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def summarise(memories: Tensor, mask: Tensor | None, c: int) -> Summary:
    """Means of chunks of memories (b, m, d), mask (b, m)."""
    wide = torch.promote_types(memories.dtype, torch.float32)
    if memories.shape[1] == 0:
        return Summary(memories.to(wide), None)
    seen = torch.ones_like(memories[..., 0], dtype=torch.bool) if mask is None else mask
    seen = in_chunks(seen, c)
    if transformed(memories) or (memories.requires_grad and torch.is_grad_enabled()):
        means = masked_mean(in_chunks(memories.to(wide), c), seen, 2)
    else:
        means = _means(memories.detach(), seen)
    return Summary(means, None if mask is None else seen.any(2))


@torch.library.custom_op("htm_pytorch::means", mutates_args=())
def _means(memories: Tensor, seen: Tensor) -> Tensor:
    """Means (b, j, d) of memories (b, m, d) where they are seen (b, j, c), without a copy of them.

    An operator, so that a graph has one node of it for any m, whether its last chunk is cut or not.
    """
    (b, m, d), (j, c) = memories.shape, seen.shape[1:]
    wide = torch.promote_types(memories.dtype, torch.float32)
    # A product with the mask.
    share = seen.to(wide)
    share = share / share.sum(-1, keepdim=True).clamp(min=1.0)
    means = memories.new_empty(b, j, d, dtype=wide)
    if m % c == 0 and memories.is_contiguous():
        # All rows at once, since their chunks lie one behind the other.
        _average(memories.view(b * m, d), share.flatten(0, 1), means.flatten(0, 1))
    else:
        for row in zip(memories, share, means, strict=True):
            _average(*row)
    if bool(means.sum().isfinite()):
        return means
    # What is masked may hold NaN, and 0 times NaN is no 0.
    some = seen.any(2)
    means.masked_fill_(~some[..., None], 0.0)
    batch, chunks = (some & ~means.isfinite().all(-1)).nonzero(as_tuple=True)
    for rows, numbers in zip(
        *(x.split(max(1, _CONVERTED // (c * d))) for x in (batch, chunks)), strict=True
    ):
        tokens, valid = takes_part(numbers, m, None, rows, c)
        cut = memories[rows[:, None], tokens].to(wide)
        means[rows, numbers] = masked_mean(cut, valid & seen[rows, numbers], 1)
    return means


@_means.register_fake
def _(memories: Tensor, seen: Tensor) -> Tensor:
    wide = torch.promote_types(memories.dtype, torch.float32)
    return memories.new_empty(*seen.shape[:2], memories.shape[2], dtype=wide)


def _average(tokens: Tensor, share: Tensor, means: Tensor) -> None:
    """Writes means (j, d) of tokens (m, d) by shares (j, c) that are of their type or wider."""
    c, d = share.shape[1], tokens.shape[1]
    whole = len(tokens) // c
    chunks = tokens[: whole * c].unflatten(0, (whole, c))
    # What has to be converted stays in a core's cache.
    step = max(1, whole if tokens.dtype == share.dtype else _CONVERTED // (c * d))
    with in_full(tokens):
        for first in range(0, whole, step):
            part = slice(first, min(whole, first + step))
            out = means[part, None]
            torch.bmm(share[part, None], chunks[part].to(share.dtype), out=out)
        rest = tokens[whole * c :].to(share.dtype)
        if len(rest):
            torch.mv(rest.mT, share[whole, : len(rest)], out=means[whole])


def takes_part(
    chunks: Tensor, m: int, mask: Tensor | None, batch: Tensor, c: int
) -> tuple[Tensor, Tensor]:
    """The tokens of chunks, and which of them are there and not masked.

    Args:
        chunks: (..., k), -1 for none.
        m: tokens that there are.
        mask: (b, m) boolean, or (..., k) int64 as `chunks`; see `fused.attend_fused`.
        batch: the rows of a boolean mask, broadcast to the shape of `chunks`.

    Returns:
        Numbers (..., k, c) of tokens, those that are not there within bounds, too; and booleans.
    """
    within = torch.arange(c, device=chunks.device)
    tokens = chunks[..., None] * c + within
    valid = (tokens >= 0) & (tokens < m)
    tokens = tokens.clamp(0, m - 1)
    if mask is None:
        return tokens, valid
    if mask.dtype == torch.bool:
        return tokens, valid & mask[batch[..., None], tokens]
    return tokens, valid & (within < mask[..., None])


def find(
    queries: Tensor,
    summary: Summary,
    k: int,
    chunk_mask: Tensor | None = None,
    candidates: Callable[[Tensor, Summary, int, Tensor | None], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most relevant chunks of each query.

    Args:
        queries: (b, n, d), by whose product with a mean a chunk is relevant.
        k: at most the number of chunks.
        chunk_mask: (b, n, j) boolean, True = may be chosen.
        candidates: `search` where None. Another one may miss some, and give -1 instead.

    Returns:
        Chunks (b, n, k), most relevant first, and weights (b, n, k), a softmax of their relevance.
        A query that may choose fewer has -1 and 0 at the end. All in the full width of the means.
    """
    means, some = summary
    wide = torch.promote_types(queries.dtype, means.dtype)
    with in_full(means):
        asked = queries.to(wide)
        means = means.to(wide)
        if candidates is None:
            indices = search(asked, Summary(means, some), k, chunk_mask)
            allowed = torch.ones_like(indices, dtype=torch.bool)
        else:
            indices = candidates(asked, Summary(means, some), k, chunk_mask)
            twice = (indices[..., None] == indices[..., None, :]).tril(-1).any(-1)
            allowed = (indices >= 0) & ~twice
            indices = indices.clamp(min=0)
        batch = torch.arange(means.shape[0], device=means.device)[:, None, None]
        if some is not None:
            allowed = allowed & some[batch, indices]
        if chunk_mask is not None:
            allowed = allowed & chunk_mask.gather(2, indices)
        # Not by a product: what must not be chosen may hold NaN.
        chosen = means[batch, indices].masked_fill_(~allowed[..., None], 0.0)
        relevance = (chosen @ asked[..., None])[..., 0].masked_fill(~allowed, NOTHING)
        relevance, order = relevance.sort(stable=True, dim=-1, descending=True)
        indices, allowed = (x.gather(2, order) for x in (indices, allowed))
        weights = relevance.softmax(-1).masked_fill(~allowed, 0.0)
    return indices.masked_fill(~allowed, -1), weights.to(queries.dtype)


@torch.no_grad()
def search(queries: Tensor, summary: Summary, k: int, chunk_mask: Tensor | None) -> Tensor:
    """The chunks (b, n, k) that `find` returns."""
    means, some = summary
    b, n, _ = queries.shape

    def best(part: slice) -> Tensor:
        scores = queries[:, part] @ means.mT
        if some is not None:
            scores = scores.masked_fill(~some[:, None], -torch.inf)
        if chunk_mask is not None:
            scores = scores.masked_fill(~chunk_mask[:, part], -torch.inf)
        return scores.topk(k, dim=-1).indices

    if torch.compiler.is_compiling():
        # A graph for any n has no loop over it.
        return best(slice(None))
    found = queries.new_empty(b, n, k, dtype=torch.int64)
    step = max(1, _SEARCHED // max(1, b * means.shape[1]))
    for first in range(0, n, step):
        part = slice(first, first + step)
        found[:, part] = best(part)
    return found
