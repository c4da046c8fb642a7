"""Softmax attention with a learned bias by distance: what every layer computes.

While training, an opaque operator takes a few queries of a few heads at a time, so that their
logits stay in a core's cache, and its backward pass computes them again: nothing of the size n x m
is kept or biased in full. `torch.compile` and `torch.export` see one node.

Shapes: b batch, n queries, m keys, h heads, d head width; g pairs of batch and head at a time,
r queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_core import differentiate_twice, transformed

# Logits that are worked on at a time: what a core's cache holds, and what keeps an accelerator
# busy.
_WORKING_SET = 2**18
_ACCELERATOR_WORKING_SET = 2**27

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? by_distance, Tensor? mask, bool causal"


def nothing(dtype: torch.dtype) -> float:
    """The logit of what takes no part: finite, so that a row of nothing else gives no NaN."""
    return torch.finfo(dtype).min / 2


def biases_by_distance(numbers: Tensor, m: int) -> Tensor:
    """Every query's row of biases, (h, n, m), from one number for each distance.

    `numbers` is (h, n + m - 1), its entry j - i + n - 1 for query i and key j.
    """
    # A row is a window of the numbers, and starts one further to the left than the row before it.
    return numbers.unfold(1, m, 1).flip(1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """softmax(q k^T + bias) v, and 0 for a query that has nothing to attend to.

    Args:
        q: (b, h, n, d), scaled.
        k, v: (b, h, m, d).
        by_distance: (h, n + m - 1) biases, see `biases_by_distance`. Differentiable.
        mask: (b, m) boolean, True = take part.
        causal: the last query sees all keys, each one before it one fewer.

    Returns:
        (b, h, n, d).
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    if by_distance is not None:
        by_distance = by_distance.to(q.dtype)
    # Without a bias a CPU's kernel is the faster one in full precision; for one query always.
    kernel = q.device.type != "cpu" or q.shape[2] == 1
    kernel |= by_distance is None and q.dtype.itemsize >= 4
    if transformed(q, k, v, by_distance):
        out = attend_plain(q, k, v, by_distance, mask, causal)
    elif kernel and not torch.is_grad_enabled():
        out = attend_kernel(q, k, v, by_distance, mask, causal)
    else:
        out = attend_blocks(q, k, v, by_distance, mask, causal)
    if mask is None:
        return out
    # Finite logits give an average where there is nothing: it is no answer.
    n, m = q.shape[2], k.shape[2]
    some = mask.cumsum(1)[:, m - n :] > 0 if causal else mask.any(1, keepdim=True)
    return out.masked_fill(~some[:, None, :, None], 0.0)


