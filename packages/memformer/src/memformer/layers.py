"""What a layer is made of: attention by its projections, and a feed-forward layer.

Shapes: b batch, n tokens, d model width, h heads.
"""

from __future__ import annotations

from torch import Tensor, nn

from memformer.checks import check_heads
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
        q: Tensor = self.to_q(x) * self.scale
        heads: Tensor = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, m, d) -> keys and values, (b, h, m, d / h) each."""
        k, v = self.to_kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, out: Tensor) -> Tensor:
        """(b, h, n, d / h) -> (b, n, d)."""
        out = out.transpose(1, 2).flatten(2)
        if self.to_out is not None:
            out = self.to_out(out)
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
        out: Tensor = x + self.dropout(self.body(self.norm(x)))
        return out


class Layer(nn.Module):
    """Self-attention, attention to the context, feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn: AttentionLayer = AttentionLayer(dim, heads, dropout)
        self.cross_attn: AttentionLayer = AttentionLayer(dim, heads, dropout)
        self.feed_forward: FeedForwardLayer = FeedForwardLayer(dim, dropout)
