"""All segments at once: Jacobi iteration on what they leave in the memory.

A segment sees of the others only their slots. Given guesses of all slots, all segments go through
the layers in parallel and give better ones: after i passes those of the first i segments are exact,
so as many passes as there are segments always are enough, and few where the memory matters little.

Shapes as in `feedback`; n tokens in c = n / s segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback_transformer.feedback import feed_forward, project_out, slots
from feedback_transformer.packing import multiply
from feedback_transformer.weights import LayerWeights, Sizes, Weights
from feedback_transformer.window import Window, split_heads

PASSES = 12
"""Without an end after so many, one segment after the other is the faster way."""
ROUNDING = 16.0
"""Changes of so many units of rounding, of the largest number of a slot, count as none."""


class _Visible(NamedTuple):
    """Who sees what, the same in every pass.

    Attributes:
        bias: (h, n, m + n) to slots, -inf to those that a segment does not see.
        bias_inside: (h, 1, s, s) to the tokens of the segment.
        keep: (b, 1, 1, m + n) boolean, or None.
        keep_inside: (b, 1, c, 1, s) boolean, or None.
        alive: (b, n, 1), 0 where there is nothing to see.
    """

    bias: Tensor
    bias_inside: Tensor
    keep: Tensor | None
    keep_inside: Tensor | None
    alive: Tensor


def run_jacobi(
    x: Tensor,
    weights: Weights,
    sizes: Sizes,
    table: Tensor,
    window: Window,
    mask: Tensor | None,
) -> tuple[Tensor, Window] | None:
    """`run_plain` for whole segments and a window without an open one; None if it does not end.

    It ends where a pass changes no slot by more than rounding does, and in half precision where it
    changes none at all. A pass holds the attention of all tokens to all slots, (b, h, n, m + n).
    """
    m, n = window.keys.shape[3], x.shape[1]
    seen = None
    if mask is not None or window.mask is not None:
        before = x.new_ones(x.shape[0], m, dtype=torch.bool)
        before = before if window.mask is None else window.mask
        seen = torch.cat((before, before.new_ones(x.shape[:2]) if mask is None else mask), 1)
    visible = _visible(table, sizes, m, x.shape[:2], seen)
    found = slots([x] * (len(weights.layers) + 1), weights)
    for _ in range(min(PASSES, n // sizes.seq_len + 1)):
        out, better = _pass(x, weights, sizes, window, visible, found)
        ended = _same(better, found, sizes)
        found = better
        if ended:
            new_keys, new_values = _by_heads(found, sizes)
            window = window._replace(new_keys=new_keys, new_values=new_values, mask=seen)
            return out, window.close(sizes.mem_len)
    return None


def _same(found: Tensor, before: Tensor, sizes: Sizes) -> bool:
    """Whether all slots (b, n, g * 2 * h * e) are what they were, each key and value by itself.

    Measured by others a small one could be wrong, be it of another row of the batch.
    """
    each = (2 * sizes.groups, sizes.inner)
    change = (found - before).unflatten(-1, each).abs().amax(-1)
    # Units of half precision are no rounding to stop at: they are what is to be computed.
    unit = min(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    largest = (
        found.unflatten(-1, each).abs().amax(-1).to(torch.promote_types(found.dtype, torch.float32))
    )
    return bool((change <= ROUNDING * unit * largest).all())


def _visible(
    table: Tensor, sizes: Sizes, m: int, shape: tuple[int, ...], seen: Tensor | None
) -> _Visible:
    b, n = shape
    s = sizes.seq_len
    inside = s if s > 1 else 0
    columns = table.shape[2] - inside
    places = torch.arange(n, device=table.device)
    high = (m + places - places % s)[:, None]
    slot = torch.arange(m + n, device=table.device)
    sees = (slot < high) & (slot >= high - sizes.mem_len)
    which = (columns - high + slot).clamp(0, max(0, columns - 1))
    rows = (places % s)[:, None].expand_as(which)
    if columns:
        bias = table[:, rows, which].masked_fill(~sees, float("-inf"))
    else:
        bias = table.new_full((table.shape[0], n, m + n), float("-inf"))
    bias_inside = table[:, None, :, columns:]
    keep = keep_inside = None
    alive = sees.any(1).expand(b, -1)
    if seen is not None:
        keep = seen[:, None, None]
        alive = (sees & seen[:, None]).any(-1)
        keep_inside = seen[:, m:].unflatten(1, (-1, s))[:, None, :, None]
        if inside:
            alive = alive | (keep_inside[:, 0, :, 0].cumsum(-1) > 0).flatten(1)
    elif inside:
        alive = torch.ones_like(alive)
    return _Visible(bias, bias_inside, keep, keep_inside, alive[..., None].to(table.dtype))


def _by_heads(found: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Slots (b, n, g * 2 * h * e) as keys and values (g, b, h, n, e)."""
    both = found.unflatten(-1, (sizes.groups, 2, sizes.inner)).unbind(3)
    return split_heads(both[0].flatten(2), sizes), split_heads(both[1].flatten(2), sizes)


