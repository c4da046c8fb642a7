"""What is counted while a memory is read, and which slots are chosen by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from product_key_memory import PKM, MemoryPool, SlotStats, select_slots
from product_key_memory.stats import PoolStats

SLOTS = 6


def same(one: PoolStats, other: PoolStats) -> bool:
    return (
        one.batches == other.batches
        and torch.equal(one.counts, other.counts)
        and torch.equal(one.documents, other.documents)
        and torch.allclose(one.mass, other.mass, rtol=1e-12)
    )


def read(pool: MemoryPool, *batches: tuple[list[int], list[float]]) -> SlotStats:
    """Statistics of batches of one token each: its slots and their weights."""
    device = pool.weight.device
    with SlotStats(pool) as stats:
        for slots, weights in batches:
            pool(torch.tensor([slots], device=device), torch.tensor([weights], device=device))
    return stats


@st.composite
def batches(draw: st.DrawFn) -> list[list[tuple[int, float]]]:
    """Batches of (slot, weight), among them empty ones and weights of zero."""
    pair = st.tuples(st.integers(0, SLOTS - 1), st.sampled_from([0.0, -0.5, 0.25, 1.0, 3.0]))
    return draw(st.lists(st.lists(pair, max_size=8), max_size=5))


@given(batches())
def test_counts_what_a_plain_loop_counts(
    device: torch.device, drawn: list[list[tuple[int, float]]]
) -> None:
    pool = MemoryPool(SLOTS, 3, dtype=torch.float64).to(device)
    counts, documents, mass = [0] * SLOTS, [0] * SLOTS, [0.0] * SLOTS
    with SlotStats(pool) as stats:
        for batch in drawn:
            slots = torch.tensor([[slot] for slot, _ in batch], device=device).long().view(-1, 1)
            weights = torch.tensor([[weight] for _, weight in batch], device=device).view(-1, 1)
            pool(slots, weights.double())
            for slot, weight in batch:
                counts[slot] += weight != 0
                mass[slot] += abs(weight)
            for slot in {slot for slot, weight in batch if weight != 0}:
                documents[slot] += 1
    assert stats.counts.dtype == stats.documents.dtype == torch.int64
    assert stats.counts.tolist() == counts
    assert stats.documents.tolist() == documents
    assert stats.pools[""].mass.tolist() == mass
    assert stats.batches == len(drawn)
    assert stats.usage == sum(count > 0 for count in counts) / SLOTS
    if sum(mass) == 0:
        assert math.isnan(stats.kl)
    else:
        shares = [m / sum(mass) for m in mass]
        kl = sum(p * math.log(p * SLOTS) for p in shares if p > 0)
        assert stats.kl == pytest.approx(kl, abs=1e-12)


def test_divergence_is_0_for_uniform_weights_and_log_of_the_slots_for_one(
    device: torch.device,
) -> None:
    pool = MemoryPool(SLOTS, 3).to(device)
    uniform = read(pool, ([0, 1, 2], [0.5] * 3), ([3, 4, 5], [0.25] * 3), ([3, 4, 5], [0.25] * 3))
    assert uniform.kl == pytest.approx(0.0, abs=1e-15)
    assert uniform.usage == 1.0
    single = read(pool, ([2, 3, 2], [0.5, 0.0, 2.0]))
    assert single.kl == pytest.approx(math.log(SLOTS), abs=1e-15)
    assert single.usage == 1 / SLOTS


def test_counts_the_slots_which_the_layer_chose(make_pkm: Any, randn: Any) -> None:
    """Kinds whose pool gets the router's slots as they are."""
    for changes in ({}, {"concat_values_and_combine": True}, {"values_grad": "factored"}):
        pkm = make_pkm(**changes)
        x = randn(3, 5, 12)
        with torch.no_grad():
            indices, _ = pkm.route(x, None, 0.0)
        with SlotStats(pkm) as stats:
            pkm(x)
            pkm(x)
        expected = indices.flatten().bincount(minlength=49)
        assert list(stats.pools) == ["values"]
        assert torch.equal(stats.counts, 2 * expected)
        assert torch.equal(stats.documents, 2 * (expected > 0).long())
        # By softmax, every head of every token weighs 1.
        assert float(stats.pools["values"].mass.sum()) == pytest.approx(2 * 15 * 2)


