"""Attention modules: projections, rotary positions and one hierarchical attention.

Shapes: b batch, n tokens, t new tokens, d model width, h query heads, g key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import Tensor, nn

from h_transformer_1d.checks import check_angles, check_options, check_rotary
from h_transformer_1d.hierarchy import h_attention
from h_transformer_1d.legacy import CAUSAL_ATTENTION_KEYS, attend_legacy
from h_transformer_1d.state import LayerState, attend_state, layer_of_tokens, slot_bias
from shared_core import register_key_map
from shared_core.checks import (
    check_at_least,
    check_dropout,
    check_legacy_options,
    check_length,
    check_mask,
    check_vectors,
)

# More levels than any length has: a checkpoint with a level bias fits every `max_seq_len`.
_BIASED_LEVELS = 32


class RotaryOwner(nn.Module):
    """Keeps the rotary frequencies in full precision where the module is cast to bf16 or fp16.

    Rounded frequencies turn into wrong angles after a few hundred tokens.
    """

    pos_emb: RotaryEmbedding | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryOwner:
        before = None if self.pos_emb is None else self.pos_emb.freqs.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.pos_emb is not None and before is not None:
            after = self.pos_emb.freqs
            if after.dtype.itemsize < before.dtype.itemsize:
                after.data = before.to(after.device)
        return self


def rotary_angles(
    pos_emb: RotaryEmbedding, start: int, length: int, device: torch.device, legacy: bool = False
) -> Tensor:
    """(length, r) angles of the positions from `start` on, at least in float32.

    The reference does not take notice of `interpolate_factor`.
    """
    # In bf16 position 257 would be 256.
    kind = torch.promote_types(pos_emb.freqs.dtype, torch.float32)
    positions = torch.arange(start, start + length, device=device, dtype=kind)
    if not legacy:
        positions = positions / pos_emb.interpolate_factor
    # Not by the module's own call, which rounds the positions to the type of the frequencies.
    angles: Tensor = positions[:, None] * pos_emb.freqs.to(kind)
    return angles.repeat_interleave(2, -1)


class Attention(RotaryOwner):
    """Projections, rotary positions and one hierarchical attention."""

    causal: bool

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        block_size: int,
        pos_emb: RotaryEmbedding | None,
        eps: float,
        scheme: str,
        query_resolution: str,
        level_bias: bool,
        kv_heads: int | None,
        dropout: float,
        legacy: bool,
    ) -> None:
        super().__init__()
        groups = heads if kv_heads is None else kv_heads
        check_at_least(
            1, dim=dim, heads=heads, dim_head=dim_head, block_size=block_size, kv_heads=groups
        )
        if heads % groups:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {groups}")
        check_options(block_size, scheme, query_resolution, self.causal)
        check_dropout(dropout=dropout)
        check_rotary(pos_emb, dim_head, legacy)
        if legacy:
            check_legacy_options(
                scheme=scheme == "sibling",
                query_resolution=query_resolution == "fine",
                level_bias=not level_bias,
                kv_heads=groups == heads,
                dropout=dropout == 0.0,
            )
        self.heads = heads
        self.kv_heads = groups
        self.dim_head = dim_head
        self.block_size = block_size
        self.scheme = scheme
        self.query_resolution = query_resolution
        self.dropout = dropout
        self.eps = eps
        self.legacy = legacy
        self.pos_emb = pos_emb
        self.to_qkv: nn.Linear = nn.Linear(dim, (heads + 2 * groups) * dim_head, bias=False)
        self.to_out: nn.Linear = nn.Linear(heads * dim_head, dim)
        self.level_bias: nn.Parameter | None = None
        if level_bias:
            self.level_bias = nn.Parameter(torch.zeros(_BIASED_LEVELS, heads))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, angles: Tensor | None = None
    ) -> Tensor:
        """Attends over a sequence.

        Args:
            x: (b, n, d).
            mask: (b, n) boolean, True = take part. Masked tokens, NaN included, change nothing.
            angles: (n, r) rotary angles instead of those of `pos_emb`.

        Returns:
            (b, n, d).

        Raises:
            TypeError: `mask` is not boolean, or x not floating point.
            ValueError: a shape does not fit.
        """
        self._check(x, mask)
        if angles is not None:
            check_angles(angles, x.shape[1], self.dim_head)
        elif self.pos_emb is not None:
            angles = rotary_angles(self.pos_emb, 0, x.shape[1], x.device, self.legacy)
        out, _, _ = self._forward(x, mask, angles)
        return out

    def prefill(
        self, x: Tensor, mask: Tensor | None, angles: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """`forward` at any length, and the state after the last token."""
        out, keys, values = self._forward(x, mask, angles)
        return out, layer_of_tokens(keys, values, mask, self.block_size)

    def _forward(
        self, x: Tensor, mask: Tensor | None, angles: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.legacy:
            q, k, v = self._project(x, angles)
            if angles is not None:
                v = apply_rotary_emb(angles, v)
            out = attend_legacy(
                q, k, v, mask, causal=self.causal, block_size=self.block_size, eps=self.eps
            )
            return self._merge(out), k, v
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        q, k, v = self._project(x, angles)
        out = h_attention(
            q,
            k,
            v,
            causal=self.causal,
            mask=mask,
            block_size=self.block_size,
            scheme=self.scheme,
            query_resolution=self.query_resolution,
            level_bias=self.level_bias,
            dropout=self.dropout if self.training else 0.0,
        )
        return self._merge(out), k, v

    def step(
        self, x: Tensor, layer: LayerState, logits: Tensor, angles: Tensor
    ) -> tuple[Tensor, LayerState]:
        """The output (b, t, d) of tokens that fit in the open block, and the state after them."""
        q, k, v = self._project(x, angles)
        layer = layer.append(k, v)
        bias = None
        if self.level_bias is not None:
            sizes = layer.closed_keys.shape[2], layer.open_keys.shape[2]
            bias = slot_bias(self.level_bias, *sizes, self.block_size)
        dropout = self.dropout if self.training else 0.0
        out = attend_state(q, layer, logits, bias, self.dim_head**-0.5, dropout)
        return self._merge(out), layer

    def _project(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, h, n, d) and keys, values (b, g, n, d); the first two rotated."""
        packed = rearrange(self.to_qkv(x), "b n (h d) -> b h n d", d=self.dim_head)
        asking, v = packed.tensor_split((self.heads + self.kv_heads,), 1)
        if angles is not None:
            asking = apply_rotary_emb(angles, asking)
        q, k = asking.tensor_split((self.heads,), 1)
        return q, k, v

    def _merge(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out(rearrange(x, "b h n d -> b n (h d)"))
        return out

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        dim = self.to_qkv.in_features
        check_vectors("x", x, dim)
        check_mask("mask", mask, x.shape[:2])


class HAttention1D(Attention):
    """Bidirectional hierarchical attention with its projections.

    Args:
        dim: model width.
        heads: query heads.
        dim_head: width of a head.
        block_size: tokens that are seen one by one around each token.
        pos_emb: rotary embedding of queries and keys, or None.
        eps: added to the normaliser with `legacy`; the exact softmax needs none.
        scheme, query_resolution: see `h_attention`.
        level_bias: learn a bias for every level and head.
        kv_heads: key/value heads, each shared by heads / kv_heads query heads.
        dropout: of attention weights while training.
        legacy: reproduce the numbers of h-transformer-1d 0.1.9.
    """

    causal = False

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        block_size: int = 16,
        pos_emb: RotaryEmbedding | None = None,
        eps: float = 1e-8,
        scheme: str = "sibling",
        query_resolution: str = "fine",
        level_bias: bool = False,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        legacy: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            block_size=block_size,
            pos_emb=pos_emb,
            eps=eps,
            scheme=scheme,
            query_resolution=query_resolution,
            level_bias=level_bias,
            kv_heads=kv_heads,
            dropout=dropout,
            legacy=legacy,
        )


class CausalHAttention1D(Attention):
    """Causal hierarchical attention with its projections.

    Args:
        max_seq_len: longest sequence that `forward` accepts.
        Others: as `HAttention1D`.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        *,
        max_seq_len: int,
        heads: int = 8,
        dim_head: int = 64,
        block_size: int = 16,
        eps: float = 1e-8,
        pos_emb: RotaryEmbedding | None = None,
        scheme: str = "sibling",
        level_bias: bool = False,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        legacy: bool = False,
    ) -> None:
        check_at_least(1, max_seq_len=max_seq_len)
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            block_size=block_size,
            pos_emb=pos_emb,
            eps=eps,
            scheme=scheme,
            query_resolution="fine",
            level_bias=level_bias,
            kv_heads=kv_heads,
            dropout=dropout,
            legacy=legacy,
        )
        self.max_seq_len = max_seq_len
        register_key_map(self, CAUSAL_ATTENTION_KEYS)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        super()._check(x, mask)
        check_length("x", x.shape[1], self.max_seq_len)
