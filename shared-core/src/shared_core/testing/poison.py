"""Uninitialised memory that shows: NaN in floats, the largest value in integers."""

from __future__ import annotations

import torch

NONDETERMINISTIC: tuple[str, ...] = (
    r".*does not have a deterministic implementation",
    r".*Deterministic behavior was enabled with either",
    r".*defaults to a non-deterministic algorithm",
)
"""What torch warns of where an operation has no deterministic version."""


def poison_uninitialised_memory() -> None:
    """Makes `torch.empty` and its kin return NaN, or the largest integer.

    torch fills them only in its deterministic mode, so that is switched on too; operations that
    have no deterministic version still run, with one of the warnings in `NONDETERMINISTIC`.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
