"""What is timed and weighed of htm-pytorch, and of its reference.

Every function prepares a subject of `bench_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

DIM, HEADS, WIDTH, TOPK, CHUNK, QUERIES = 512, 8, 64, 8, 32, 128
Run = Callable[[], Any]


def attention(device: str) -> Any:
    """The same arguments are known to both packages."""
    from htm_pytorch import HTMAttention

    torch.manual_seed(0)
    module = HTMAttention(
        dim=DIM, heads=HEADS, topk_mems=TOPK, mem_chunk_size=CHUNK, dim_head=WIDTH
    )
    return module.to(device)


def sequence(n: int, device: str, *, rows: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, DIM, generator=generator).to(device)


def mask_of(kind: str, m: int, device: str) -> Tensor:
    """A mask (1, m)."""
    mask = torch.ones(1, m, dtype=torch.bool)
    if kind == "the end":
        # Some of the last tokens are in a chunk with others.
        mask[:, -(CHUNK + CHUNK // 2) :] = False
    elif kind == "four fifths":
        mask[:, m // 5 :] = False
    elif kind == "here and there":
        mask = torch.rand(1, m, generator=torch.Generator().manual_seed(0)) < 0.9
    return mask.to(device)


def core(
    *,
    device: str,
    m: int,
    n: int = QUERIES,
    backward: bool = False,
    masked: str = "the end",
) -> Run:
    module = attention(device)
    queries, memories = (sequence(x, device, seed=x) for x in (n, m))
    mask = mask_of(masked, m, device)
    cotangent = sequence(n, device, seed=1)

    def forward() -> None:
        with torch.no_grad():
            module(queries, memories, mask=mask)

    def both() -> None:
        module.zero_grad()
        module(queries, memories, mask=mask).backward(cotangent)

    return both if backward else forward


def stored(m: int, device: str, *, rows: int = 1, dtype: str = "float32") -> Any:
    """A store that holds m tokens of each environment."""
    from htm_pytorch import MemoryStore

    store = MemoryStore(
        DIM, environments=rows, chunk_size=CHUNK, dtype=getattr(torch, dtype), device=device
    )
    for part in sequence(m, device, rows=rows).split(8192, 1):
        store.append(part)
    return store


def from_store(*, device: str, m: int, dtype: str) -> Run:
    """Queries to what is stored and summarised."""
    module, store, queries = (
        attention(device),
        stored(m, device, dtype=dtype),
        sequence(128, device),
    )

    def run() -> None:
        with torch.no_grad():
            store.attend(module, queries)

    return run


def streaming_ours(*, device: str, m: int, rows: int = 1) -> Run:
    """Each environment takes a token in and asks with it."""
    module, store = attention(device), stored(m, device, rows=rows)
    tokens = sequence(1, device, rows=rows, seed=2)

    def run() -> None:
        with torch.no_grad():
            store.append(tokens)
            store.attend(module, tokens)

    return run


def streaming_reference(*, device: str, m: int, rows: int = 1) -> Run:
    """The reference cannot append: a buffer with room, of which a mask shows what is there."""
    module = attention(device)
    memories = sequence(m + CHUNK, device, rows=rows)
    mask = torch.ones(memories.shape[:2], dtype=torch.bool, device=device)
    mask[:, m:] = False
    tokens = sequence(1, device, rows=rows, seed=2)

    def run() -> None:
        memories[:, m : m + 1] = tokens
        mask[:, m] = True
        with torch.no_grad():
            module(tokens, memories, mask=mask)

    return run


@cache
def _vast(m: int, dim: int) -> Any:
    """A store in bf16, made once for all that is asked of it."""
    from htm_pytorch import MemoryStore

    store = MemoryStore(dim, chunk_size=CHUNK, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    part = 2**16
    for first in range(0, m, part):
        store.append(torch.randn(1, min(part, m - first), dim, generator=generator))
    return store


def from_vast_store(*, device: str, m: int, dim: int, part: str) -> Run:  # noqa: ARG001
    """One query to all that is stored: the whole of it, or finding the chunks alone."""
    from htm_pytorch import HTMAttention
    from htm_pytorch.attention import choose
    from htm_pytorch.retrieval import Summary

    torch.manual_seed(0)
    module = HTMAttention(dim, HEADS, TOPK, CHUNK, dim // HEADS)
    store, query = _vast(m, dim), torch.randn(1, 1, dim)
    # Not public: nobody else wants to know the parts.
    view = store._layout.view(torch.arange(1))

    def run() -> None:
        with torch.no_grad():
            if part == "search":
                choose(module, query, Summary(view.means, view.some))
            else:
                store.attend(module, query)

    return run


def vast_memory(*, device: str, m: int, dim: int) -> Run:
    """Filling a store and asking it."""

    def run() -> None:
        from_vast_store(device=device, m=m, dim=dim, part="attend")()

    return run
