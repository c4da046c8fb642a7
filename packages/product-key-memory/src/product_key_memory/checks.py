"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_positive(**numbers: int) -> None:
    """Raises unless all are integers of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    """Raises ValueError for an unknown option."""
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")


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


def check_probability(**numbers: float) -> None:
    """Raises ValueError unless all are from 0 to 1."""
    for name, number in numbers.items():
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be from 0 to 1, got {number}")


def check_input(x: Tensor, dim: int) -> None:
    """Raises unless x is (..., dim), floating point."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != dim:
        raise ValueError(f"x must be (..., {dim}), got shape {tuple(x.shape)}")


def check_tokens(x: Tensor, n: int, dim: int) -> None:
    """Raises unless x is (n, dim), floating point."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if tuple(x.shape) != (n, dim):
        raise ValueError(f"x must be {(n, dim)}, got shape {tuple(x.shape)}")


def check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Raises unless `mask` is boolean and has the leading shape of the input."""
    if mask.dtype != torch.bool:
        raise TypeError(f"input_mask must be boolean, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"input_mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")


def check_trainable(mask: Tensor, slots: int) -> None:
    """Raises unless `mask` is boolean (slots,)."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mem_trainable_mask must be boolean, got {mask.dtype}")
    if tuple(mask.shape) != (slots,):
        raise ValueError(f"mem_trainable_mask must be ({slots},), got shape {tuple(mask.shape)}")


def check_indices(indices: Tensor, weights: Tensor) -> None:
    """Raises unless both are (n, k), indices of int64."""
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.ndim != 2 or indices.shape != weights.shape:
        raise ValueError(
            "indices and weights must both be (n, k), got "
            f"{tuple(indices.shape)} and {tuple(weights.shape)}"
        )
