"""What fails, at whatever step, leaves a store as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from memories import CHUNK, DIM, Memories, make_module, new_store
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import htm_pytorch
from htm_pytorch import HTMAttention, MemoryStore, mapped, storage
from shared_core.testing import Randn

CAPACITY = 2 * CHUNK
# Each step takes half a minute in all, which is for the night.
strides = pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
SOURCES = str(Path(htm_pytorch.__file__).parent)
POOLS = (storage.__file__, mapped.__file__)


class Fails(TorchDispatchMode):
    """An allocation that fails: that of the operation of number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0 and self.left > -2:
            raise MemoryError
        return func(*args, **(kwargs or {}))


class Interrupts:
    """A key pressed while line `at` of the sources is about to run, or a function has ended."""

    def __init__(self, at: int, *sources: str) -> None:
        self.left = at
        self.sources = sources or (SOURCES,)

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.sources):
            return None
        if event in ("line", "return"):
            self.left -= 1
            if self.left == -1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._line)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def append(t: int, env_ids: list[int]) -> Callable[[Any, Randn], None]:
    def act(on: Any, randn: Randn) -> None:
        on.append(randn(len(env_ids), t, DIM, seed=t), env_ids)

    return act


ACTIONS: dict[str, Callable[[Any, Randn], None]] = {
    "a token more in a chunk": append(1, [1]),
    "a chunk for another": append(1, [0, 2]),
    "some tokens": append(4, [2, 1]),
    "all tokens": append(40, [0, 1, 2]),
    "reset": lambda on, _: on.reset([0, 1]),
}


def worn_store(randn: Randn, **settings: Any) -> tuple[MemoryStore, Any]:
    """Full, full but for the last chunk, and full; places given back are in use again."""
    store, held = new_store(capacity=CAPACITY, **settings), Memories(CAPACITY)
    for on in (store, held):
        on.append(randn(3, 5, DIM), [0, 1, 2])
        on.reset([0])
        for env_id, t in enumerate((CAPACITY, 2, 3 * CHUNK - 5)):
            on.append(randn(1, t, DIM, seed=env_id), [env_id])
        on.append(randn(2, CHUNK, DIM, seed=7), [0, 2])
    return store, held


def assert_answers(store: MemoryStore, module: Any, held: Any) -> None:
    device = store.device
    queries = torch.linspace(-1.0, 1.0, 18, dtype=torch.float64, device=device).reshape(3, 1, DIM)
    found = store.attend(module, queries)
    expected = held.attend(module, queries, [0, 1, 2])[0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)


def lost(store: MemoryStore) -> int:
    """Places that nobody has; raises where one is another's, too."""
    layout = store._layout
    pool = layout.pool
    there = [layout.table[layout.table >= 0].cpu(), pool.room.free, pool.room.pending]
    there += [x.places for x in (*pool._released, *pool._held)]
    places = torch.cat(there)
    assert len(places.unique()) == len(places)
    assert bool((places < pool.room.used).all())
    return pool.room.used - len(places)


@strides
@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("failure", [Fails, Interrupts])
def test_at_any_step(
    device: torch.device,
    tmp_path: Path,
    randn: Randn,
    failure: Any,
    name: str,
    in_files: bool,
    stride: int,
) -> None:
    """All of it was done, or nothing; what comes after finds a store in order."""
    if in_files and device.type != "cpu":
        pytest.skip("files are on the CPU")
    act, step, failed = ACTIONS[name], 0, True
    module = make_module(HTMAttention, device, topk_mems=3)
    while failed:
        settings = {"path": tmp_path / str(step)} if in_files else {"device": device}
        store, before = worn_store(randn, **settings)
        after = before.copy()
        act(after, randn)
        failed = False
        # Drawn before: its own operations are not to fail.
        cached = _Drawn(randn)
        act(_Nothing(), cached)
        try:
            with failure(step):
                act(store, cached)
        except (MemoryError, KeyboardInterrupt):
            failed = True
        done = after.same(store) and not before.same(store)
        assert done or before.same(store)
        if failure is Fails:
            assert done is not failed
            assert lost(store) == 0
        else:
            # A key that is pressed when all has been done comes too late.
            assert done or failed
            lost(store)
        if not done:
            assert_answers(store, module, before)
            act(store, randn)
        assert after.same(store)
        other = append(CHUNK + 1, [0, 1, 2])
        other(store, randn)
        other(after, randn)
        assert after.same(store)
        assert_answers(store, module, after)
        store.close()
        step += stride
    assert step > 2 * stride


