"""The maths of the feedback transformer, slowly: a loop over tokens, layers, heads and slots.

Fan et al. 2020, "Addressing some limitations of transformers with feedback memory" (arXiv
2002.09402), section 3. One batch row at a time; t counts tokens, l layers, x^l_t is what layer l
has made of token t, x^0_t its embedding, m_t its memory vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
"""Of a `FeedbackTransformer`, by name."""


def run(
    embeddings: Tensor,
    parameters: Parameters,
    *,
    depth: int,
    heads: int,
    seq_len: int,
    mem_len: int,
    keep_last_hidden: bool = False,
    mask: list[bool] | None = None,
    context: Tensor | None = None,
    context_mask: list[bool] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """States of the last layer (n, d) of a row of embeddings (n, d), and the memory vectors m_t.

    Args:
        mask: which tokens take part; a masked one is a zero that nobody attends to.
        context: (m, dim_context), of a model with dim_context.
    """
    p = parameters
    n = len(embeddings)
    takes_part = mask or [True] * n
    shares = p["layer_weight"].softmax(0)
    if keep_last_hidden:
        shares = torch.zeros_like(shares)
        shares[-1] = 1.0
    groups = depth if p["to_kv.weight"].shape[0] > 2 * p["layers.0.to_q.weight"].shape[0] else 1
    outputs: list[list[Tensor]] = []
    memory: list[Tensor] = []
    for t in range(n):
        begin = t - t % seq_len
        # The segment's tokens each have their own keys in each layer; the past has its slots.
        slots = [u for u in range(max(0, begin - mem_len), begin) if takes_part[u]]
        x = embeddings[t] * float(takes_part[t])
        states = [x]
        for layer in range(depth):
            name = f"layers.{layer}."
            to_kv = p["to_kv.weight"].chunk(groups)[layer if groups > 1 else 0]
            seen = [(memory[u], t - u) for u in slots]
            if seq_len > 1:
                for u in range(begin, t + 1):
                    if takes_part[u]:
                        before = x if u == t else outputs[u][layer]
                        seen.append((norm(before, p, name + "attn_norm"), t - u))
            if seen:
                query = p[name + "to_q.weight"] @ norm(x, p, name + "attn_norm")
                found = attend(query, [to_kv @ y for y, _ in seen], heads, p, [d for _, d in seen])
                x = x + p[name + "to_out.weight"] @ found + p[name + "to_out.bias"]
            if context is not None:
                x = x + look_up(x, context, context_mask, heads, p, name + "cross.")
            inner = p[name + "ff.inner.weight"] @ norm(x, p, name + "ff_norm")
            value, gate = (inner + p[name + "ff.inner.bias"]).chunk(2)
            gate = gate * 0.5 * (1.0 + torch.erf(gate / math.sqrt(2.0)))
            x = x + p[name + "ff.outer.weight"] @ (value * gate) + p[name + "ff.outer.bias"]
            states.append(x)
        outputs.append(states)
        slot = sum((share * state for share, state in zip(shares, states, strict=True)), 0.0 * x)
        if "memory_norm.weight" in p:
            slot = norm(slot, p, "memory_norm")
        memory.append(slot)
    return torch.stack([states[-1] for states in outputs]), memory


def attend(
    query: Tensor, keys_values: list[Tensor], heads: int, p: Parameters, distances: list[int]
) -> Tensor:
    """Multi-head attention of one query (h * e,) to keys and values, (2 * h * e,) each."""
    width = len(query) // heads
    answers = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores, values = [], []
        for key_value, distance in zip(keys_values, distances, strict=True):
            key, value = key_value.chunk(2)
            score = query[part] @ key[part] / math.sqrt(width)
            if distance >= 0:
                score = score + p["pos_emb.relative_attention_bias.weight"][bucket(distance), head]
            scores.append(score)
            values.append(value[part])
        answers.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    return torch.cat(answers)


def look_up(
    x: Tensor, context: Tensor, mask: list[bool] | None, heads: int, p: Parameters, name: str
) -> Tensor:
    """What a token finds in a context."""
    seen = [y for i, y in enumerate(context) if mask is None or mask[i]]
    if not seen:
        return 0.0 * x
    query = p[name + "to_q.weight"] @ norm(x, p, name + "norm")
    keys_values = [p[name + "to_kv.weight"] @ y for y in seen]
    found = attend(query, keys_values, heads, p, [-1] * len(seen))
    return p[name + "to_out.weight"] @ found + p[name + "to_out.bias"]


def bucket(distance: int) -> int:
    """Of T5 (arXiv 1910.10683): 16 distances each their own, 16 growing ones up to 128."""
    if distance < 16:
        return distance
    grown = torch.tensor(distance / 16.0).log() / math.log(128 / 16) * 16
    return min(31, 16 + int(grown))


def norm(x: Tensor, p: Parameters, name: str) -> Tensor:
    """Layer normalisation."""
    centred = x - x.mean()
    scaled = centred / (centred.square().mean() + 1e-5).sqrt()
    return scaled * p[name + ".weight"] + p[name + ".bias"]
