"""Attention inside chosen chunks, a few queries at a time, with its own backward pass.

Forward and backward gather the chunks of a few queries, so that what they gather stays in a core's
cache; the backward pass computes the weights again, so nothing of the size of what was gathered is
kept. Both are opaque operators: `torch.compile` and `torch.export` see one node of any length.

Shapes: b batch, n queries, h query heads, g heads of keys and values (1 or h), m tokens, e width of
a key, f width of a value, k chunks a query, c tokens a chunk; r queries at a time, t = k c.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htm_pytorch.plain import attend_plain
from htm_pytorch.retrieval import NOTHING, takes_part

# Elements of keys that are gathered at a time: what a core's cache holds, and what keeps an
# accelerator busy.
_WORKING_SET = 2**19
_ACCELERATOR_WORKING_SET = 2**26

_INPUTS = (
    "Tensor q, Tensor keys, Tensor? values, Tensor weights, Tensor indices, Tensor? mask, "
    "Tensor? positions, int c"
)


class _Block(NamedTuple):
    """A few queries and what they attend to.

    Attributes:
        part: which of the b n queries.
        q: (r, g, h / g, e). keys: (r, g, t, e). values: (r, g, t, f); both 0 where not valid.
        rows: (r, t) of all b m tokens.
        weights: (r, k).
        probabilities: (r, g, h / g, k, c) of a token inside its chunk.
    """

    part: slice
    q: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor
    weights: Tensor
    probabilities: Tensor

    def weighted(self) -> Tensor:
        """(r, g, h / g, t) weights of tokens of all chunks."""
        share = self.probabilities * self.weights[:, None, None, :, None]
        return share.flatten(-2).to(self.values.dtype)


def _blocks(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    c: int,
) -> Iterator[_Block]:
    b, n, h, e = q.shape
    m, g = keys.shape[1:3]
    k = indices.shape[2]
    q = q.reshape(b * n, g, h // g, e)
    weights = weights.reshape(b * n, k)
    chunks = indices.reshape(b * n, k)
    batch = torch.arange(b, device=q.device).repeat_interleave(n)
    counts = None if mask is None or mask.dtype == torch.bool else mask.reshape(b * n, k)
    flat_keys = keys.reshape(b * m, g * e)
    flat_values = None if values is None else values.reshape(b * m, -1)
    working_set = _WORKING_SET if q.device.type == "cpu" else _ACCELERATOR_WORKING_SET
    step = min(b * n, max(1, working_set // (k * c * g * e)))
    # Kept from block to block: memory that is new each time costs more than what is read into it.
    room = [flat_keys.new_empty(step * k * c, g * e)]
    if flat_values is not None:
        room.append(flat_values.new_empty(step * k * c, flat_values.shape[1]))
    for start in range(0, b * n, step):
        part = slice(start, start + step)
        takes = mask if counts is None else counts[part]
        tokens, there = takes_part(chunks[part], m, takes, batch[part, None], c)
        rows = (tokens + batch[part, None, None] * m).flatten(1)
        valid = None if there.all() else there
        found = _gather(flat_keys, rows, valid, g, q.dtype, room[0])
        scores = (q[part] @ found.mT).to(torch.promote_types(q.dtype, torch.float32))
        scores = scores.unflatten(-1, (k, c))
        if positions is not None:
            scores += (q[part] @ positions.mT).unsqueeze(-2)
        if valid is not None:
            scores.masked_fill_(~valid[:, None, None], NOTHING)
        seen = found
        if flat_values is not None:
            seen = _gather(flat_values, rows, valid, g, q.dtype, room[1])
        yield _Block(part, q[part], found, seen, rows, weights[part], scores.softmax(-1))


def _gather(
    x: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    g: int,
    dtype: torch.dtype,
    room: Tensor,
) -> Tensor:
    """Rows (r, t) of x (b m, g e), 0 where not valid: (r, g, t, e), in `room`."""
    room = room[: rows.numel()]
    torch.index_select(x, 0, rows.flatten(), out=room)
    if valid is not None:
        # Not by a product: what is masked may hold NaN.
        room.masked_fill_(~valid.flatten()[:, None], 0.0)
    return room.to(dtype).view(*rows.shape, g, -1).transpose(1, 2)


@torch.library.custom_op("htm_pytorch::attend", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
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
    out = _new_output(q, keys, values)
    flat = out.view(-1, keys.shape[2], q.shape[2] // keys.shape[2], out.shape[3])
    if indices.numel() == 0 or keys.shape[1] == 0:
        return out.zero_()
    for block in _blocks(q, keys, values, weights, indices, mask, positions, c):
        weighted = block.weighted()
        found = weighted @ block.values
        if positions is not None:
            found += weighted.unflatten(-1, (-1, c)).sum(-2) @ positions
        flat[block.part] = found
    return out


def _new_output(q: Tensor, keys: Tensor, values: Tensor | None) -> Tensor:
    width = keys.shape[3] if values is None else values.shape[3]
    return q.new_empty(*q.shape[:3], width)


@attend_fused.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor | None, *_: Any) -> Tensor:
    return _new_output(q, keys, values)


@torch.library.custom_op(
    "htm_pytorch::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, bool memories) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor,
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
    """Gradients of q, keys, values and weights; empty for keys and values unless `memories`."""
    grads = _new_gradients(q, keys, values, weights, memories)
    for x in grads:
        x.zero_()
    if indices.numel() == 0 or keys.shape[1] == 0:
        return grads
    b, m, g, e = keys.shape
    flat_q = grads[0].view(-1, g, q.shape[2] // g, e)
    flat_keys, flat_values = (x.view(b * m, -1) for x in grads[1:3])
    flat_weights = grads[3].view(-1, weights.shape[2])
    grad = grad.reshape(*flat_q.shape[:3], -1)
    for block in _blocks(q, keys, values, weights, indices, mask, positions, c):
        asked = grad[block.part]
        # What every token adds to the loss where it is seen: (r, g, h / g, k, c).
        worth = (asked @ block.values.mT).unflatten(-1, (-1, c))
        if positions is not None:
            worth = worth + (asked @ positions.mT).unsqueeze(-2)
        mean = (block.probabilities * worth).sum(-1, keepdim=True)
        flat_weights[block.part] = mean.sum((1, 2))[..., 0]
        weighted = block.weighted()
        grad_scores = weighted.unflatten(-1, (-1, c)) * (worth - mean).to(weighted.dtype)
        flat_scores = grad_scores.flatten(-2)
        found = flat_scores @ block.keys
        if positions is not None:
            found += grad_scores.sum(-2) @ positions
        flat_q[block.part] = found
        if memories:
            _add(flat_keys, block.rows, flat_scores.mT @ block.q)
            into = flat_keys if values is None else flat_values
            _add(into, block.rows, weighted.mT @ asked)
    return grads


def _add(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """Adds (r, g, t, e) to rows (r, t) of (b m, g e). Masked rows get 0."""
    total.index_add_(0, rows.flatten(), x.transpose(1, 2).reshape(rows.numel(), -1))


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, keys: Tensor, values: Tensor | None, *inputs: Any) -> Any:  # noqa: ARG001
    return _new_gradients(q, keys, values, inputs[0], inputs[-1])


def _new_gradients(
    q: Tensor, keys: Tensor, values: Tensor | None, weights: Tensor, memories: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = q.new_empty(0)

    def new(x: Tensor | None) -> Tensor:
        return q.new_empty(x.shape) if memories and x is not None else nothing.clone()

    return q.new_empty(q.shape), new(keys), new(values), q.new_empty(weights.shape)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:7])
    ctx.c = inputs[7]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Once: a checkpoint gives them no second time.
    saved = ctx.saved_tensors
    memories = any(ctx.needs_input_grad[1:3])
    grads = _attend_backward(grad, *saved, ctx.c, memories)
    grad_keys = grads[1] if memories else None
    grad_values = grads[2] if memories and saved[2] is not None else None
    return grads[0], grad_keys, grad_values, grads[3], None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:8])
    ctx.c, ctx.memories = inputs[8:]
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
            return (None,) * 10
        first = torch.autograd.grad(out, [x for x, _ in wanted], leaves[0], create_graph=True)
        inputs = [x for x in leaves if x is not None]
        second = iter(torch.autograd.grad(first, inputs, [y for _, y in wanted], allow_unused=True))
    return (*(None if x is None else next(second) for x in leaves), *[None] * 5)


torch.library.register_autograd("htm_pytorch::attend", _differentiate, setup_context=_save_forward)
torch.library.register_autograd(
    "htm_pytorch::attend_backward", _differentiate_twice, setup_context=_save_backward
)
