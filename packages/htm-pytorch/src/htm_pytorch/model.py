"""The modules: attention to the relevant chunks of a memory, and a residual block of it.

Shapes: b batch, n queries, m memory tokens, d model width, c tokens a chunk, j = ceil(m / c)
chunks, k of them that a query attends to, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from htm_pytorch.attention import attend_chosen, choose
from htm_pytorch.checks import check_same_batch
from htm_pytorch.legacy import attend_legacy
from htm_pytorch.retrieval import count_chunks, summarise
from shared_core.checks import (
    check_at_least,
    check_choice,
    check_legacy_options,
    check_mask,
    check_vectors,
)

IMPLEMENTATIONS = ("auto", "absorbed", "projected")


def asked_for(
    out: Tensor, indices: Tensor, weights: Tensor, return_indices: bool, return_weights: bool
) -> Tensor | tuple[Tensor, ...]:
    """The result alone, or a tuple of it and what else is to be returned."""
    more = [(indices, return_indices), (weights, return_weights)]
    found = tuple(x for x, is_wanted in more if is_wanted)
    return (out, *found) if found else out


class SinusoidalPosition(nn.Module):
    """Sine and cosine of a token's distance from the end of its chunk.

    Args:
        dim: width.
        min_timescale: distance of neighbouring frequencies among `dim` exponents, and no timescale
            in spite of the reference's name for it. One that gives another width is refused.
        max_timescale: longest wavelength, in units of 2 pi.

    Raises:
        TypeError, ValueError: a number is out of range.
    """

    inv_freqs: Tensor

    def __init__(self, dim: int, min_timescale: float = 2.0, max_timescale: float = 1e4) -> None:
        check_at_least(1, dim=dim)
        if not 0.0 < min_timescale < math.inf or not 0.0 < max_timescale < math.inf:
            raise ValueError(
                f"timescales must be finite and above 0, got {min_timescale} and {max_timescale}"
            )
        width = 2 * math.ceil(dim / min_timescale)
        if width not in (dim, dim + dim % 2):
            raise ValueError(f"min_timescale {min_timescale} gives a width of {width}, not {dim}")
        super().__init__()
        self.dim: int = dim
        self.min_timescale: float = min_timescale
        self.max_timescale: float = max_timescale
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("inv_freqs", torch.empty(width // 2, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Computes the frequencies, for instance after `to_empty`."""
        freqs = self.min_timescale * torch.arange(len(self.inv_freqs), dtype=torch.float64)
        with torch.no_grad():
            self.inv_freqs.copy_(self.max_timescale ** (-freqs / self.dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SinusoidalPosition:
        """Keeps the frequencies in full precision where the module is cast to bf16 or fp16."""
        before = self.inv_freqs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freqs.dtype.itemsize < 4:
            self.inv_freqs = before.to(self.inv_freqs.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Positions (c, dim) of tokens x (..., c, dim): c - 1 down to 0, in the type of x."""
        places = torch.arange(x.shape[-2] - 1, -1, -1, device=x.device, dtype=self.inv_freqs.dtype)
        angles = places[:, None] * self.inv_freqs.to(x.device)
        # Of an odd width the last cosine has no room.
        return torch.cat((angles.sin(), angles.cos()), -1)[:, : self.dim].to(x.dtype)


class _Inside(nn.Module):
    """Projections of multi-head attention inside a chunk."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.to_q: nn.Linear = nn.Linear(dim, inner, bias=False)
        self.to_kv: nn.Linear = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out: nn.Linear = nn.Linear(inner, dim)


class HTMAttention(nn.Module):
    """Attention to the k most relevant chunks of a memory (Lampinen et al. 2021, section 2).

    Args:
        dim: width of queries and memories.
        heads: attention heads inside a chunk.
        topk_mems: chunks that a query attends to; fewer where there are fewer.
        mem_chunk_size: tokens of a chunk; the last one may be cut.
        dim_head: width of a head.
        add_pos_enc: tell the tokens of a chunk apart by their distance from its end.
        eps: with `legacy`, added to the number of tokens that a chunk's mean is divided by.
        detach_memories: gradients do not reach the memories, as in the paper.
        impl: "absorbed" moves the projections of memories to the queries, "projected" projects the
            memories, "auto" takes what costs less, and "absorbed" in a compiled graph.
        legacy: reproduce the numbers of htm-pytorch 0.0.4.

    Raises:
        TypeError, ValueError: a number or option is out of range, or a new one meets `legacy`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        topk_mems: int = 2,
        mem_chunk_size: int = 32,
        dim_head: int = 64,
        add_pos_enc: bool = True,
        eps: float = 1e-5,
        *,
        detach_memories: bool = True,
        impl: str = "auto",
        legacy: bool = False,
    ) -> None:
        check_at_least(
            1,
            dim=dim,
            heads=heads,
            topk_mems=topk_mems,
            mem_chunk_size=mem_chunk_size,
            dim_head=dim_head,
        )
        check_choice("impl", impl, IMPLEMENTATIONS)
        if not 0.0 <= eps < math.inf:
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        if legacy:
            check_legacy_options(detach_memories=detach_memories, impl=impl == "auto")
        super().__init__()
        self.dim: int = dim
        self.heads: int = heads
        self.topk_mems: int = topk_mems
        self.mem_chunk_size: int = mem_chunk_size
        self.dim_head: int = dim_head
        self.eps: float = eps
        self.detach_memories: bool = detach_memories
        self.impl: str = impl
        self.legacy: bool = legacy
        self.to_summary_queries: nn.Linear = nn.Linear(dim, dim)
        self.to_summary_keys: nn.Linear = nn.Linear(dim, dim)
        self.attn: _Inside = _Inside(dim, heads, dim_head)
        self.pos_emb: SinusoidalPosition | None = SinusoidalPosition(dim) if add_pos_enc else None

    def forward(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
        *,
        return_indices: bool = False,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attends to memories.

        Args:
            queries: (b, n, d).
            memories: (b, m, d), any m, 0 included.
            mask: (b, m) boolean, True = take part. Masked tokens, NaN included, change nothing.
            chunk_attn_mask: (b, n, j) boolean: the chunks that a query may attend to.
            return_indices: return the chunks (b, n, min(k, j)), too, most relevant first, -1 where
                a query may attend to fewer.
            return_weights: return their weights (b, n, min(k, j)), too.

        Returns:
            (b, n, d), exactly 0 for a query with nothing to attend to; with either option a tuple.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape; nothing is broadcast.
                With `legacy`, also for an option that the reference does not have.
        """
        check_vectors("queries", queries, self.dim, least=0)
        check_vectors("memories", memories, self.dim, least=0)
        check_same_batch(queries, memories)
        check_mask("mask", mask, memories.shape[:2])
        if chunk_attn_mask is not None:
            chunks = count_chunks(memories.shape[1], self.mem_chunk_size)
            check_mask("chunk_attn_mask", chunk_attn_mask, (*queries.shape[:2], chunks))
        if self.legacy:
            check_legacy_options(
                return_indices=not return_indices, return_weights=not return_weights
            )
            return attend_legacy(self, queries, memories, mask, chunk_attn_mask)
        memories = memories.detach() if self.detach_memories else memories
        summary = summarise(memories, mask, self.mem_chunk_size)
        indices, weights = choose(self, queries, summary, chunk_attn_mask)
        out = attend_chosen(self, queries, memories, mask, indices, weights)
        return asked_for(out, indices, weights, return_indices, return_weights)


class HTMBlock(nn.Module):
    """`HTMAttention` of normalised queries, added to the queries.

    Args:
        dim: width of queries and memories.
        Others: as `HTMAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        topk_mems: int = 2,
        mem_chunk_size: int = 32,
        dim_head: int = 64,
        add_pos_enc: bool = True,
        eps: float = 1e-5,
        *,
        detach_memories: bool = True,
        impl: str = "auto",
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.attn: HTMAttention = HTMAttention(
            dim,
            heads,
            topk_mems,
            mem_chunk_size,
            dim_head,
            add_pos_enc,
            eps,
            detach_memories=detach_memories,
            impl=impl,
            legacy=legacy,
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.legacy: bool = legacy

    def forward(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
        *,
        return_indices: bool = False,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Queries (b, n, d) and what they find; arguments and results as `HTMAttention.forward`.

        With `legacy` the normalised queries are added instead, as the reference does.
        """
        check_vectors("queries", queries, self.attn.dim, least=0)
        asking = self.norm(queries)
        found = self.attn(
            asking,
            memories,
            mask,
            chunk_attn_mask,
            return_indices=return_indices,
            return_weights=return_weights,
        )
        kept = asking if self.legacy else queries
        if isinstance(found, tuple):
            return (kept + found[0], *found[1:])
        out: Tensor = kept + found
        return out
