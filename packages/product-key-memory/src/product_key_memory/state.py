"""What a `Transformer` carries from token to token.

Shapes: b batch, h heads, n tokens seen, d_h width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What attention has seen. It is never changed in place, so one may be continued twice.

    Attributes:
        tokens: (b, n) since the first position.
        keys, values: of each layer, (b, h, n, d_h).
    """

    tokens: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Tokens seen since the first position."""
        return self.tokens.shape[1]

    def detach(self) -> State:
        """Cuts the graph behind the state."""
        return self._map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> State:
        """Moves every tensor to `device`."""
        return self._map(lambda x: x.to(device))

    def reorder(self, index: Tensor) -> State:
        """Takes the rows `index` (b',) of the batch, as beam search does."""
        return self._map(lambda x: x.index_select(0, index.to(x.device)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        return State(
            change(self.tokens),
            tuple(change(x) for x in self.keys),
            tuple(change(x) for x in self.values),
        )
