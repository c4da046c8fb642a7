"""Attention inside chosen chunks by differentiable operations: as `fused` and `chunkwise` have it.

Shapes: b batch, n queries, h query heads, g heads of keys and values (1 or h), m tokens, e width of
a key, f width of a value, k chunks a query, c tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def refuse_tangents(*inputs: Tensor) -> None:
    """Raises NotImplementedError for derivatives in forward mode, which operators know nothing of.

    They would be 0 without a word.
    """
    if not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise NotImplementedError("htm_pytorch differentiates in reverse mode only")


def differentiate_twice(
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    rest: tuple[Any, ...],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the gradients that a backward pass has given.

    Args:
        grad: (b, n, h, f) that it was given.
        inputs: q, keys, values and weights of `attend_plain`; `rest` its other arguments.
        cotangents: of the gradients of `inputs`; None where there is none.

    Returns:
        Gradients of `grad` and `inputs`, None for an input that is None.
    """
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (grad, *inputs)]
        out = attend_plain(*leaves[1:], *rest)  # type: ignore[arg-type]
        pairs = zip(leaves[1:], cotangents, strict=True)
        wanted = [(x, y) for x, y in pairs if x is not None and y is not None]
        if not wanted:
            return [None] * len(leaves)
        first = torch.autograd.grad(out, [x for x, _ in wanted], leaves[0], create_graph=True)
        sources = [x for x in leaves if x is not None]
        targets = [y for _, y in wanted]
        second = iter(torch.autograd.grad(first, sources, targets, allow_unused=True))
    return [None if x is None else next(second) for x in leaves]
