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
from typing import NamedTuple

import torch
from torch import Tensor

from shared_core import masked_mean, pad_to

NOTHING = -1e30
"""Score of what is not to be seen: finite, so that no row meets ``inf - inf``."""

# Scores of queries and chunks that are kept at a time while searching.
_SEARCHED = 2**22


class Summary(NamedTuple):
    """What is known of chunks.

    Attributes:
        means: (b, j, d) of their unmasked tokens, 0 where there is none.
        some: (b, j) boolean, whether there is one; None where all have one.
    """

    means: Tensor
    some: Tensor | None


def count_chunks(m: int, c: int) -> int:
    """Number of chunks of m tokens, the last one perhaps cut."""
    return -(-m // c)


def summarise(memories: Tensor, mask: Tensor | None, c: int) -> Summary:
    """Means of chunks of memories (b, m, d), mask (b, m)."""
    m = memories.shape[1]
    if m == 0:
        return Summary(memories, None)
    if torch.compiler.is_compiling() or type(memories.data) is not Tensor or memories.is_meta:
        # No numbers to look at: one graph for any m, whether its last chunk is cut or not.
        seen = torch.ones_like(memories[..., 0], dtype=torch.bool) if mask is None else mask
        tokens, seen = (pad_to(x, c, 1).unflatten(1, (-1, c)) for x in (memories, seen))
        return Summary(masked_mean(tokens, seen, 2), None if mask is None else seen.any(2))
    # Without a copy of the memories.
    before = (count_chunks(m, c) - 1) * c
    wide = torch.promote_types(memories.dtype, torch.float32)
    sums = memories[:, :before].unflatten(1, (-1, c)).sum(2, dtype=wide)
    sums = torch.cat((sums, memories[:, before:].sum(1, keepdim=True, dtype=wide)), 1)
    sizes = (m - c * torch.arange(sums.shape[1], device=memories.device)).clamp(max=c)
    means = (sums / sizes[:, None]).to(memories.dtype)
    if mask is None:
        return Summary(means, None)
    counts = pad_to(mask, c, 1).unflatten(1, (-1, c)).sum(2)
    batch, chunks = (counts < sizes).nonzero(as_tuple=True)
    tokens, seen = takes_part(chunks, m, mask, batch, c)
    cut = masked_mean(memories[batch[:, None], tokens], seen, 1)
    return Summary(means.index_put((batch, chunks), cut), counts > 0)


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
        A query that may choose fewer has -1 and 0 in the place of the others.
    """
    means, some = summary
    missing = None
    asked = queries.to(means.dtype)
    if candidates is None:
        indices = search(asked, summary, k, chunk_mask)
    else:
        indices = candidates(asked, summary, k, chunk_mask)
        missing = indices < 0
        indices = indices.clamp(min=0)
    batch = torch.arange(means.shape[0], device=means.device)[:, None, None]
    allowed = None if some is None else some[batch, indices]
    if missing is not None:
        allowed = ~missing if allowed is None else allowed & ~missing
    if chunk_mask is not None:
        may = chunk_mask.gather(2, indices)
        allowed = may if allowed is None else allowed & may
    chosen = means[batch, indices]
    if allowed is not None:
        # Not by a product: what must not be chosen may hold NaN.
        chosen = chosen.masked_fill(~allowed[..., None], 0.0)
    # Of half precision a softmax would keep 2 digits.
    wide = torch.promote_types(queries.dtype, torch.float32)
    relevance = (chosen * queries[:, :, None].to(wide)).sum(-1)
    if allowed is None:
        return indices, relevance.softmax(-1).to(queries.dtype)
    weights = relevance.masked_fill(~allowed, NOTHING).softmax(-1).masked_fill(~allowed, 0.0)
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
