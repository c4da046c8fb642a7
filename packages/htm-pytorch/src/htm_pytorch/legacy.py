"""What exists only because of the reference, htm-pytorch 0.0.4: its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from htm_pytorch.model import HTMAttention


def attend_legacy(
    module: HTMAttention,
    queries: Tensor,
    memories: Tensor,
    mask: Tensor | None,
    chunk_attn_mask: Tensor | None,
) -> Tensor:
    """As the reference: memories are padded in front, and padding counts where there is no mask.

    Returns:
        (b, n, d).

    Raises:
        ValueError: there are fewer chunks than `topk_mems`.
    """
    c, k = module.mem_chunk_size, module.topk_mems
    missing = -memories.shape[1] % c
    tokens = F.pad(memories.detach(), (0, 0, missing, 0)).unflatten(1, (-1, c))
    if tokens.shape[1] < k:
        raise ValueError(f"legacy=True needs {k} chunks of {c} tokens, got {memories.shape[1]}")
    seen = None
    if mask is None:
        means = tokens.mean(2)
    else:
        seen = F.pad(mask, (missing, 0), value=False).unflatten(1, (-1, c))
        tokens = tokens.masked_fill(~seen[..., None], 0.0)
        means = (tokens.sum(2) / (seen.sum(2) + module.eps)[..., None]).to(tokens.dtype)
    relevance = module.to_summary_queries(queries) @ module.to_summary_keys(means).mT
    relevance = relevance * module.dim**-0.5
    lowest = torch.finfo(relevance.dtype).min
    if seen is not None:
        relevance = relevance.masked_fill(~seen.any(2)[:, None], lowest)
    if chunk_attn_mask is not None:
        relevance = relevance.masked_fill(~chunk_attn_mask, lowest)
    best, indices = relevance.topk(k, dim=-1)
    weights = best.softmax(-1)

    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    chosen = tokens[batch, indices]
    if module.pos_emb is not None:
        chosen = chosen + module.pos_emb(chosen)
    keys, values = module.attn.to_kv(chosen).unflatten(-1, (2, module.heads, -1)).unbind(-3)
    asking = module.attn.to_q(queries).unflatten(-1, (module.heads, -1)) * module.dim_head**-0.5
    scores = torch.einsum("bnhe,bnkche->bnkhc", asking, keys)
    if seen is not None:
        scores = scores.masked_fill(~seen[batch, indices][:, :, :, None], lowest)
    answers = torch.einsum("bnkhc,bnkche->bnkhe", scores.softmax(-1), values).flatten(3)
    out: Tensor = (module.attn.to_out(answers) * weights[..., None]).sum(2)
    return out
