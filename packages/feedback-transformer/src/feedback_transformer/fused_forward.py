"""The way forward through whole segments; see `fused`, whose shapes these are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback_transformer.layout import (
    Activations,
    Matrices,
    Shape,
    kept,
    lay_out,
    matrix,
    product,
    unflatten,
)
from feedback_transformer.packing import Packs
from feedback_transformer.weights import LayerWeights

Result = tuple[Tensor, Tensor, Tensor, Activations | None]


@torch.no_grad()
def forward_pass(
    shape: Shape,
    seen: Tensor | None,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    key_value: Tensor,
    mix: Tensor,
    flat: tuple[Tensor, ...],
    *,
    save: bool,
    packs: Packs | None = None,
) -> Result:
    """States (n, b, d) of the last layer, keys and values of slots, and activations if wanted.

    Args:
        seen: (b, m + n) boolean: who takes part; None: all.
        x: (n, b, d) embeddings.
        keys, values: (g, b * h, m, e), slots of the memory before.
        table: (h, s, m') biases.
        flat: the memory's norm, if there is one, and the parameters of all layers.
        save: whether activations are wanted.
        packs: packed weights of earlier calls, or None.
    """
    norm, layers = unflatten(flat, shape)
    forward = _Forward(shape, seen, x, (keys, values), table, layers, save)
    forward.weights = lay_out(layers, key_value, shape, transposed=False, packs=packs)
    out = torch.empty_like(x)
    for k in range(shape.segments):
        states = forward.segment(k, x)
        forward.remember(k, states, mix, norm)
        start = k * shape.sizes.seq_len
        out[start : start + shape.sizes.seq_len].flatten(0, 1).copy_(states[-1])
    saved = forward.saved
    if saved is not None:
        saved = saved._replace(shares=tuple(forward.shares))
    new = forward.slots[:, :, :, shape.slots :]
    return out, new[0], new[1], saved


class _Seen(NamedTuple):
    """What a segment sees.

    Attributes:
        rows: its tokens.
        keys: of each group, (b * h, e, m_k), transposed.
        values: of each group, (b * h, m_k, e).
        places: of each group those of the segment itself, (2, b * h, s, e).
        bias: (b * h, s, m_k).
        keep, alive: as `kept` has them.
    """

    rows: slice
    keys: list[Tensor]
    values: list[Tensor]
    places: list[Tensor]
    bias: Tensor
    keep: Tensor | None
    alive: Tensor | None


class _Forward:
    """The sequential part, and the buffers that it fills."""

    def __init__(
        self,
        shape: Shape,
        seen: Tensor | None,
        x: Tensor,
        memory: tuple[Tensor, Tensor],
        table: Tensor,
        layers: list[LayerWeights],
        save: bool,
    ) -> None:
        self.shape, self.seen, self.layers = shape, seen, layers
        sizes, b = shape.sizes, shape.rows
        # Attention in half precision is slow on the CPU. The way back needs what it was.
        halved = x.device.type == "cpu" and x.dtype.itemsize < 4 and not save
        self.slots = x.new_empty(
            (2, sizes.groups, b * sizes.heads, shape.slots + shape.tokens, sizes.dim_head),
            dtype=torch.float32 if halved else x.dtype,
        )
        for slots, before in zip(self.slots, memory, strict=True):
            slots[:, :, : shape.slots] = before
        self.table = table.repeat(b, 1, 1).to(self.slots.dtype)
        self.weights: Matrices
        self.saved = _allocate(shape, x, matrix(layers[0].inner).shape[0], self.slots, save)
        self.shares: list[Tensor] = []

    def segment(self, k: int, x: Tensor) -> list[Tensor]:
        """The states (s * b, d) of segment k of all layers, first its embeddings."""
        shape, seen = self.shape, self._seen(k)
        states = [x[seen.rows].flatten(0, 1)]
        shares: list[Tensor] = []
        all_factors: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            y = states[-1]
            middle, share, factors = self._attention(i, layer, y, seen)
            states.append(self._feed_forward(i, layer, middle, seen.rows))
            shares.append(share)
            all_factors.append(factors)
        if self.saved is not None:
            self.saved.states[:, seen.rows].flatten(1, 2).copy_(torch.stack(states))
            self.shares.append(torch.stack(shares))
            if shape.sizes.attn_dropout:
                self.shares.append(torch.stack(all_factors))
        return states

    def remember(
        self, k: int, states: list[Tensor], mix: Tensor, norm: tuple[Tensor, Tensor] | None
    ) -> None:
        """Writes the slots of segment k, from the states of all of its layers."""
        shape, sizes = self.shape, self.shape.sizes
        high = shape.slots + k * sizes.seq_len
        mixed = (mix @ torch.stack(states).flatten(1)).view_as(states[0])
        if norm is not None:
            mixed = F.layer_norm(mixed, mixed.shape[-1:], *norm)
        both = product(mixed, self.weights.slot, shape.matrix_dtype)
        both = both.view(sizes.seq_len, -1, sizes.groups, 2, sizes.dim_head)
        self.slots[:, :, :, high : high + sizes.seq_len] = both.permute(3, 2, 1, 0, 4)

    def _seen(self, k: int) -> _Seen:
        shape = self.shape
        start, low, high, end = shape.spans(k)
        columns = self.table.shape[2] - (shape.sizes.seq_len if shape.inside else 0)
        keep, alive = kept(self.seen, shape, k)
        return _Seen(
            slice(start, start + shape.sizes.seq_len),
            [keys[:, low:end].mT for keys in self.slots[0]],
            [values[:, low:end] for values in self.slots[1]],
            [self.slots[:, group, :, high:end] for group in range(shape.sizes.groups)],
            self.table[:, :, columns - (high - low) : columns + (end - high)],
            keep,
            alive,
        )

    def _attention(
        self, i: int, layer: LayerWeights, y: Tensor, seen: _Seen
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States behind attention, its weights (b * h, s, m_k), and their factors of dropout."""
        shape, dtype = self.shape, self.shape.matrix_dtype
        sizes = shape.sizes
        s, e, group = sizes.seq_len, sizes.dim_head, i if sizes.groups > 1 else 0
        hidden = F.layer_norm(y, y.shape[-1:], layer.attn_gain, layer.attn_shift)
        query = product(hidden, self.weights.query[i], dtype)
        own = None
        if shape.inside:
            own = product(hidden, self.weights.own[group], dtype)
            seen.places[group].copy_(own.view(s, -1, 2, e).permute(2, 1, 0, 3))
        by_head = query.view(s, -1, e).transpose(0, 1).to(self.slots.dtype)
        share, factors, found = _attend(
            by_head, seen.keys[group], seen.values[group], seen.bias, seen.keep, sizes.attn_dropout
        )
        found = found.transpose(0, 1).reshape(query.shape).to(y.dtype)
        middle = y
        if seen.alive is not None:
            shift = seen.alive.reshape(-1, 1) * layer.out_bias
            middle = product(found, self.weights.out[i], dtype).add_(shift).add_(y)
        elif share.shape[-1] > 0:
            middle = product(found, self.weights.out[i], dtype, layer.out_bias).add_(y)
        if self.saved is not None:
            _put(self.saved.query[i, seen.rows], query)
            _put(self.saved.found[i, seen.rows], found)
            _put(self.saved.middle[i, seen.rows], middle)
            if own is not None:
                _put(self.saved.own[i, seen.rows], own)
        return middle, share, factors

    def _feed_forward(self, i: int, layer: LayerWeights, middle: Tensor, rows: slice) -> Tensor:
        """States behind the feed-forward layer."""
        dtype, dropout = self.shape.matrix_dtype, self.shape.sizes.ff_dropout
        hidden = F.layer_norm(middle, middle.shape[-1:], layer.ff_gain, layer.ff_shift)
        inner = product(hidden, self.weights.inner[i], dtype, layer.inner_bias)
        half = inner.shape[1] // 2
        active = F.gelu(inner[:, half:]).mul_(inner[:, :half])
        factors = _factors(active, dropout) if dropout else None
        if factors is not None:
            active.mul_(factors)
        if self.saved is not None:
            _put(self.saved.inner[i, rows], inner)
            if factors is not None:
                _put(self.saved.dropped[i, rows], factors)
        return product(active, self.weights.outer[i], dtype, layer.outer_bias).add_(middle)


def _put(place: Tensor, rows: Tensor) -> None:
    """Writes rows (s * b, f) to (s, b, f)."""
    place.view_as(rows).copy_(rows)


def _allocate(shape: Shape, x: Tensor, inner: int, slots: Tensor, save: bool) -> Activations | None:
    if not save:
        return None
    sizes = shape.sizes
    n, b, depth, d = shape.tokens, shape.rows, shape.depth, x.shape[2]
    return Activations(
        x.new_empty(depth + 1, n, b, d),
        x.new_empty(depth, n, b, d),
        x.new_empty(depth, n, b, sizes.inner),
        x.new_empty(depth, n if shape.inside else 0, b, 2 * sizes.inner),
        x.new_empty(depth, n, b, sizes.inner),
        x.new_empty(depth, n, b, inner),
        x.new_empty(depth, n if sizes.ff_dropout else 0, b, inner // 2),
        slots,
        (),
    )


def _factors(like: Tensor, dropout: float) -> Tensor:
    """Factors of dropout: 0, or what keeps the mean."""
    return F.dropout(torch.ones_like(like), dropout)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their factors of dropout, and what queries (b * h, s, e) find; keys transposed."""
    scores = torch.baddbmm(bias, query, keys, alpha=query.shape[-1] ** -0.5)
    if keep is not None:
        scores.masked_fill_(~keep, torch.finfo(scores.dtype).min)
    share = scores.softmax(-1)
    if keep is not None:
        share.mul_(keep)
    factors = share
    if not dropout:
        return share, factors, share @ values
    factors = _factors(share, dropout)
    return share, factors, (share * factors) @ values
