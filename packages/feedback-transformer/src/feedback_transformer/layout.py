"""What the passes over whole segments have in common: sizes, kept activations, laid out weights.

Shapes as in `fused`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from feedback_transformer.packing import Matrix, Packs, multiply, pack
from feedback_transformer.weights import LayerWeights, Sizes

FEWEST, FEWEST_BACK, FEWEST_HALF = 6, 16, 128
"""Segments from which on it pays to lay out weights for them, to transpose them for that, and to
do it in float16."""


class Shape(NamedTuple):
    """Sizes of a model and of a call: `slots` of the memory before, `tokens` n, `rows` b."""

    sizes: Sizes
    depth: int
    rows: int
    tokens: int
    slots: int
    norm_memory: bool
    matrix_dtype: torch.dtype

    @property
    def inside(self) -> bool:
        """Whether tokens see their own segment."""
        return self.sizes.seq_len > 1

    @property
    def segments(self) -> int:
        return self.tokens // self.sizes.seq_len

    def spans(self, k: int) -> tuple[int, int, int, int]:
        """Segment k: its first token, the slots it sees, from and to, and where its own end."""
        start = k * self.sizes.seq_len
        high = self.slots + start
        low = max(0, high - self.sizes.mem_len)
        return start, low, high, high + (self.sizes.seq_len if self.inside else 0)


class Activations(NamedTuple):
    """What the backward pass needs: all that is linear in the number of tokens, nothing else.

    Attributes:
        states: (l + 1, n, b, d), the input of every layer, and the output.
        middle: (l, n, b, d), between attention and feed-forward.
        query: (l, n, b, h * e).
        own: (l, n, b, h * 2 * e), keys and values inside the segment; empty where it has one token.
        found: (l, n, b, h * e), what attention found.
        inner: (l, n, b, f), before GEGLU.
        dropped: (l, n, b, f / 2), factors of the feed-forward's dropout; empty without.
        slots: (2, g, b * h, m + n, e), keys and values of the memory before and of all tokens.
        shares: of each segment the attention weights (l, b * h, s, m_k), then its factors of
            dropout where there is some.
    """

    states: Tensor
    middle: Tensor
    query: Tensor
    own: Tensor
    found: Tensor
    inner: Tensor
    dropped: Tensor
    slots: Tensor
    shares: tuple[Tensor, ...]


class Matrices(NamedTuple):
    """The matrices of the recurrence, (out, in), for one direction.

    Attributes:
        query, out, inner, outer: of each layer.
        own: of each group, rows ordered by heads: h, then key and value, then e.
        slot: rows ordered by heads: h, then groups, then key and value, then e. With one group
            it is `own`, so that it stays in a cache.
    """

    query: tuple[Matrix, ...]
    own: tuple[Matrix, ...]
    out: tuple[Matrix, ...]
    inner: tuple[Matrix, ...]
    outer: tuple[Matrix, ...]
    slot: Matrix


def lay_out(
    layers: list[LayerWeights],
    key_value: Tensor,
    shape: Shape,
    *,
    transposed: bool,
    packs: Packs | None = None,
) -> Matrices:
    """Matrices for the forward pass, or transposed ones for the way back; kept in `packs`."""
    sizes = shape.sizes
    h, e, g = sizes.heads, sizes.dim_head, sizes.groups
    rows = sizes.seq_len * shape.rows
    by_group = key_value.view(g, 2, h, e, -1)

    def place(name: str, weight: Tensor, source: Tensor) -> Matrix:
        weight = weight.detach().to(shape.matrix_dtype)
        weight = weight.t() if transposed else weight
        # Fewer never take what others have kept: a call gives the same after any other.
        if shape.segments < (FEWEST_BACK if transposed else FEWEST):
            return weight
        if packs is None:
            return pack(weight, rows)
        return packs.pack(name, weight, source, rows, half=shape.segments >= FEWEST_HALF)

    slot = place("slot", by_group.permute(2, 0, 1, 3, 4).flatten(0, 3), key_value)
    own: tuple[Matrix, ...] = (slot,)
    if g > 1:
        parts = (group.transpose(0, 1).flatten(0, 2) for group in by_group)
        own = tuple(place(f"own {i}", part, key_value) for i, part in enumerate(parts))

    def each(name: str) -> tuple[Matrix, ...]:
        weights = (matrix(getattr(layer, name)) for layer in layers)
        return tuple(place(f"{name} {i}", weight, weight) for i, weight in enumerate(weights))

    return Matrices(
        each("query"),
        own if shape.inside else (),
        each("out"),
        each("inner"),
        each("outer"),
        slot,
    )


def matrix(weight: Matrix) -> Tensor:
    """A weight that is not packed."""
    if not isinstance(weight, Tensor):
        raise TypeError("weights must not be packed yet")
    return weight


def product(x: Tensor, weight: Matrix, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, computed in `dtype`, in the type of x."""
    if x.dtype == dtype or not isinstance(weight, Tensor):
        return multiply(x, weight, bias)
    out = multiply(x.to(dtype), weight).to(x.dtype)
    return out if bias is None else out + bias


def unflatten(
    flat: tuple[Tensor, ...], shape: Shape
) -> tuple[tuple[Tensor, Tensor] | None, list[LayerWeights]]:
    """Gain and shift of the memory's norm, or None, and the layers."""
    norm = (flat[0], flat[1]) if shape.norm_memory else None
    flat = flat[2:] if shape.norm_memory else flat
    width = len(LayerWeights._fields)
    layers = [LayerWeights(*flat[width * i : width * (i + 1)]) for i in range(shape.depth)]
    return norm, layers


def kept(seen: Tensor | None, shape: Shape, k: int) -> tuple[Tensor | None, Tensor | None]:
    """What segment k may see: (b * h, 1, m_k) boolean, and rows (s, b, 1) that see something.

    None where all is seen; the second alone is there where there is nothing to see.
    """
    _, low, high, end = shape.spans(k)
    s, h = shape.sizes.seq_len, shape.sizes.heads
    if seen is None:
        return None, None
    keep = seen[:, low:end]
    alive = keep[:, : high - low].any(1).expand(s, -1)
    if shape.inside:
        alive = alive | (keep[:, high - low :].cumsum(1) > 0).t()
    keep = keep[:, None, None].expand(-1, h, 1, -1).flatten(0, 1)
    return keep, alive[..., None]
