"""What a module does with its parameters: choosing chunks, and attending to their tokens.

Shapes: b batch, n queries, m memory tokens, d model width, c tokens a chunk, j = ceil(m / c)
chunks, k of them that a query attends to, h heads, e width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from htm_pytorch.chunkwise import attend_chunkwise
from htm_pytorch.fused import attend_fused
from htm_pytorch.plain import attend_plain
from htm_pytorch.retrieval import Summary, count_chunks, find
from shared_core import transformed

if TYPE_CHECKING:
    from htm_pytorch.model import HTMAttention


def choose(
    module: HTMAttention,
    queries: Tensor,
    summary: Summary,
    chunk_attn_mask: Tensor | None = None,
    candidates: Callable[[Tensor, Summary, int, Tensor | None], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks (b, n, min(k, j)) that queries attend to, and their weights; see `find`."""
    k = min(module.topk_mems, summary.means.shape[1])
    if k == 0 or queries.numel() == 0:
        indices = torch.full((*queries.shape[:2], k), -1, device=queries.device)
        return indices, queries.new_zeros(indices.shape)
    # (W_q q + b_q) . (W_k s + b_k): of one query b_k adds as much to all chunks, which is nothing
    # to a softmax. Its gradient is 0, not None, as data parallelism wants it.
    asking = module.to_summary_queries(queries) @ module.to_summary_keys.weight
    asking = asking * module.dim**-0.5 + module.to_summary_keys.bias[:0].sum()
    return find(asking, summary, k, chunk_attn_mask, candidates)


def attend_chosen(
    module: HTMAttention,
    queries: Tensor,
    memories: Tensor,
    mask: Tensor | None,
    indices: Tensor,
    weights: Tensor,
) -> Tensor:
    """What queries (b, n, d) find in chunks (b, n, k) of memories (b, m, d): (b, n, d).

    Args:
        mask: as `attend_fused`.
        indices: (b, n, k), -1 for none.
        weights: (b, n, k).
    """
    k = indices.shape[2]
    if k == 0 or queries.numel() == 0:
        # Nothing to attend to, but every parameter has its gradient of zero.
        edges = [x.flatten()[:0].sum() for x in (queries, *module.parameters())]
        return torch.zeros_like(queries) + sum(edges)
    chunks = count_chunks(memories.shape[1], module.mem_chunk_size)
    attend = _projected if _projects(module, queries.shape[1] * k / chunks) else _absorbed
    answers = attend(module, queries, memories, mask, indices, weights).to(queries.dtype)
    out = F.linear(answers.flatten(2), module.attn.to_out.weight)
    out = out + (indices >= 0).any(-1, keepdim=True) * module.attn.to_out.bias
    return out.to(queries.dtype)


def _projects(module: HTMAttention, queries_of_a_chunk: float) -> bool:
    """Whether projecting the memories costs less than working on them as they are.

    A pair of a query and a token costs 4 h d operations, or 4 h e once the token has been
    projected, which costs 4 d h e. The operations of the first kind, which wait for what is
    gathered, take about twice as long each (measured on a CPU, widths 128 to 1024).
    """
    if module.impl != "auto":
        return module.impl == "projected"
    d, e = module.dim, module.dim_head
    # A graph with dynamic lengths would be bound to one of the two ways.
    if d <= e or torch.compiler.is_compiling():
        return False
    return 2 * queries_of_a_chunk > d * e / (d - e)


def _absorbed(
    module: HTMAttention,
    queries: Tensor,
    memories: Tensor,
    mask: Tensor | None,
    indices: Tensor,
    weights: Tensor,
) -> Tensor:
    """Answers (b, n, h, e) with all projections on the side of the queries."""
    keys, values = module.attn.to_kv.weight.view(2, module.heads, module.dim_head, -1)
    asking = torch.einsum("bnhe,hed->bnhd", _queries(module, queries), keys)
    c, positions = module.mem_chunk_size, None
    if module.pos_emb is not None:
        positions = module.pos_emb(asking.new_empty(c, module.dim))
    found = attend_fused(asking, memories, weights, indices, mask, positions, c)
    return torch.einsum("bnhd,hed->bnhe", found, values.to(found.dtype))


def _projected(
    module: HTMAttention,
    queries: Tensor,
    memories: Tensor,
    mask: Tensor | None,
    indices: Tensor,
    weights: Tensor,
) -> Tensor:
    """Answers (b, n, h, e) from keys and values of all tokens."""
    b, m, _ = memories.shape
    c = module.mem_chunk_size
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
    if module.pos_emb is not None:
        positions = module.pos_emb(tokens.new_empty(c, module.dim))
        tokens = tokens + positions[places % c]
    keys, values = module.attn.to_kv(tokens).unflatten(-1, (2, module.heads, -1)).unbind(2)
    asking = _queries(module, queries).to(keys.dtype)
    if transformed(asking, keys, values, weights):
        return attend_plain(asking, keys, values, weights, indices, mask, None, c)
    found: Tensor = attend_chunkwise(asking, keys, values, weights, indices, mask, c)
    return found


def _queries(module: HTMAttention, queries: Tensor) -> Tensor:
    """(b, n, h, e), scaled."""
    asking: Tensor = module.attn.to_q(queries).unflatten(-1, (module.heads, module.dim_head))
    scale: float = module.dim_head**-0.5
    return asking * scale
