"""The way back through whole segments; see `fused`, whose shapes these are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback_transformer.layout import (
    Activations,
    Matrices,
    Shape,
    lay_out,
    product,
    unflatten,
)
from feedback_transformer.weight_gradients import Deltas, Statistics, WeightGradients
from feedback_transformer.weights import LayerWeights

_softmax_backward = torch.ops.aten._softmax_backward_data
_gelu_backward = torch.ops.aten.gelu_backward


@torch.no_grad()
def backward_pass(
    shape: Shape,
    seen: Tensor | None,
    inputs: list[Tensor],
    saved: Activations,
    gradients: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """The gradients of all inputs of the recurrence, in their order."""
    _, _, _, table, key_value, mix, *flat = inputs
    norm, layers = unflatten(tuple(flat), shape)
    back = _Back(shape, seen, saved, table, mix, norm, layers)
    back.begin(gradients)
    weights = lay_out(layers, key_value, shape, transposed=True)
    for k in reversed(range(shape.segments)):
        back.segment(k, weights)
    slots = shape.slots
    mixed = back.vectors if back.mixed is None else back.mixed.out
    of_weights = WeightGradients(shape, seen, saved, back.deltas, layers, back.attn, back.ff, mixed)
    found: list[Tensor | None] = [
        back.deltas.states[0],
        *back.slots_grad[:, :, :, :slots].to(mix.dtype).unbind(0),
        back.table_grad.to(table.dtype),
        of_weights.key_value(key_value),
        of_weights.mix(),
    ]
    if norm is not None and back.mixed is not None:
        found += back.mixed.parameters(back.deltas.normed, back.vectors, *norm)
    for i in range(shape.depth):
        found += of_weights.layer(i)
    return found


class _Back:
    """The sequential part: gradients of activations, a segment after the other, the last first."""

    def __init__(
        self,
        shape: Shape,
        seen: Tensor | None,
        saved: Activations,
        table: Tensor,
        mix: Tensor,
        norm: tuple[Tensor, Tensor] | None,
        layers: list[LayerWeights],
    ) -> None:
        self.shape, self.seen, self.saved, self.norm, self.layers = shape, seen, saved, norm, layers
        self.mix = mix.tolist()
        # Where a segment has its own keys while it is its turn; before it nobody sees them.
        self.slots = saved.slots.clone()
        # Sums over all segments: in half precision they would lose what comes late.
        wide = torch.promote_types(table.dtype, torch.float32)
        self.slots_grad = torch.zeros_like(saved.slots, dtype=wide)
        self.table_grad = torch.zeros_like(table, dtype=wide)
        self.attn = [
            Statistics.of(x, layer.attn_gain, layer.attn_shift)
            for x, layer in zip(saved.states, layers, strict=False)
        ]
        self.ff = [
            Statistics.of(x, layer.ff_gain, layer.ff_shift)
            for x, layer in zip(saved.middle, layers, strict=True)
        ]
        mixed = torch.tensordot(mix, saved.states, 1)
        self.vectors = mixed
        self.mixed = None if norm is None else Statistics.of(mixed, *norm)
        self.deltas = Deltas(
            torch.empty_like(saved.states),
            torch.empty_like(saved.middle),
            torch.empty_like(saved.query),
            torch.empty_like(saved.own),
            self._factors_of_inner(),
            torch.empty_like(saved.middle),
            torch.empty_like(saved.middle),
            mixed.new_empty(shape.tokens, shape.rows, 2 * shape.sizes.groups * shape.sizes.inner),
            torch.empty_like(mixed),
            torch.empty_like(mixed),
        )

    def begin(self, gradients: tuple[Tensor, ...]) -> None:
        """Takes the gradients of the results: states, keys and values of the new slots."""
        out, keys, values = gradients
        self.deltas.states[-1] = out
        self.slots_grad[0, :, :, self.shape.slots :] = keys
        self.slots_grad[1, :, :, self.shape.slots :] = values

    def _factors_of_inner(self) -> Tensor:
        """Of GEGLU's input what the gradient of its output is multiplied by, all at once."""
        factors = torch.empty_like(self.saved.inner)
        half = factors.shape[-1] // 2
        for factor, inner in zip(factors, self.saved.inner, strict=True):
            values, gates = inner.split(half, -1)
            factor[..., :half] = F.gelu(gates)
            factor[..., half:] = _gelu_backward(values, gates)
        if self.shape.sizes.ff_dropout:
            factors.unflatten(-1, (2, half)).mul_(self.saved.dropped.unsqueeze(-2))
        return factors

    def segment(self, k: int, weights: Matrices) -> None:
        shape, deltas = self.shape, self.deltas
        sizes, b = shape.sizes, shape.rows
        s, h, e, g = sizes.seq_len, sizes.heads, sizes.dim_head, sizes.groups
        start, low, high, end = shape.spans(k)
        rows, dtype = slice(start, start + s), shape.matrix_dtype
        to_mixed = self._slots_back(rows, high, weights)
        dropping = bool(sizes.attn_dropout)
        share = self.saved.shares[k * (2 if dropping else 1)]
        factors = self.saved.shares[2 * k + 1] if dropping else None
        scores_grad = torch.empty_like(share)
        found_grad = []
        windows = [
            (self.slots[0, j, :, low:end], self.slots[1, j, :, low:end].mT) for j in range(g)
        ]
        delta = deltas.states[-1, rows].add_(to_mixed, alpha=self.mix[-1]).view(s * b, -1)
        for i in reversed(range(shape.depth)):
            group = i if g > 1 else 0
            layer, (keys, values) = self.layers[i], windows[group]
            inner = deltas.inner[i, rows].view(s * b, 2, -1)
            inner.mul_(product(delta, weights.outer[i], dtype)[:, None])
            hidden = product(inner.view(s * b, -1), weights.inner[i], dtype)
            deltas.ff_hidden[i, rows] = hidden.view(s, b, -1)
            middle = self.ff[i].back(hidden, self.saved.middle[i], layer.ff_gain, rows)
            middle = middle.view(s * b, -1).add_(delta)
            deltas.middle[i, rows] = middle.view(s, b, -1)
            answer = product(middle, weights.out[i], dtype).view(s, b * h, e).transpose(0, 1)
            found_grad.append(answer)
            query = self.saved.query[i, rows].view(s, b * h, e).transpose(0, 1)
            if shape.inside:
                own = self.saved.own[i, rows].view(s, b * h, 2, e).permute(2, 1, 0, 3)
                self.slots[:, group, :, high:end] = own
            to_share = answer @ values
            dropped = share[i]
            if factors is not None:
                to_share.mul_(factors[i])
                dropped = dropped * factors[i]
            to_scores = _softmax_backward(to_share, share[i], -1, share.dtype).mul_(e**-0.5)
            scores_grad[i] = to_scores
            to_query = deltas.query[i, rows].view(s, b * h, e)
            to_query.copy_((to_scores @ keys).transpose(0, 1))
            hidden = product(to_query.view(s * b, -1), weights.query[i], dtype)
            if shape.inside:
                inside = slice(high - low, None)
                to_own = deltas.own[i, rows].view(s, b * h, 2, e)
                to_own[:, :, 0] = (to_scores[..., inside].mT @ query).transpose(0, 1)
                to_own[:, :, 1] = (dropped[..., inside].mT @ answer).transpose(0, 1)
                hidden += product(to_own.view(s * b, -1), weights.own[group], dtype)
            deltas.attn_hidden[i, rows] = hidden.view(s, b, -1)
            delta = self.attn[i].back(hidden, self.saved.states[i], layer.attn_gain, rows)
            delta = (
                delta.view(s * b, -1).add_(middle).add_(to_mixed.view(s * b, -1), alpha=self.mix[i])
            )
            deltas.states[i, rows] = delta.view(s, b, -1)
        found_grad.reverse()
        self._memory_back(k, share, factors, scores_grad, torch.stack(found_grad))

    def _slots_back(self, rows: slice, high: int, weights: Matrices) -> Tensor:
        """The gradient of memory vectors (s, b, d), whose slots all later segments have seen."""
        shape, s = self.shape, self.shape.sizes.seq_len
        h, e, g, b = shape.sizes.heads, shape.sizes.dim_head, shape.sizes.groups, shape.rows
        slots = self.deltas.slot[rows].view(s, b * h, g, 2, e).permute(3, 2, 1, 0, 4)
        slots.copy_(self.slots_grad[:, :, :, high : high + s])
        delta = product(self.deltas.slot[rows].flatten(0, 1), weights.slot, shape.matrix_dtype)
        delta = delta.view(s, b, -1)
        if self.mixed is not None and self.norm is not None:
            self.deltas.normed[rows] = delta
            delta = self.mixed.back(delta, self.vectors, self.norm[0], rows)
        self.deltas.mixed[rows] = delta
        return delta

    def _memory_back(
        self,
        k: int,
        share: Tensor,
        factors: Tensor | None,
        scores_grad: Tensor,
        found_grad: Tensor,
    ) -> None:
        """What segment k adds to the gradients of the slots that it has seen, and of biases.

        Of all layers at once: `share` and `scores_grad` are (l, b * h, s, m_k), `found_grad` is
        (l, b * h, s, e). The scores are those before scaling.
        """
        shape = self.shape
        sizes, b = shape.sizes, shape.rows
        s, h, e, g = sizes.seq_len, sizes.heads, sizes.dim_head, sizes.groups
        start, low, high, end = shape.spans(k)
        columns = self.table_grad.shape[2] - (s if shape.inside else 0)
        window = self.table_grad[:, :, columns - (high - low) : columns + (end - high)]
        window += scores_grad.unflatten(1, (b, h)).sum((0, 1)) * e**0.5
        if high == low:
            return
        dropped = share if factors is None else share * factors
        query = self.saved.query[:, start : start + s].unflatten(-1, (h, e))
        query = query.permute(0, 2, 3, 1, 4).flatten(1, 2)

        def rows(x: Tensor) -> Tensor:
            """(l, b * h, s, ...) -> (g * b * h, l * s or s, ...)."""
            return x.flatten(0, 1) if g > 1 else x.transpose(0, 1).flatten(1, 2)

        seen = slice(0, high - low)
        for grad, left, right in zip(
            self.slots_grad, (scores_grad, dropped), (query, found_grad), strict=True
        ):
            added = rows(left[..., seen]).mT @ rows(right)
            grad[:, :, low:high] += added.view(g, b * h, high - low, e)
