"""Attending to a store equals calling the module on all tokens that it should hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import CHUNK, DIM, ENVIRONMENTS, Memories, draw, make_module, new_store
from torch import Tensor

from htm_pytorch import HTMAttention, HTMBlock, MemoryStore, storage
from htm_pytorch.retrieval import Summary
from shared_core.testing import Randn

if TYPE_CHECKING:
    from conftest import Make


some_ids = st.permutations(range(ENVIRONMENTS)).flatmap(
    lambda ids: st.integers(1, ENVIRONMENTS).map(lambda n: ids[:n])
)
steps = st.one_of(
    st.tuples(st.just("append"), some_ids, st.integers(0, 4)),
    st.tuples(st.just("append"), some_ids, st.integers(0, 25)),
    st.tuples(st.just("reset"), some_ids, st.just(0)),
    st.tuples(st.just("attend"), some_ids, st.integers(0, 3)),
)
capacities = st.sampled_from([None, CHUNK, 2 * CHUNK, 5 * CHUNK])


def assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], atol: float) -> None:
    out, indices, weights = ours
    torch.testing.assert_close(out, theirs[0], atol=atol, rtol=0.0)
    assert torch.equal(indices, theirs[1])
    torch.testing.assert_close(weights, theirs[2], atol=atol, rtol=0.0)


@given(
    plan=st.lists(steps, min_size=1, max_size=10),
    capacity=capacities,
    block=st.booleans(),
    banned=st.booleans(),
    k=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_equals_the_module(
    device: torch.device,
    impl: str,
    plan: list[tuple[str, list[int], int]],
    capacity: int | None,
    block: bool,
    banned: bool,
    k: int,
    seed: int,
) -> None:
    """Whatever was appended, forgotten and reset before."""
    generator = torch.Generator().manual_seed(seed)
    cls = HTMBlock if block else HTMAttention
    module = make_module(cls, device, impl=impl, topk_mems=k)
    store, memories = new_store(device=device, capacity=capacity), Memories(capacity)
    for action, env_ids, number in [*plan, ("attend", list(range(ENVIRONMENTS)), 2)]:
        if action == "append":
            tokens = draw(generator, len(env_ids), number, DIM)
            store.append(tokens.to(device), env_ids)
            memories.append(tokens, env_ids)
        elif action == "reset":
            store.reset(torch.tensor(env_ids, device=device))
            memories.reset(env_ids)
        else:
            queries = draw(generator, len(env_ids), number, DIM).to(device)
            mask = None
            if banned:
                j = -(-memories.padded(env_ids, queries)[0].shape[1] // CHUNK)
                shape = (len(env_ids), number, j)
                mask = (torch.rand(shape, generator=generator) < 0.6).to(device)
            found = store.attend(
                module,
                queries,
                env_ids=env_ids,
                chunk_attn_mask=mask,
                return_indices=True,
                return_weights=True,
            )
            assert isinstance(found, tuple)
            assert_close(found, memories.attend(module, queries, env_ids, mask), 1e-12)
    assert memories.same(store)


def fill(store: MemoryStore, memories: Any, randn: Randn) -> None:
    """Memories of 17, 4 and 10 tokens, in pieces."""
    for seed, (env_id, t) in enumerate([(0, 4), (2, 10), (0, 1), (1, 4), (0, 12)]):
        tokens = randn(1, t, DIM, seed=seed + 10)
        store.append(tokens, [env_id])
        memories.append(tokens, [env_id])


@pytest.mark.parametrize("options", [(False, False), (True, False), (False, True), (True, True)])
def test_returns_what_is_asked_for(
    device: torch.device, make_attention: Make, randn: Randn, options: tuple[bool, bool]
) -> None:
    store, memories = new_store(device=device), Memories()
    fill(store, memories, randn)
    queries = randn(3, 2, DIM)
    found = store.attend(
        make_attention(), queries, return_indices=options[0], return_weights=options[1]
    )
    expected = memories.attend(make_attention(), queries, [0, 1, 2])
    wanted = [x for x, is_wanted in zip(expected, (True, *options), strict=True) if is_wanted]
    parts = found if isinstance(found, tuple) else (found,)
    assert isinstance(found, tuple) == any(options)
    for ours, theirs in zip(parts, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits(
    device: torch.device, make_attention: Make, randn: Randn, dtype: torch.dtype
) -> None:
    """Equals the module on rounded tokens, and not on those that were given."""
    store, rounded, exact = new_store(device=device, dtype=dtype), Memories(dtype=dtype), Memories()
    fill(store, rounded, randn)
    fill(new_store(device=device), exact, randn)
    module = make_attention().float()
    queries = randn(3, 2, DIM, dtype=torch.float32)
    found = store.attend(module, queries, return_indices=True, return_weights=True)
    assert isinstance(found, tuple)
    assert_close(found, rounded.attend(module, queries, [0, 1, 2]), 2e-6)
    assert not torch.allclose(found[0], exact.attend(module, queries, [0, 1, 2])[0], atol=1e-5)
    module.to(dtype)
    out = store.attend(module, queries.to(dtype))
    assert isinstance(out, Tensor)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), found[0], atol=0.1, rtol=0.1)


def test_weights_may_change(device: torch.device, make_attention: Make, randn: Randn) -> None:
    """Nothing in a store depends on them."""
    store, memories = new_store(device=device), Memories()
    fill(store, memories, randn)
    module, queries = make_attention(), randn(3, 2, DIM)
    before = store.attend(module, queries)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-1.5)
    after = store.attend(module, queries)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    assert not torch.allclose(before, after)
    expected = memories.attend(module, queries, [0, 1, 2])[0]
    torch.testing.assert_close(after, expected, atol=1e-12, rtol=0.0)


def test_gradients_wait_for_later_tokens(
    device: torch.device, make_block: Make, randn: Randn, impl: str
) -> None:
    """Attend, append, attend, and differentiate both: as two calls on what was there."""
    results = []
    for stored in (True, False):
        module = make_block(impl=impl)
        store, memories = new_store(device=device), Memories()
        queries = randn(3, 2, DIM).requires_grad_()
        loss = queries.new_zeros(())
        for seed in range(4):
            tokens = randn(3, 2, DIM, seed=seed + 20).requires_grad_()
            store.append(tokens)
            memories.append(tokens.detach(), [0, 1, 2])
            out = store.attend(module, queries) if stored else None
            out = memories.attend(module, queries, [0, 1, 2])[0] if out is None else out
            assert isinstance(out, Tensor)
            loss = loss + (out * randn(3, 2, DIM, seed=seed + 30)).sum()
        loss.backward()
        results.append([queries.grad, *(x.grad for x in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)


def test_inference_mode(device: torch.device, make_attention: Make, randn: Randn) -> None:
    """A store made and filled there may be trained on, and the other way round."""
    memories = Memories()
    with torch.inference_mode():
        store = new_store(device=device)
        fill(store, memories, randn)
    queries, module = randn(3, 2, DIM), make_attention()
    fill(store, memories, randn)
    out = store.attend(module, queries)
    assert isinstance(out, Tensor)
    out.sum().backward()
    with torch.inference_mode():
        fill(store, memories, randn)
        store.reset([1])
        memories.reset([1])
        out = store.attend(module, queries)
        assert isinstance(out, Tensor)
        expected = memories.attend(module, queries, [0, 1, 2])[0]
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0.0)


def test_nan_stays_where_it_is(device: torch.device, make_attention: Make, randn: Randn) -> None:
    """In another environment, and in chunks that hold something else now."""
    store, memories = new_store(device=device), Memories()
    store.append(torch.full((1, 7, DIM), torch.nan, device=device), [0])
    fill_ids, queries = [1, 2], randn(2, 2, DIM)
    tokens = randn(2, 5, DIM)
    store.append(tokens, fill_ids)
    memories.append(tokens, fill_ids)
    expected = memories.attend(make_attention(), queries, fill_ids)[0]
    for _ in range(2):
        found = store.attend(make_attention(), queries, env_ids=fill_ids)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)
        store.reset([0])
        store.append(tokens[:1], [0])
        found = store.attend(make_attention(), queries[:1], env_ids=[0])
        torch.testing.assert_close(found, expected[:1], atol=1e-12, rtol=0.0)


def test_an_empty_store_gives_zero(
    device: torch.device, make_attention: Make, randn: Randn
) -> None:
    store = new_store(device=device)
    module = make_attention()
    found = store.attend(module, randn(3, 2, DIM), return_indices=True, return_weights=True)
    assert [tuple(x.shape) for x in found] == [(3, 2, DIM), (3, 2, 0), (3, 2, 0)]
    assert found[0].eq(0.0).all()
    found[0].sum().backward()
    assert all(x.grad is not None and x.grad.eq(0.0).all() for x in module.parameters())


@pytest.mark.parametrize("capacity", [None, 8 * CHUNK])
def test_growth_is_rare(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    randn: Randn,
    capacity: int | None,
) -> None:
    """Room doubles, up to what an environment may hold."""
    sizes = []
    grow = storage.Pool._grow

    def noted(self: storage.Pool, least: int) -> None:
        grow(self, least)
        sizes.append(len(self.tokens))

    monkeypatch.setattr(storage.Pool, "_grow", noted)
    store = new_store(device=device, environments=1, capacity=capacity)
    for _ in range(400):
        store.append(randn(1, 1, DIM))
    assert sizes == ([1, 2, 4, 8, 16, 32, 64, 128, 256] if capacity is None else [1, 2, 4, 8, 9])


def test_beyond_the_capacity_room_grows_by_a_quarter(device: torch.device, randn: Randn) -> None:
    """By what one append brings, which is written before anything is forgotten."""
    store = new_store(device=device, environments=2, capacity=40 * CHUNK)
    store.append(randn(2, 40 * CHUNK, DIM))
    pool = store._layout.pool
    assert len(pool.tokens) == 80
    store.append(randn(2, 1, DIM))
    assert len(pool.tokens) == 82
    store.append(randn(2, 5 * CHUNK - 1, DIM))
    assert len(pool.tokens) == 102
    for seed in range(5):
        store.append(randn(2, 10 * CHUNK, DIM, seed=seed))
    assert len(pool.tokens) == 102


def test_columns_grow_by_half(device: torch.device, randn: Randn) -> None:
    """Up to what an environment may hold."""
    store, widths = new_store(device=device, environments=2, capacity=10 * CHUNK), []
    for _ in range(12):
        store.append(randn(1, CHUNK, DIM), [1])
        widths.append(store._layout.means.shape[1])
        assert store._layout.table.shape == (2, widths[-1])
    assert widths == [1, 2, 3, 4, 6, 6, 9, 9, 9, 10, 10, 10]


@pytest.mark.parametrize("env_ids", [[0, 1, 2], [1, 2], [1], [2, 1], [0, 2]])
def test_neighbours_are_looked_at_in_place(
    device: torch.device, randn: Randn, env_ids: list[int]
) -> None:
    """Means of environments that follow each other are not copied."""
    store, memories = new_store(device=device), Memories()
    fill(store, memories, randn)
    view = store._layout.view(torch.tensor(env_ids))
    expected = store._layout.means[env_ids][:, : view.means.shape[1]]
    torch.testing.assert_close(view.means, expected, atol=0.0, rtol=0.0, equal_nan=True)
    same = view.means.untyped_storage().data_ptr() == store._layout.means.data_ptr()
    assert same == (env_ids == sorted(env_ids) and env_ids != [0, 2])


@pytest.mark.parametrize("wrap", ["none", "whole", "inside"])
def test_compiled_modules(
    device: torch.device, make_block: Make, make_attention: Make, randn: Randn, wrap: str
) -> None:
    """What is inside of them attends."""
    store = new_store(device=device)
    fill(store, Memories(), randn)
    queries = randn(3, 2, DIM)
    for make in (make_block, make_attention):
        expected, module = store.attend(make(), queries), make()
        if wrap == "inside" and make is make_block:
            module.attn = torch.compile(module.attn, backend="eager")
        elif wrap == "whole":
            module = torch.compile(module, backend="eager")
        torch.testing.assert_close(store.attend(module, queries), expected, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("make", [torch.nn.Sequential, lambda x: [x], lambda x: x.attn.attn])
def test_other_modules(
    device: torch.device, make_block: Make, randn: Randn, make: Callable[[Any], Any]
) -> None:
    module = make(make_block())
    message = f"module must be an HTMAttention or HTMBlock, got {type(module).__name__}; of one"
    with pytest.raises(TypeError, match=message):
        new_store(device=device).attend(module, randn(3, 2, DIM))


def test_moves(device: torch.device, make_attention: Make, randn: Randn) -> None:
    store, memories = new_store(), Memories()
    fill(store, memories, randn)
    assert store.to(device) is store
    assert store.device == device
    fill(store, memories, randn)
    assert memories.same(store)
    found = store.attend(make_attention(), randn(3, 2, DIM))
    expected = memories.attend(make_attention(), randn(3, 2, DIM), [0, 1, 2])[0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)


class Forgetful:
    """Finds the chunks of even numbers alone, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[list[int], list[int]]] = []

    def search(
        self, queries: Tensor, summary: Summary, k: int, chunk_mask: Tensor | None, env_ids: Tensor
    ) -> Tensor:
        assert chunk_mask is None
        assert env_ids.tolist() == [2, 0]
        j = summary.means.shape[1]
        chunks = torch.arange(0, 2 * k, 2, device=queries.device)
        chunks = chunks.masked_fill(chunks >= j, -1)
        return chunks.expand(*queries.shape[:2], k)

    def changed(self, env_ids: Tensor, chunks: Tensor) -> None:
        self.told.append((env_ids.tolist(), chunks.tolist()))


