"""What exists only because of the reference, h-transformer-1d 0.1.9: its numbers and key names.

`attend_legacy` departs from the paper as the reference does: values are summed where the
normaliser counts a coarse key once, every level subtracts its own maximum, the bidirectional form
has no top level, the causal form keeps a coarse level only for the last token of each group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_core import masked_mean

MODEL_KEYS = (
    (r"layers\.blocks\.(\d+)\.f\.net\.norm\.(.+)", r"layers.layers.\1.0.norm.\2"),
    (r"layers\.blocks\.(\d+)\.g\.net\.norm\.(.+)", r"layers.layers.\1.1.norm.\2"),
    (r"layers\.(?:layers\.\d+\.0|blocks\.\d+\.f\.net)\.(?:fn\.)+(?:mask|pos_emb\..+)", None),
    (
        r"layers\.(?:layers\.(\d+)\.0|blocks\.(\d+)\.f\.net)\.(?:fn\.)+(to_qkv|to_out)\.(.+)",
        r"layers.layers.\1\2.0.body.\3.\4",
    ),
    (
        r"layers\.(?:layers\.(\d+)\.1|blocks\.(\d+)\.g\.net)\.(?:fn\.)+net\.0\.(.+)",
        r"layers.layers.\1\2.1.body.inner.\3",
    ),
    (
        r"layers\.(?:layers\.(\d+)\.1|blocks\.(\d+)\.g\.net)\.(?:fn\.)+net\.2\.(.+)",
        r"layers.layers.\1\2.1.body.outer.\3",
    ),
    (r"to_logits\.0\.(.+)", r"norm.\1"),
    (r"to_logits\.1\.(.+)", r"to_logits.\1"),
)
"""How the reference names the parameters of `HTransformer1D`, sequential or reversible."""

CAUSAL_ATTENTION_KEYS = ((r"mask", None),)
REVERSIBLE_KEYS = (
    (r"blocks\.(\d+)\.f\.net\.(.+)", r"layers.\1.0.\2"),
    (r"blocks\.(\d+)\.g\.net\.(.+)", r"layers.\1.1.\2"),
)


def check_legacy_length(max_seq_len: int, block_size: int) -> None:
    """Raises ValueError for a length that the reference refuses."""
    blocks, rest = divmod(max_seq_len, block_size)
    if rest or blocks & (blocks - 1):
        raise ValueError(
            "legacy needs max_seq_len to be block_size times a power of two, got "
            f"max_seq_len={max_seq_len} and block_size={block_size}"
        )


def attend_legacy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    block_size: int,
    eps: float,
) -> Tensor:
    """The reference's attention on (b, h, n, d); `mask` (b, n) has no effect where `causal`.

    Lengths too short for the reference are padded to the shortest that it accepts.
    """
    n, d = q.shape[2:]
    blocks = max(1 << (-(-n // block_size) - 1).bit_length(), 1 if causal else 4)
    padding = blocks * block_size - n
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q * d**-0.5, k, v))
    if causal:
        output, weight = _sum_causal(q, k, v, block_size)
    else:
        if mask is not None:
            mask = F.pad(mask, (0, padding))[:, None]
        output, weight = _sum_bidirectional(q, k, v, mask, block_size)
    return (output / (weight + eps))[:, :, :n]


def _sum_causal(q: Tensor, k: Tensor, v: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Own block, then at each level the left sibling of every right block."""
    n = q.shape[2]
    if n == c:
        return torch.zeros_like(q), torch.zeros_like(q[..., :1])
    allowed = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()
    output, weight = _attend_blocks(q, k, v, c, allowed)
    position = torch.arange(n, device=q.device)
    for level in range(1, (n // c).bit_length() - 1):
        q, k, v = _halve(q).mean(3), _halve(k).mean(3), _halve(v).sum(3)
        right, left = 1, 0
        pair = _attend_blocks(
            _every_other(q, c, right), _every_other(k, c, left), _every_other(v, c, left), c, None
        )
        last = ((position + 1) % (1 << level) == 0)[:, None]
        for_right = (x.unflatten(2, (-1, 1, c)) for x in pair)
        part, part_weight = (
            torch.cat((torch.zeros_like(x), x), 3).flatten(2, 4).repeat_interleave(1 << level, 2)
            for x in for_right
        )
        output, weight = output + part * last, weight + part_weight * last
    return output, weight


def _sum_bidirectional(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, c: int
) -> tuple[Tensor, Tensor]:
    """Own block, then the sibling block at each level but the top one."""
    top = (q.shape[2] // c).bit_length() - 3
    output, weight = _attend_blocks(q, k, v, c, _allowed(mask, mask, c))
    for level in range(top + 1):
        if level > 0:
            q, k = _mean_of_pairs(q, mask), _mean_of_pairs(k, mask)
            v = _halve(v if mask is None else v.masked_fill(~mask[..., None], 0.0)).sum(3)
            mask = None if mask is None else mask.unflatten(2, (-1, 2)).any(3)
        sibling_mask = None if mask is None else _flip(mask, c)
        part, part_weight = (
            x.repeat_interleave(1 << level, 2)
            for x in _attend_blocks(q, _flip(k, c), _flip(v, c), c, _allowed(mask, sibling_mask, c))
        )
        output, weight = output + part, weight + part_weight
    return output, weight


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, c: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of exp(logit - row maximum), with the values (b, h, n, d) and alone (b, h, n, 1)."""
    q, k, v = (x.unflatten(2, (-1, c)) for x in (q, k, v))
    logits = q @ k.mT
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.finfo(logits.dtype).max)
    weight = (logits - logits.amax(-1, keepdim=True)).exp()
    return (weight @ v).flatten(2, 3), weight.sum(-1, keepdim=True).flatten(2, 3)


def _allowed(row: Tensor | None, key: Tensor | None, c: int) -> Tensor | None:
    """(b, 1, n / c, c, c) pairs of unmasked tokens."""
    if row is None or key is None:
        return None
    row, key = (x.unflatten(2, (-1, c)) for x in (row, key))
    return row[..., :, None] & key[..., None, :]


def _flip(x: Tensor, c: int) -> Tensor:
    """Exchanges sibling blocks along dim 2."""
    flipped: Tensor = x.unflatten(2, (-1, 2, c)).flip(3).flatten(2, 4)
    return flipped


def _every_other(x: Tensor, c: int, first: int) -> Tensor:
    """Every second block along dim 2."""
    blocks: Tensor = x.unflatten(2, (-1, 2, c))[:, :, :, first].flatten(2, 3)
    return blocks


def _halve(x: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, h, n / 2, 2, d)."""
    halves: Tensor = x.unflatten(2, (-1, 2))
    return halves


def _mean_of_pairs(x: Tensor, mask: Tensor | None) -> Tensor:
    """A pair counts by its unmasked members, however many tokens are behind each."""
    if mask is None:
        return _halve(x).mean(3)
    return masked_mean(_halve(x), _halve(mask[..., None])[..., 0].expand(*x.shape[:2], -1, -1), 3)
