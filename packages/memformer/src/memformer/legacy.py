"""What exists only because of the reference, memformer 0.3.1: its numbers and key names."""

from __future__ import annotations

import torch
from torch import Tensor

from memformer.attention import biases_by_distance

LAYER_KEYS = (
    (r"layers\.(\d+)\.0\.fn\.norm\.(.+)", r"layers.\1.self_attn.norm.\2"),
    (r"layers\.(\d+)\.0\.fn\.fn\.(.+)", r"layers.\1.self_attn.body.\2"),
    (r"layers\.(\d+)\.1\.fn\.norm\.(.+)", r"layers.\1.cross_attn.norm.\2"),
    (r"layers\.(\d+)\.1\.fn\.fn\.(.+)", r"layers.\1.cross_attn.body.\2"),
    (r"layers\.(\d+)\.2\.fn\.norm\.(.+)", r"layers.\1.feed_forward.norm.\2"),
    (r"layers\.(\d+)\.2\.fn\.fn\.net\.0\.(.+)", r"layers.\1.feed_forward.body.inner.\2"),
    (r"layers\.(\d+)\.2\.fn\.fn\.net\.2\.(.+)", r"layers.\1.feed_forward.body.outer.\2"),
)
"""How the reference names what is in an encoder or a decoder."""

FEED_FORWARD_KEYS = (
    (r"fn\.norm\.(.+)", r"norm.\1"),
    (r"fn\.fn\.net\.0\.(.+)", r"body.inner.\1"),
    (r"fn\.fn\.net\.2\.(.+)", r"body.outer.\1"),
)
"""How it names the feed-forward layer of the memory."""


def attend_legacy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_distance: Tensor | None,
    query_mask: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """The reference's attention: a masked query gets the mean of all values, later ones included.

    Shapes as in `attention.attend`; `query_mask` is (b, n).
    """
    logits = q @ k.mT
    if by_distance is not None:
        logits = logits + biases_by_distance(by_distance, k.shape[2])
    lowest = -torch.finfo(logits.dtype).max
    if causal:
        above = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(above, lowest)
    if query_mask is not None:
        logits = logits.masked_fill(~query_mask[:, None, :, None], lowest)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], lowest)
    return logits.softmax(-1) @ v
