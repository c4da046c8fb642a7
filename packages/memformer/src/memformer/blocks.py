"""Attention and its gradients, some queries of some heads at a time.

Logits of a step stay in a core's cache, in room that the next step takes over, and the backward
pass computes them again: nothing of the size n x m is kept or biased in full. Where PyTorch's own
kernel is the faster one, it takes their place in the forward pass, and biases are not written out
for it either.

Shapes: b batch, n queries, m keys, h heads, d head width; g pairs of batch and head at a time,
r queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import flash_sdp_enabled

# Logits that are worked on at a time: what a core's cache holds, and what keeps an accelerator
# busy.
WORKING_SET = 2**18
ACCELERATOR_WORKING_SET = 2**27
# Causal queries that the kernel is given at a time, with the keys that the last of them sees.
CAUSAL_ROWS = 256

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def nothing(dtype: torch.dtype) -> float:
    """The logit of what takes no part: finite, so that a row of nothing else gives no NaN.

    Not for float16, in which a logit that takes part can be as low.
    """
    return torch.finfo(dtype).min / 2


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the queries, unless one that takes part could be as low there as what does not."""
    return torch.float32 if dtype == torch.float16 else dtype


def new_output(q: Tensor) -> Tensor:
    """(b, h, n, d), laid out as (b, n, h, d): its heads are merged for nothing."""
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2)


def new_gradients(q: Tensor, k: Tensor, v: Tensor, by_distance: Tensor | None) -> Gradients:
    """Room for the gradients of all, the last one empty where there are no biases.

    Those of keys and values are laid out as `backward` sums them up.
    """
    last = q.new_empty(0) if by_distance is None else q.new_empty(by_distance.shape)
    of_k, of_v = (torch.empty_like(x.mT, memory_format=torch.contiguous_format) for x in (k, v))
    return new_output(q), of_k.mT, of_v.mT, last


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """As `attention.attend`, but something finite for a query that has nothing to attend to."""
    out = new_output(q)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_()
    # In half precision the kernel is slower; with a mask each row of a batch needs its own biases.
    if (
        q.device.type == "cpu"
        and flash_sdp_enabled()
        and q.dtype.itemsize >= 4
        and mask is None
        and q.shape[2] <= k.shape[2]
    ):
        return _kernel(q, k, v, by_distance, causal, out)
    for block in _blocks(q, k, by_distance, mask, causal):
        values = block.take(v, slice(0, block.m))
        block.put(out, block.weights, values)
    return out


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, by_distance: Tensor | None, causal: bool, out: Tensor
) -> Tensor:
    """As `forward` without a mask, by PyTorch's kernel, into `out`."""
    n, m = q.shape[2], k.shape[2]
    numbers = _numbers(n, m, by_distance, causal, q)
    if numbers is None:
        return out.copy_(F.scaled_dot_product_attention(q, k, v, scale=1.0))
    # From the last key to the first, the row of a query's biases begins one further to the right
    # than the row before it, so that all rows are windows of the same numbers.
    numbers, k, v = numbers.flip(1).contiguous(), k.flip(2), v.flip(2)
    step = CAUSAL_ROWS if causal else n
    for start in range(0, n, step):
        stop = min(n, start + step)
        first = n - stop if causal else 0
        biases = numbers[:, start + first :].unfold(1, m - first, 1)[:, : stop - start]
        out[:, :, start:stop] = F.scaled_dot_product_attention(
            q[:, :, start:stop],
            k[:, :, first:],
            v[:, :, first:],
            attn_mask=biases.expand(1, q.shape[1], -1, -1),
            scale=1.0,
        )
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Gradients:
    """Gradients of q, k, v and by_distance, the last one empty where there are no biases."""
    grads = new_gradients(q, k, v, by_distance)
    if grads[0].numel() == 0 or k.shape[2] == 0:
        for x in grads:
            x.zero_()
        return grads
    n = q.shape[2]
    # Sums over blocks of queries: in half precision each addition would round. Transposed, since
    # the wide weights are then the right-hand factor, which is faster.
    wide = torch.promote_types(q.dtype, torch.float32)
    same = wide == q.dtype
    totals = [x.mT.zero_() if same else torch.zeros_like(x.mT, dtype=wide) for x in grads[1:3]]
    total_biases = torch.zeros_like(grads[3], dtype=wide)
    room, skewed = q.new_empty(_room(q, k)), q.new_empty(0)
    for block in _blocks(q, k, by_distance, mask, causal):
        keys = slice(0, block.m)
        asked, queries = block.take(grad, block.rows), block.take(q, block.rows)
        block.add(totals[1], asked.mT, block.weights)
        worth = _view(room, block.weights.shape)
        _product(asked, block.take(v, keys).mT, worth)
        _softmax_backward(worth, block.weights)
        block.put(grads[0], worth, block.take(k, keys))
        block.add(totals[0], queries.mT, worth)
        if by_distance is not None:
            each = worth.unflatten(0, (-1, block.heads.stop - block.heads.start))
            each = each[0] if len(each) == 1 else each.sum(0)
            skewed = _skew(each, skewed)
            sums = skewed.new_ones(1, skewed.shape[1]) @ skewed
            first = n - block.rows.stop
            total_biases[block.heads, first : first + sums.shape[2]] += sums[:, 0]
    if not same:
        grads[1].copy_(totals[0].mT)
        grads[2].copy_(totals[1].mT)
    grads[3].copy_(total_biases)
    return grads


