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
from feedback_transformer.state import Memory
from shared_core import RelativePositionBias


class LayerWeights(NamedTuple):
    """The parameters of a layer, in the order in which they are used; matrices are (out, in)."""

    attn_gain: Tensor
    attn_shift: Tensor
    query: Matrix
    out: Matrix
    out_bias: Tensor
    ff_gain: Tensor
    ff_shift: Tensor
    inner: Matrix
    inner_bias: Tensor
    outer: Matrix
    outer_bias: Tensor


class ContextWeights(NamedTuple):
    """The parameters of a layer's attention to a context."""

    gain: Tensor
    shift: Tensor
    query: Tensor
    key_value: Tensor
    out: Tensor
    out_bias: Tensor


class Weights(NamedTuple):
    """All that the recurrence multiplies by.

    Attributes:
        layers: of each layer.
        key_value: (g * 2 * h * e, d): of each group the keys, then the values.
        mix: (l + 1,), the weights with which a token's states make its slot; their sum is 1.
        memory_norm: gain and shift of the norm of what goes into the memory, or None.
        own: of each group its part of `key_value`, where that cannot be cut; or None.
        context: of each layer, or None.
    """

    layers: tuple[LayerWeights, ...]
    key_value: Matrix
    mix: Tensor
    memory_norm: tuple[Tensor, Tensor] | None = None
    own: tuple[Matrix, ...] | None = None
    context: tuple[ContextWeights, ...] | None = None


class Sizes(NamedTuple):
    """The numbers of a model: s, mem_len, h, e, g, and its dropouts, 0 when not training."""

    seq_len: int
    mem_len: int
    heads: int
    dim_head: int
    groups: int
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0

    @property
    def inner(self) -> int:
        return self.heads * self.dim_head


class Context(NamedTuple):
    """Keys and values (b, h, m, e) of a context in one layer, and who takes part (b, 1, 1, m)."""

    keys: Tensor
    values: Tensor
    keep: Tensor | None


def bias_table(positions: RelativePositionBias, s: int, m: int) -> Tensor:
    """Biases (h, s, m + s) of a segment's tokens to m slots and to the segment, -inf to the future.

    Slots are right-aligned: fewer of them are a window that begins later. Segments of one token see
    the memory alone, (h, 1, m).
    """
    inside = s if s > 1 else 0
    device = positions.relative_attention_bias.weight.device
    places = torch.arange(m, m + s, device=device)[:, None]
    # By indices and not by a window over all distances: its width would be fixed in a graph.
    distances = places - torch.arange(m + inside, device=device)
    table: Tensor = positions.relative_attention_bias(positions.buckets(distances))
    return table.permute(2, 0, 1).masked_fill(distances < 0, float("-inf"))


def beyond(m: int, most: int) -> int:
    """How many of m are more than `most`: by a comparison, which a graph can settle for good."""
    return m - most if m > most else 0


def split_heads(x: Tensor, sizes: Sizes) -> Tensor:
    """(b, m, g * h * e) -> (g, b, h, m, e)."""
    x = x.unflatten(-1, (sizes.groups, sizes.heads, sizes.dim_head)).permute(2, 0, 3, 1, 4)
    # Of one row the products take it as it is; of several they would copy it in every layer.
    return x.contiguous() if x.shape[1] > 1 else x


def join_heads(x: Tensor) -> Tensor:
    """(g, b, h, m, e) -> (b, m, g * h * e)."""
    return x.permute(1, 3, 0, 2, 4).flatten(2)


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
    weights = F.dropout(weights, dropout, dropout > 0.0)
    parts = weights.split([part.shape[2] for part in keys], -1)
    found = [share.to(value.dtype) @ value for share, value in zip(parts, values, strict=True)]
    out = found[0] if len(found) == 1 else found[0] + found[1]
    return out.to(query.dtype).transpose(1, 2).flatten(2), alive


def feed_forward(x: Tensor, layer: LayerWeights, dropout: float) -> Tensor:
    """GEGLU (arXiv 2002.05202) of the normalised states, (..., d) -> (..., d)."""
    hidden = F.layer_norm(x, x.shape[-1:], layer.ff_gain, layer.ff_shift)
    values, gates = multiply(hidden, layer.inner, layer.inner_bias).chunk(2, -1)
    hidden = F.dropout(values * F.gelu(gates), dropout, dropout > 0.0)
    return multiply(hidden, layer.outer, layer.outer_bias)


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


