"""Attention inside chosen chunks by differentiable operations: as `fused` and `chunkwise` have it.

Shapes: b batch, n queries, h query heads, g heads of keys and values (1 or h), m tokens, e width of
a key, f width of a value, k chunks a query, c tokens a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from htm_pytorch.retrieval import NOTHING, takes_part


def attend_plain(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
) -> Tensor:
    """Sums (b, n, h, f) of values, by softmax inside a chunk and by a weight of the chunk.

    Args:
        q: (b, n, h, e), scaled.
        keys: (b, m, g, e).
        values: (b, m, g, f); the keys where None.
        weights, indices, mask, positions, c: as `fused.attend_fused`.
    """
    b, m, g, _ = keys.shape
    batch = torch.arange(b, device=q.device)[:, None, None]
    tokens, valid = takes_part(indices, m, mask, batch, c)

    def gather(x: Tensor) -> Tensor:
        """(b, n, k, c, g, e), 0 where not valid."""
        found = x[batch[..., None], tokens].to(q.dtype).masked_fill(~valid[..., None, None], 0.0)
        return found if positions is None else found + positions[:, None]

    found = gather(keys)
    q = q.unflatten(2, (g, -1))
    scores = torch.einsum("bnghe,bnkcge->bnghkc", q, found)
    # Wide, since half precision has no room for what stands for nothing.
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~valid[:, :, None, None], NOTHING)
    weights = weights.masked_fill(indices < 0, 0.0)
    share = scores.softmax(-1).to(q.dtype) * weights[:, :, None, None, :, None]
    seen = found if values is None else gather(values)
    return torch.einsum("bnghkc,bnkcge->bnghe", share, seen).flatten(2, 3)
