"""The gradients of the weights of whole segments, which need no order; see `fused`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback_transformer.layout import Activations, Shape, kept
from feedback_transformer.weights import LayerWeights

_layer_norm = torch.ops.aten.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward
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


@dataclass(frozen=True)
class WeightGradients:
    """The gradients of the weights: each one product over all rows.

    Attributes:
        seen: (b, m + n) boolean: who takes part; None: all.
        attn, ff: of each layer the norm before attention, and before the feed-forward layer.
        mixed: (n, b, d), the memory vectors of which slots are made.
    """

    shape: Shape
    seen: Tensor | None
    saved: Activations
    deltas: Deltas
    layers: list[LayerWeights]
    attn: list[Statistics]
    ff: list[Statistics]
    mixed: Tensor

    def _outer(self, delta: Tensor, x: Tensor) -> Tensor:
        """(n, b, out) and (n, b, in) -> (out, in)."""
        dtype = self.shape.matrix_dtype
        found = delta.flatten(0, 1).to(dtype).t() @ x.flatten(0, 1).to(dtype)
        return found.to(delta.dtype)

    def mix(self) -> Tensor:
        """Of the weights with which the memory is mixed, (l + 1,)."""
        states = self.saved.states
        return states.flatten(1) @ self.deltas.mixed.flatten()

    def key_value(self, key_value: Tensor) -> Tensor:
        """Of keys and values, of slots and inside segments, (g * 2 * h * e, d)."""
        sizes, deltas = self.shape.sizes, self.deltas
        g, h, e = sizes.groups, sizes.heads, sizes.dim_head
        found = self._outer(deltas.slot, self.mixed).view(h, g, 2, e, -1)
        if self.shape.inside:
            for i, statistics in enumerate(self.attn):
                own = self._outer(deltas.own[i], statistics.out)
                found[:, i if g > 1 else 0] += own.view(h, 2, e, -1)
        return found.permute(1, 2, 0, 3, 4).reshape(key_value.shape)

    def layer(self, i: int) -> list[Tensor]:
        """Of the parameters of a layer, in their order."""
        shape, deltas, saved = self.shape, self.deltas, self.saved
        layer, attn, ff = self.layers[i], self.attn[i], self.ff[i]
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
