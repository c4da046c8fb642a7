"""What a caller may get wrong, refused before any work by its name and what was given.

A wrong type raises TypeError; a wrong number, choice or shape raises ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

__all__ = [
    "check_at_least",
    "check_choice",
    "check_dropout",
    "check_integers",
    "check_legacy_options",
    "check_length",
    "check_mask",
    "check_probability",
    "check_tokens",
    "check_vectors",
]


def check_integers(**numbers: int) -> None:
    """Raises unless all are integers; True and False are none."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")


def check_at_least(least: int, /, **numbers: int) -> None:
    """Raises unless all are integers of at least `least`."""
    check_integers(**numbers)
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def check_probability(**numbers: float) -> None:
    """Raises unless all are numbers from 0 to 1."""
    for name, number in numbers.items():
        _check_number(name, number)
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be from 0 to 1, got {number}")


def check_dropout(**numbers: float) -> None:
    """Raises unless all are numbers from 0 to below 1: something is kept, and scaled up."""
    for name, number in numbers.items():
        _check_number(name, number)
        if not 0.0 <= number < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {number}")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    """Raises unless `choice` is one of `choices`."""
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")


def check_tokens(name: str, x: Tensor, batch: int | None = None) -> None:
    """Raises unless x is (b, n) int64 or int32 with n >= 1, of `batch` rows where given."""
    _check_tensor(name, x)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold int64 or int32 tokens, got {x.dtype}")
    _check_shape(name, x, batch, (), 1)


def check_vectors(
    name: str, x: Tensor, dim: int, batch: int | None = None, *, least: int = 1
) -> None:
    """Raises unless x is (b, n, dim), floating point, n >= `least`, of `batch` rows where given."""
    _check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    _check_shape(name, x, batch, (dim,), least)


def check_mask(name: str, mask: Tensor | None, shape: Sequence[int]) -> None:
    """Raises unless `mask` is None, or boolean and of exactly this shape: nothing is broadcast."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a boolean tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got shape {tuple(mask.shape)}")


def check_length(name: str, n: int, max_seq_len: int) -> None:
    """Raises unless a sequence of `n` tokens fits."""
    if n > max_seq_len:
        raise ValueError(f"{name} has {n} tokens, more than max_seq_len={max_seq_len}")


def check_legacy_options(**unset: bool) -> None:
    """Raises ValueError for an option that the reference does not have; True = left alone."""
    changed = [name for name, left_alone in unset.items() if not left_alone]
    if changed:
        raise ValueError(f"legacy=True has no {', '.join(changed)}: the reference knows none")


def _check_number(name: str, number: float) -> None:
    if not isinstance(number, Real):
        raise TypeError(f"{name} must be a number, got {number!r}")


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _check_shape(
    name: str, x: Tensor, batch: int | None, dims: tuple[int, ...], least: int
) -> None:
    """Raises unless x is (b, n, *dims) with n >= `least`, and b = `batch` where given."""
    fits = x.ndim == 2 + len(dims) and x.shape[1] >= least and tuple(x.shape[2:]) == dims
    if not fits or (batch is not None and x.shape[0] != batch):
        sizes = ", ".join(str(size) for size in ("b" if batch is None else batch, "n", *dims))
        more = f" with n >= {least}" if least else ""
        raise ValueError(f"{name} must be ({sizes}){more}, got shape {tuple(x.shape)}")
