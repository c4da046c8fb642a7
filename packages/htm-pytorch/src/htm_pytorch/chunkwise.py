"""Attention inside chosen chunks, a chunk at a time, for chunks that serve many queries.

Nothing is gathered but the queries. Forward and backward are opaque operators, as in `fused`.

Shapes: b batch, n queries, h heads, m tokens, e width of a key, f width of a value, k chunks a
query, c tokens a chunk; p queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch.plain import attend_plain
from htm_pytorch.retrieval import NOTHING, count_chunks
from shared_core import differentiate_twice

_INPUTS = (
    "Tensor q, Tensor keys, Tensor values, Tensor weights, Tensor indices, Tensor? mask, int c"
)


class _Part(NamedTuple):
    """A chunk, and what attends to it.

    Attributes:
        tokens: its tokens among all b m.
        queries: (p,) of all b n. slots: (p,) of all b n k.
        q: (h, p, e). keys: (h, c, e). values: (h, c, f). weights: (p, 1).
        probabilities: (h, p, c).
    """

    tokens: slice
    queries: Tensor
    slots: Tensor
    q: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor
    probabilities: Tensor


def _parts(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    c: int,
) -> Iterator[_Part]:
    (b, m), k = keys.shape[:2], indices.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    j = count_chunks(m, c)
    numbers = indices + j * torch.arange(b, device=q.device)[:, None, None]
    slots = (indices >= 0).flatten().nonzero()[:, 0]
    numbers, order = numbers.flatten()[slots].sort(stable=True)
    slots = slots[order]
    found, counts = numbers.unique_consecutive(return_counts=True)
    flat_q, flat_keys, flat_values = (x.flatten(0, 1) for x in (q, keys, values))
    flat_weights = weights.reshape(-1, 1)
    by_token = mask.flatten() if mask is not None and mask.dtype == torch.bool else None
    by_slot = mask.flatten() if mask is not None and by_token is None else None
    within = torch.arange(c, device=q.device)
    for number, chosen in zip(found.tolist(), slots.split(counts.tolist()), strict=True):
        row, chunk = divmod(number, j)
        tokens = slice(row * m + chunk * c, row * m + min(m, (chunk + 1) * c))
        queries = chosen // k
        asking = flat_q[queries].transpose(0, 1)
        chunk_keys, chunk_values = (x[tokens].transpose(0, 1) for x in (flat_keys, flat_values))
        scores = (asking @ chunk_keys.mT).to(wide)
        if by_token is not None:
            scores.masked_fill_(~by_token[tokens], NOTHING)
        if by_slot is not None:
            seen = within[: scores.shape[-1]] < by_slot[chosen][:, None]
            scores.masked_fill_(~seen, NOTHING)
        yield _Part(
            tokens,
            queries,
            chosen,
            asking,
            chunk_keys,
            chunk_values,
            flat_weights[chosen],
            scores.softmax(-1),
        )


@torch.library.custom_op(
    "htm_pytorch::attend_chunkwise", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def attend_chunkwise(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    c: int,
) -> Tensor:
    """As `fused.attend_fused`, for keys and values of each head, positions in them.

    Args:
        q: (b, n, h, e), scaled.
        keys: (b, m, h, e), finite where masked, too.
        values: (b, m, h, f), finite where masked, too.
        weights, indices, mask, c: as `attend_fused`.

    Returns:
        (b, n, h, f).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:3], values.shape[3], dtype=wide)
    total = out.flatten(0, 1)
    for part in _parts(q, keys, values, weights, indices, mask, c):
        share = (part.probabilities * part.weights).to(q.dtype)
        total.index_add_(0, part.queries, (share @ part.values).transpose(0, 1).to(wide))
    return out.to(q.dtype)


@attend_chunkwise.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return q.new_empty(*q.shape[:3], values.shape[3])


@torch.library.custom_op(
    "htm_pytorch::attend_chunkwise_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    c: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, keys, values and weights."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
    grad_keys, grad_values, grad_weights = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (keys, values, weights)
    )
    flat = [x.flatten(0, 1) for x in (grad, grad_q, grad_keys, grad_values)]
    flat_weights = grad_weights.view(-1)
    for part in _parts(q, keys, values, weights, indices, mask, c):
        asked = flat[0][part.queries].transpose(0, 1)
        # What every token adds to the loss where it is seen.
        gain = (asked @ part.values.mT).to(wide)
        mean = (part.probabilities * gain).sum(-1, keepdim=True)
        flat_weights[part.slots] = mean.sum((0, 2)).to(weights.dtype)
        share = part.probabilities * part.weights
        grad_scores = (share * (gain - mean)).to(q.dtype)
        flat[1].index_add_(0, part.queries, (grad_scores @ part.keys).transpose(0, 1).to(wide))
        # No other part has these tokens.
        flat[2][part.tokens] = (grad_scores.mT @ part.q).transpose(0, 1)
        flat[3][part.tokens] = (share.to(q.dtype).mT @ asked).transpose(0, 1)
    return grad_q.to(q.dtype), grad_keys, grad_values, grad_weights


@_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor,
    *_: Any,
) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, keys, values, weights))


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:6])
    ctx.c = inputs[6]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.c), None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:7])
    ctx.c = inputs[7]
    ctx.set_materialize_grads(False)


def _differentiate_again(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad, *inputs, indices, mask = ctx.saved_tensors
    attend = partial(attend_plain, indices=indices, mask=mask, positions=None, c=ctx.c)
    grads = differentiate_twice(attend, inputs, grad, cotangents)
    return *grads, None, None, None


torch.library.register_autograd(
    "htm_pytorch::attend_chunkwise", _differentiate, setup_context=_save_forward
)
torch.library.register_autograd(
    "htm_pytorch::attend_chunkwise_backward", _differentiate_again, setup_context=_save_backward
)
