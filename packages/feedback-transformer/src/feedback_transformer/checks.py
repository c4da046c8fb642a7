"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shared_core import transformed


def check_at_least(least: int, **numbers: int) -> None:
    """Raises unless all are integers of at least `least`."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def check_share(**numbers: float) -> None:
    """Raises unless all are numbers from 0 to 1."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {number!r}")
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be from 0 to 1, got {number}")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    """Raises ValueError for an unknown option."""
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")


def check_every(name: str, tokens: int | None, seq_len: int) -> None:
    """Raises unless `tokens` is None or a positive multiple of the segment's length."""
    if tokens is None:
        return
    check_at_least(1, **{name: tokens})
    if tokens % seq_len:
        raise ValueError(f"{name} must be a multiple of seq_len={seq_len}, got {tokens}")


def check_input(x: Tensor, dim: int, num_tokens: int, dtype: torch.dtype) -> None:
    """Raises unless x is integer tokens (b, n) below num_tokens, or embeddings (b, n, dim).

    Embeddings must be of the model's type `dtype`, or come under autocast.
    """
    if not x.is_floating_point() and x.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            "x must hold tokens, torch.int32 or torch.int64, or floating-point embeddings, got "
            f"{x.dtype}"
        )
    shape = tuple(x.shape)
    if x.is_floating_point():
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"embeddings must be {dtype} as the model's weights, got {x.dtype}")
        if x.ndim != 3 or shape[2] != dim:
            raise ValueError(f"embeddings must be (b, n, {dim}), got shape {shape}")
    elif x.ndim != 2:
        raise ValueError(f"tokens must be (b, n), got shape {shape}")
    if shape[1] < 1:
        raise ValueError(f"x must hold at least 1 token, got shape {shape}")
    # Where it costs nothing: elsewhere it waits for the device, or cuts a graph. Inside of `vmap`
    # a token has no number.
    if x.device.type != "cpu" or x.is_floating_point() or torch.compiler.is_compiling():
        return
    if not transformed(x):
        check_tokens(x, num_tokens)


def check_tokens(x: Tensor, num_tokens: int) -> None:
    """Raises ValueError for a token outside the vocabulary."""
    if x.numel() == 0:
        return
    least, largest = x.aminmax()
    if int(least) < 0 or int(largest) >= num_tokens:
        raise ValueError(
            f"tokens must be from 0 to {num_tokens - 1}, got {int(least)} to {int(largest)}"
        )


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Raises unless `mask` is boolean and has exactly this shape: nothing is broadcast."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got shape {tuple(mask.shape)}")


def check_context(
    context: Tensor | None, context_mask: Tensor | None, dim_context: int | None, batch: int
) -> None:
    """Raises unless the context is what the model was built for."""
    if dim_context is None:
        if context is not None or context_mask is not None:
            raise ValueError("context needs a model with dim_context, got dim_context=None")
        return
    if context is None:
        raise ValueError(f"a model with dim_context={dim_context} needs a context, got None")
    if not context.is_floating_point():
        raise TypeError(f"context must be floating point, got {context.dtype}")
    if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != dim_context:
        raise ValueError(
            f"context must be ({batch}, m, {dim_context}), got shape {tuple(context.shape)}"
        )
    if context_mask is not None:
        check_mask("context_mask", context_mask, context.shape[:2])


def check_part(name: str, part: nn.Module | None, kind: type[nn.Module]) -> None:
    """Raises TypeError for a part whose weights are not all that calling it would use.

    Parts are never called. So one of another class, with a `forward` of its own, or with a weight
    that is made when it is called, would be right nowhere.
    """
    if part is None:
        return
    words = f"{name} is never called, its weights are used as they are: it must be"
    if not isinstance(part, kind) or type(part).forward is not kind.forward:
        found = type(part).__name__
        raise TypeError(f"{words} a {kind.__name__}, got {found}")
    if part._forward_pre_hooks and "weight" in vars(part):
        raise TypeError(f"{words} without hooks that make them, as parametrizations are")
