"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_positive(*, least: int = 1, **numbers: int) -> None:
    """Raises unless all are integers of at least `least`."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def check_heads(dim: int, heads: int, name: str = "heads") -> None:
    """Raises unless `dim` is a multiple of `heads`."""
    check_positive(dim=dim, **{name: heads})
    if dim % heads:
        raise ValueError(f"dim must be a multiple of {name}, got dim={dim} and {name}={heads}")


def check_dropout(dropout: float) -> None:
    """Raises ValueError unless 0 <= dropout < 1."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    """Raises ValueError for an unknown option."""
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")


def check_tokens(name: str, x: Tensor, batch: int | None = None) -> None:
    """Raises unless x is (b, n) integers with n >= 1, of `batch` rows where given."""
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold int64 or int32 tokens, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must be (b, n) with n >= 1, got shape {tuple(x.shape)}")
    _check_batch(name, x, batch)


def check_vectors(name: str, x: Tensor, dim: int, batch: int | None = None) -> None:
    """Raises unless x is (b, n, dim), floating point, of `batch` rows where given."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != dim:
        shape = tuple(x.shape)
        raise ValueError(f"{name} must be (b, n, {dim}) with n >= 1, got shape {shape}")
    _check_batch(name, x, batch)


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raises TypeError unless a product of x with a weight is defined, or autocast sees to it."""
    kinds = [x.dtype, weight.dtype]
    cast = torch.is_autocast_enabled(weight.device.type) and torch.float64 not in kinds
    if x.dtype != weight.dtype and not cast:
        raise TypeError(f"{name} must be {weight.dtype} as the model is, got {x.dtype}")


def _check_batch(name: str, x: Tensor, batch: int | None) -> None:
    if batch is not None and x.shape[0] != batch:
        raise ValueError(f"{name} must have {batch} rows, got {x.shape[0]}")


def check_mask(name: str, mask: Tensor | None, *shapes: Sequence[int]) -> None:
    """Raises unless `mask` is None, or boolean and of one of the shapes: nothing is broadcast."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a boolean tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, got {mask.dtype}")
    if tuple(mask.shape) not in [tuple(shape) for shape in shapes]:
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(mask.shape)}")


def check_length(name: str, n: int, longest: int) -> None:
    """Raises ValueError for a sequence over the model's length."""
    if n > longest:
        raise ValueError(f"{name} has {n} tokens, more than max_seq_len={longest}")


def check_only_one(tokens: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raises ValueError unless exactly one of them is given."""
    if (tokens is None) == (inputs_embeds is None):
        both = "neither" if tokens is None else "both"
        raise ValueError(f"give either tokens or inputs_embeds, got {both}")
