"""The feed-forward layer, and a module's switch into evaluation and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_at_least, check_probability

Module = TypeVar("Module", bound=nn.Module)


class FeedForward(nn.Module):
    """Position-wise feed-forward layer with exact GELU, or GEGLU (Shazeer, arXiv 2002.05202).

    GELU: `outer(gelu(inner(x)))`, `mult` times as wide inside. GEGLU (`gated`): `inner` is twice as
    wide again, `outer(first half * gelu(second half))`. Dropout acts before `outer`.
    Raises ValueError for `dim` or `mult` below 1 and for `dropout` outside [0, 1], TypeError for
    what is no number.
    """

    def __init__(
        self, dim: int, mult: int = 4, *, dropout: float = 0.0, gated: bool = False
    ) -> None:
        check_at_least(1, dim=dim, mult=mult)
        check_probability(dropout=dropout)
        super().__init__()
        self.gated: bool = gated
        self.inner: nn.Linear = nn.Linear(dim, dim * mult * (2 if gated else 1))
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        self.outer: nn.Linear = nn.Linear(dim * mult, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d). Raises ValueError for another width."""
        dim = self.inner.in_features
        if x.shape[-1:] != (dim,):
            raise ValueError(f"x must be (..., {dim}), got shape {tuple(x.shape)}")
        hidden: Tensor = self.inner(x)
        if self.gated:
            values, gates = hidden.chunk(2, dim=-1)
            hidden = values * F.gelu(gates)
        else:
            hidden = F.gelu(hidden)
        out: Tensor = self.outer(self.dropout(hidden))
        return out


@contextmanager
def eval_mode(module: Module) -> Iterator[Module]:
    """Evaluation mode in a `with` block; then each submodule has its own flag back, always."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield module
    finally:
        for part, training in flags:
            part.training = training