def test_another_search(device: torch.device, make_attention: Make, randn: Randn) -> None:
    """As if the chunks that it does not find were banned; it is told of every change."""
    forgetful = Forgetful()
    store, memories = new_store(device=device, search=forgetful, capacity=18), Memories(18)
    fill(store, memories, randn)
    module, queries = make_attention(topk_mems=3), randn(2, 2, DIM)
    found = store.attend(module, queries, env_ids=[2, 0], return_indices=True, return_weights=True)
    assert isinstance(found, tuple)
    even = torch.arange(6, device=device).remainder(2).eq(0).expand(2, 2, 6)
    out, indices, weights = memories.attend(module, queries, [2, 0], even)
    torch.testing.assert_close(found[0], out, atol=1e-12, rtol=0.0)
    # In no order that the search has promised.
    assert torch.equal(found[1].sort(-1).values, indices.sort(-1).values)
    torch.testing.assert_close(found[2].sort(-1).values, weights.sort(-1).values)
    store.append(randn(1, 3, DIM), [0])
    store.reset([1])
    assert forgetful.told == [
        ([0, 0], [0, 1]),
        ([2, 2, 2, 2], [0, 1, 2, 3]),
        ([0], [1]),
        ([1, 1], [0, 1]),
        ([0, 0, 0, 0, 0], [1, 2, 3, 4, 5]),
        ([0, 0], [5, 0]),
        ([1, 1], [0, 1]),
    ]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"environments": 0}, ValueError, "environments must be at least 1, got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer, got 2.0"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": 7}, ValueError, "capacity must be a multiple of 3, got 7"),
        ({"dtype": torch.int64}, ValueError, "dtype must be one of float64, .*, got torch.int64"),
        ({"path": "x", "device": "meta"}, ValueError, "with a path is on the CPU, got device meta"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        MemoryStore(DIM, **({"chunk_size": CHUNK} | settings))


@pytest.mark.parametrize(
    ("tokens", "env_ids", "kind", "message"),
    [
        (torch.zeros(3, 2, 5), None, ValueError, r"tokens must be \(b, n, 6\), got .*\(3, 2, 5\)"),
        (torch.zeros(2, 6), None, ValueError, r"tokens must be \(b, n, 6\), got shape \(2, 6\)"),
        (torch.zeros(3, 2, 6).long(), None, TypeError, "tokens must be floating point, got .*64"),
        (torch.zeros(2, 2, 6), None, ValueError, "tokens must be of 3 environments, got 2"),
        (torch.zeros(2, 2, 6), [1], ValueError, "tokens must be of 1 environments, got 2"),
        (torch.zeros(1, 2, 6), [3], ValueError, r"env_ids must be from 0 to 2, got \[3\]"),
        (torch.zeros(1, 2, 6), [-1], ValueError, r"env_ids must be from 0 to 2, got \[-1\]"),
        (torch.zeros(2, 2, 6), [1, 1], ValueError, r"env_ids must be different, got \[1, 1\]"),
        (torch.zeros(1, 2, 6), [0.5], TypeError, r"env_ids must be integers in one row, .*0.5"),
        (torch.zeros(3, 2, 6), [True, False, True], TypeError, "integers in one row, got .True"),
        (torch.zeros(1, 2, 6), [[0]], TypeError, r"env_ids must be integers in one row, .*\[0\]"),
    ],
)
def test_wrong_appends(
    device: torch.device,
    randn: Randn,
    tokens: Tensor,
    env_ids: Any,
    kind: type[Exception],
    message: str,
) -> None:
    """The store is unchanged."""
    store, memories = new_store(device=device), Memories()
    fill(store, memories, randn)
    with pytest.raises(kind, match=message):
        store.append(tokens.to(device), env_ids)
    assert memories.same(store)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"queries": torch.zeros(3, 2, 5)}, ValueError, r"queries must be \(b, n, 6\), got shape"),
        ({"queries": torch.zeros(2, 2, 6)}, ValueError, "queries must be of 3 environments, got 2"),
        ({"queries": torch.zeros(3, 2, 6).to("meta")}, ValueError, "queries must be on .*, got me"),
        ({"module": {"dim": 4}}, ValueError, "the module must be of dim 6, got 4"),
        ({"module": {"mem_chunk_size": 4}}, ValueError, "the module must have chunks of 3, got 4"),
        ({"module": {"legacy": True}}, ValueError, "a module with legacy=True in front"),
        ({"mask": torch.zeros(3, 2, 5) > 0}, ValueError, r"chunk_attn_mask must be \(3, 2, 6\)"),
        ({"mask": torch.zeros(3, 2, 6)}, TypeError, "chunk_attn_mask must be boolean, got .*32"),
        ({"env_ids": [0, 3, 1]}, ValueError, "env_ids must be from 0 to 2, got "),
    ],
)
def test_wrong_questions(
    device: torch.device,
    make_attention: Make,
    randn: Randn,
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    store = new_store(device=device)
    fill(store, Memories(), randn)
    module = make_attention(**changes.get("module", {})).float()
    queries = changes.get("queries", torch.zeros(3, 2, 6))
    queries = queries if queries.device.type == "meta" else queries.to(device)
    mask = changes.get("mask")
    with pytest.raises(kind, match=message):
        store.attend(
            module,
            queries,
            env_ids=changes.get("env_ids"),
            chunk_attn_mask=mask if mask is None else mask.to(device),
        )


def test_a_closed_store(device: torch.device, make_attention: Make, randn: Randn) -> None:
    with new_store(device=device) as store:
        fill(store, Memories(), randn)
    store.close()
    for use in (
        lambda: store.append(randn(3, 2, DIM)),
        lambda: store.attend(make_attention(), randn(3, 2, DIM)),
        lambda: store.tokens(0),
        lambda: store.lengths,
        lambda: store.save("x"),
        lambda: store.to("cpu"),
        store.reset,
        store.flush,
        store.__enter__,
    ):
        with pytest.raises(ValueError, match="the store is closed"):
            use()


@settings(max_examples=10)
@given(t=st.integers(1, 40), capacity=capacities)
def test_one_by_one_equals_at_once(device: torch.device, t: int, capacity: int | None) -> None:
    tokens = draw(torch.Generator().manual_seed(t), 3, t, DIM).to(device)
    whole, pieces = (new_store(device=device, capacity=capacity) for _ in range(2))
    whole.append(tokens)
    for token in tokens.split(1, 1):
        pieces.append(token)
    memories = Memories(capacity)
    memories.append(tokens, [0, 1, 2])
    for store in (whole, pieces):
        assert memories.same(store)