def attend_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """As `attend_blocks`, by PyTorch's own kernels and a bias in full; where nothing is learned."""
    bias = full_bias(q, k, by_distance, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def full_bias(
    q: Tensor, k: Tensor, by_distance: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor | None:
    """What is added to all logits, (1 or b, 1 or h, n, m) in the queries' dtype, or None.

    A row of nothing else than -inf gives no number, which `attend` replaces.
    """
    n, m = q.shape[2], k.shape[2]
    bias = None
    if by_distance is not None:
        bias = biases_by_distance(by_distance, m)[None]
    # In the dtype of the queries: with another one the CPU's kernel reads wrong numbers.
    for hidden in _hidden(n, m, mask, causal, q.device):
        base = q.new_zeros(()) if bias is None else bias
        bias = base.masked_fill(hidden, -math.inf)
    return bias


def _hidden(
    n: int, m: int, mask: Tensor | None, causal: bool, device: torch.device
) -> Iterator[Tensor]:
    """Logits that take no part, each (1 or b, 1, 1 or n, m)."""
    if causal:
        keys = torch.arange(m, device=device)
        yield (keys > keys[m - n :, None])[None, None]
    if mask is not None:
        yield ~mask[:, None, None]


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """As `attend_blocks`, by differentiable operations on all logits at once."""
    with _without_autocast(q):
        logits = (q @ k.mT).to(_logits_dtype(q.dtype))
        if by_distance is not None:
            # Not windows, whose gradient `torch.func.vmap` takes in a loop, with a warning.
            queries, keys = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
            logits = logits + by_distance[:, keys + (q.shape[2] - 1 - queries)[:, None]]
        for hidden in _hidden(q.shape[2], k.shape[2], mask, causal, q.device):
            logits = logits.masked_fill(hidden, nothing(logits.dtype))
        return logits.softmax(-1).to(q.dtype) @ v


def _without_autocast(like: Tensor) -> torch.autocast:
    """In a `with` block the dtypes of what comes in decide."""
    return torch.autocast(like.device.type, enabled=False)


def _logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the queries, unless one that takes part could be as low there as what does not."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Block(NamedTuple):
    """Some queries of some heads, and the keys that they may see.

    Attributes:
        pairs: which of the b h pairs. rows: which queries. m: how many keys, from the first.
        heads: which heads; of all batches in `pairs` the same.
        weights: (g, r, m) after the softmax.
    """

    pairs: slice
    rows: slice
    m: int
    heads: slice
    weights: Tensor


class _Sizes(NamedTuple):
    """Pairs, heads (the pairs, or all), and queries at a time."""

    pairs: int
    heads: int
    rows: int


def _sizes(q: Tensor, b: int, m: int) -> _Sizes:
    h, n = len(q) // b, q.shape[1]
    room = _WORKING_SET if q.device.type == "cpu" else _ACCELERATOR_WORKING_SET
    heads = max(1, room // (n * m))
    if heads >= h:
        return _Sizes(h * min(b, heads // h), h, n)
    return _Sizes(heads, heads, n if heads > 1 else min(n, max(64, room // m)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(g, i, j) times (g, j, k). Of a single pair as matrices, which need not be copied for it."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _blocks(
    q: Tensor,
    k: Tensor,
    b: int,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Iterator[_Block]:
    """Of flat queries (b h, n, d) and keys (b h, m, d)."""
    n, m = q.shape[1], k.shape[1]
    h = len(q) // b
    sizes = _sizes(q, b, m)
    dtype = _logits_dtype(q.dtype)
    numbers = _numbers(n, m, by_distance, causal, torch.empty(0, dtype=dtype, device=q.device))
    # Batches in turn where a step takes less than all heads of one.
    for batch in range(0, b, max(1, sizes.pairs // h)):
        rows_of = min(b, batch + max(1, sizes.pairs // h))
        for head in range(0, h, sizes.heads):
            heads = slice(head, min(h, head + sizes.heads))
            pairs = slice(batch * h + head, (rows_of - 1) * h + heads.stop)
            tile = None if numbers is None else _tile(numbers, heads, sizes.rows)
            for start in range(0, n, sizes.rows):
                stop = min(n, start + sizes.rows)
                seen = m - n + stop if causal else m
                logits = _product(q[pairs, start:stop], k[pairs, :seen].mT).to(dtype)
                each = logits.view(rows_of - batch, -1, stop - start, seen)
                if tile is not None:
                    each += _window(tile, n - 1 - start, stop - start, seen)
                if mask is not None:
                    hidden = ~mask[batch:rows_of, None, None, :seen]
                    each.masked_fill_(hidden, nothing(dtype))
                weights = logits.softmax(-1).to(q.dtype)
                yield _Block(pairs, slice(start, stop), seen, heads, weights)


def _numbers(
    n: int, m: int, by_distance: Tensor | None, causal: bool, like: Tensor
) -> Tensor | None:
    """Biases by distance (1 or h, n + m - 1), with what a causal query may not see among them."""
    if not causal:
        return by_distance
    numbers = like.new_zeros(1, n + m - 1)
    if by_distance is not None:
        numbers = by_distance.to(like.dtype, copy=True)
    numbers[:, m:] = nothing(like.dtype)
    return numbers


def _tile(numbers: Tensor, heads: slice, rows: int) -> Tensor:
    """The numbers of some heads once for each row: (1 or g, rows, n + m - 1), contiguous."""
    part = numbers[heads] if len(numbers) > 1 else numbers
    return part[:, None].expand(-1, rows, -1).contiguous()


def _window(tile: Tensor, first: int, rows: int, m: int) -> Tensor:
    """A view (heads, rows, m) of which each row begins one to the left of the row before it."""
    heads, all_rows, width = tile.shape
    strides = (all_rows * width, width - 1, 1)
    return tile.as_strided((heads, rows, m), strides, tile.storage_offset() + first)


@torch.library.custom_op("memformer::attend", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """As `attend`, but something finite for a query that has nothing to attend to."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_()
    q3, k3, v3 = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    flat = out.view(q3.shape)
    with _without_autocast(q):
        for block in _blocks(q3, k3, len(q), by_distance, mask, causal):
            flat[block.pairs, block.rows] = torch.bmm(block.weights, v3[block.pairs, : block.m])
    return out


@attend_blocks.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op(
    "memformer::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and by_distance, the last one empty where there are no biases."""
    grads = _new_gradients(q, k, v, by_distance)
    if grads[0].numel() == 0 or k.shape[2] == 0:
        for x in grads:
            x.zero_()
        return grads
    b, _, n, _ = q.shape
    grad, q3, k3, v3 = (x.reshape(-1, *x.shape[2:]) for x in (grad, q, k, v))
    grad_q = grads[0].view(q3.shape)
    # Sums over blocks of queries: in half precision each addition would round. Transposed, since
    # the wide weights are then the right-hand factor, which is faster.
    wide = torch.promote_types(q.dtype, torch.float32)
    totals = [x.new_zeros(len(x), x.shape[2], x.shape[1], dtype=wide) for x in (k3, v3)]
    total_biases = torch.zeros_like(grads[3], dtype=wide)
    skewed = torch.empty(0)
    with _without_autocast(q):
        for block in _blocks(q3, k3, b, by_distance, mask, causal):
            pairs, rows, keys = block.pairs, block.rows, slice(0, block.m)
            asked = grad[pairs, rows]
            totals[1][pairs, :, keys] += _product(asked.mT, block.weights)
            worth = _product(asked, v3[pairs, keys].mT)
            logits = torch.ops.aten._softmax_backward_data(worth, block.weights, -1, q.dtype)
            grad_q[pairs, rows] = _product(logits, k3[pairs, keys])
            totals[0][pairs, :, keys] += _product(q3[pairs, rows].mT, logits)
            if by_distance is not None:
                each = logits.view(-1, block.heads.stop - block.heads.start, *logits.shape[1:])
                each = each[0] if len(each) == 1 else each.sum(0)
                skewed = _skew(each, skewed)
                sums = skewed.new_ones(1, skewed.shape[1]) @ skewed
                first = n - rows.stop
                total_biases[block.heads, first : first + sums.shape[2]] += sums[:, 0]
    grads[1].view(k3.shape).copy_(totals[0].mT)
    grads[2].view(v3.shape).copy_(totals[1].mT)
    grads[3].copy_(total_biases)
    return grads


def _skew(x: Tensor, room: Tensor) -> Tensor:
    """(h, r, m) with each row one place to the left of the row before it: (h, r, r + m - 1).

    The column sums are those of the diagonals, the lowest left corner first. `room` is what an
    earlier call returned: of the same shape, it is 0 where it has to be.
    """
    heads, rows, m = x.shape
    shape = heads, rows, rows + m - 1
    if room.shape != shape:
        room = x.new_zeros(shape)
    _window(room, rows - 1, rows, m).copy_(x)
    return room


def _new_gradients(
    q: Tensor, k: Tensor, v: Tensor, by_distance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last = q.new_empty(0) if by_distance is None else q.new_empty(by_distance.shape)
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), last


@_attend_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(q, k, v, by_distance)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:5])
    ctx.causal = inputs[5]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Once: a checkpoint gives them no second time.
    saved = ctx.saved_tensors
    grads = _attend_backward(grad, *saved, ctx.causal)
    return *grads[:3], None if saved[3] is None else grads[3], None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:6])
    ctx.causal = inputs[6]


def _differentiate_twice(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients, by all logits at once."""
    grad, *inputs, mask = ctx.saved_tensors
    # The gradient of no biases is empty, and nothing depends on it.
    given = [y if x is not None else None for x, y in zip(inputs, cotangents, strict=True)]

    def plain(q: Tensor, k: Tensor, v: Tensor, by_distance: Tensor | None) -> Tensor:
        return attend_plain(q, k, v, by_distance, mask, ctx.causal)

    with _without_autocast(grad):
        found = differentiate_twice(plain, inputs, grad, given)
    return (*found, None, None)


torch.library.register_autograd("memformer::attend", _differentiate, setup_context=_save_forward)
torch.library.register_autograd(
    "memformer::attend_backward", _differentiate_twice, setup_context=_save_backward
)
