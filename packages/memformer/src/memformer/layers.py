"""What a layer is made of: attention by its projections, and a feed-forward layer.

Shapes: b batch, n tokens, d model width, h heads.
"""

from __future__ import annotations

from torch import Tensor, nn

from memformer.attention import attend
from memformer.checks import check_heads
from memformer.legacy import attend_legacy
from memformer.products import feed_forward, project
from shared_core import FeedForward


class Attention(nn.Module):
    """The projections of multi-head attention (h heads of width d / h)."""

    def __init__(self, dim: int, heads: int = 8, *, project_out: bool = True) -> None:
        check_heads(dim, heads)
        super().__init__()
        self.heads: int = heads
        self.scale: float = (dim // heads) ** -0.5
        self.to_q: nn.Linear = nn.Linear(dim, dim)
        self.to_kv: nn.Linear = nn.Linear(dim, dim * 2)
        self.to_out: nn.Linear | None = nn.Linear(dim, dim) if project_out else None

    def queries(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b, h, n, d / h), scaled."""
        q: Tensor = project(self.to_q, x) * self.scale
        heads: Tensor = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, m, d) -> keys and values, (b, h, m, d / h) each."""
        k, v = project(self.to_kv, x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, out: Tensor) -> Tensor:
        """(b, h, n, d / h) -> (b, n, d)."""
        out = out.transpose(1, 2).flatten(2)
        if self.to_out is not None:
            out = project(self.to_out, out)
        return out


class AttentionLayer(nn.Module):
    """Attention, a norm before it, and dropout behind."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.body: Attention = Attention(dim, heads)
        self.dropout: nn.Dropout = nn.Dropout(dropout)

    def queries(self, x: Tensor) -> Tensor:
        """Of the norm of x, (b, n, d) -> (b, h, n, d / h)."""
        return self.body.queries(self.norm(x))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the norm of x, (b, n, d) -> (b, h, n, d / h) each."""
        return self.body.keys_values(self.norm(x))

    def add(self, x: Tensor, found: Tensor) -> Tensor:
        """x (b, n, d) and what the heads have found, (b, h, n, d / h)."""
        out: Tensor = x + self.dropout(self.body.merge(found))
        return out


class FeedForwardLayer(nn.Module):
    """x + feed-forward of its norm, with dropout."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.body: FeedForward = FeedForward(dim, dropout=dropout)
        self.dropout: nn.Dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        out: Tensor = x + self.dropout(feed_forward(self.body, self.norm(x)))
        return out


class Layer(nn.Module):
    """Self-attention, attention to the context, feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float, *, causal: bool, legacy: bool) -> None:
        super().__init__()
        self.causal: bool = causal
        self.legacy: bool = legacy
        self.self_attn: AttentionLayer = AttentionLayer(dim, heads, dropout)
        self.cross_attn: AttentionLayer = AttentionLayer(dim, heads, dropout)
        self.feed_forward: FeedForwardLayer = FeedForwardLayer(dim, dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        by_distance: Tensor,
        mask: Tensor | None,
        context_mask: Tensor | None,
    ) -> Tensor:
        """(b, n, d), context (b, m, d), biases (h, 2 n - 1), masks (b, n), (b, m) -> (b, n, d)."""
        if self.legacy:
            return self._forward_legacy(x, context, by_distance, mask, context_mask)
        k, v = self.self_attn.keys_values(x)
        q = self.self_attn.queries(x)
        x = self.self_attn.add(x, attend(q, k, v, by_distance, mask, causal=self.causal))
        if context is not None:
            k, v = self.cross_attn.body.keys_values(context)
            x = self.cross(x, k, v, context_mask)
        out: Tensor = self.feed_forward(x)
        return out

    def cross(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """x (b, n, d) and what it finds in keys and values of a context, (b, h, m, d / h)."""
        return self.cross_attn.add(x, attend(self.cross_attn.queries(x), k, v, None, mask))

    def _forward_legacy(
        self,
        x: Tensor,
        context: Tensor | None,
        by_distance: Tensor,
        mask: Tensor | None,
        context_mask: Tensor | None,
    ) -> Tensor:
        body = self.self_attn.body
        normed = self.self_attn.norm(x)
        q, (k, v) = body.queries(normed), body.keys_values(normed)
        x = x + body.merge(attend_legacy(q, k, v, by_distance, mask, mask, self.causal))
        body = self.cross_attn.body
        normed = self.cross_attn.norm(x)
        k, v = body.keys_values(normed if context is None else context)
        # Only the decoder masks here; without a context it is as for the tokens themselves.
        query_mask = mask if self.causal else None
        if context is None and context_mask is None:
            context_mask = query_mask
        q = body.queries(normed)
        x = x + body.merge(attend_legacy(q, k, v, None, query_mask, context_mask, False))
        out: Tensor = self.feed_forward(x)
        return out