@strides
@pytest.mark.parametrize("failure", [Fails, Interrupts])
def test_graphs_at_any_step(device: torch.device, randn: Randn, failure: Any, stride: int) -> None:
    """What a graph reads stays as it was, and is given back when the graph has ended."""
    module = make_module(HTMAttention, device)
    queries = randn(3, 2, DIM).requires_grad_()

    def attend(store: MemoryStore) -> Tensor:
        return store.attend(module, queries)

    def gradient(out: Tensor) -> Tensor:
        return torch.autograd.grad(out.sum(), queries, retain_graph=True)[0]

    def graph(store: MemoryStore) -> tuple[Tensor, Tensor]:
        out = attend(store)
        return out, gradient(out)

    step, failed = 0, True
    while failed:
        store, _ = worn_store(randn, device=device)
        kept, ends, failed = [graph(store)], attend(store), False
        tokens = [randn(3, CHUNK, DIM, seed=seed) for seed in range(4)]
        store.append(tokens[0])
        kept.append(graph(store))
        store.append(tokens[1])
        del ends
        try:
            with failure(step):
                attend(store)
                store.append(tokens[2])
                store.reset([0])
        except (MemoryError, KeyboardInterrupt):
            failed = True
        for _ in range(3):
            store.append(tokens[3])
            lost(store)
        for out, expected in kept:
            torch.testing.assert_close(gradient(out), expected, atol=0.0, rtol=0.0)
        del out
        kept.clear()
        pool = store._layout.pool
        pool.collect()
        assert pool.leases.live() == []
        assert pool._held == []
        if failure is Fails:
            assert lost(store) == 0
        step += stride
    assert step > 2 * stride


@pytest.mark.parametrize("in_files", [False, True])
def test_growing_by_less_than_was_interrupted(
    device: torch.device, tmp_path: Path, randn: Randn, in_files: bool
) -> None:
    """What an interrupt leaves of a pool that grows does for any growth that follows."""
    if in_files and device.type != "cpu":
        pytest.skip("files are on the CPU")
    step, interrupted = 0, True
    while interrupted:
        settings = {"path": tmp_path / str(step)} if in_files else {"device": device}
        store, held, interrupted = new_store(**settings), Memories(), False
        for on in (store, held):
            on.append(randn(3, CHUNK, DIM), [0, 1, 2])
        try:
            with Interrupts(step, *POOLS):
                store.append(randn(3, 9 * CHUNK, DIM))
        except KeyboardInterrupt:
            interrupted = True
        if not held.same(store):
            held.append(randn(3, 9 * CHUNK, DIM), [0, 1, 2])
        for chunks in (1, 5, 40):
            for on in (store, held):
                on.append(randn(1, chunks * CHUNK, DIM, seed=chunks), [1])
            if in_files:
                store.flush()
            lost(store)
            assert held.same(store)
        store.close()
        step += 1
    assert step > 2


class _Drawn:
    """Numbers that have been drawn."""

    def __init__(self, randn: Randn) -> None:
        self._randn = randn
        self._drawn: dict[Any, Tensor] = {}

    def __call__(self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        if (shape, seed) not in self._drawn:
            self._drawn[shape, seed] = self._randn(*shape, seed=seed, dtype=dtype)
        return self._drawn[shape, seed]


class _Nothing:
    def append(self, *_: object) -> None:
        pass

    def reset(self, *_: object) -> None:
        pass


class Refuses:
    """A search that cannot be told."""

    def search(self, *_: object) -> Any:
        raise AssertionError

    def changed(self, *_: object) -> None:
        raise OSError("gone")


def test_a_search_that_fails(device: torch.device, randn: Randn) -> None:
    store = new_store(device=device, search=Refuses())
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            store.append(randn(3, 2, DIM))
    assert Memories().same(store)
    assert lost(store) == 0


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failed_move_changes_nothing(device: torch.device, randn: Randn, at: int) -> None:
    """Of the three parts of a store all are moved, or none."""
    store, held = worn_store(randn, device=device)
    before = [store._layout.pool.tokens, store._layout.table, store._layout.means]
    # The copies alone, which are one operation each.
    with pytest.raises((MemoryError, NotImplementedError)), Fails(at):
        store.to("meta")
    now = [store._layout.pool.tokens, store._layout.table, store._layout.means]
    assert all(x is y for x, y in zip(before, now, strict=True))
    assert store.device == device
    assert held.same(store)


def test_numbers_that_float16_cannot_hold(device: torch.device, randn: Randn) -> None:
    """Refused, where they were finite; other types round."""
    store = new_store(device=device, dtype=torch.float16)
    tokens = randn(3, 2, DIM)
    store.append(tokens)
    tokens[0, 0, 0], tokens[2, 1, 3] = 1e5, -7e4
    message = r"within 65504 of zero to be stored in torch.float16, got 2 that are not"
    with pytest.raises(ValueError, match=message):
        store.append(tokens)
    assert store.lengths.tolist() == [2, 2, 2]
    tokens[0, 0, 0], tokens[2, 1, 3] = torch.inf, torch.nan
    store.append(tokens)
    assert store.lengths.tolist() == [4, 4, 4]
    assert store.tokens(0)[2, 0].isinf()


@pytest.mark.parametrize("value", [[[[0.0] * DIM]], None, 3.0])
def test_no_tensors(device: torch.device, value: Any) -> None:
    store = new_store(device=device)
    name = type(value).__name__
    module = make_module(HTMAttention, device)
    with pytest.raises(TypeError, match=f"tokens must be a tensor, got {name}"):
        store.append(value)
    with pytest.raises(TypeError, match=f"queries must be a tensor, got {name}"):
        store.attend(module, value)
    queries = torch.zeros(3, 1, DIM, dtype=torch.float64, device=device)
    if value is not None:
        with pytest.raises(
            TypeError, match=f"chunk_attn_mask must be a boolean tensor, got {name}"
        ):
            store.attend(module, queries, chunk_attn_mask=value)
        with pytest.raises(TypeError, match=f"mask must be a boolean tensor, got {name}"):
            module(queries, queries, value)
