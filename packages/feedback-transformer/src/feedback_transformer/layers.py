"""The parameters of a layer; what is done with them is in `feedback`."""

from __future__ import annotations

from torch import nn

from feedback_transformer.checks import check_part
from feedback_transformer.weights import ContextWeights, LayerWeights
from shared_core import FeedForward


class CrossAttention(nn.Module):
    """Attention of tokens to a context, with keys and values of its own."""

    def __init__(self, dim: int, dim_context: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.to_q: nn.Linear = nn.Linear(dim, inner, bias=False)
        self.to_kv: nn.Linear = nn.Linear(dim_context, 2 * inner, bias=False)
        self.to_out: nn.Linear = nn.Linear(inner, dim)

    def weights(self, place: str) -> ContextWeights:
        """The parameters, in the order of their use; TypeError for another kind of part.

        `place` is its name in the model, for messages.
        """
        check_part(f"{place}.norm", self.norm, nn.LayerNorm)
        for name in ("to_q", "to_kv", "to_out"):
            check_part(f"{place}.{name}", getattr(self, name), nn.Linear)
        return ContextWeights(
            self.norm.weight,
            self.norm.bias,
            self.to_q.weight,
            self.to_kv.weight,
            self.to_out.weight,
            self.to_out.bias,
        )


class Layer(nn.Module):
    """Attention to the memory and the segment, maybe to a context, and a feed-forward layer."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, ff_dropout: float, dim_context: int | None
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.attn_norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.to_q: nn.Linear = nn.Linear(dim, inner, bias=False)
        self.to_out: nn.Linear = nn.Linear(inner, dim)
        self.cross: CrossAttention | None = None
        if dim_context is not None:
            self.cross = CrossAttention(dim, dim_context, heads, dim_head)
        self.ff_norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.ff: FeedForward = FeedForward(dim, dropout=ff_dropout, gated=True)

    def weights(self, place: str) -> LayerWeights:
        """The parameters, in the order of their use, but for those to a context.

        `place` is its name in the model, for messages. Raises TypeError for another kind of part.
        """
        check_part(f"{place}.ff", self.ff, FeedForward)
        for name, part, kind in (
            ("attn_norm", self.attn_norm, nn.LayerNorm),
            ("to_q", self.to_q, nn.Linear),
            ("to_out", self.to_out, nn.Linear),
            ("ff_norm", self.ff_norm, nn.LayerNorm),
            ("ff.inner", self.ff.inner, nn.Linear),
            ("ff.outer", self.ff.outer, nn.Linear),
        ):
            check_part(f"{place}.{name}", part, kind)
        return LayerWeights(
            self.attn_norm.weight,
            self.attn_norm.bias,
            self.to_q.weight,
            self.to_out.weight,
            self.to_out.bias,
            self.ff_norm.weight,
            self.ff_norm.bias,
            self.ff.inner.weight,
            self.ff.inner.bias,
            self.ff.outer.weight,
            self.ff.outer.bias,
        )
