"""What a decoder carries from token to token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DecoderState(NamedTuple):
    """Keys and values of all layers, in room for a whole sequence.

    A step writes into the room in place: of two continuations of one state, take a `reorder`ed
    copy for the second. Shapes: b batch, h heads, d head width, j tokens that there is room for,
    m tokens of the context.

    Attributes:
        keys, values: (b, h, j, d) of each layer.
        cross_keys, cross_values: (b, h, m, d) of each layer; empty tuples without a context.
        mask: (b, j) boolean, True = takes part; None where all do.
        cross_mask: (b, m) boolean, or None.
        by_distance: (h, 2 j - 1) biases, the largest distance first.
        length: tokens seen so far.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cross_keys: tuple[Tensor, ...]
    cross_values: tuple[Tensor, ...]
    mask: Tensor | None
    cross_mask: Tensor | None
    by_distance: Tensor
    length: int

    def reorder(self, rows: Tensor) -> DecoderState:
        """A copy with these rows (i,) of the batch, each as often as it is named: beam search."""

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, rows)

        return DecoderState(
            tuple(map(pick, self.keys)),
            tuple(map(pick, self.values)),
            tuple(map(pick, self.cross_keys)),
            tuple(map(pick, self.cross_values)),
            None if self.mask is None else pick(self.mask),
            None if self.cross_mask is None else pick(self.cross_mask),
            self.by_distance,
            self.length,
        )

    def hide(self, mask: Tensor) -> DecoderState:
        """With (b, t) new tokens of which some do not take part, at the place `length`."""
        room = self.keys[0].shape[2]
        everything = torch.ones(len(mask), room, dtype=torch.bool, device=mask.device)
        if self.mask is not None:
            everything &= self.mask
        everything[:, self.length : self.length + mask.shape[1]] = mask
        return self._replace(mask=everything)
