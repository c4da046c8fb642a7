"""Attention inside chosen chunks, a few queries at a time, with its own backward pass.

Tokens are keys and values as they are, of all heads. Forward and backward are opaque operators:
`torch.compile` and `torch.export` see one node of any length.

Shapes: b batch, n queries, h heads, m tokens, d width, k chunks a query, c tokens a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.blocks import Blocks, Sums
from htm_pytorch.plain import attend_plain
from shared_core import differentiate_twice, transformed

_INPUTS = (
    "Tensor q, Tensor memories, Tensor weights, Tensor indices, Tensor? mask, Tensor? positions, "
    "int c"
)


def attend_fused(
    q: Tensor,
    memories: Tensor,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
) -> Tensor:
    """Sums of tokens, by softmax inside a chunk and by a weight of the chunk.

    Args:
        q: (b, n, h, d), scaled.
        memories: (b, m, d).
        weights: (b, n, k) of the chunks.
        indices: (b, n, k) chunks; -1 for none, with a weight of 0.
        mask: (b, m) boolean, True = take part; or (b, n, k) int64, so many first tokens of each
            of the chunks do.
        positions: (c, d) added to the tokens of every chunk; constants.
        c: tokens of a chunk.

    Returns:
        (b, n, h, d).
    """
    if transformed(q, memories, weights):
        tokens = memories[:, :, None]
        return attend_plain(q, tokens, None, weights, indices, mask, positions, c)
    needed = q.requires_grad or memories.requires_grad or weights.requires_grad
    # Kept for the backward pass where they take no more than the queries do.
    wide = torch.promote_types(q.dtype, torch.float32)
    takes = indices.shape[2] * c * wide.itemsize
    keep = needed and torch.is_grad_enabled() and takes <= q.shape[3] * q.dtype.itemsize
    out: Tensor = _attend(q, memories, weights, indices, mask, positions, c, keep)[0]
    return out


@torch.library.custom_op(
    "htm_pytorch::attend", mutates_args=(), schema=f"({_INPUTS}, bool keep) -> (Tensor, Tensor)"
)
def _attend(
    q: Tensor,
    memories: Tensor,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """See `attend_fused`; and the probabilities (b n, h, k, c), empty unless `keep`."""
    out, kept = _new_outputs(q, indices, c, keep)
    if indices.numel() == 0 or memories.shape[1] == 0:
        return out.zero_(), kept.zero_()
    blocks = Blocks(q, memories, weights, indices, mask, positions, c)
    sums = Sums(out.flatten(0, 1), positions, c)
    for part in blocks.parts():
        found = blocks.gather(part)
        probabilities = blocks.probabilities(part, found)
        if keep:
            kept[part] = probabilities
        sums.add(part, blocks.weighted(part, probabilities).to(q.dtype), found)
    sums.finish()
    return out, kept


def _new_outputs(q: Tensor, indices: Tensor, c: int, keep: bool) -> tuple[Tensor, Tensor]:
    b, n, h, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (b * n, h, indices.shape[2], c) if keep else (0,)
    return q.new_empty(b, n, h, d), q.new_empty(shape, dtype=wide)


@_attend.register_fake
def _(q: Tensor, memories: Tensor, weights: Tensor, *others: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    indices, _, _, c, keep = others
    return _new_outputs(q, indices, c, keep)


@torch.library.custom_op(
    "htm_pytorch::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor kept, {_INPUTS}, bool summed) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor,
    kept: Tensor,
    q: Tensor,
    memories: Tensor,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
    summed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, memories and weights; that of memories is empty unless `summed`.

    `kept` are the probabilities; they are computed again where it is empty.
    """
    grad_q, grad_memories, grad_weights = _new_gradients(q, memories, weights, summed)
    if indices.numel() == 0 or memories.shape[1] == 0:
        return grad_q.zero_(), grad_memories.zero_(), grad_weights.zero_()
    blocks = Blocks(q, memories, weights, indices, mask, positions, c)
    flat_weights = grad_weights.view(len(blocks.q), -1)
    sums = Sums(grad_q.flatten(0, 1), positions, c)
    wide = torch.promote_types(torch.promote_types(memories.dtype, q.dtype), torch.float32)
    total = torch.zeros_like(grad_memories, dtype=wide).flatten(0, -2)
    grad = grad.reshape(blocks.q.shape)
    offsets = blocks.to_positions(grad)
    for part in blocks.parts():
        found = blocks.gather(part)
        probabilities = kept[part] if kept.numel() else blocks.probabilities(part, found)
        # What every token adds to the loss where it is seen.
        gain = blocks.products(grad[part], found, offsets, part)
        mean = (probabilities * gain).sum(-1, keepdim=True)
        flat_weights[part] = mean.sum(1)[..., 0]
        weighted = blocks.weighted(part, probabilities)
        grad_scores = (weighted * (gain - mean)).to(q.dtype)
        sums.add(part, grad_scores, found)
        if summed:
            # As keys and as values; what is masked gets 0.
            both = torch.cat((grad_scores, weighted.to(q.dtype)), 1).flatten(-2)
            added = torch.bmm(both.mT, torch.cat((blocks.q[part], grad[part]), 1))
            total.index_add_(0, blocks.rows[part].flatten(), added.flatten(0, 1).to(wide))
    sums.finish()
    grad_weights.masked_fill_(indices < 0, 0.0)
    return grad_q, total.view(grad_memories.shape).to(memories.dtype), grad_weights


@_attend_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    kept: Tensor,  # noqa: ARG001
    q: Tensor,
    memories: Tensor,
    weights: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(q, memories, weights, others[-1])


def _new_gradients(
    q: Tensor, memories: Tensor, weights: Tensor, summed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = memories.shape if summed else (0, 0)
    return q.new_empty(q.shape), memories.new_empty(shape), weights.new_empty(weights.shape)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:6])
    ctx.c = inputs[6]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    summed = ctx.needs_input_grad[1]
    grads = _attend_backward(grad, *ctx.saved_tensors, ctx.c, summed)
    return grads[0], grads[1] if summed else None, grads[2], *[None] * 5


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0], *inputs[2:8])
    ctx.c, ctx.summed = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad, q, memories, weights, indices, mask, positions = ctx.saved_tensors
    attend = partial(attend_plain, indices=indices, mask=mask, positions=positions, c=ctx.c)
    inputs = (q, memories[:, :, None], None, weights)
    of_q, of_memories, of_weights = cotangents
    of_memories = of_memories[:, :, None] if ctx.summed and of_memories is not None else None
    second = differentiate_twice(attend, inputs, grad, (of_q, of_memories, None, of_weights))
    of_memories = None if second[2] is None else second[2].squeeze(2)
    return second[0], None, second[1], of_memories, second[4], *[None] * 5


torch.library.register_autograd("htm_pytorch::attend", _differentiate, setup_context=_save_forward)
torch.library.register_autograd(
    "htm_pytorch::attend_backward", _differentiate_twice, setup_context=_save_backward
)
