"""The feedback transformer as functions on tensors (Fan et al. 2020, section 3), by segments.

Shapes: b batch, n tokens of a call, s tokens of a segment, p tokens of it that came before, m slots
of the memory, d model width, h heads, e width of a head, l layers, g groups of keys: 1 where all
layers share theirs, else l.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback_transformer.packing import Matrix, multiply
from feedback_transformer.weights import ContextWeights, LayerWeights, Sizes, Weights
from feedback_transformer.window import Window, split_heads
from shared_core import RelativePositionBias


class Context(NamedTuple):
    """Keys and values (b, h, m, e) of a context in one layer, and who takes part (b, 1, 1, m)."""

    keys: Tensor
    values: Tensor
    keep: Tensor | None

    def to(self, dtype: torch.dtype) -> Context:
        """In another type."""
        return Context(self.keys.to(dtype), self.values.to(dtype), self.keep)


def bias_table(positions: RelativePositionBias, s: int, m: int) -> Tensor:
    """Biases (h, s, m + s) of a segment's tokens to m slots and to the segment, -inf to the future.

    Slots are right-aligned: fewer of them are a window that begins later. Segments of one token see
    the memory alone, (h, 1, m).
    """
    inside = s if s > 1 else 0
    device = positions.relative_attention_bias.weight.device
    places = torch.arange(m, m + s, device=device)[:, None]
    distances = places - torch.arange(m + inside, device=device)
    table: Tensor = positions(distances)
    return table.permute(2, 0, 1).masked_fill(distances < 0, float("-inf"))


def attend(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: Tensor | None,
    keep: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries (b, h, n, e), scaled, to one or two parts of keys (b, h, m_i, e).

    It is computed in the type of the keys.

    Args:
        bias: (h, n, m) over all parts; -inf where there is nothing to see.
        keep: (b, 1, 1, m) boolean, or None.

    Returns:
        (b, n, h * e), 0 where there is nothing to attend to, and (b, n, 1) where there is
        something, or None for everywhere.
    """
    scores = torch.cat([query.to(part.dtype) @ part.mT for part in keys], -1)
    if bias is not None:
        scores = scores + bias
    alive = None
    if scores.shape[-1] == 0:
        alive = scores.new_zeros(scores.shape[0], scores.shape[2], 1)
    if keep is not None:
        # The lowest number, not -inf: a row of nothing is no NaN.
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if keep is not None:
        weights = weights * keep
        seen = keep if bias is None else keep & (bias > float("-inf"))[:1]
        alive = seen.any(-1)[:, 0, :, None].to(scores.dtype)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    parts = weights.split([part.shape[2] for part in keys], -1)
    found = [share.to(value.dtype) @ value for share, value in zip(parts, values, strict=True)]
    out = found[0] if len(found) == 1 else found[0] + found[1]
    return out.to(query.dtype).transpose(1, 2).flatten(2), alive


def feed_forward(x: Tensor, layer: LayerWeights, dropout: float) -> Tensor:
    """GEGLU (arXiv 2002.05202) of the normalised states, (..., d) -> (..., d)."""
    hidden = F.layer_norm(x, x.shape[-1:], layer.ff_gain, layer.ff_shift)
    values, gates = multiply(hidden, layer.inner, layer.inner_bias).chunk(2, -1)
    hidden = values * _gelu(gates)
    if dropout > 0.0:
        hidden = F.dropout(hidden, dropout)
    return multiply(hidden, layer.outer, layer.outer_bias)


def _gelu(x: Tensor) -> Tensor:
    """Of a single token on the CPU twice, which is faster than once.

    For a tensor without gaps torch calls oneDNN, which takes as long to begin as a small product.
    """
    if x.device.type != "cpu" or x.shape[:-1].numel() != 1 or torch.compiler.is_compiling():
        return F.gelu(x)
    return F.gelu(x.expand(2, *x.shape[1:]))[:1]


def project_out(x: Tensor, weight: Matrix, bias: Tensor, alive: Tensor | None) -> Tensor:
    """The end of an attention layer; it adds nothing, bias included, where it saw nothing."""
    if alive is None:
        return multiply(x, weight, bias)
    return multiply(x, weight) + alive * bias


def context_keys(
    context: Tensor, weights: ContextWeights, heads: int, mask: Tensor | None
) -> Context:
    """What the tokens of a layer attend to in a context (b, m, dim_context)."""
    if mask is not None:
        # 0 times NaN would be NaN.
        context = context.masked_fill(~mask[..., None], 0.0)
    both = F.linear(context, weights.key_value).unflatten(-1, (2, heads, -1))
    keys, values = both.permute(2, 0, 3, 1, 4).unbind(0)
    return Context(keys, values, None if mask is None else mask[:, None, None])


def attend_context(x: Tensor, weights: ContextWeights, context: Context) -> Tensor:
    """Attention of the normalised states (b, n, d) to a context."""
    hidden = F.layer_norm(x, x.shape[-1:], weights.gain, weights.shift)
    heads, e = context.keys.shape[1], context.keys.shape[3]
    query = (F.linear(hidden, weights.query) * e**-0.5).unflatten(-1, (heads, e)).transpose(1, 2)
    found, alive = attend(query, [context.keys], [context.values], None, context.keep, 0.0)
    return project_out(found, weights.out, weights.out_bias, alive)


