"""Biases of attention by the distance of a query and a key."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checks import check_at_least


class RelativePositionBias(nn.Module):
    """A learned number for each head and bucket of distances (T5, arXiv 1910.10683, section 2.1).

    Half of the buckets are for a distance each; the others for distances up to `max_distance`,
    which grow by a factor, and the last for all beyond. If `bidirectional`, half of them are for
    keys behind the query and half for those after it; if not, keys after it count as its own place.

    Raises ValueError for fewer than 1 head, than 2 buckets (4 if `bidirectional`), an odd number of
    them, and a `max_distance` that leaves nothing for the growing buckets; TypeError for heads that
    are no integer.
    """

    def __init__(
        self,
        heads: int,
        *,
        bidirectional: bool = False,
        num_buckets: int = 32,
        max_distance: int = 128,
    ) -> None:
        check_at_least(1, heads=heads)
        sides = 2 if bidirectional else 1
        if num_buckets < 2 * sides or num_buckets % (2 * sides):
            raise ValueError(f"num_buckets must be a multiple of {2 * sides}, got {num_buckets}")
        if max_distance <= num_buckets // sides // 2:
            exact = num_buckets // sides // 2
            raise ValueError(f"max_distance must be above {exact}, got {max_distance}")
        super().__init__()
        self.bidirectional: bool = bidirectional
        self.num_buckets: int = num_buckets
        self.max_distance: int = max_distance
        self.relative_attention_bias: nn.Embedding = nn.Embedding(num_buckets, heads)

    def buckets(self, distances: Tensor) -> Tensor:
        """Buckets of distances (...), int64."""
        buckets, first = self.num_buckets, torch.zeros_like(distances)
        if self.bidirectional:
            buckets //= 2
            first = (distances < 0) * buckets
            distances = distances.abs()
        distances = distances.clamp(min=0)
        exact = buckets // 2
        # In float32 as everybody has it: which bucket a border belongs to is up to rounding.
        grown = (distances.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        beyond = (exact + (grown * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distances < exact, distances, beyond)

    def forward(self, distances: Tensor) -> Tensor:
        """Biases (..., h) of distances (...), the place of a query less that of a key."""
        biases: Tensor = self.relative_attention_bias(self.buckets(distances))
        return biases
