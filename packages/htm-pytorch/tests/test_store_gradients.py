"""Gradients through a store, whatever happens to it between an `attend` and its backward pass."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import CHUNK, DIM, ENVIRONMENTS, Memories, draw, make_module, new_store
from torch import Tensor

from htm_pytorch import HTMAttention, HTMBlock, MemoryStore
from shared_core.testing import Randn

if TYPE_CHECKING:
    from conftest import Make

CAPACITY = 2 * CHUNK
ALL = list(range(ENVIRONMENTS))

plans = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 4, 9])),
        st.tuples(st.just("attend"), st.integers(1, 2)),
        st.tuples(st.just("reset"), st.sampled_from(ALL)),
        st.tuples(st.just("flush"), st.just(0)),
        st.tuples(st.just("backward"), st.just(0)),
    ),
    max_size=20,
)


def rollout(
    plan: list[tuple[str, int]],
    module: Any,
    queries: Tensor,
    *,
    store: MemoryStore | None,
    seed: int,
) -> list[Tensor | None]:
    """Gradients of a sum over all that was found, in a store or else in plain tensors."""
    generator, losses = torch.Generator().manual_seed(seed), []
    held = Memories(CAPACITY)
    for action, number in [("append", 2), ("attend", 2), *plan, ("attend", 1), ("backward", 0)]:
        if action == "append":
            tokens = draw(generator, ENVIRONMENTS, number, DIM).to(queries.device)
            held.append(tokens, ALL)
            if store is not None:
                store.append(tokens)
        elif action == "reset":
            held.reset([number])
            if store is not None:
                store.reset([number])
        elif action == "attend":
            asking = queries[:, :number]
            if store is None:
                out = held.attend(module, asking, ALL)[0]
            else:
                out = store.attend(module, asking)
            losses.append((out * draw(generator, *out.shape).to(out.device)).sum())
        elif action == "flush" and store is not None:
            store.flush()
        elif action == "backward" and losses:
            torch.stack(losses).sum().backward()
            losses = []
    return [queries.grad, *(x.grad for x in module.parameters())]


@settings(max_examples=60)
@given(plan=plans, in_files=st.booleans(), block=st.booleans(), seed=st.integers(0, 2**16))
def test_equal_those_of_the_module(
    device: torch.device,
    tmp_path_factory: pytest.TempPathFactory,
    impl: str,
    plan: list[tuple[str, int]],
    in_files: bool,
    block: bool,
    seed: int,
) -> None:
    """Through evictions, resets, growth, and flushes of a folder."""
    if in_files and device.type == "cpu":
        given = {"path": tmp_path_factory.mktemp("stores") / "store"}
    else:
        given = {"device": device}
    results = []
    with new_store(capacity=CAPACITY, **given) as store:
        for used in (store, None):
            module = make_module(HTMBlock if block else HTMAttention, device, impl=impl)
            queries = torch.linspace(-1.0, 1.0, 36, dtype=torch.float64, device=device)
            queries = queries.reshape(3, 2, DIM).requires_grad_()
            results.append(rollout(plan, module, queries, store=used, seed=seed))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0.0)


def full_store(randn: Randn, **changes: Any) -> MemoryStore:
    store: MemoryStore = new_store(capacity=CAPACITY, **changes)
    store.append(randn(3, CAPACITY, DIM))
    return store


def overwrite(store: MemoryStore, randn: Randn) -> None:
    """Everything that was held, more than once, and reads nothing of it."""
    for seed in range(4 * CAPACITY):
        store.append(randn(3, 1, DIM, seed=seed))
    store.reset()
    store.append(randn(3, CAPACITY, DIM, seed=99))


def places(store: MemoryStore) -> int:
    return store._layout.pool.room.used


def fresh(device: torch.device, randn: Randn, **changes: Any) -> tuple[MemoryStore, Any, Tensor]:
    """A full store, an attention, and queries with gradients."""
    module = make_module(HTMAttention, device)
    return full_store(randn, device=device, **changes), module, randn(3, 2, DIM).requires_grad_()


def test_two_backward_passes(device: torch.device, randn: Randn) -> None:
    store, module, queries = fresh(device, randn)
    out = store.attend(module, queries)
    assert isinstance(out, Tensor)
    expected = torch.autograd.grad(out.sum(), queries, retain_graph=True)
    for _ in range(2):
        overwrite(store, randn)
        found = torch.autograd.grad(out.sum(), queries, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=0.0, rtol=0.0)


def test_gradients_of_gradients(device: torch.device, randn: Randn) -> None:
    """Those need the tokens, too, when the first graph is no more."""
    results = []
    for overwritten in (False, True):
        store, module, queries = fresh(device, randn)
        out = store.attend(module, queries)
        assert isinstance(out, Tensor)
        (first,) = torch.autograd.grad(out.square().sum(), queries, create_graph=True)
        del out
        if overwritten:
            overwrite(store, randn)
        first.square().sum().backward()
        results.append([queries.grad, *(x.grad for x in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.0, rtol=0.0)


def ended_by_backward(store: MemoryStore, module: Any, queries: Tensor) -> Any:
    loss = store.attend(module, queries).sum()  # type: ignore[union-attr]
    loss.backward()
    return loss


def dropped(store: MemoryStore, module: Any, queries: Tensor) -> Any:
    store.attend(module, queries)


def without_gradients(store: MemoryStore, module: Any, queries: Tensor) -> Any:
    with torch.no_grad():
        return store.attend(module, queries)


def in_inference_mode(store: MemoryStore, module: Any, queries: Tensor) -> Any:
    with torch.inference_mode(), torch.enable_grad():
        return store.attend(module, queries.detach())


def of_frozen_weights(store: MemoryStore, module: Any, queries: Tensor) -> Any:
    module.requires_grad_(False)
    return store.attend(module, queries.detach())


@pytest.mark.parametrize(
    "use", [ended_by_backward, dropped, without_gradients, in_inference_mode, of_frozen_weights]
)
def test_nobody_waits(device: torch.device, randn: Randn, use: Callable[..., Any]) -> None:
    """Places are used again at once, even if what was computed is kept."""
    store, module, queries = fresh(device, randn)
    overwrite(store, randn)
    used, kept = places(store), []
    for _ in range(4):
        kept.append(use(store, module, queries))
        overwrite(store, randn)
    assert places(store) == used


def test_what_waits_is_bounded_by_what_was_forgotten(device: torch.device, randn: Randn) -> None:
    """And is used again after the backward pass."""
    store, module, queries = fresh(device, randn)
    before, sizes = places(store), []
    for _ in range(3):
        losses = []
        for step in range(10 * CHUNK):
            losses.append(store.attend(module, queries).sum())  # type: ignore[union-attr]
            store.append(randn(3, 1, DIM, seed=step))
        # A chunk of each environment every CHUNK steps, and the one that is begun.
        assert places(store) <= before + 3 * (10 + 1)
        torch.stack(losses).sum().backward()
        sizes.append(len(store._layout.pool.tokens))
    assert len(set(sizes)) == 1


def test_only_later_graphs_are_waited_for(device: torch.device, randn: Randn) -> None:
    """What was forgotten before an `attend` is free, though its graph is alive."""
    store, module, queries = fresh(device, randn)
    for seed in range(3):
        store.append(randn(3, CHUNK, DIM, seed=seed))
    used, graphs = places(store), []
    for seed in range(4):
        store.reset()
        # The last graph saw nothing of what the reset has forgotten.
        graphs = [store.attend(module, queries)]
        store.append(randn(3, CAPACITY, DIM, seed=seed))
    assert graphs
    assert places(store) <= used + 3


def test_a_graph_keeps_nothing_of_the_size_of_the_store(device: torch.device, randn: Randn) -> None:
    """But the tokens themselves, which are not copied."""
    sizes = []
    for t in (3 * CHUNK, 60 * CHUNK):
        store = new_store(device=device)
        store.append(randn(3, t, DIM))
        module, queries = make_module(HTMAttention, device), randn(3, 2, DIM)
        saved: list[int] = []
        tokens = store._layout.pool.tokens.untyped_storage().data_ptr()

        def pack(x: Tensor, saved: list[int] = saved, tokens: int = tokens) -> Tensor:
            saved.append(0 if x.untyped_storage().data_ptr() == tokens else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            store.attend(module, queries)
        assert 0 in saved
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1]


# torch's compiler looks at what is handed from one of its graphs to another.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_in_a_compiled_function(device: torch.device, impl: str, randn: Randn) -> None:
    """What its graphs keep is not overwritten either."""
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        module = make_module(HTMAttention, device, impl=impl)
        store, queries = full_store(randn, device=device), randn(3, 2, DIM).requires_grad_()

        def loss(x: Tensor, store: MemoryStore = store, module: Any = module) -> Tensor:
            out = store.attend(module, x.square())
            assert isinstance(out, Tensor)
            return out.square().sum()

        compute = torch.compile(loss, backend="aot_eager") if compiled else loss
        losses = []
        for seed in range(4):
            losses.append(compute(queries))
            store.append(randn(3, 4, DIM, seed=seed))
        torch.stack(losses).sum().backward()
        results.append([queries.grad, *(x.grad for x in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)


def test_no_gradients_through_a_closed_folder(tmp_path: Path, randn: Randn) -> None:
    """Another store may have written to it: an error, never a wrong number."""
    cpu = torch.device("cpu")
    module, queries = make_module(HTMAttention, cpu), randn(3, 2, DIM).cpu()
    queries.requires_grad_()
    with new_store(path=tmp_path / "store") as store:
        store.append(randn(3, 4, DIM))
        out = store.attend(module, queries)
        assert isinstance(out, Tensor)
        (first,) = torch.autograd.grad(out.square().sum(), queries, create_graph=True)
        for seed in range(3):
            store.append(randn(3, 40, DIM, seed=seed))
        store.attend(module, queries).sum().backward()  # type: ignore[union-attr]
    with MemoryStore.open(tmp_path / "store") as store:
        store.reset()
        store.flush()
        store.append(randn(3, 40, DIM, seed=5))
        with pytest.raises(ValueError, match="no gradients through a store with a path after it"):
            out.sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.sum().backward()
        # It is the closed one alone that they cannot pass.
        store.attend(module, queries).sum().backward()  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_gradients_through_a_folder_that_was_dropped(tmp_path: Path, randn: Randn) -> None:
    """Without being closed: its lock is gone all the same."""
    module, queries = make_module(HTMAttention, torch.device("cpu")), randn(3, 2, DIM)
    queries = queries.cpu().requires_grad_()
    store = new_store(path=tmp_path / "store")
    store.append(randn(3, 4, DIM))
    store.flush()
    out = store.attend(module, queries)
    del store
    gc.collect()
    with MemoryStore.open(tmp_path / "store") as other:
        other.reset()
        other.flush()
        other.append(randn(3, 40, DIM, seed=5))
        with pytest.raises(ValueError, match="no gradients through a store with a path after it"):
            out.sum().backward()


def test_an_old_graph_holds_back_only_what_it_may_have_seen(
    device: torch.device, randn: Randn
) -> None:
    store = new_store(capacity=CAPACITY, device=device)
    module = make_module(HTMAttention, device)
    queries = randn(3, 2, DIM).requires_grad_()
    store.append(randn(3, 2 * CHUNK, DIM))
    old = store.attend(module, queries)
    for seed in range(40):
        store.append(randn(3, CHUNK, DIM, seed=seed))
        # A graph of each step, which ends before the next.
        store.attend(module, queries)
    held = ENVIRONMENTS * CAPACITY // CHUNK
    # What the old one has seen, what is held, and what the last step has let go of.
    assert len(store._layout.pool.tokens) <= 4 * held
    assert store._layout.pool.room.used <= 3 * held
    old.sum().backward()


def test_attending_in_several_threads(device: torch.device, randn: Randn) -> None:
    """Each with its own graph, none of whose leases is lost."""
    store = new_store(capacity=CAPACITY, device=device)
    module = make_module(HTMAttention, device)
    store.append(randn(3, 2 * CHUNK, DIM))
    queries = randn(3, 2, DIM)
    with torch.no_grad():
        expected = store.attend(module, queries)

    def attend(_: int) -> list[Tensor]:
        return [store.attend(module, queries.clone().requires_grad_()) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        found = [out for outs in pool.map(attend, range(4)) for out in outs]
    leases = store._layout.pool.leases
    assert len(leases.live()) == 200
    assert all(torch.equal(out, expected) for out in found)
    del found
    gc.collect()
    assert leases.live() == []


def test_in_memory_gradients_pass_a_closed_store(device: torch.device, randn: Randn) -> None:
    store, module, queries = fresh(device, randn)
    out = store.attend(module, queries)
    assert isinstance(out, Tensor)
    (expected,) = torch.autograd.grad(out.sum(), queries, retain_graph=True)
    store.close()
    out.sum().backward()
    torch.testing.assert_close(queries.grad, expected, atol=0.0, rtol=0.0)


def test_a_copy_waits_for_nobody(device: torch.device, randn: Randn) -> None:
    store, module, queries = fresh(device, randn)
    out = store.attend(module, queries)
    overwrite(store, randn)
    other = copy.deepcopy(store)
    overwrite(other, randn)
    used = places(other)
    overwrite(other, randn)
    assert places(other) == used
    assert other._layout.pool._held == []
    assert isinstance(out, Tensor)
    out.sum().backward()


def test_memories_have_no_gradients(
    device: torch.device, make_attention: Make, randn: Randn
) -> None:
    """Whatever the module says of them."""
    store, queries = new_store(device=device), randn(3, 2, DIM).requires_grad_()
    tokens = randn(3, 4, DIM).requires_grad_()
    store.append(tokens)
    results = []
    for detach in (True, False):
        out = store.attend(make_attention(detach_memories=detach), queries)
        assert isinstance(out, Tensor)
        results.append(torch.autograd.grad(out.sum(), queries)[0])
    assert tokens.grad is None
    torch.testing.assert_close(*results, atol=0.0, rtol=0.0)
