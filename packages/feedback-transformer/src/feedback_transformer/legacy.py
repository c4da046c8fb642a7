"""What exists only because of the reference, feedback-transformer-pytorch 0.0.11.

Its numbers, and the names of its checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback_transformer.feedback import feed_forward, slots
from feedback_transformer.packing import multiply
from feedback_transformer.state import Memory
from feedback_transformer.weights import LayerWeights, Sizes, Weights
from shared_core import RelativePositionBias

_LAYER = r"layers\.(\d+)\."
KEY_MAP: list[tuple[str, str | None]] = [
    (r"to_logits\.0\.(weight|bias)", r"norm.\1"),
    (r"to_logits\.1\.(weight|bias)", r"to_logits.\1"),
    (r"shared_kv_proj\.weight", "to_kv.weight"),
    # The same tensor once more for every layer.
    (_LAYER + r"0(?:\.fn){2,3}\.to_kv\.weight", None),
    # Segments of one token are wrapped once more.
    (_LAYER + r"0(?:\.fn){2,3}\.(to_q|to_out)\.(weight|bias)", r"layers.\1.\2.\3"),
    (_LAYER + r"0(?:\.fn){1,2}\.norm\.(weight|bias)", r"layers.\1.attn_norm.\2"),
    (_LAYER + r"1\.fn\.fn\.net\.0\.(weight|bias)", r"layers.\1.ff.inner.\2"),
    (_LAYER + r"1\.fn\.fn\.net\.3\.(weight|bias)", r"layers.\1.ff.outer.\2"),
    (_LAYER + r"1\.fn\.norm\.(weight|bias)", r"layers.\1.ff_norm.\2"),
]
"""From the reference's parameter names, with segments of one token or of several, to ours."""


def run_legacy(
    x: Tensor,
    weights: Weights,
    sizes: Sizes,
    positions: RelativePositionBias,
    memory: Memory | None,
) -> tuple[Tensor, Memory]:
    """Embeddings (b, n, d) through all layers, as the reference does it.

    Positions of queries are counted from 0 though the memory comes before them, a lone token does
    not see itself, a call ends its last segment, and `mem_len=0` sets no limit.
    """
    keys, values = (None, None) if memory is None else (memory.keys, memory.values)
    outputs = []
    for piece in x.split(sizes.seq_len, 1):
        states = [piece]
        for layer in weights.layers:
            y = states[-1]
            # Without a memory a segment of one token attends to nothing, whatever its layer.
            if not (sizes.seq_len == 1 and keys is None):
                y = y + _attend(y, layer, weights, sizes, positions, keys, values)
            states.append(y + feed_forward(y, layer, sizes.ff_dropout))
        outputs.append(states[-1])
        new_keys, new_values = slots(states, weights).chunk(2, -1)
        keys = new_keys if keys is None else torch.cat((keys, new_keys), 1)
        values = new_values if values is None else torch.cat((values, new_values), 1)
        keys, values = keys[:, -sizes.mem_len :], values[:, -sizes.mem_len :]
    if keys is None or values is None:
        raise ValueError(f"x must hold at least 1 token, got shape {tuple(x.shape)}")
    return torch.cat(outputs, 1), Memory(keys, values)


def _attend(
    x: Tensor,
    layer: LayerWeights,
    weights: Weights,
    sizes: Sizes,
    positions: RelativePositionBias,
    keys: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    hidden = F.layer_norm(x, x.shape[-1:], layer.attn_gain, layer.attn_shift)
    n = x.shape[1]
    seen = [] if keys is None or values is None else [torch.cat((keys, values), -1)]
    if n > 1:
        seen.append(multiply(hidden, weights.key_value))
    if not seen:
        raise ValueError("legacy=True: a lone token without a memory has nothing to attend to")
    both = torch.cat(seen, 1).chunk(2, -1)
    asking = multiply(hidden, layer.query) * sizes.dim_head**-0.5
    query, key, value = (
        y.unflatten(-1, (sizes.heads, -1)).transpose(1, 2) for y in (asking, *both)
    )
    m = key.shape[2]
    # The reference counts queries from the first key on.
    places = torch.arange(max(n, m), device=query.device)
    biases = positions(places[:n, None] - places[:m]).permute(2, 0, 1)
    scores = query @ key.mT + biases
    if n > 1:
        future = torch.ones(n, m, dtype=torch.bool, device=x.device).triu(m - n + 1)
        scores = scores.masked_fill(future, -torch.finfo(scores.dtype).max)
    shares = F.dropout(scores.softmax(-1), sizes.attn_dropout, sizes.attn_dropout > 0.0)
    return multiply((shares @ value).transpose(1, 2).flatten(2), layer.out, layer.out_bias)
