"""What the recurrence multiplies by, and the numbers of a model, as plain tuples.

Shapes: d model width, s tokens of a segment, h heads, e width of a head, l layers, g groups of
keys: 1 where all layers share theirs, else l.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from feedback_transformer.packing import Matrix


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
