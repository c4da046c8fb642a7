"""Memformer's maths, slowly: loops over rows, tokens, heads and slots.

Wu et al. 2020, "Memformer: A Memory-Augmented Transformer for Sequence Modeling" (arXiv
2010.06891), section 3; the GRU rule and pre-norm layers are the reference's. One row of a batch at
a time; shapes: n tokens, m slots or context tokens, d width. `weights` are a module's, by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def below(weights: Weights, prefix: str) -> Weights:
    """The weights of a submodule."""
    return {k.removeprefix(prefix + "."): x for k, x in weights.items() if k.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / (centred.square().mean() + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def bucket(distance: int, bidirectional: bool, buckets: int = 32, furthest: int = 128) -> int:
    """The T5 rule; `distance` is the query's place less the key's."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance < 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    grown = torch.tensor(distance / exact).log() / math.log(furthest / exact)
    return first + min(buckets - 1, exact + int(grown * (buckets - exact)))


def attend_one(
    query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor], heads: int
) -> Tensor:
    """Multi-head attention of one query (d,) to a list of keys; 0 to an empty list.

    `biases` has an entry of all heads, (h,), for each key.
    """
    if not keys:
        return query * 0.0
    out = []
    for head in range(heads):
        part = slice(head * len(query) // heads, (head + 1) * len(query) // heads)
        scale = (len(query) // heads) ** -0.5
        logits = [
            query[part] @ key[part] * scale + b[head] for key, b in zip(keys, biases, strict=True)
        ]
        shares = torch.stack(logits).softmax(0)
        out.append(torch.stack([p * v[part] for p, v in zip(shares, values, strict=True)]).sum(0))
    return torch.cat(out)


def attention(
    weights: Weights,
    x: list[Tensor],
    context: list[Tensor],
    seen: list[list[int]],
    heads: int,
    bias: Tensor | None = None,
    bidirectional: bool = True,
) -> list[Tensor]:
    """Token i of x attends to the tokens seen[i] of a context, with biases (buckets, h)."""
    both = [linear(weights, "to_kv", token).chunk(2) for token in context]
    out = []
    for i, token in enumerate(x):
        if bias is None:
            biases = [token.new_zeros(heads) for _ in seen[i]]
        else:
            biases = [bias[bucket(i - j, bidirectional)] for j in seen[i]]
        keys, values = [both[j][0] for j in seen[i]], [both[j][1] for j in seen[i]]
        found = attend_one(linear(weights, "to_q", token), keys, values, biases, heads)
        out.append(linear(weights, "to_out", found))
    return out


def feed_forward(weights: Weights, x: Tensor) -> Tensor:
    hidden = linear(weights, "body.inner", norm(weights, "norm", x))
    return x + linear(weights, "body.outer", F.gelu(hidden))


def layers(
    weights: Weights,
    x: list[Tensor],
    context: list[Tensor],
    mask: list[bool],
    context_mask: list[bool],
    *,
    depth: int,
    heads: int,
    causal: bool,
    scale: float = 1.0,
) -> list[Tensor]:
    """Encoder (equation 4: every token reads the slots) or decoder; masked tokens hold 0."""
    bias = weights["rel_pos_emb.relative_attention_bias.weight"]
    x = [token if there else token * 0.0 for token, there in zip(x, mask, strict=True)]
    context = [c * scale for c in context]
    there = [j for j, some in enumerate(mask) if some]
    known = [j for j, some in enumerate(context_mask) if some]
    for number in range(depth):
        part = below(weights, f"layers.{number}.self_attn")
        normed = [norm(part, "norm", token) for token in x]
        seen = [[j for j in there if j <= i or not causal] for i in range(len(x))]
        found = attention(below(part, "body"), normed, normed, seen, heads, bias, not causal)
        x = [token + y for token, y in zip(x, found, strict=True)]
        part = below(weights, f"layers.{number}.cross_attn")
        normed = [norm(part, "norm", token) for token in x]
        found = attention(below(part, "body"), normed, context, [known] * len(x), heads)
        x = [token + y for token, y in zip(x, found, strict=True)]
        part = below(weights, f"layers.{number}.feed_forward")
        x = [feed_forward(part, token) for token in x]
    return x


def write_gru(
    weights: Weights, slots: list[Tensor], tokens: list[Tensor], heads: int
) -> list[Tensor]:
    """Each slot attends to itself and the tokens; GRU cell, feed-forward layer, bound of 1.

    `weights` are the model's; `tokens` those that are not masked.
    """
    new = []
    for slot in slots:
        part = below(weights, "mem_updater")
        (x,) = attention(part, [slot], [slot, *tokens], [list(range(1 + len(tokens)))], heads)
        given = (weights["gru.weight_ih"] @ x + weights["gru.bias_ih"]).chunk(3)
        kept = (weights["gru.weight_hh"] @ slot + weights["gru.bias_hh"]).chunk(3)
        r, z = (given[0] + kept[0]).sigmoid(), (given[1] + kept[1]).sigmoid()
        proposed = (given[2] + r * kept[2]).tanh()
        after = feed_forward(below(weights, "mem_ff"), (1 - z) * proposed + z * slot)
        new.append(after / after.square().mean().sqrt().clamp(min=1.0))
    return new


def write_bmn(
    weights: Weights, slots: list[Tensor], tokens: list[Tensor], heads: int, temperature: float
) -> list[Tensor]:
    """Section 3.3: m' = A [m; V_x], m <- (m' + v) / |m' + v|, with softmax of logits / tau.

    Projections are of sqrt(d) m, and V_x is scaled by 1 / sqrt(d); see `writers.write_bmn`.
    """
    part = below(weights, "mem_updater")
    root = len(slots[0]) ** 0.5
    both = [linear(part, "to_kv", token).chunk(2) for token in tokens]
    new = []
    for slot, bias in zip(slots, weights["memory_slots"], strict=True):
        own_key, _ = linear(part, "to_kv", slot * root).chunk(2)
        query = linear(part, "to_q", slot * root) / temperature
        keys, values = [own_key, *(k for k, _ in both)], [slot, *(v / root for _, v in both)]
        found = attend_one(query, keys, values, [slot.new_zeros(heads)] * len(keys), heads)
        new.append((found + bias) / (found + bias).norm())
    return new


def segment(
    weights: Weights,
    src: list[int],
    mask: list[bool],
    slots: list[Tensor] | None,
    tgt: list[int],
    tgt_mask: list[bool],
    *,
    writer: str,
    heads: tuple[int, int, int],
    depths: tuple[int, int],
    updates: int,
    temperature: float = 0.25,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One segment: encoder output (n, d), slots (m, d), logits of all target tokens.

    `heads` and `depths` are of encoder, decoder and, the last of `heads`, memory.
    """
    dim = weights["memory_slots"].shape[1]
    if slots is None:
        slots = list(weights["memory_slots"])
        slots = [v / v.norm() for v in slots] if writer == "bmn" else slots
    part = below(weights, "encoder")
    x = layers(
        below(part, "layer_blocks"),
        [part["token_emb.weight"][token] for token in src],
        slots,
        mask,
        [True] * len(slots),
        depth=depths[0],
        heads=heads[0],
        causal=False,
        scale=dim**0.5 if writer == "bmn" else 1.0,
    )
    out = [norm(part, "norm", token) for token in x]
    kept = [token for token, there in zip(out, mask, strict=True) if there]
    for _ in range(updates if kept else 0):
        if writer == "gru":
            slots = write_gru(weights, slots, kept, heads[2])
        else:
            slots = write_bmn(weights, slots, kept, heads[2], temperature)
    part = below(weights, "decoder.net")
    y = layers(
        below(part, "layer_blocks"),
        [part["token_emb.weight"][token] for token in tgt],
        out,
        tgt_mask,
        mask,
        depth=depths[1],
        heads=heads[1],
        causal=True,
    )
    logits = [linear(part, "to_logits", norm(part, "norm", token)) for token in y]
    return out, slots, logits
