"""What exists only because of the reference, product-key-memory 0.3.0: its names and numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PKM_KEYS = (
    (r"values\.0\.weight", "values.weight"),
    (r"(?:values\.3|maybe_concat_combine\.2)\.weight", "combine.weight"),
)
"""How releases 0.2 and 0.3 name parameters that bear another name here."""


def differentiable_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best scores (..., k) and where they were, by coordinate descent (Ainslie et al. 2023)."""
    # Only here: it takes a second to import, and few want it.
    from colt5_attention import topk

    found = topk(scores, k=k, fused=True)
    return found.values, found.indices


def normalise_over_time(norm: nn.BatchNorm1d, queries: Tensor, dim_head: int) -> Tensor:
    """Batch normalisation whose channels are the places in a sequence: (b, n, 2 h d) -> same.

    Raises:
        ValueError: the sequences do not have as many tokens as the norm has channels.
    """
    if queries.ndim != 3 or queries.shape[1] != norm.num_features:
        raise ValueError(
            f"legacy with use_layernorm=False takes (b, {norm.num_features}, d), as the reference "
            f"does, got sequences of shape {tuple(queries.shape[:-1])}"
        )
    halves = queries.unflatten(-1, (-1, dim_head)).transpose(1, 2)
    normalised: Tensor = norm(halves.flatten(0, 1)).view(halves.shape)
    return normalised.transpose(1, 2).flatten(-2)


def widen_statistics(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Repeats the reference's statistics of dim_head features for each head and half."""
    own = module.state_dict(keep_vars=True)
    for name in ("weight", "bias", "running_mean", "running_var"):
        key = f"norm.fn.{name}"
        given = state_dict.get(prefix + key)
        if key in own and isinstance(given, torch.Tensor) and given.ndim == 1:
            repeats, rest = divmod(len(own[key]), max(1, len(given)))
            if rest == 0 and len(given) == module.dim_head:
                state_dict[prefix + key] = given.repeat(repeats)
