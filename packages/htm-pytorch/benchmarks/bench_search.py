"""Exact and approximate search of chunks, for `bench_cases`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BEST, QUERIES = 8, 16


def drawn(chunks: int, dim: int) -> tuple[Any, Tensor]:
    """Means of chunks, and queries."""
    from htm_pytorch import Summary

    generator = torch.Generator().manual_seed(0)
    means, queries = (torch.randn(1, n, dim, generator=generator) for n in (chunks, QUERIES))
    return Summary(means, None), queries


def exact(summary: Any, queries: Tensor) -> Tensor:
    from htm_pytorch.retrieval import search

    return search(queries, summary, BEST, None)


@cache
def indexed(chunks: int, dim: int) -> tuple[Callable[[], Tensor], float]:
    """A search whose index is there, and the seconds that it took to build."""
    from htm_pytorch import FaissSearch

    found, (summary, queries) = FaissSearch(), drawn(chunks, dim)

    def run() -> Tensor:
        return found.search(queries, summary, BEST, None, torch.arange(1))

    first = time.perf_counter()
    run()
    return run, time.perf_counter() - first


def search_of(*, device: str, chunks: int, dim: int, kind: str) -> Callable[[], Any]:  # noqa: ARG001
    if kind == "faiss":
        return indexed(chunks, dim)[0]
    summary, queries = drawn(chunks, dim)
    return lambda: exact(summary, queries)


def recall(*, device: str, chunks: int, dim: int) -> Callable[[], float]:  # noqa: ARG001
    """Per cent of the best chunks that are found."""
    found, wanted = indexed(chunks, dim)[0](), exact(*drawn(chunks, dim))
    hits = (found[..., None] == wanted[..., None, :]).any(-1)
    return lambda: 100 * hits.float().mean().item()


def build_time(*, device: str, chunks: int, dim: int) -> Callable[[], float]:  # noqa: ARG001
    return lambda: indexed(chunks, dim)[1]
