"""What a decoder carries from token to token."""

from __future__ import annotations

from collections.abc import Callable
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

        # The biases are of no row.
        by_distance = self.by_distance
        return self._map(lambda x: x if x is by_distance else x.index_select(0, rows))

    def detach(self) -> DecoderState:
        """The same without a graph, in the same room."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> DecoderState:
        """On a device, in the same room if it is there already."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> DecoderState:
        return DecoderState(
            tuple(map(change, self.keys)),
            tuple(map(change, self.values)),
            tuple(map(change, self.cross_keys)),
            tuple(map(change, self.cross_values)),
            None if self.mask is None else change(self.mask),
            None if self.cross_mask is None else change(self.cross_mask),
            change(self.by_distance),
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
