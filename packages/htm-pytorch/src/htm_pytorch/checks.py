"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_same_batch(queries: Tensor, memories: Tensor) -> None:
    """Raises ValueError unless both have as many rows."""
    if queries.shape[0] != memories.shape[0]:
        raise ValueError(
            f"queries and memories must be of one batch, got {queries.shape[0]} and "
            f"{memories.shape[0]} rows"
        )


def check_rows(name: str, x: Tensor, rows: int) -> None:
    """Raises ValueError unless `x` has a row for each environment in question."""
    if len(x) != rows:
        raise ValueError(f"{name} must be of {rows} environments, got {len(x)}")


def check_overflow(given: Tensor, stored: Tensor) -> None:
    """Raises ValueError where a finite number has become infinite in float16."""
    if stored.dtype != torch.float16 or given.dtype == torch.float16:
        return
    lost = given.to(stored.device).isfinite() & ~stored.isfinite()
    if bool(lost.any()):
        raise ValueError(
            f"tokens must be within {torch.finfo(stored.dtype).max:.0f} of zero to be stored in "
            f"{stored.dtype}, got {int(lost.sum())} that are not"
        )


def check_env_ids(env_ids: Sequence[int] | Tensor, environments: int) -> Tensor:
    """Environments as (e,) int64 on the CPU; raises unless they are different and all exist."""
    ids = torch.as_tensor(env_ids).cpu()
    # An empty list makes a tensor of floats.
    ids = ids.to(torch.int64) if ids.numel() == 0 else ids
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"env_ids must be integers in one row, got {env_ids!r}")
    if bool(((ids < 0) | (ids >= environments)).any()):
        raise ValueError(f"env_ids must be from 0 to {environments - 1}, got {env_ids!r}")
    if len(ids.unique()) < len(ids):
        raise ValueError(f"env_ids must be different, got {env_ids!r}")
    return ids.to(torch.int64)
