"""How a segment is written into the memory: two rules.

Each slot attends to itself and to the segment, never to another slot.

Shapes: b batch, m slots, n tokens of the segment, d model width, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer.transformer import Attention
from shared_core import transformed

WRITERS = ("gru", "bmn")
BMN_BIAS = 0.001
"""How long the bias of a slot of norm 1 is at first."""


def attend_slots(
    q: Tensor,
    own: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    """What each slot finds in itself and in the segment: (b, h, m, d / h).

    While training, weights are computed again for the gradient, not kept.

    Args:
        q: (b, h, m, d / h), scaled.
        own: keys and values of the slots, like `q`; a slot sees only its own.
        tokens: keys and values of the segment, (b, h, n, d / h).
        mask: (b, n) boolean, True = take part.
    """
    given = q, *own, *tokens
    # A compiler decides for itself, and a transform has no use for what is saved.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed(*given):
        return _attend_slots(*given, mask)
    found: Tensor = checkpoint(
        _attend_slots, *given, mask, use_reentrant=False, preserve_rng_state=False
    )
    return found


def _attend_slots(
    q: Tensor, own_key: Tensor, own_value: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    logits = q @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    # Never a row of nothing: a slot sees itself.
    itself = (q * own_key).sum(-1, keepdim=True)
    weights = torch.cat((itself, logits), dim=-1).softmax(-1)
    return weights[..., :1] * own_value + weights[..., 1:] @ v


def write_gru(
    mems: Tensor,
    segment: Tensor,
    mask: Tensor | None,
    *,
    attention: Attention,
    gru: nn.GRUCell,
    feed_forward: Callable[[Tensor], Tensor],
    bounded: bool,
) -> Tensor:
    """The reference's rule: attention, a GRU cell, a residual feed-forward layer.

    `bounded` then scales a slot whose mean square exceeds 1 down to 1: without it, what the
    feed-forward layer adds would pile up from segment to segment where the GRU keeps its state.
    The reference knows no bound.
    """
    own = attention.keys_values(mems)
    found = attend_slots(attention.queries(mems), own, attention.keys_values(segment), mask)
    update = attention.merge(found).flatten(0, 1)
    mems = gru(update, mems.flatten(0, 1).to(update.dtype)).view(mems.shape)
    mems = feed_forward(mems)
    if bounded:
        mems = mems * mems.square().mean(-1, keepdim=True).clamp(min=1.0).rsqrt()
    return mems


def write_bmn(
    mems: Tensor,
    segment: Tensor,
    mask: Tensor | None,
    *,
    attention: Attention,
    bias: Tensor,
    temperature: float,
) -> Tensor:
    """The paper's rule (section 3.3): m' = A [m; V_x], then biased memory normalisation.

    Queries and keys are made of sqrt(d) m, and the segment's values are scaled by 1 / sqrt(d), so
    that all projections are of vectors of unit variance, and a slot of norm 1 is mixed with values
    of its own size.
    """
    root = mems.shape[-1] ** 0.5
    wide = mems * root
    own_keys, _ = attention.keys_values(wide)
    own_values = mems.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    keys, values = attention.keys_values(segment)
    q = attention.queries(wide) / temperature
    found = attend_slots(q, (own_keys, own_values.to(q.dtype)), (keys, values / root), mask)
    return normalise(found.transpose(1, 2).flatten(2) + bias)


def normalise(mems: Tensor) -> Tensor:
    """Slots of norm 1, (..., d)."""
    # In half precision the squares of small numbers are 0.
    wide = mems.to(torch.promote_types(mems.dtype, torch.float32))
    return (wide * wide.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()).to(mems.dtype)
