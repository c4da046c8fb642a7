"""Attention inside chosen chunks, a few queries at a time, with its own backward pass.

Forward and backward gather the chunks of a few queries, so that what they gather stays in a core's
cache, and nothing of its size is kept. Both are opaque operators: `torch.compile` and
`torch.export` see one node of any length.

Shapes: b batch, n queries, h query heads, g heads of keys and values (1 or h), m tokens, e width of
a key, f width of a value, k chunks a query, c tokens a chunk; r queries at a time, t = k c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from htm_pytorch.blocks import Job, MemoryGradients, Sums
from htm_pytorch.plain import attend_plain

_INPUTS = (
    "Tensor q, Tensor keys, Tensor? values, Tensor weights, Tensor indices, Tensor? mask, "
    "Tensor? positions, int c"
)


def attend_fused(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
) -> Tensor:
    """Sums of values, by softmax inside a chunk and by a weight of the chunk.

    Args:
        q: (b, n, h, e), scaled.
        keys: (b, m, g, e).
        values: (b, m, g, f); the keys where None.
        weights: (b, n, k) of the chunks.
        indices: (b, n, k) chunks; -1 for none, with a weight of 0.
        mask: (b, m) boolean, True = take part; or (b, n, k) int64, so many first tokens of each
            of the chunks do.
        positions: (c, e) added to the keys, and the values, of every chunk; constants.
        c: tokens of a chunk.

    Returns:
        (b, n, h, f).
    """
    inputs = (q, keys, values, weights, indices, mask, positions, c)
    needed = any(x is not None and x.requires_grad for x in (q, keys, values, weights))
    # Kept for the backward pass where they take no more than the queries do.
    keep = needed and torch.is_grad_enabled() and indices.shape[2] * c <= q.shape[3]
    out: Tensor = _attend(*inputs, keep)[0]
    return out


@torch.library.custom_op(
    "htm_pytorch::attend", mutates_args=(), schema=f"({_INPUTS}, bool keep) -> (Tensor, Tensor)"
)
def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """See `attend_fused`; and the probabilities (b n, g, h / g, k, c), empty unless `keep`."""
    out, kept = _new_outputs(q, keys, values, indices, c, keep)
    if indices.numel() == 0 or keys.shape[1] == 0:
        return out.zero_(), kept.zero_()
    job = Job(q, keys, values, weights, indices, mask, positions, c)
    sums = Sums(job, out.view(*job.q.shape[:3], -1))
    for part in job.parts():
        found = job.keys(part)
        probabilities = job.probabilities(part, found)
        if keep:
            kept[part] = probabilities
        if job.values is not job.keys:
            found = job.values(part)
        sums.add(part, job.weighted(part, probabilities).to(q.dtype), found)
    sums.finish()
    return out, kept


def _new_outputs(
    q: Tensor, keys: Tensor, values: Tensor | None, indices: Tensor, c: int, keep: bool
) -> tuple[Tensor, Tensor]:
    (b, n, h, _), g, k = q.shape, keys.shape[2], indices.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    width = (keys if values is None else values).shape[3]
    shape = (b * n, g, h // g, k, c) if keep else (0,)
    return q.new_empty(b, n, h, width), q.new_empty(shape, dtype=wide)


@_attend.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    _, indices, _, _, c, keep = others
    return _new_outputs(q, keys, values, indices, c, keep)


@torch.library.custom_op(
    "htm_pytorch::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor kept, {_INPUTS}, bool memories) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor,
    kept: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
    memories: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, keys, values and weights; empty for keys and values unless `memories`.

    `kept` are the probabilities; they are computed again where it is empty.
    """
    grads = _new_gradients(q, keys, values, weights, memories)
    if indices.numel() == 0 or keys.shape[1] == 0:
        return tuple(x.zero_() for x in grads)  # type: ignore[return-value]
    job = Job(q, keys, values, weights, indices, mask, positions, c)
    flat_weights = grads[3].view(len(job.q), -1)
    sums = Sums(job, grads[0].view(job.q.shape))
    into = MemoryGradients(job, keys, values) if memories else None
    grad = grad.reshape(*job.q.shape[:3], -1)
    offsets = job.to_positions(grad)
    for part in job.parts():
        found = job.keys(part)
        probabilities = kept[part] if kept.numel() else job.probabilities(part, found)
        weighted = job.weighted(part, probabilities)
        seen = found if job.values is job.keys else job.values(part)
        # What every token adds to the loss where it is seen.
        gain = job.products(grad[part], seen, offsets, part)
        mean = (probabilities * gain).sum(-1, keepdim=True)
        flat_weights[part] = mean.sum((1, 2))[..., 0]
        grad_scores = (weighted * (gain - mean)).to(q.dtype)
        sums.add(part, grad_scores, found)
        if into is not None:
            into.add(part, grad_scores, weighted.to(q.dtype), grad[part])
    grads[3].masked_fill_(indices < 0, 0.0)
    sums.finish()
    if into is not None:
        grads = (grads[0], *into.results(keys, values), grads[3])
    return grads


@_attend_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    kept: Tensor,  # noqa: ARG001
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *others: Any,
) -> Any:
    return _new_gradients(q, keys, values, others[0], others[-1])


def _new_gradients(
    q: Tensor, keys: Tensor, values: Tensor | None, weights: Tensor, memories: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def new(x: Tensor | None) -> Tensor:
        return keys.new_empty(0) if x is None or not memories else x.new_empty(x.shape)

    return q.new_empty(q.shape), new(keys), new(values), q.new_empty(weights.shape)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.c = inputs[7]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # Once: a checkpoint gives them no second time.
    saved = ctx.saved_tensors
    memories = any(ctx.needs_input_grad[1:3])
    grads = _attend_backward(grad, *saved, ctx.c, memories)
    grad_keys = grads[1] if memories else None
    grad_values = grads[2] if memories and saved[3] is not None else None
    return grads[0], grad_keys, grad_values, grads[3], *[None] * 5


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0], *inputs[2:9])
    ctx.c, ctx.memories = inputs[9:]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the gradients, through the plain path."""
    grad, q, keys, values, weights, *rest = ctx.saved_tensors
    with torch.enable_grad():
        leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_()
            for x in (grad, q, keys, values, weights)
        ]
        out = attend_plain(*[*leaves[1:], *rest, ctx.c])
        places = [0, *([1, 2] if ctx.memories else []), 3]
        wanted = [(leaves[1:][i], cotangents[i]) for i in places if leaves[1:][i] is not None]
        wanted = [(x, cotangent) for x, cotangent in wanted if cotangent is not None]
        if not wanted:
            return (None,) * 11
        first = torch.autograd.grad(out, [x for x, _ in wanted], leaves[0], create_graph=True)
        inputs = [x for x in leaves if x is not None]
        second = iter(torch.autograd.grad(first, inputs, [y for _, y in wanted], allow_unused=True))
    grads = [None if x is None else next(second) for x in leaves]
    return (grads[0], None, *grads[1:], *[None] * 5)


torch.library.register_autograd("htm_pytorch::attend", _differentiate, setup_context=_save_forward)
torch.library.register_autograd(
    "htm_pytorch::attend_backward", _differentiate_twice, setup_context=_save_backward
)