@pytest.mark.parametrize("training", [True, False])
def test_masked_tokens_do_not_count(
    make_pkm: Any, randn: Any, changes: dict[str, Any], training: bool
) -> None:
    pkm = make_pkm(**changes).train(training)
    x, mask = randn(2, 5, 12), torch.rand(2, 5) < 0.6
    mask = mask.to(x.device)
    found = []
    for tokens in (x, torch.where(mask[..., None], x, float("nan"))):
        with SlotStats(pkm) as stats:
            pkm(tokens, mask)
        found.append(stats.pools["values"])
    assert same(*found)
    assert 0 < int(found[0].counts.sum()) <= int(mask.sum()) * 2 * 4
    with SlotStats(pkm) as stats:
        pkm(x, torch.zeros_like(mask))
    assert (stats.usage, stats.batches) == (0.0, 1)


class Pair(nn.Module):
    """Two layers, sharing a pool or not, with activation checkpointing or not."""

    def __init__(self, first: PKM, second: PKM, again: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.again = first, second, again

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.again else layer(x))
        return x


def test_a_shared_pool_is_one_and_a_call_of_the_module_one_batch(make_pkm: Any, randn: Any) -> None:
    pool = MemoryPool(49, 12).to(randn(1))
    shared = Pair(make_pkm(pool=pool), make_pkm(pool=pool))
    x = randn(2, 3, 12)
    with SlotStats(shared) as stats:
        shared(x)
        shared(x[:0])
    assert list(stats.pools) == ["first.values"]
    assert int(stats.counts.sum()) == 2 * 6 * 2 * 4
    assert stats.batches == 2
    assert int(stats.documents.max()) == 1
    # Whoever reads by parts of the module makes each a batch.
    with stats:
        shared.first(x)
        shared.second(x)
    assert stats.batches == 4

    apart = Pair(make_pkm(), make_pkm())
    with SlotStats(apart) as several:
        apart(x)
        apart.second(x)
    assert {name: s.batches for name, s in several.pools.items()} == {
        "first.values": 1,
        "second.values": 2,
    }
    for name in ("counts", "documents", "batches", "usage", "kl"):
        with pytest.raises(ValueError, match="2 pools"):
            getattr(several, name)


def test_what_checkpointing_repeats_counts_once(make_pkm: Any, randn: Any) -> None:
    found = []
    for again in (False, True):
        pair = Pair(make_pkm(), make_pkm(), again)
        with SlotStats(pair) as stats:
            for seed in range(2):
                pair(randn(2, 3, 12, seed=seed).requires_grad_()).sum().backward()
        found.append(stats)
    for name in ("first.values", "second.values"):
        assert same(found[0].pools[name], found[1].pools[name])
        assert found[1].pools[name].batches == 2


def test_counts_in_a_compiled_module(make_pkm: Any, randn: Any) -> None:
    torch._dynamo.reset()
    pkm, x = make_pkm(), randn(2, 3, 12)
    with SlotStats(pkm) as expected:
        for _ in range(3):
            pkm(x)
    compiled: Any = torch.compile(pkm, fullgraph=True, backend="aot_eager")
    with SlotStats(pkm) as stats:
        for _ in range(3):
            compiled(x).sum().backward()
    assert same(stats.pools["values"], expected.pools["values"])


def test_counting_changes_nothing_and_leaves_nothing(make_pkm: Any, randn: Any) -> None:
    pkm, x = make_pkm(), randn(2, 3, 12)
    expected = pkm(x)
    gradients = torch.autograd.grad(expected.sum(), list(pkm.parameters()), allow_unused=True)
    stats = SlotStats(pkm)
    with stats:
        out = pkm(x)
        kept = [stats.counts.data_ptr(), stats.pools["values"].mass.data_ptr()]
        pkm(x)
    assert kept == [stats.counts.data_ptr(), stats.pools["values"].mass.data_ptr()]
    counted = stats.counts.clone()
    pkm(x)
    assert torch.equal(stats.counts, counted)
    assert torch.equal(out, expected)
    again = torch.autograd.grad(out.sum(), list(pkm.parameters()), allow_unused=True)
    for a, b in zip(gradients, again, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert not stats.pools["values"].mass.requires_grad
    for module in (pkm, pkm.values):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called


def test_a_call_that_fails_is_a_batch_and_spoils_no_other(make_pkm: Any, randn: Any) -> None:
    pkm, x = make_pkm(), randn(2, 3, 12)
    with SlotStats(pkm) as stats:
        with pytest.raises(ValueError, match="12"):
            pkm(randn(2, 3, 11))
        with pytest.raises(TypeError, match="int64"):
            pkm.values(torch.zeros(1, 1), torch.zeros(1, 1))
        pkm(x)
    assert (stats.batches, int(stats.counts.sum())) == (2, 6 * 8)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = pkm.output_norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), stats:
        pkm(x)
    handle.remove()
    assert (stats.batches, int(stats.counts.sum())) == (3, 2 * 6 * 8)
    with stats:
        pkm(x)
    assert (stats.batches, int(stats.documents.max())) == (4, 3)


