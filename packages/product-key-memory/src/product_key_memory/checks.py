"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def as_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type of a name; raises TypeError unless it is floating point, or None."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise TypeError(f"{name} must be a floating-point torch.dtype or its name, got {dtype!r}")


def check_at_least_0(**numbers: float) -> None:
    """Raises ValueError unless all are numbers of at least 0."""
    for name, number in numbers.items():
        if not number >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {number}")


def check_input(x: Tensor, dim: int) -> None:
    """Raises unless x is (..., dim), floating point."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != dim:
        raise ValueError(f"x must be (..., {dim}), got shape {tuple(x.shape)}")


def check_rows(x: Tensor, n: int, dim: int) -> None:
    """Raises unless x is (n, dim), floating point."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if tuple(x.shape) != (n, dim):
        raise ValueError(f"x must be {(n, dim)}, got shape {tuple(x.shape)}")


def check_indices(indices: Tensor, weights: Tensor) -> None:
    """Raises unless both are (n, k), indices of int64."""
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.ndim != 2 or indices.shape != weights.shape:
        raise ValueError(
            "indices and weights must both be (n, k), got "
            f"{tuple(indices.shape)} and {tuple(weights.shape)}"
        )
