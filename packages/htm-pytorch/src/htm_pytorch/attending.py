"""What a module finds in the chunks of a store.

Shapes: e environments, n queries, d width, k chunks a query, j columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from htm_pytorch.attention import attend_chosen
from htm_pytorch.layout import View
from htm_pytorch.mapped import MappedPool
from htm_pytorch.model import HTMAttention, HTMBlock
from htm_pytorch.settings import Settings
from htm_pytorch.storage import Pool

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """The function, left out of the graphs of `torch.compile`.

    They would keep tokens in ways of their own, for which there is no lease.
    """

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            found: R = torch.compiler.disable(function)(*args, **kwargs)
            return found
        return function(*args, **kwargs)

    return outside


def parts(module: object, settings: Settings) -> tuple[HTMBlock | None, HTMAttention]:
    """A block, if it is one, and its attention.

    Raises:
        TypeError, ValueError: the module is another one, or for other memories.
    """
    # What `torch.compile` returns has the module inside.
    module = getattr(module, "_orig_mod", module)
    block = module if isinstance(module, HTMBlock) else None
    found = module if block is None else getattr(block.attn, "_orig_mod", block.attn)
    if not isinstance(found, HTMAttention):
        raise TypeError(
            f"module must be an HTMAttention or HTMBlock, got {type(module).__name__}; of one that "
            "is wrapped, give what is inside"
        )
    if found.dim != settings.dim:
        raise ValueError(f"the module must be of dim {settings.dim}, got {found.dim}")
    if found.mem_chunk_size != settings.chunk_size:
        raise ValueError(
            f"the module must have chunks of {settings.chunk_size}, got {found.mem_chunk_size}"
        )
    if found.legacy:
        raise ValueError("a store pads at the end, and a module with legacy=True in front")
    return block, found


def attend_view(
    attention: HTMAttention,
    queries: Tensor,
    pool: Pool,
    view: View,
    columns: Tensor,
    weights: Tensor,
) -> Tensor:
    """What queries (e, n, d) find in columns (e, n, k) of a view, with weights (e, n, k)."""
    e, n, k = columns.shape
    # Only a graph reads tokens later, and there is none of what inference mode computes.
    recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    tokens = pool.leases.take(pool.tokens) if recorded else pool.tokens
    newest, has = view.last[:, :, None, None]
    counts = torch.where(columns == newest, has, tokens.shape[1])
    # The pool is one row of one batch.
    out = attend_chosen(
        attention,
        queries.reshape(1, e * n, queries.shape[2]),
        tokens[: pool.room.used].flatten(0, 1)[None],
        counts.reshape(1, e * n, k),
        look_up(view.table, columns).reshape(1, e * n, k),
        weights.reshape(1, e * n, k),
    )
    if isinstance(pool, MappedPool) and out.requires_grad:
        out.register_hook(pool.leases.check)
    return out.view(queries.shape)


def look_up(table: Tensor, columns: Tensor) -> Tensor:
    """What a table (e, j) has at columns (e, n, k); -1 stays."""
    found = table.gather(1, columns.clamp(min=0).flatten(1)).view_as(columns)
    return found.masked_fill(columns < 0, -1)