def _pass(
    x: Tensor, weights: Weights, sizes: Sizes, window: Window, visible: _Visible, found: Tensor
) -> tuple[Tensor, Tensor]:
    """All segments through all layers, given their slots; states and better slots."""
    new_keys, new_values = _by_heads(found, sizes)
    keys, values = torch.cat((window.keys, new_keys), 3), torch.cat((window.values, new_values), 3)
    states = [x]
    for i, layer in enumerate(weights.layers):
        group = i if sizes.groups > 1 else 0
        y = states[-1]
        y = y + _attend(y, layer, group, weights, sizes, keys[group], values[group], visible)
        states.append(y + feed_forward(y, layer, 0.0))
    return states[-1], slots(states, weights)


def _attend(
    x: Tensor,
    layer: LayerWeights,
    group: int,
    weights: Weights,
    sizes: Sizes,
    keys: Tensor,
    values: Tensor,
    visible: _Visible,
) -> Tensor:
    """Attention (b, n, d) to slots (b, h, m + n, e), and to the segment where that has several."""
    s, h, e = sizes.seq_len, sizes.heads, sizes.dim_head
    hidden = F.layer_norm(x, x.shape[-1:], layer.attn_gain, layer.attn_shift)
    query = (multiply(hidden, layer.query) * e**-0.5).unflatten(-1, (h, e)).transpose(1, 2)
    scores = query @ keys.mT + visible.bias
    lowest = torch.finfo(scores.dtype).min
    if visible.keep is not None:
        scores = scores.masked_fill(~visible.keep, lowest)
    parts = [scores]
    own_values = None
    if s > 1 and isinstance(weights.key_value, Tensor):
        own = weights.key_value[2 * sizes.inner * group : 2 * sizes.inner * (group + 1)]
        both = F.linear(hidden, own).unflatten(-1, (2, h, e)).permute(2, 0, 3, 1, 4)
        own_keys, own_values = both.unflatten(3, (-1, s)).unbind(0)
        inside = query.unflatten(2, (-1, s)) @ own_keys.mT + visible.bias_inside
        if visible.keep_inside is not None:
            inside = inside.masked_fill(~visible.keep_inside, lowest)
        parts.append(inside.flatten(2, 3))
    # A token that sees nothing at all: no NaN, and 0 in the end.
    shares = torch.cat(parts, -1).softmax(-1).nan_to_num(0.0)
    shares = shares * visible.alive[:, None]
    past, present = shares[..., : scores.shape[-1]], shares[..., scores.shape[-1] :]
    answer = past @ values
    if own_values is not None:
        answer = answer + (present.unflatten(2, (-1, s)) @ own_values).flatten(2, 3)
    answer = answer.transpose(1, 2).flatten(2)
    return project_out(answer, layer.out, layer.out_bias, visible.alive)
