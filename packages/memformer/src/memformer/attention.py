"""Softmax attention with a learned bias by distance: what every layer computes.

While training, it is an opaque operator, of which nothing of the size n x m is kept or biased in
full, see `blocks`. `torch.compile` and `torch.export` see one node.

Shapes: b batch, n queries, m keys, h heads, d head width; g pairs of batch and head at a time,
r queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memformer import blocks
from shared_core import differentiate_twice, transformed

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? by_distance, Tensor? mask, bool causal"


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
    # Of the CPU's kernel: `blocks` knows how to give it biases, but not masks.
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
    # From a single query, the last one, nothing is hidden.
    if causal and n > 1:
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
        logits = (q @ k.mT).to(blocks.logits_dtype(q.dtype))
        if by_distance is not None:
            # Not windows, whose gradient `torch.func.vmap` takes in a loop, with a warning.
            queries, keys = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
            logits = logits + by_distance[:, keys + (q.shape[2] - 1 - queries)[:, None]]
        for hidden in _hidden(q.shape[2], k.shape[2], mask, causal, q.device):
            logits = logits.masked_fill(hidden, blocks.nothing(logits.dtype))
        return logits.softmax(-1).to(q.dtype) @ v


def _without_autocast(like: Tensor) -> torch.autocast:
    """In a `with` block the dtypes of what comes in decide."""
    return torch.autocast(like.device.type, enabled=False)


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
    with _without_autocast(q):
        return blocks.forward(q, k, v, by_distance, mask, causal)


@attend_blocks.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return blocks.new_output(q)


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
    with _without_autocast(q):
        return blocks.backward(grad, q, k, v, by_distance, mask, causal)


@_attend_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return blocks.new_gradients(q, k, v, by_distance)


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
