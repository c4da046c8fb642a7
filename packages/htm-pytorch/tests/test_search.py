"""The search by faiss: with a stand-in that is exact, and with faiss where it is installed."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from memories import CHUNK, DIM, Memories, draw, make_module, new_store

from htm_pytorch import FaissSearch, HTMAttention
from htm_pytorch.retrieval import Summary, find
from shared_core.testing import Randn

if TYPE_CHECKING:
    from conftest import Make


class ExactIndex:
    """What is used of an index of faiss."""

    def __init__(self, width: int, description: str) -> None:
        self.is_trained = description != "IVF"
        self._means = torch.empty(0, width)

    def train(self, means: Any) -> None:
        assert len(means) > 0
        self.is_trained = True

    def add(self, means: Any) -> None:
        assert self.is_trained
        self._means = torch.cat((self._means, torch.from_numpy(means)))

    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        scores = torch.from_numpy(queries) @ self._means.mT
        best = scores.topk(min(k, len(self._means)))
        missing = (0, k - best.indices.shape[1])
        entries = torch.nn.functional.pad(best.indices, missing, value=-1)
        return best.values.numpy(), entries.numpy()


@pytest.fixture(params=["stand-in", "IVF", "faiss"])
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An index that misses nothing."""
    pytest.importorskip("numpy")
    if request.param == "faiss":
        pytest.importorskip("faiss")
        return "Flat"
    faiss = SimpleNamespace(
        METRIC_INNER_PRODUCT=0,
        index_factory=lambda width, description, metric: ExactIndex(
            width, description + metric * ""
        ),
    )
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    return str(request.param)


@pytest.mark.parametrize("capacity", [None, 30 * CHUNK])
def test_equals_the_exact_search(device: torch.device, index: str, capacity: int | None) -> None:
    """With tokens appended, forgotten and reset between questions, in one index after another."""
    search = FaissSearch(index, few=4)
    store = new_store(device=device, capacity=capacity, search=search)
    held = Memories(capacity)
    module = make_module(HTMAttention, device, topk_mems=3)
    generator = torch.Generator().manual_seed(1)
    for turn in range(60):
        env_ids = [[0, 1, 2], [1], [2, 1]][turn % 3]
        tokens = draw(generator, len(env_ids), [1, 2, 9][turn // 3 % 3], DIM)
        store.append(tokens, env_ids)
        held.append(tokens, env_ids)
        if turn == 40:
            store.reset([1])
            held.reset([1])
        queries = draw(generator, 3, 2, DIM).to(device)
        found = store.attend(module, queries, return_indices=True, return_weights=True)
        expected = held.attend(module, queries, [0, 1, 2])
        torch.testing.assert_close(found[0], expected[0], atol=1e-12, rtol=0.0)
        assert torch.equal(found[1].sort(-1).values, expected[1].sort(-1).values)


def test_an_index_is_made_anew(monkeypatch: pytest.MonkeyPatch, index: str, randn: Randn) -> None:
    """When it was trained on few chunks, and when most of what it holds has changed."""
    search, made = FaissSearch(index, few=4), []
    make = search._make

    def noted(means: torch.Tensor) -> Any:
        made.append(len(means))
        return make(means)

    monkeypatch.setattr(search, "_make", noted)
    queries, means = randn(1, 3, DIM), randn(1, 41, DIM, seed=2)
    ids = torch.zeros(1, dtype=torch.int64)
    for j in (10, 40, 41, 41):
        search.search(queries, Summary(means[:, :j], None), 2, None, ids)
    assert made == ([10, 41] if index == "IVF" else [10])
    search.changed(ids.expand(30), torch.arange(30))
    search.search(queries, Summary(means, None), 2, None, ids)
    assert made == ([10, 41, 41] if index == "IVF" else [10, 41])


def test_banned_chunks_are_found_exactly(index: str, randn: Randn) -> None:
    queries, means = randn(2, 3, DIM), randn(2, 40, DIM, seed=2)
    mask = randn(2, 3, 40, seed=3) > 1.5
    search = FaissSearch(index, few=4)
    ids = torch.arange(2)
    for given in (None, mask):
        found = find(queries, Summary(means, None), 8, given, partial(search.search, env_ids=ids))
        expected = find(queries, Summary(means, None), 8, given)
        order, expected_order = found[0].argsort(-1), expected[0].argsort(-1)
        for ours, theirs in zip(found, expected, strict=True):
            same = ours.gather(2, order), theirs.gather(2, expected_order)
            torch.testing.assert_close(*same, atol=1e-12, rtol=0.0)


def test_gradients_pass(
    device: torch.device, index: str, make_attention: Make, randn: Randn
) -> None:
    results = []
    for search in (FaissSearch(index, few=4), None):
        store = new_store(device=device, search=search)
        store.append(randn(3, 40, DIM))
        queries, module = randn(3, 2, DIM, seed=2).requires_grad_(), make_attention()
        store.attend(module, queries).square().sum().backward()
        results.append([queries.grad, *(x.grad for x in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0.0)


def recall(search: FaissSearch, width: int, j: int) -> float:
    """Of the 8 best of j random means of equal norm, the part that is found."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(1, 50, width, generator=generator)
    means = torch.nn.functional.normalize(torch.randn(1, j, width, generator=generator), dim=-1)
    found = search.search(queries, Summary(means, None), 8, None, torch.arange(1))
    assert found.unique(dim=-1).shape == found.shape
    exact = find(queries, Summary(means, None), 8)[0]
    return float((found[..., None] == exact[..., None, :]).any(-1).float().mean())


def test_the_default_finds_most() -> None:
    """Also where it is hard: no structure, and much more width than chunks can fill."""
    pytest.importorskip("faiss")
    assert recall(FaissSearch(), 128, 16_000) > 0.9


def test_parameters_are_used() -> None:
    """More thorough finds more; each kind of index has its own."""
    pytest.importorskip("faiss")
    for index, name in (("HNSW32", "efSearch"), ("IVF64,Flat", "nprobe")):
        few, many = (FaissSearch(index, parameters=f"{name}={n}") for n in (4, 60))
        assert recall(few, 32, 5000) + 0.1 < recall(many, 32, 5000)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"few": 0}, ValueError, "few must be at least 1, got 0"),
        ({"few": 0.5}, TypeError, "few must be an integer, got 0.5"),
        ({"index": 3}, TypeError, "index and parameters must be str, got 3 and None"),
        ({"parameters": 3}, TypeError, "index and parameters must be str, got .* and 3"),
    ],
)
def test_wrong_arguments(
    index: str, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        FaissSearch(**({"index": index} | arguments))


def test_what_faiss_does_not_know() -> None:
    """Known before there are any chunks, but where it is up to their width."""
    pytest.importorskip("faiss")
    for index, parameters in (("HNSV", None), ("HNSW32", "nprobe=3"), ("Flat", "much")):
        message = f"faiss can make no index '{index}' of width 64 with parameters"
        with pytest.raises(ValueError, match=message):
            FaissSearch(index, parameters=parameters)
    search = FaissSearch("PQ11", few=1)
    with pytest.raises(ValueError, match="faiss can make no index 'PQ11' of width 8"):
        recall(search, 8, 400)


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install htm-pytorch\[faiss\]"):
        FaissSearch()