def test_entering_twice_or_without_a_module_is_refused(make_pkm: Any) -> None:
    stats = SlotStats(make_pkm())
    with stats, pytest.raises(RuntimeError, match="already"):
        stats.__enter__()
    with pytest.raises(RuntimeError, match="none to count"):
        (stats + stats).__enter__()


def test_parts_add_up_to_the_whole(make_pkm: Any, randn: Any) -> None:
    pair = Pair(make_pkm(), make_pkm())
    xs = [randn(2, 3, 12, seed=seed) for seed in range(3)]
    whole, parts = SlotStats(pair), [SlotStats(pair) for _ in xs]
    for x, part in zip(xs, parts, strict=True):
        with whole, part:
            pair(x)
    total = parts[0] + parts[1] + parts[2]
    for name, stats in whole.pools.items():
        assert same(total.pools[name], stats)
    assert parts[0].pools["first.values"].batches == 1


def test_saved_and_loaded_again(make_pkm: Any, randn: Any, tmp_path: Path) -> None:
    pair = Pair(make_pkm(), make_pkm())
    with SlotStats(pair) as stats:
        pair(randn(2, 3, 12))
    stats.save(tmp_path / "background.pt")
    loaded = SlotStats.load(str(tmp_path / "background.pt"))
    assert [file.name for file in tmp_path.iterdir()] == ["background.pt"]
    assert stats.pools.keys() == loaded.pools.keys()
    for name, pool in stats.pools.items():
        assert same(pool.to(torch.device("cpu")), loaded.pools[name])
    chosen, again = (select_slots(stats, background, 5) for background in (stats, loaded))
    assert all(torch.equal(chosen[name], again[name]) for name in chosen)


def test_a_file_is_written_whole_or_not_at_all(
    make_pkm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats.pt"
    stats = SlotStats(make_pkm())
    stats.save(path)
    before = path.read_bytes()

    def fails(_: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        stats.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_selects_by_a_hand_computed_example(device: torch.device) -> None:
    """Of 10 reads slots 0, 1, 2, 5 have 4, 3, 2, 1; of 3 batches they are in 3, 1, 0, 0."""
    pool = MemoryPool(SLOTS, 3).to(device)
    new = read(pool, ([0, 0, 0, 0, 1], [1.0] * 5), ([1, 1, 2, 2, 5, 4], [1.0] * 5 + [0.0]))
    old = read(pool, ([0, 1, 3], [1.0] * 3), ([0, 3, 3], [1.0] * 3), ([0, 4, 0], [1.0] * 3))
    # 0.4 log(4/4) = 0, 0.3 log(4/2) = 0.208, 0.2 log(4/1) = 0.277, 0.1 log(4/1) = 0.139.
    assert select_slots(new, old, 10)[""].tolist() == [2, 1, 5, 0]
    assert select_slots(new, old, 2)[""].tolist() == [2, 1]
    # Without a background, by counts.
    assert select_slots(new, SlotStats(pool), 3)[""].tolist() == [0, 1, 2]
    assert select_slots(SlotStats(pool), old, 3)[""].tolist() == []
    # Of 5 reads 3 of slot 0, in 1 of 2 batches: 0.6 log(3/2) = 0.243 > 0.2 log(3/1) = 0.220.
    new = read(pool, ([2, 1, 0, 0, 0], [1.0] * 5))
    old = read(pool, ([0], [1.0]), ([3], [1.0]))
    assert select_slots(new, old, 3)[""].tolist() == [0, 1, 2]
    # Of equal scores the lower slot.
    even = read(pool, ([5, 1, 3, 0], [1.0] * 4))
    assert select_slots(even, SlotStats(pool), 3)[""].tolist() == [0, 1, 3]


def test_bad_input_is_refused_with_the_numbers(make_pkm: Any, tmp_path: Path) -> None:
    stats = SlotStats(make_pkm())
    with pytest.raises(TypeError, match="Tensor"):
        SlotStats(torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has 0 memories"):
        SlotStats(nn.Linear(1, 1))
    for other in (SlotStats(make_pkm(num_keys=5)), SlotStats(Pair(make_pkm(), make_pkm()))):
        with pytest.raises(ValueError, match="49"):
            select_slots(stats, other, 1)
        with pytest.raises(ValueError, match="49"):
            stats + other
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        select_slots(stats, stats, 0)
    with pytest.raises(TypeError, match=r"1\.5"):
        select_slots(stats, stats, 1.5)  # type: ignore[arg-type]
    torch.save(make_pkm().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt' is no file of SlotStats"):
        SlotStats.load(tmp_path / "model.pt")
