"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor

SCHEMES = ("sibling", "neighbor")
RESOLUTIONS = ("fine", "coarse")
IMPLEMENTATIONS = ("auto", "fused", "plain", "flex")


def check_positive(**numbers: int) -> None:
    """Raises unless all are integers of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def check_options(block_size: int, scheme: str, query_resolution: str, causal: bool) -> None:
    """Raises ValueError for an unusable combination."""
    check_positive(block_size=block_size)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if query_resolution not in RESOLUTIONS:
        raise ValueError(f"query_resolution must be one of {RESOLUTIONS}, got {query_resolution!r}")
    if scheme == "neighbor" and block_size % 2:
        raise ValueError(f"scheme 'neighbor' needs an even block_size, got {block_size}")
    if causal and query_resolution == "coarse":
        raise ValueError(
            "query_resolution 'coarse' cannot be causal: a mean query would see later queries"
        )


def check_dropout(name: str, probability: float) -> None:
    """Raises ValueError unless 0 <= probability < 1."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {probability}")


def check_mask(mask: Tensor, b: int, n: int) -> None:
    """Raises unless `mask` is boolean (b, n)."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if tuple(mask.shape) != (b, n):
        raise ValueError(f"mask must have shape {(b, n)}, got {tuple(mask.shape)}")


def check_tokens(x: Tensor) -> None:
    """Raises unless x is (b, n) integers with n >= 1."""
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"tokens must be (b, n) with n >= 1, got shape {tuple(x.shape)}")


def check_embeddings(x: Tensor, dim: int) -> None:
    """Raises unless x is (b, n, dim) floating point with n >= 1."""
    if not x.is_floating_point():
        raise TypeError(f"embeddings must be floating point, got {x.dtype}")
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != dim:
        raise ValueError(f"embeddings must be (b, n, {dim}), n >= 1, got shape {tuple(x.shape)}")


def check_angles(angles: Tensor, n: int, dim_head: int) -> None:
    """Raises ValueError unless `angles` is (n, r) with r <= dim_head."""
    if angles.dim() != 2 or angles.shape[0] != n or angles.shape[1] > dim_head:
        raise ValueError(
            f"angles must be ({n}, r) with r <= dim_head={dim_head}, got {tuple(angles.shape)}"
        )


def check_length(n: int, longest: int) -> None:
    """Raises ValueError for a sequence over `max_seq_len`."""
    if n > longest:
        raise ValueError(f"sequence of {n} tokens is longer than max_seq_len={longest}")


def check_rotary(pos_emb: RotaryEmbedding | None, dim_head: int, legacy: bool) -> None:
    if pos_emb is None:
        return
    if not isinstance(pos_emb, RotaryEmbedding):
        raise TypeError(f"pos_emb must be a RotaryEmbedding, got {type(pos_emb).__name__}")
    rotated = 2 * pos_emb.freqs.numel()
    if rotated > dim_head:
        raise ValueError(f"pos_emb rotates {rotated} features, dim_head is {dim_head}")
    if pos_emb.use_xpos and not legacy:
        raise ValueError("pos_emb with use_xpos=True scales keys by length, which is not supported")
