"""Hierarchical attention as the definition reads: slow, one query at a time, nothing shared.

    b batch, h heads, n tokens, d head width, c block size, l level, s slot, i block

Level l of the pyramid has one slot for every 2**l tokens, in blocks of c slots. Slot s of level l
stands for the tokens s * 2**l to (s + 1) * 2**l - 1: K_l and V_l are the means of the unmasked
ones, n_l is their number. A token's logit for a slot is q . K_l * scale + log n_l, and one softmax
runs over all the slots that the token sees: a slot weighs as much as n_l equal keys would.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["h_attention_oracle", "slot_means", "visible_slots"]


def visible_slots(
    t: int,
    n: int,
    *,
    causal: bool,
    block_size: int,
    scheme: Literal["sibling", "neighbor"] = "sibling",
) -> list[tuple[int, int]]:
    """The slots (level, slot) that token t of n sees: every token it may see is in just one.

    Own block, level 0, in both schemes; up to t itself if causal. With i = t // c its block:

    "sibling", bidirectional: at each level l the other half (i >> l) ^ 1 of the pair.
    "sibling", causal: that half where it lies before, which is where bit l of i is set (Fenwick).
    "neighbor": with j = i >> l, at each level l the blocks j - 1 and j + 1, without what level
    l - 1 has shown already. There j is two blocks, the token in the one of parity p, and what that
    one and its neighbours hold reaches half into j + 1 if p = 1 and half into j - 1 if p = 0:

        level l       |      j - 1      |        j        |      j + 1      |
        level l - 1   |        |        |  p = 0 |  p = 1 |        |        |
        seen, p = 0            [--------------------------]
        seen, p = 1                     [--------------------------]

    Causal sees j - 1 only.
    """
    c = block_size
    i = t // c
    last = (n - 1) // c
    slots = [(0, s) for s in range(i * c, t + 1 if causal else (i + 1) * c)]

    level = 0
    while last >> level > 0:
        j = i >> level
        if scheme == "sibling":
            sibling = j ^ 1
            if not causal or sibling < j:
                slots += [(level, s) for s in range(sibling * c, (sibling + 1) * c)]
        else:
            p = (i >> (level - 1)) & 1 if level > 0 else None
            if j > 0:
                count = c // 2 if p == 0 else c
                slots += [(level, s) for s in range((j - 1) * c, (j - 1) * c + count)]
            if not causal:
                count = c // 2 if p == 1 else c
                slots += [(level, s) for s in range((j + 2) * c - count, (j + 2) * c)]
        level += 1

    # A sequence may end anywhere: slots that begin behind its end do not exist.
    return [(level, s) for level, s in slots if s * 2**level < n]


def slot_means(x: Tensor, mask: Tensor, level: int) -> Tensor:
    """Mean of the unmasked tokens of each slot of a level, 0 where there is none.

    x (b, h, n, d), mask (b, n); returns (b, h, ceil(n / 2**level), d).
    """
    x = x.masked_fill(~mask[:, None, :, None], 0.0)
    means = []
    for start in range(0, x.shape[2], 2**level):
        end = start + 2**level
        count = mask[:, start:end].sum(dim=1).clamp(min=1)
        means.append(x[:, :, start:end].sum(dim=2) / count[:, None, None])
    return torch.stack(means, dim=2)


def h_attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    block_size: int,
    scheme: Literal["sibling", "neighbor"] = "sibling",
    query_resolution: Literal["fine", "coarse"] = "fine",
    level_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Hierarchical attention by its definition; `h_attention` is fast and checks its input.

    q (b, h, n, d), k and v (b, h or a divisor of h, n, d), mask (b, n) with True for the tokens
    that take part, level_bias (levels, h), whose last row also serves all higher levels. Returns
    (b, h, n, d).

    A masked token is no key, and NaN in its query, key or value changes nothing. Its own row asks
    with a query of 0 for what its position sees. A token that sees no unmasked token gets 0.

    `query_resolution="coarse"` (bidirectional) asks at level l with the mean of the unmasked
    queries of the level-l slot that holds the token, 0 if there is none. "fine" asks with the
    token's own query at every level.

    Source: arXiv 2107.11906. There a coarse key stands for its tokens by the sum
    of their values in the numerator and by their number in the denominator, which is V_l and
    log n_l here. The paper's queries are coarse and its partition is "neighbor".
    """
    b, h, n, d = q.shape
    k = k.repeat_interleave(h // k.shape[1], dim=1)
    v = v.repeat_interleave(h // v.shape[1], dim=1)
    scale = d**-0.5 if scale is None else scale
    if mask is None:
        mask = torch.ones(b, n, dtype=torch.bool, device=q.device)

    levels = range(((n - 1) // block_size).bit_length() + 1)
    keys = [slot_means(k, mask, level) for level in levels]
    values = [slot_means(v, mask, level) for level in levels]
    # Fine queries are the means of level 0, which are single tokens.
    queries = [
        slot_means(q, mask, level if query_resolution == "coarse" else 0) for level in levels
    ]
    # The numbers of tokens, each (b, slots).
    counts = [
        torch.stack([part.sum(dim=1) for part in mask.split(2**level, dim=1)], dim=1)
        for level in levels
    ]

    rows = []
    for t in range(n):
        slots = visible_slots(t, n, causal=causal, block_size=block_size, scheme=scheme)
        logits = []
        seen_values = []
        seen_counts = []
        for level in sorted({level for level, _ in slots}):
            at = torch.tensor([s for of, s in slots if of == level], device=q.device)
            query = queries[level][:, :, t >> level if query_resolution == "coarse" else t]
            # K_l (b, h, slots, d) . q (b, h, d) -> (b, h, slots)
            logit = (keys[level][:, :, at] * query[:, :, None]).sum(dim=-1) * scale
            count = counts[level][:, None, at]
            logit = logit + count.clamp(min=1).to(q.dtype).log()
            if level_bias is not None:
                logit = logit + level_bias[min(level, len(level_bias) - 1)][:, None]
            logits.append(logit)
            seen_values.append(values[level][:, :, at])
            seen_counts.append(count)
        there = torch.cat(seen_counts, dim=-1) > 0
        # The lowest number rather than -inf, and 0 afterwards: where nothing is there the softmax
        # stays finite, and so does its gradient.
        logit = torch.cat(logits, dim=-1).masked_fill(~there, torch.finfo(q.dtype).min)
        weight = logit.softmax(dim=-1).masked_fill(~there, 0.0)
        rows.append((weight[..., None] * torch.cat(seen_values, dim=2)).sum(dim=2))
    return torch.stack(rows, dim=2)
