"""How a store finds chunks: what a search must offer, and one that is approximate.

Shapes: e environments, n queries, d width, j chunks, k of them wanted, x chunks changed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from htm_pytorch.retrieval import Summary, search
from shared_core.checks import check_at_least

# Chunks of an environment that are searched exactly before it gets an index.
_FEW = 4096

_TRIAL_WIDTH = 64


class Search(Protocol):
    """Finds chunks for a `MemoryStore`. An object serves one store, which tells it of changes."""

    def search(
        self, queries: Tensor, summary: Summary, k: int, chunk_mask: Tensor | None, env_ids: Tensor
    ) -> Tensor:
        """The k chunks (e, n, k) whose mean has the largest products with a query, or most of them.

        Args:
            queries: (e, n, d).
            summary: means (e, j, d), and which of them there are.
            chunk_mask: (e, n, j) boolean, True = may be chosen.
            env_ids: (e,) environments in question, on the CPU.

        Returns:
            Different chunks for each query, in any order: they are put in that of their relevance
            after. -1 in the place of those not found, which a chunk that is there twice counts as.
        """

    def changed(self, env_ids: Tensor, chunks: Tensor) -> None:
        """Chunks (x,) of environments (x,), on the CPU, are about to be others, or be no more.

        They are other ones by the next search. If this raises, nothing is changed.
        """


class FaissSearch:
    """Approximate search by an index of faiss.

    Each environment has an index on the CPU. Chunks that it does not hold yet, or that have changed
    since, are searched exactly beside it, until there are enough of them to be added. Queries with
    a chunk mask are answered exactly, without it.

    The first search of more than `few` chunks waits while the index is built, and so does the one
    after half of what it holds has changed: much longer than a search takes.

    Args:
        index: what `faiss.index_factory` is to make, such as "HNSW32" or "IVF1024,Flat".
        few: chunks up to which an environment has no index. A quarter of it is added at a time.
        parameters: how thoroughly to search, as `faiss.ParameterSpace` takes it: "efSearch=512" or
            "nprobe=32". Where None, "efSearch=256" for an index that begins with HNSW, and else
            what faiss has. With it HNSW32 finds more than nine tenths of the 8 best of 16,000
            random means of width 128, which is what a test holds it to; means that lie in groups
            are found more easily, and more or wider ones less.

    Raises:
        ImportError: faiss is not installed.
        TypeError, ValueError: an argument is of the wrong type, or faiss does not know it.
    """

    def __init__(
        self, index: str = "HNSW32", *, few: int = _FEW, parameters: str | None = None
    ) -> None:
        check_at_least(1, few=few)
        if not isinstance(index, str) or not isinstance(parameters, str | None):
            raise TypeError(f"index and parameters must be str, got {index!r} and {parameters!r}")
        try:
            faiss = import_module("faiss")
        except ImportError as error:
            raise ImportError("FaissSearch needs faiss: pip install htm-pytorch[faiss]") from error
        if parameters is None and index.startswith("HNSW"):
            parameters = "efSearch=256"
        self.index: str = index
        self.few: int = few
        self.parameters: str | None = parameters
        self._faiss: Any = faiss
        self._indices: dict[int, _Index] = {}
        try:
            # What is wrong is to be known now, not at the first search of so many chunks.
            self._new(_TRIAL_WIDTH)
        except ValueError as error:
            # The width that it will be of may be one.
            if "should be a multiple of" not in str(error):
                raise

    def search(
        self, queries: Tensor, summary: Summary, k: int, chunk_mask: Tensor | None, env_ids: Tensor
    ) -> Tensor:
        """See `Search.search`."""
        if chunk_mask is not None:
            return search(queries, summary, k, chunk_mask)
        found = torch.full((*queries.shape[:2], k), -1, device=queries.device)
        for row, env_id in enumerate(env_ids.tolist()):
            means = summary.means[row]
            if summary.some is not None:
                means = means[: int(summary.some[row].sum())]
            if len(means) <= self.few:
                self._indices.pop(env_id, None)
                part = Summary(means[None], None)
                best = search(queries[row, None], part, min(k, len(means)), None)[0]
            else:
                best = self._search(env_id, queries[row].detach(), means, k)
            found[row, :, : best.shape[1]] = best
        return found

    def changed(self, env_ids: Tensor, chunks: Tensor) -> None:
        """See `Search.changed`."""
        for env_id in env_ids.unique().tolist():
            if env_id in self._indices:
                self._indices[env_id].forget(chunks[env_ids == env_id])

    def _search(self, env_id: int, queries: Tensor, means: Tensor, k: int) -> Tensor:
        indexed = self._indices.get(env_id)
        if indexed is None or indexed.outgrown(len(means)):
            indexed = self._indices[env_id] = self._make(means)
        rest = indexed.missing(len(means))
        if 4 * len(rest) > self.few:
            indexed.add(means, rest)
            rest = rest[:0]
        chunks = indexed.search(queries, k).to(queries.device)
        scores = torch.einsum("nd,nkd->nk", queries, means[chunks.clamp(min=0)])
        scores = scores.masked_fill(chunks < 0, -torch.inf)
        rest = rest.to(queries.device)
        chunks = torch.cat((chunks, rest.expand(len(queries), -1)), 1)
        scores, best = torch.cat((scores, queries @ means[rest].mT), 1).topk(k)
        return chunks.gather(1, best).masked_fill(scores.isneginf(), -1)

    def _make(self, means: Tensor) -> _Index:
        index = self._new(means.shape[1])
        if index.is_trained:
            return _Index(index, None)
        index.train(_numbers(means))
        return _Index(index, 4 * len(means))

    def _new(self, width: int) -> Any:
        faiss = self._faiss
        try:
            index = faiss.index_factory(width, self.index, faiss.METRIC_INNER_PRODUCT)
            if self.parameters is not None:
                faiss.ParameterSpace().set_index_parameters(index, self.parameters)
        except RuntimeError as error:
            raise ValueError(
                f"faiss can make no index {self.index!r} of width {width} with parameters "
                f"{self.parameters!r}: {error}"
            ) from error
        return index


class _Index:
    """An index of an environment, and which chunks its entries are.

    Args:
        index: of faiss, empty.
        most: chunks that it was made for; any number where None.
    """

    def __init__(self, index: Any, most: int | None) -> None:
        self._index = index
        self._most = most
        # -1 for an entry whose chunk has changed, and for a chunk without an entry.
        self._chunks = torch.empty(0, dtype=torch.int64)
        self._entries = torch.empty(0, dtype=torch.int64)

    def missing(self, j: int) -> Tensor:
        """Those of j chunks that have no entry."""
        more = max(0, j - len(self._entries))
        self._entries = torch.cat((self._entries, self._entries.new_full((more,), -1)))
        return (self._entries[:j] < 0).nonzero()[:, 0]

    def add(self, means: Tensor, chunks: Tensor) -> None:
        self._index.add(_numbers(means[chunks.to(means.device)]))
        first = len(self._chunks)
        self._chunks = torch.cat((self._chunks, chunks))
        self._entries[chunks] = torch.arange(first, len(self._chunks))

    def forget(self, chunks: Tensor) -> None:
        chunks = chunks[chunks < len(self._entries)]
        entries = self._entries[chunks]
        self._chunks[entries[entries >= 0]] = -1
        self._entries[chunks] = -1

    def outgrown(self, j: int) -> bool:
        """Whether to make it anew for j chunks: it was trained on few, or most have changed."""
        grown = self._most is not None and j > self._most
        return grown or 2 * int((self._chunks < 0).sum()) > len(self._chunks)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """At least k chunks (n, ...) of each query, -1 for none; fewer where it finds no more."""
        numbers, wanted = _numbers(queries), k
        while True:
            entries = torch.from_numpy(self._index.search(numbers, wanted)[1])
            chunks = self._chunks[entries.clamp(min=0)].masked_fill(entries < 0, -1)
            # Among the best may be many that have changed since.
            lacking = (chunks >= 0).sum(1) < k
            if wanted >= len(self._chunks) or not bool((lacking & (entries[:, -1] >= 0)).any()):
                return chunks
            wanted = 2 * wanted


def _numbers(x: Tensor) -> Any:
    """An array of float32, which is what faiss takes."""
    return x.detach().float().cpu().contiguous().numpy()
