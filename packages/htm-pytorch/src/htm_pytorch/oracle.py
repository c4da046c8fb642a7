"""The maths of hierarchical transformer memory, slowly: a loop over queries, chunks and heads.

Lampinen et al. 2021, "Towards mental time travel: a hierarchical memory for reinforcement learning
agents" (arXiv 2105.14039), section 2 and figure 1. One batch row at a time; shapes: n queries, m
memory tokens, d width, c tokens a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunks(memories: Tensor, mask: Tensor, c: int) -> list[list[tuple[int, Tensor]]]:
    """The unmasked tokens of each chunk of memories (m, d), with their places in the chunk."""
    found = []
    for first in range(0, len(memories), c):
        places = range(min(c, len(memories) - first))
        found.append([(t, memories[first + t]) for t in places if mask[first + t]])
    return found


def attend(
    queries: Tensor,
    memories: Tensor,
    mask: Tensor,
    chunk_mask: Tensor,
    *,
    weights: dict[str, Tensor],
    heads: int,
    k: int,
    c: int,
    positions: Tensor,
) -> tuple[Tensor, list[dict[int, Tensor]]]:
    """What queries (n, d) find in memories (m, d).

    Args:
        mask: (m,) boolean. chunk_mask: (n, chunks) boolean; True = take part.
        weights: of the module, by name.
        positions: (c, d) added to the tokens of a chunk.

    Returns:
        (n, d), and of each query the relevance of the chunks that it attended to, by number.
    """
    d = queries.shape[1]
    all_chunks = chunks(memories, mask, c)
    rows, found = [], []
    for i, query in enumerate(queries):
        asking = weights["to_summary_queries.weight"] @ query + weights["to_summary_queries.bias"]
        relevance = {}
        for j, tokens in enumerate(all_chunks):
            if tokens and chunk_mask[i, j]:
                summary = torch.stack([token for _, token in tokens]).mean(0)
                key = weights["to_summary_keys.weight"] @ summary + weights["to_summary_keys.bias"]
                relevance[j] = asking @ key * d**-0.5
        best = sorted(relevance, key=lambda j: float(relevance[j].detach()), reverse=True)[:k]
        row = query * 0.0
        share: dict[int, Tensor] = {}
        if best:
            soft = torch.stack([relevance[j] for j in best]).softmax(0)
            share = dict(zip(best, soft, strict=True))
        for j, weight in share.items():
            placed = [token + positions[t] for t, token in all_chunks[j]]
            row = row + weight * attend_inside(query, placed, weights, heads)
        rows.append(row)
        found.append(share)
    return torch.stack(rows) if rows else queries.clone(), found


def attend_inside(
    query: Tensor, tokens: list[Tensor], weights: dict[str, Tensor], heads: int
) -> Tensor:
    """Multi-head attention of one query to the tokens of one chunk: (d,)."""
    width = weights["attn.to_q.weight"].shape[0] // heads
    q = (weights["attn.to_q.weight"] @ query).view(heads, width)
    both = [(weights["attn.to_kv.weight"] @ token).view(2, heads, width) for token in tokens]
    answers = []
    for head in range(heads):
        keys = torch.stack([key_value[0, head] for key_value in both])
        values = torch.stack([key_value[1, head] for key_value in both])
        answers.append((keys @ q[head] * width**-0.5).softmax(0) @ values)
    return weights["attn.to_out.weight"] @ torch.cat(answers) + weights["attn.to_out.bias"]