class _Block(NamedTuple):
    """Some queries of some heads, and the keys that they may see.

    Attributes:
        batches, heads, rows: which ones. m: how many keys, from the first.
        weights: (g, r, m) after the softmax, in room that the next block takes over.
    """

    batches: slice
    heads: slice
    rows: slice
    m: int
    weights: Tensor

    def take(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of (b, h, n, d): (g, r, d)."""
        return x[self.batches, self.heads, rows].flatten(0, 1)

    def put(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Writes a b, (g, r, d), into the block's rows of (b, h, n, d)."""
        place = out[self.batches, self.heads, self.rows]
        if len(a) == 1:
            torch.mm(a[0], b[0], out=place[0, 0])
        else:
            place.copy_(torch.bmm(a, b).view(place.shape))

    def add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds a b, (g, d, m), to the block's keys of a sum (b, h, d, all keys)."""
        place = total[self.batches, self.heads, :, : self.m]
        if len(a) > 1:
            place += torch.bmm(a, b).view(place.shape)
        elif a.dtype == total.dtype:
            place[0, 0].addmm_(a[0], b[0])
        else:
            place += torch.mm(a[0], b[0])


def _blocks(
    q: Tensor,
    k: Tensor,
    by_distance: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Iterator[_Block]:
    b, h, n, _ = q.shape
    m = k.shape[2]
    sizes = _sizes(q, m)
    dtype = logits_dtype(q.dtype)
    room = q.new_empty(_room(q, k), dtype=dtype)
    numbers = _numbers(n, m, by_distance, causal, room)
    for batch in range(0, b, sizes.batches):
        batches = slice(batch, min(b, batch + sizes.batches))
        for head in range(0, h, sizes.heads):
            heads = slice(head, min(h, head + sizes.heads))
            tile = None if numbers is None else _tile(numbers, heads, sizes.rows)
            for start in range(0, n, sizes.rows):
                rows = slice(start, min(n, start + sizes.rows))
                seen = m - n + rows.stop if causal else m
                block = _Block(batches, heads, rows, seen, room)
                queries, keys = block.take(q, rows), block.take(k, slice(0, seen))
                logits = _view(room, (*queries.shape[:2], seen))
                biases = None
                if tile is not None:
                    biases = _window(tile, n - 1 - start, queries.shape[1], seen)
                _product(queries, keys.mT, logits, biases)
                if mask is not None:
                    hidden = ~mask[batches, None, None, :seen]
                    each = logits.unflatten(0, (len(hidden), -1))
                    each.masked_fill_(hidden, nothing(dtype))
                yield block._replace(weights=_softmax(logits).to(q.dtype))


class _Sizes(NamedTuple):
    """Batches, heads and queries at a time; more than one batch only with all heads."""

    batches: int
    heads: int
    rows: int


def _sizes(q: Tensor, m: int) -> _Sizes:
    b, h, n, _ = q.shape
    room = WORKING_SET if q.device.type == "cpu" else ACCELERATOR_WORKING_SET
    heads = max(1, room // (n * m))
    if heads >= h:
        return _Sizes(min(b, heads // h), h, n)
    return _Sizes(1, heads, n if heads > 1 else min(n, max(64, room // m)))


def _room(q: Tensor, k: Tensor) -> int:
    """How many logits there are at a time."""
    sizes = _sizes(q, k.shape[2])
    return sizes.batches * sizes.heads * sizes.rows * k.shape[2]


def _view(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first numbers of a flat tensor in this shape."""
    return room[: shape[0] * shape[1] * shape[2]].view(shape)


def _product(a: Tensor, b: Tensor, out: Tensor, biases: Tensor | None = None) -> None:
    """Writes (g, i, j) times (g, j, k), plus biases (1 or heads, i, k) of each batch.

    Of a single pair as matrices, which need not be copied for it.
    """
    if a.dtype != out.dtype:
        out.copy_(torch.bmm(a, b))
    elif len(a) > 1:
        torch.bmm(a, b, out=out)
    elif biases is None:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.addmm(biases[0], a[0], b[0], out=out[0])
        return
    if biases is not None:
        each = out.unflatten(0, (-1, len(biases)))
        each += biases


def _softmax(x: Tensor) -> Tensor:
    """Of the last dimension. A CPU's kernel takes a row at a time, so it can be in place."""
    return torch.softmax(x, -1, out=x) if x.device.type == "cpu" else x.softmax(-1)


def _softmax_backward(grad: Tensor, weights: Tensor) -> None:
    """Takes the gradient of the weights to that of the logits, in place."""
    dtype = weights.dtype
    if grad.device.type == "cpu":
        torch.ops.aten._softmax_backward_data.out(grad, weights, -1, dtype, grad_input=grad)
    else:
        grad.copy_(torch.ops.aten._softmax_backward_data(grad, weights, -1, dtype))


def _numbers(
    n: int, m: int, by_distance: Tensor | None, causal: bool, like: Tensor
) -> Tensor | None:
    """Biases by distance (1 or h, n + m - 1), with what a causal query may not see among them."""
    if by_distance is not None:
        by_distance = by_distance.to(like.dtype)
    if not causal:
        return by_distance
    numbers = like.new_zeros(1, n + m - 1) if by_distance is None else by_distance.clone()
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
