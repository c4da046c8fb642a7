"""The modules: attention to the relevant chunks of a memory, and a residual block of it.

Shapes: b batch, n queries, m memory tokens, d model width, c tokens a chunk, j = ceil(m / c)
chunks, k of them that a query attends to, h heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from htm_pytorch.checks import (
    check_choice,
    check_mask,
    check_positive,
    check_same_batch,
    check_sequence,
)
from htm_pytorch.fused import attend_fused
from htm_pytorch.legacy import attend_legacy, check_legacy_options
from htm_pytorch.retrieval import Summary, count_chunks, find, summarise

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
        min_timescale: distance of neighbouring frequencies; the reference's name for it.
        max_timescale: longest wavelength, in units of 2 pi.

    Raises:
        TypeError, ValueError: a number is out of range.
    """

    inv_freqs: Tensor

    def __init__(self, dim: int, min_timescale: float = 2.0, max_timescale: float = 1e4) -> None:
        check_positive(dim=dim)
        if not min_timescale > 0.0 or not max_timescale > 0.0:
            raise ValueError(f"timescales must be above 0, got {min_timescale} and {max_timescale}")
        super().__init__()
        self.dim: int = dim
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        freqs = torch.arange(0, dim, min_timescale, dtype=dtype)
        self.register_buffer("inv_freqs", max_timescale ** (-freqs / dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SinusoidalPosition:
        """Keeps the frequencies in full precision where the module is cast to bf16 or fp16."""
        before = self.inv_freqs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freqs.dtype.itemsize < before.dtype.itemsize:
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
        check_positive(
            dim=dim,
            heads=heads,
            topk_mems=topk_mems,
            mem_chunk_size=mem_chunk_size,
            dim_head=dim_head,
        )
        check_choice("impl", impl, IMPLEMENTATIONS)
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
        """
        check_sequence("queries", queries, self.dim)
        check_sequence("memories", memories, self.dim)
        check_same_batch(queries, memories)
        if mask is not None:
            check_mask("mask", mask, memories.shape[:2])
        if chunk_attn_mask is not None:
            chunks = count_chunks(memories.shape[1], self.mem_chunk_size)
            check_mask("chunk_attn_mask", chunk_attn_mask, (*queries.shape[:2], chunks))
        if self.legacy:
            found = attend_legacy(self, queries, memories, mask, chunk_attn_mask)
        else:
            memories = memories.detach() if self.detach_memories else memories
            summary = summarise(memories, mask, self.mem_chunk_size)
            found = self.attend_chunks(queries, memories, mask, summary, chunk_attn_mask)
        return asked_for(*found, return_indices, return_weights)

    def attend_chunks(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None,
        summary: Summary,
        chunk_attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` for chunks that are summarised already; nothing is checked."""
        indices, weights = self.choose(queries, summary, chunk_attn_mask)
        return self.attend_found(queries, memories, mask, indices, weights), indices, weights

    def choose(
        self,
        queries: Tensor,
        summary: Summary,
        chunk_attn_mask: Tensor | None = None,
        candidates: Callable[[Tensor, Summary, int, Tensor | None], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Chunks (b, n, min(k, j)) that queries attend to, and their weights; see `find`."""
        k = min(self.topk_mems, summary.means.shape[1])
        if k == 0 or queries.numel() == 0:
            indices = torch.full((*queries.shape[:2], k), -1, device=queries.device)
            return indices, queries.new_zeros(indices.shape)
        # (W_q q + b_q) . (W_k s + b_k): of one query b_k adds as much to all chunks, which is
        # nothing to a softmax. Its gradient is 0, not None, as data parallelism wants it.
        asking = self.to_summary_queries(queries) @ self.to_summary_keys.weight
        asking = asking * self.dim**-0.5 + self.to_summary_keys.bias.sum() * 0.0
        return find(asking, summary, k, chunk_attn_mask, candidates)

    def attend_found(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None,
        indices: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """What queries find in chunks (b, n, k) with weights (b, n, k); nothing is checked.

        `mask` may be (b, n, k) int64 as well: so many first tokens of each of the chunks take part.
        """
        k = indices.shape[2]
        if k == 0 or queries.numel() == 0:
            # Nothing to attend to, but every parameter has its gradient of zero.
            return queries * 0.0 + sum(parameter.sum() * 0.0 for parameter in self.parameters())
        chunks = count_chunks(memories.shape[1], self.mem_chunk_size)
        attend = self._projected if self._projects(queries, k, chunks) else self._absorbed
        answers = attend(queries, memories, mask, indices, weights).to(queries.dtype)
        out = nn.functional.linear(answers.flatten(2), self.attn.to_out.weight)
        out = out + (indices >= 0).any(-1, keepdim=True) * self.attn.to_out.bias
        return out.to(queries.dtype)

    def _projects(self, queries: Tensor, k: int, chunks: int) -> bool:
        """Whether projecting the memories costs less than working on them as they are.

        A pair of a query and a chunk costs `heads` products of width d, or of width dim_head once
        the chunk has been projected.
        """
        if self.impl != "auto":
            return self.impl == "projected"
        # A graph with dynamic lengths would be bound to one of the two ways.
        if self.dim <= self.dim_head or torch.compiler.is_compiling():
            return False
        queries_of_a_chunk = queries.shape[1] * k / chunks
        return queries_of_a_chunk > self.dim * self.dim_head / (self.dim - self.dim_head)

    def _absorbed(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None,
        indices: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Answers (b, n, h, dim_head) with all projections on the side of the queries."""
        keys, values = self.attn.to_kv.weight.view(2, self.heads, self.dim_head, -1)
        asking = torch.einsum("bnhe,hed->bnhd", self._queries(queries), keys)
        positions = None
        if self.pos_emb is not None:
            positions = self.pos_emb(asking.new_empty(self.mem_chunk_size, self.dim))
        c = self.mem_chunk_size
        found = attend_fused(
            asking, memories[:, :, None], None, weights, indices, mask, positions, c
        )
        return torch.einsum("bnhd,hed->bnhe", found, values.to(found.dtype))

    def _projected(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None,
        indices: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Answers (b, n, h, dim_head) from keys and values of all tokens."""
        b, m, _ = memories.shape
        c = self.mem_chunk_size
        places = torch.arange(m, device=indices.device)
        # Only what some query sees, since 0 times NaN would be in the weights' gradients.
        by_token = mask is None or mask.dtype == torch.bool
        counts = torch.full_like(indices, c) if mask is None or by_token else mask
        chunks = counts.new_zeros(b, count_chunks(m, c) + 1)
        chunks.scatter_reduce_(1, indices.flatten(1) + 1, counts.flatten(1), "amax")
        seen = places % c < chunks[:, places // c + 1]
        if mask is not None and by_token:
            seen = seen & mask
        tokens = memories.to(queries.dtype).masked_fill(~seen[..., None], 0.0)
        if self.pos_emb is not None:
            positions = self.pos_emb(tokens.new_empty(c, self.dim))
            tokens = tokens + positions[places % c]
        keys, values = self.attn.to_kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)
        asking = self._queries(queries).to(keys.dtype)
        found: Tensor = attend_fused(asking, keys, values, weights, indices, mask, None, c)
        return found

    def _queries(self, queries: Tensor) -> Tensor:
        """(b, n, h, dim_head), scaled."""
        asking: Tensor = self.attn.to_q(queries).unflatten(-1, (self.heads, self.dim_head))
        scale: float = self.dim_head**-0.5
        return asking * scale


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
        check_sequence("queries", queries, self.attn.dim)
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
