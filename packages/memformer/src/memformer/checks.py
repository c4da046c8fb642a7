"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_core.checks import check_at_least


def check_heads(dim: int, heads: int, name: str = "heads") -> None:
    """Raises unless `dim` is a multiple of `heads`."""
    check_at_least(1, dim=dim, **{name: heads})
    if dim % heads:
        raise ValueError(f"dim must be a multiple of {name}, got dim={dim} and {name}={heads}")


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raises TypeError unless a product of x with a weight is defined, or autocast sees to it."""
    kinds = [x.dtype, weight.dtype]
    cast = torch.is_autocast_enabled(weight.device.type) and torch.float64 not in kinds
    if x.dtype != weight.dtype and not cast:
        raise TypeError(f"{name} must be {weight.dtype} as the model is, got {x.dtype}")


def check_only_one(tokens: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raises ValueError unless exactly one of them is given."""
    if (tokens is None) == (inputs_embeds is None):
        both = "neither" if tokens is None else "both"
        raise ValueError(f"give either tokens or inputs_embeds, got {both}")