def run_plain(
    x: Tensor,
    weights: Weights,
    sizes: Sizes,
    table: Tensor,
    window: Window,
    mask: Tensor | None = None,
    context: list[Context] | None = None,
) -> tuple[Tensor, Window]:
    """All tokens, a segment or a part of one at a time, by operations that autograd knows.

    Args:
        x: (b, n, d) embeddings, 0 where masked.
        table: of `bias_table`, for at least as many slots as there will be.
        mask: (b, n) boolean, or None.
        context: of each layer, or None.

    Returns:
        (b, n, d) states of the last layer, and the window for what follows.
    """
    if mask is not None and window.mask is None:
        m = window.keys.shape[3] + window.open_length
        window = window._replace(mask=mask.new_ones(mask.shape[0], m))
    elif mask is None and window.mask is not None:
        mask = window.mask.new_ones(x.shape[:2])
    outputs, start, n = [], 0, x.shape[1]
    while start < n:
        stop = min(n, start + sizes.seq_len - window.open_length)
        if mask is not None and window.mask is not None:
            window = window._replace(mask=torch.cat((window.mask, mask[:, start:stop]), 1))
        out, window = run_piece(x[:, start:stop], weights, sizes, table, window, context)
        if window.open_length == sizes.seq_len:
            window = window.close(sizes.mem_len)
        outputs.append(out)
        start = stop
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), window


def run_piece(
    x: Tensor,
    weights: Weights,
    sizes: Sizes,
    table: Tensor,
    window: Window,
    context: list[Context] | None,
) -> tuple[Tensor, Window]:
    """Tokens (b, n, d) of the open segment through all layers, and into the window.

    `window.mask` has their columns already.
    """
    h, e, inner = sizes.heads, sizes.dim_head, sizes.inner
    n, p, m = x.shape[1], window.open_length, window.keys.shape[3]
    inside = sizes.seq_len > 1
    width = table.shape[2] - (sizes.seq_len if inside else 0)
    bias = table[:, p : p + n, width - m : width + (p + n if inside else 0)]
    keep = None
    if window.mask is not None:
        keep = window.mask[:, None, None, : m + (p + n if inside else 0)]
    states, layer_keys, layer_values = [x], [], []
    for i, layer in enumerate(weights.layers):
        group = i if sizes.groups > 1 else 0
        hidden = F.layer_norm(x, x.shape[-1:], layer.attn_gain, layer.attn_shift)
        query, keys, values = _project(hidden, weights, layer, group, sizes)
        query = (query * e**-0.5).unflatten(-1, (h, e)).transpose(1, 2)
        all_keys, all_values = [window.keys[group]], [window.values[group]]
        if keys is not None and values is not None:
            keys, values = (y.unflatten(-1, (h, e)).transpose(1, 2) for y in (keys, values))
            keys = torch.cat((window.layer_keys[i], keys), 2)
            values = torch.cat((window.layer_values[i], values), 2)
            all_keys.append(keys)
            all_values.append(values)
        else:
            keys = values = hidden.new_zeros(x.shape[0], h, p + n, e)
        found, alive = attend(query, all_keys, all_values, bias, keep, sizes.attn_dropout)
        x = x + project_out(found, layer.out, layer.out_bias, alive)
        if context is not None and weights.context is not None:
            x = x + attend_context(x, weights.context[i], context[i])
        x = x + feed_forward(x, layer, sizes.ff_dropout)
        states.append(x)
        layer_keys.append(keys)
        layer_values.append(values)
    both = slots(states, weights).unflatten(-1, (sizes.groups, 2, inner))
    new_keys, new_values = (split_heads(y.flatten(2), sizes) for y in both.unbind(3))
    window = window._replace(
        new_keys=torch.cat((window.new_keys, new_keys), 3),
        new_values=torch.cat((window.new_values, new_values), 3),
        layer_keys=torch.stack(layer_keys),
        layer_values=torch.stack(layer_values),
    )
    return x, window


def _project(
    hidden: Tensor, weights: Weights, layer: LayerWeights, group: int, sizes: Sizes
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries, and for segments of several tokens their keys and values, (b, n, h * e)."""
    query = multiply(hidden, layer.query)
    if sizes.seq_len == 1:
        return query, None, None
    if weights.own is not None:
        own = weights.own[group]
    elif isinstance(weights.key_value, Tensor):
        own = weights.key_value.chunk(sizes.groups)[group]
    else:
        raise TypeError("packed keys and values need a matrix for each group")
    keys, values = multiply(hidden, own).chunk(2, -1)
    return query, keys, values


def slots(states: list[Tensor], weights: Weights) -> Tensor:
    """Keys and values (b, n, g * 2 * h * e) of the memory's slots of tokens (equations 3 and 5)."""
    mixed = (torch.stack(states) * weights.mix.to(states[-1].dtype).view(-1, 1, 1, 1)).sum(0)
    if weights.memory_norm is not None:
        mixed = F.layer_norm(mixed, mixed.shape[-1:], *weights.memory_norm)
    return multiply(mixed, weights.key_value)
