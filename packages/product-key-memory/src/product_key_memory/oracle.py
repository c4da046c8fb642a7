"""The maths once more, slow and plain, in the notation of the papers; tests and readers use it.

q(x) = [q1, q2] a query in two halves, c_i and c'_j sub-keys, slot (i, j) with value v_ij.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slot_scores(q1: Tensor, q2: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Scores of all slots: (d_k,), (d_k,), (K1, d_k), (K2, d_k) -> (K1 K2,).

    Lample et al. 2019, section 3.1: <q, k_ij> = <q1, c_i> + <q2, c'_j>.
    """
    return ((c1 @ q1)[:, None] + (c2 @ q2)[None, :]).flatten()


def memory(
    queries: Tensor, c1: Tensor, c2: Tensor, values: Tensor, k: int, gate: str = "softmax"
) -> Tensor:
    """The memory's output for one token, from all slots (section 3.1).

    Args:
        queries: (2, h, d_k). c1: (h, K1, d_k). c2: (h, K2, d_k). values: (K1 K2, d).

    Returns:
        (d,), added up over heads.
    """
    out = values.new_zeros(values.shape[1])
    for head in range(queries.shape[1]):
        scores = slot_scores(queries[0, head], queries[1, head], c1[head], c2[head])
        best, slots = scores.topk(k)
        for weight, slot in zip(weights_of(best, gate), slots, strict=True):
            out = out + weight * values[slot]
    return out


def weights_of(scores: Tensor, gate: str) -> Tensor:
    """The softmax of section 3.1, or what stands in its place."""
    if gate == "softmax":
        exponents = torch.exp(scores - scores.max())
        return exponents / exponents.sum()
    if gate == "relu":
        return scores * (scores > 0)
    return 1 / (1 + torch.exp(-scores))


def experts(
    x: Tensor, queries: Tensor, c1: Tensor, c2: Tensor, inputs: Tensor, values: Tensor, k: int,
    gate: str = "softmax",
) -> Tensor:  # fmt: skip
    """PEER (He 2024, equation 3): each chosen slot is a neuron, gelu(<u, x>) v."""
    out = values.new_zeros(values.shape[1])
    for head in range(queries.shape[1]):
        scores = slot_scores(queries[0, head], queries[1, head], c1[head], c2[head])
        best, slots = scores.topk(k)
        for weight, slot in zip(weights_of(best, gate), slots, strict=True):
            hidden = torch.nn.functional.gelu(inputs[slot] @ x)
            out = out + weight * hidden * values[slot]
    return out


def concatenated(
    queries: Tensor, c1: Tensor, c2: Tensor, values: Tensor, k: int, w_o: Tensor,
    gate: str = "softmax",
) -> Tensor:  # fmt: skip
    """Each head's memory for itself, W_o [m_1; ...; m_h]: values (K1 K2, d_v), w_o (d, h d_v)."""
    heads = [slice(head, head + 1) for head in range(queries.shape[1])]
    found = [memory(queries[:, h], c1[h], c2[h], values, k, gate) for h in heads]
    return w_o @ torch.cat(found)


def gated(x: Tensor, y: Tensor, w_1: Tensor, w_2: Tensor) -> Tensor:
    """Berges et al. 2024, section 3.2: W_2 (y * silu(W_1 x)) of a token x and its memory y."""
    z = w_1 @ x
    return w_2 @ (y * z / (1 + torch.exp(-z)))