class Window(NamedTuple):
    """What the tokens of a segment may see, and what they have left there so far.

    Attributes:
        keys, values: (g, b, h, m, e), the slots of all closed segments.
        new_keys, new_values: (g, b, h, p, e), the slots of the open segment, for those after it.
        layer_keys, layer_values: (l, b, h, p, e), for the open segment itself.
        mask: (b, m + p) boolean, or None.
    """

    keys: Tensor
    values: Tensor
    new_keys: Tensor
    new_values: Tensor
    layer_keys: Tensor
    layer_values: Tensor
    mask: Tensor | None

    @property
    def open_length(self) -> int:
        return self.layer_keys.shape[3]

    def most_slots(self, n: int, sizes: Sizes) -> int:
        """The most slots that any of n tokens will see."""
        m, p = self.keys.shape[3], self.open_length
        return m if p + n <= sizes.seq_len else min(m + p + n, sizes.mem_len)

    @staticmethod
    def of(memory: Memory | None, like: Tensor, layers: int, sizes: Sizes) -> Window:
        """From a memory, or an empty one for the rows of `like` (b, n, d)."""
        b = like.shape[0]
        if memory is None:
            slots = like.new_zeros(sizes.groups, b, sizes.heads, 0, sizes.dim_head)
            none = like.new_zeros(layers, b, sizes.heads, 0, sizes.dim_head)
            return Window(slots, slots, slots, slots, none, none, None)
        p = memory.open_length
        m = memory.keys.shape[1] - p
        first = beyond(m, sizes.mem_len)
        both = [split_heads(x[:, first:].to(like), sizes) for x in (memory.keys, memory.values)]
        if memory.layer_keys is None or memory.layer_values is None:
            none = like.new_zeros(layers, b, sizes.heads, 0, sizes.dim_head)
            inside = [none, none]
        else:
            inside = [
                x.to(like).unflatten(-1, (sizes.heads, -1)).permute(1, 0, 3, 2, 4)
                for x in (memory.layer_keys, memory.layer_values)
            ]
        m -= first
        mask = None if memory.mask is None else memory.mask[:, first:]
        (keys, new_keys), (values, new_values) = (x.split([m, p], 3) for x in both)
        return Window(keys, values, new_keys, new_values, inside[0], inside[1], mask)

    def wide(self) -> Window:
        """In float32 where the CPU would be slower in half precision, as in attention it is."""
        if self.keys.device.type != "cpu" or self.keys.dtype.itemsize > 2:
            return self
        found = (None if x is None or x.dtype == torch.bool else x.float() for x in self)
        return Window(*found)._replace(mask=self.mask)  # type: ignore[arg-type]

    def detach(self) -> Window:
        """Cuts the graph behind the slots and the open segment."""
        return Window(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def memory(self) -> Memory:
        """As it is carried to the next call."""
        keys, values = self.keys, self.values
        if self.open_length == 0:
            return Memory(join_heads(keys), join_heads(values), None, None, self.mask)
        keys, values = torch.cat((keys, self.new_keys), 3), torch.cat((values, self.new_values), 3)
        own_keys, own_values = (
            x.permute(1, 0, 3, 2, 4).flatten(3) for x in (self.layer_keys, self.layer_values)
        )
        return Memory(join_heads(keys), join_heads(values), own_keys, own_values, self.mask)

    def close(self, mem_len: int) -> Window:
        """Moves the slots of the open segment into the memory, which keeps the last `mem_len`."""
        m = self.keys.shape[3] + self.new_keys.shape[3]
        first = beyond(m, mem_len)
        keys = torch.cat((self.keys, self.new_keys), 3)[..., first:, :]
        values = torch.cat((self.values, self.new_values), 3)[..., first:, :]
        mask = None if self.mask is None else self.mask[:, first:]
        none, empty = self.layer_keys[..., :0, :], self.new_keys[..., :0, :]
        return Window(keys, values, empty, empty, none, none, mask)


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
