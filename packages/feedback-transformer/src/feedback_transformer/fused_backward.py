"""The way back through whole segments; see `fused`, whose shapes these are."""

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
    product,
    unflatten,
)
from feedback_transformer.weights import LayerWeights

_layer_norm = torch.ops.aten.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward
_softmax_backward = torch.ops.aten._softmax_backward_data
_gelu_backward = torch.ops.aten.gelu_backward
EPS = 1e-5


class Statistics(NamedTuple):
    """What layer normalisation has made of all rows, and of each its mean and 1 / deviation."""

    out: Tensor
    mean: Tensor
    rstd: Tensor

    @staticmethod
    def of(x: Tensor, gain: Tensor, shift: Tensor) -> Statistics:
        return Statistics(*_layer_norm(x, x.shape[-1:], gain, shift, EPS))

    def back(self, gradient: Tensor, x: Tensor, gain: Tensor, rows: slice) -> Tensor:
        """The gradient of some rows of x (n, b, d) from that of what was made of them."""
        found = _layer_norm_backward(
            gradient.view_as(x[rows]),
            x[rows],
            x.shape[-1:],
            self.mean[rows],
            self.rstd[rows],
            gain,
            None,
            [True, False, False],
        )
        out: Tensor = found[0]
        return out

    def parameters(self, gradient: Tensor, x: Tensor, gain: Tensor, shift: Tensor) -> list[Tensor]:
        """The gradients of gain and shift from those of all rows."""
        found = _layer_norm_backward(
            gradient, x, x.shape[-1:], self.mean, self.rstd, gain, shift, [False, True, True]
        )
        return [found[1], found[2]]


class Deltas(NamedTuple):
    """Gradients of what the segments have computed, row by row, from which those of weights follow.

    Attributes:
        states: (l + 1, n, b, d), of the input of every layer, and of the output.
        middle: (l, n, b, d).
        query: (l, n, b, h * e).
        own: (l, n, b, h * 2 * e), keys and values inside segments; empty where they have one token.
        inner: (l, n, b, f); before a segment's turn what its gradient is multiplied by.
        attn_hidden, ff_hidden: (l, n, b, d), of what the norms have made.
        slot: (n, b, h * g * 2 * e).
        mixed: (n, b, d), of the memory vectors, before and after their norm.
    """

    states: Tensor
    middle: Tensor
    query: Tensor
    own: Tensor
    inner: Tensor
    attn_hidden: Tensor
    ff_hidden: Tensor
    slot: Tensor
    mixed: Tensor
    normed: Tensor


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
    of_weights = _Parameters(shape, seen, saved, back, layers)
    found: list[Tensor | None] = [
        back.deltas.states[0],
        *back.slots_grad[:, :, :, :slots].to(mix.dtype).unbind(0),
        back.table_grad.to(table.dtype),
        of_weights.key_value(key_value),
        of_weights.mix(),
    ]
    if norm is not None and back.mixed is not None:
        found += back.mixed.parameters(back.deltas.normed, of_weights.mixed, *norm)
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


class _Parameters:
    """The gradients of the weights: each one product over all rows."""

    def __init__(
        self,
        shape: Shape,
        seen: Tensor | None,
        saved: Activations,
        back: _Back,
        layers: list[LayerWeights],
    ) -> None:
        self.shape, self.seen, self.saved, self.back, self.layers = shape, seen, saved, back, layers
        self.mixed = back.vectors
        self._mixed_out = back.vectors if back.mixed is None else back.mixed.out

    def _outer(self, delta: Tensor, x: Tensor) -> Tensor:
        """(n, b, out) and (n, b, in) -> (out, in)."""
        dtype = self.shape.matrix_dtype
        found = delta.flatten(0, 1).to(dtype).t() @ x.flatten(0, 1).to(dtype)
        return found.to(delta.dtype)

    def mix(self) -> Tensor:
        """Of the weights with which the memory is mixed, (l + 1,)."""
        states = self.saved.states
        return states.flatten(1) @ self.back.deltas.mixed.flatten()

    def key_value(self, key_value: Tensor) -> Tensor:
        """Of keys and values, of slots and inside segments, (g * 2 * h * e, d)."""
        sizes, deltas = self.shape.sizes, self.back.deltas
        g, h, e = sizes.groups, sizes.heads, sizes.dim_head
        found = self._outer(deltas.slot, self._mixed_out).view(h, g, 2, e, -1)
        if self.shape.inside:
            for i, statistics in enumerate(self.back.attn):
                own = self._outer(deltas.own[i], statistics.out)
                found[:, i if g > 1 else 0] += own.view(h, 2, e, -1)
        return found.permute(1, 2, 0, 3, 4).reshape(key_value.shape)

    def layer(self, i: int) -> list[Tensor]:
        """Of the parameters of a layer, in their order."""
        shape, deltas, saved = self.shape, self.back.deltas, self.saved
        layer, attn, ff = self.layers[i], self.back.attn[i], self.back.ff[i]
        middle = deltas.middle[i]
        # The gradient at the end of the layer, where that of its mixed state has been added.
        end = deltas.states[i + 1]
        values, gates = saved.inner[i].chunk(2, -1)
        active = F.gelu(gates).mul_(values)
        if shape.sizes.ff_dropout:
            active.mul_(saved.dropped[i])
        return [
            *attn.parameters(
                deltas.attn_hidden[i], saved.states[i], layer.attn_gain, layer.attn_shift
            ),
            self._outer(deltas.query[i], attn.out),
            self._outer(middle, saved.found[i]),
            (middle * self._alive()).sum((0, 1)),
            *ff.parameters(deltas.ff_hidden[i], saved.middle[i], layer.ff_gain, layer.ff_shift),
            self._outer(deltas.inner[i], ff.out),
            deltas.inner[i].sum((0, 1)),
            self._outer(end, active),
            end.sum((0, 1)),
        ]

    def _alive(self) -> Tensor:
        """Where attention has seen something, as factors (n, b or 1, 1)."""
        shape, s = self.shape, self.shape.sizes.seq_len
        parts = []
        for k in range(shape.segments):
            _, low, _, end = shape.spans(k)
            _, alive = kept(self.seen, shape, k)
            if alive is None or end == low:
                alive = torch.full((s, 1, 1), end > low, device=self.mixed.device)
            parts.append(alive.expand(s, shape.rows, 1))
        return torch.cat(parts).to(self.mixed.dtype)
