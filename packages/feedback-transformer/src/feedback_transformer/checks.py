"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared_core import transformed
from shared_core.checks import check_at_least, check_mask, check_vectors


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
        check_vocabulary(x, num_tokens)


def check_vocabulary(x: Tensor, num_tokens: int) -> None:
    """Raises ValueError for a token outside the vocabulary."""
    if x.numel() == 0:
        return
    least, largest = x.aminmax()
    if int(least) < 0 or int(largest) >= num_tokens:
        raise ValueError(
            f"tokens must be from 0 to {num_tokens - 1}, got {int(least)} to {int(largest)}"
        )


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
    check_vectors("context", context, dim_context, batch, least=0)
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
