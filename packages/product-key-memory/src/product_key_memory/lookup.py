"""Product-key lookup: the best of K1 x K2 slots from the scores of K1 + K2 sub-keys.

A slot i of a memory is a pair of sub-keys, i = i1 * K2 + i2, and its score is the sum of theirs
(Lample et al. 2019, arXiv 1907.05242, section 3.1). Shapes: K1, K2 sub-keys, k slots kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Scores (..., K) and k -> the k best (..., k) in descending order, and where they were."""


def product_top_k(
    first: Tensor, second: Tensor, k: int, *, sub_top_k: TopK | None = None
) -> tuple[Tensor, Tensor]:
    """The k best sums of one score of each half, exactly those of all K1 * K2 sums.

    Of two descending lists, the pair (i, j) has (i + 1) (j + 1) - 1 pairs before it which are at
    least as good, so only pairs with (i + 1) (j + 1) <= k can be among the best: 119 of 1024 for
    k = 32. Gradients flow to the scores that were chosen.

    Args:
        first: (..., K1) scores.
        second: (..., K2) scores.
        k: slots to keep, at most min(K1, K2).
        sub_top_k: chooses among sub-keys; `torch.topk` by default.

    Returns:
        Scores (..., k) in descending order and slots (..., k), int64; ties in any order.

    Raises:
        ValueError: k is below 1 or above min(K1, K2), or the leading shapes differ.
    """
    if first.shape[:-1] != second.shape[:-1]:
        raise ValueError(
            "first and second must be (..., K1) and (..., K2), got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not 1 <= k <= min(first.shape[-1], second.shape[-1]):
        raise ValueError(
            f"k must be from 1 to the number of sub-keys, got k={k} and "
            f"{first.shape[-1]} x {second.shape[-1]} sub-keys"
        )
    if sub_top_k is None:
        at_1, at_2 = choose(first, second, k)
        scores = first.gather(-1, at_1) + second.gather(-1, at_2)
        return scores, at_1 * second.shape[-1] + at_2
    (best_1, at_1), (best_2, at_2) = sub_top_k(first, k), sub_top_k(second, k)
    rank_1, rank_2 = choose(best_1, best_2, k)
    scores = best_1.gather(-1, rank_1) + best_2.gather(-1, rank_2)
    return scores, at_1.gather(-1, rank_1) * second.shape[-1] + at_2.gather(-1, rank_2)


@torch.no_grad()
def choose(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The sub-keys, both (..., k), of the k best sums, best first; see `product_top_k`."""
    (best_1, at_1), (best_2, at_2) = best_sub_keys(first, k), best_sub_keys(second, k)
    i, j = candidates(k, first)
    among = (best_1[..., i] + best_2[..., j]).topk(k, dim=-1).indices
    return at_1.gather(-1, i[among]), at_2.gather(-1, j[among])


def best_sub_keys(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of (..., K) scores; of many, it looks into the k groups of best maximum only.

    Entries i, i + K/4, i + K/2 and i + 3K/4 are a group. Each of the k best groups has an entry
    that is at least as good as all entries of the others.
    """
    size = scores.shape[-1]
    if size % 4 or size < 16 * k:
        best, at = scores.topk(k, dim=-1)
        return best, at
    groups = scores.unflatten(-1, (4, size // 4))
    chosen = groups.amax(-2).topk(k, dim=-1, sorted=False).indices
    entries = groups.gather(-1, chosen[..., None, :].expand(*chosen.shape[:-1], 4, k))
    best, among = entries.flatten(-2).topk(k, dim=-1)
    quarter = torch.div(among, k, rounding_mode="floor")
    at = chosen.gather(-1, among - quarter * k) + quarter * (size // 4)
    return best, at


def candidates(k: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) of ranks with (i + 1) (j + 1) <= k, two index tensors beside `scores`."""
    # A cached tensor must neither be made while tracing nor be fake, nor meet fake ones.
    cached = type(scores) is Tensor and not torch.compiler.is_compiling()
    return _cached(k, scores.device) if cached else _candidates(k, scores.device)


def _candidates(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    i, j = (torch.tensor(ranks, device=device) for ranks in zip(*pairs, strict=True))
    return i, j


_cached = lru_cache(maxsize=64)(_candidates)
