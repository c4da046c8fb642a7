"""Learning by a few slots: the others keep every bit, and what changed can be taken back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from product_key_memory import (
    PKM,
    MemoryPool,
    SlotDiff,
    SlotStats,
    select_slots,
    sparse_finetune,
)
from product_key_memory.values import LocalReader

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda rows: torch.optim.AdamW(rows, lr=0.1, weight_decay=0.1),
    "sgd": lambda rows: torch.optim.SGD(rows, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda rows: torch.optim.Adagrad(rows, lr=0.1, weight_decay=0.1),
}
CHOSEN = torch.tensor([30, 2, 48, 7, 21, 0, 33, 12, 40, 17])


class Stack(nn.Module):
    """Two layers one after the other."""

    def __init__(self, first: PKM, second: PKM) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, trainable: Tensor | None = None) -> Tensor:
        for layer in (self.first, self.second):
            x = x + layer(x, mem_trainable_mask=trainable)
        return x


@pytest.fixture
def slots(device: torch.device) -> Tensor:
    return CHOSEN.to(device)


@pytest.fixture
def shared(make_pkm: Any, device: torch.device) -> Stack:
    """Two layers which share a pool."""
    pool = MemoryPool(49, 12, dtype=torch.float64).to(device)
    return Stack(make_pkm(pool=pool), make_pkm(pool=pool))


@pytest.fixture
def apart(make_pkm: Any) -> Stack:
    """Two layers with a pool each."""
    return Stack(make_pkm(), make_pkm())


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Every byte of a module's state."""
    state = module.state_dict().items()
    return {name: x.detach().clone().reshape(-1).view(torch.uint8) for name, x in state}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def train(
    module: Any,
    parameters: Iterable[nn.Parameter],
    randn: Any,
    make_optimizer: Callable[[Any], Optimizer] = OPTIMIZERS["adamw"],
    steps: int = 4,
    dim: int = 12,
    **options: Any,
) -> None:
    optimizer = make_optimizer(parameters)
    for seed in range(steps):
        x = randn(4, 8, dim, seed=seed, dtype=next(module.parameters()).dtype)
        optimizer.zero_grad()
        module(x, **options).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_keeps_every_bit(
    make_pkm: Any, randn: Any, changes: dict[str, Any], slots: Tensor, name: str
) -> None:
    pkm = make_pkm(**{**changes, "num_keys": 7}).eval()
    before = bits(pkm)
    table = pkm.values.weight.detach().clone()
    with sparse_finetune(pkm, slots) as session:
        train(pkm, session.parameters(), randn, OPTIMIZERS[name])
    after = bits(pkm)
    del before["values.weight"], after["values.weight"]
    assert same_bits(before, after)
    moved = (pkm.values.weight != table).all(1)
    assert moved.nonzero().flatten().tolist() == sorted(slots.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factored_and_narrow_tables(
    make_pkm: Any, randn: Any, slots: Tensor, dtype: torch.dtype
) -> None:
    for changes in ({"experts": True}, {}):
        pkm = make_pkm(values_grad="factored", **changes).to(dtype)
        table = pkm.values.weight.detach().clone()
        with sparse_finetune(pkm, slots) as session:
            assert [rows.dtype for rows in session.parameters()] == [torch.float32]
            train(pkm, session.parameters(), randn)
        assert pkm.values.weight.dtype == dtype
        moved = (pkm.values.weight != table).any(1)
        assert moved.nonzero().flatten().tolist() == sorted(slots.tolist())
        assert session.diff().after["values"].dtype == dtype


def test_small_steps_add_up_in_a_narrow_table(device: torch.device) -> None:
    pool = MemoryPool(2, 3, dtype=torch.bfloat16).to(device)
    nn.init.ones_(pool.weight)
    chosen = torch.tensor([1], device=device)
    session = sparse_finetune(pool, chosen)
    chosen.zero_()  # the session has its own copy
    with session:
        optimizer = torch.optim.SGD(session.parameters(), lr=2**-10)
        for _ in range(64):
            optimizer.zero_grad()
            weights = torch.ones(1, 1, device=device)
            pool(weights.long(), weights).sum().backward()
            optimizer.step()
    assert pool.weight.tolist() == [[1.0] * 3, [1 - 2**-4] * 3]


@pytest.mark.parametrize("kind", ["sgd", "adam", "adagrad"])
@pytest.mark.parametrize("sharing", [True, False])
def test_rows_train_as_in_dense_training_of_the_table(
    shared: Stack, apart: Stack, randn: Any, slots: Tensor, kind: str, sharing: bool
) -> None:
    def make_optimizer(rows: Any) -> Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(rows, lr=0.1, momentum=0.9)
        return (torch.optim.Adam if kind == "adam" else torch.optim.Adagrad)(rows, lr=0.1)

    sparse = shared if sharing else apart
    dense = copy.deepcopy(sparse)
    trainable = torch.zeros(49, dtype=torch.bool, device=slots.device)
    trainable[slots] = True
    tables = dict.fromkeys([dense.first.values.weight, dense.second.values.weight])
    train(dense, list(tables), randn, make_optimizer, trainable=trainable)
    chosen: Any = {"first.values": slots}
    if not sharing:
        chosen["second.values"] = trainable
    with sparse_finetune(sparse, chosen) as session:
        train(sparse, session.parameters(), randn, make_optimizer)
    assert len(session.diff().slots) == len(tables)
    for name, expected in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], expected, rtol=0, atol=1e-11)
    diff = session.diff()
    assert all(bool((diff.before[n] != diff.after[n]).any(1).all()) for n in diff.slots)


def test_both_masks_together(make_pkm: Any, randn: Any, slots: Tensor) -> None:
    """Slots that `mem_trainable_mask` leaves out get a gradient of zero, the chosen ones too."""
    pkm = make_pkm()
    trainable = torch.zeros(49, dtype=torch.bool, device=slots.device)
    trainable[slots[:5]] = True
    trainable[1] = True
    x = randn(4, 8, 12)
    with sparse_finetune(pkm, slots) as session:
        (rows,) = session.parameters()
        grads = []
        for mask in (None, trainable):
            out = pkm(x, mem_trainable_mask=mask)
            grads.append(torch.autograd.grad(out.square().sum(), rows)[0])
            torch.testing.assert_close(out, pkm(x), rtol=0, atol=1e-12)
    assert bool(grads[0].ne(0).any(1).all())
    torch.testing.assert_close(grads[1][:5], grads[0][:5], rtol=0, atol=1e-12)
    assert bool(grads[1][5:].eq(0).all())


def test_the_forward_pass_is_the_same_inside(
    make_pkm: Any, randn: Any, changes: dict[str, Any], slots: Tensor
) -> None:
    pkm = make_pkm(**{**changes, "num_keys": 7}).eval()
    x = randn(3, 5, 12).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        out = pkm(x)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    expected = run()
    with sparse_finetune(pkm, slots) as session:
        inside = run()
        with torch.no_grad():
            session.parameters()[0].add_(1.0)
        changed = run()
    for found, wanted in ((inside, expected), (changed, run())):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert not torch.allclose(changed[0], inside[0])


def test_the_module_is_frozen_meanwhile_and_as_before_afterwards(
    apart: Stack, randn: Any, slots: Tensor
) -> None:
    apart.first.keys.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in apart.named_parameters()}
    apart(randn(2, 3, 12)).sum().backward()
    readers = apart.first.values.reader, apart.second.values.reader
    whole = torch.optim.AdamW(apart.parameters(), lr=0.1)
    before = bits(apart)
    with sparse_finetune(apart, {"second.values": slots, "first.values": slots[:0]}) as session:
        assert not any(p.requires_grad for p in apart.parameters())
        assert len(session.parameters()) == 1
        apart(randn(2, 3, 12)).sum().backward()
        # An optimizer of the whole module finds nothing to do, in spite of the earlier gradients.
        whole.step()
    assert same_bits(bits(apart), before)
    assert {name: p.requires_grad for name, p in apart.named_parameters()} == flags
    assert all(p.grad is None for p in apart.parameters())
    assert (apart.first.values.reader, apart.second.values.reader) == readers
    for pool in (apart.first.values, apart.second.values):
        assert not pool._state_dict_pre_hooks
        assert not pool._load_state_dict_pre_hooks
        assert not pool._load_state_dict_post_hooks
    clone = pickle.loads(pickle.dumps(copy.deepcopy(apart)))
    assert same_bits(bits(clone), before)


def test_factors_of_earlier_passes_are_dropped(make_pkm: Any, slots: Tensor, randn: Any) -> None:
    pkm = make_pkm(values_grad="factored")
    collected: list[Any] = []
    pkm.values.weight.factors = collected
    pkm(randn(1, 2, 12)).sum().backward()
    assert len(collected) == 1
    with sparse_finetune(pkm, slots):
        pkm(randn(1, 2, 12)).sum().backward()
        assert not collected
    pkm(randn(1, 2, 12)).sum().backward()
    assert len(collected) == 1


def test_state_dict_inside_has_the_current_rows(
    shared: Stack, make_pkm: Any, randn: Any, slots: Tensor
) -> None:
    keys = list(shared.state_dict())
    x = randn(2, 3, 12)
    other = Stack(make_pkm(), make_pkm())
    with sparse_finetune(shared, slots) as session:
        optimizer = torch.optim.SGD(session.parameters(), lr=0.1)
        for _ in range(2):
            loss = shared(x).square().sum()
            state = shared.state_dict()  # between the two passes, too
            loss.backward()
            optimizer.step()
        assert list(shared.state_dict(keep_vars=True)) == keys
        state = {name: value.clone() for name, value in shared.state_dict().items()}
        inside = shared(x)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), inside, rtol=0, atol=1e-12)
    assert all(torch.equal(value, state[name]) for name, value in shared.state_dict().items())


def test_loading_inside_moves_the_rows(make_pkm: Any, randn: Any, slots: Tensor) -> None:
    pkm = make_pkm()
    best = {name: value.clone() + 1 for name, value in pkm.state_dict().items()}
    with sparse_finetune(pkm, slots) as session:
        train(pkm, session.parameters(), randn)
        trained = pkm.state_dict()["values.weight"].clone()
        # Without its table, a state leaves the rows as they are.
        pkm.load_state_dict({"keys": best["keys"]}, strict=False)
        train(pkm, session.parameters(), randn)
        pkm.values.load_state_dict({}, strict=False)
        assert not torch.equal(session.parameters()[0], trained[slots])
        trained = pkm.state_dict()["values.weight"].clone()
        torch.testing.assert_close(session.parameters()[0], trained[slots], rtol=0, atol=0)
        pkm.load_state_dict(best)
        assert torch.equal(session.parameters()[0], best["values.weight"][slots])
    assert all(torch.equal(value, best[name]) for name, value in pkm.state_dict().items())


def test_an_exception_loses_nothing(make_pkm: Any, randn: Any, slots: Tensor) -> None:
    pkm = make_pkm()
    before = bits(pkm)
    session = sparse_finetune(pkm, slots)
    rows = torch.empty(0)

    def interrupted() -> None:
        nonlocal rows
        with session:
            train(pkm, session.parameters(), randn)
            rows = session.parameters()[0].detach().clone()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(pkm.values.weight[slots], rows)
    assert all(p.requires_grad for p in pkm.parameters())
    session.diff().rollback(pkm)
    assert same_bits(bits(pkm), before)


def test_one_finetuning_at_a_time_on_a_pool(apart: Stack, randn: Any, slots: Tensor) -> None:
    before = bits(apart)
    outer = sparse_finetune(apart, {"first.values": slots})
    with outer:
        for second in (outer, sparse_finetune(apart.first, slots[:3])):
            with pytest.raises(ValueError, match="another fine-tuning holds 10 of 49"):
                second.__enter__()
        change = SlotDiff({"first.values": slots}, {"first.values": slots}, {"first.values": slots})
        with pytest.raises(ValueError, match="another fine-tuning holds 10 of 49"):
            change.apply(apart)
        with pytest.raises(RuntimeError, match="after the context has ended"):
            outer.diff()
        # Another pool is free.
        with sparse_finetune(apart, {"second.values": slots[:4]}) as inner:
            train(apart, [*outer.parameters(), *inner.parameters()], randn)
    assert list(inner.diff().slots) == ["second.values"]
    assert all(p.requires_grad for p in apart.parameters())
    inner.diff().rollback(apart)
    outer.diff().rollback(apart)
    assert same_bits(bits(apart), before)
    with pytest.raises(RuntimeError, match="only inside"):
        outer.parameters()
    with pytest.raises(RuntimeError, match="after the context has ended"):
        sparse_finetune(apart, {"first.values": slots}).diff()
    # The same one may go on.
    with outer:
        train(apart, outer.parameters(), randn)
    outer.diff().rollback(apart)
    assert same_bits(bits(apart), before)


def test_sharded_tables_are_refused(make_pkm: Any, slots: Tensor) -> None:
    """By our own styles, which replace the reader, or as FSDP does, which replaces the tensor."""

    class Elsewhere:
        read = match = None

    class Sharded(Tensor):
        pass

    pkm = make_pkm()
    pkm.values.weight = nn.Parameter(pkm.values.weight.detach().as_subclass(Sharded))
    with pytest.raises(ValueError, match="of 49 slots is not whole"), sparse_finetune(pkm, slots):
        pass
    pkm = make_pkm()
    pkm.values.reader = Elsewhere()
    with pytest.raises(ValueError, match="of 49 slots is not whole"), sparse_finetune(pkm, slots):
        pass
    pkm.values.reader = LocalReader(factored=False)
    with sparse_finetune(pkm, slots):
        pass


def test_diffs_repeat_and_undo_bit_by_bit(
    apart: Stack, randn: Any, slots: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        apart.first.values.weight[slots[0], 0] = -0.0
        apart.second.values.weight[slots[1], 0] = float("nan")
    start = copy.deepcopy(apart)
    chosen = {"first.values": slots, "second.values": slots[1:4]}
    with sparse_finetune(apart, chosen) as session:
        train(apart, session.parameters(), randn)
    before, after = bits(start), bits(apart)
    session.diff().save(str(tmp_path / "facts.pt"))
    assert [file.name for file in tmp_path.iterdir()] == ["facts.pt"]
    diff = SlotDiff.load(tmp_path / "facts.pt")
    for name, expected in chosen.items():
        assert torch.equal(diff.slots[name].to(expected), expected)
    diff.apply(start)
    assert same_bits(bits(start), after)
    diff.rollback(start)
    assert same_bits(bits(start), before)
    session.diff().rollback(apart)
    assert same_bits(bits(apart), before)
    torch.save({"kind": "SlotStats"}, tmp_path / "stats.pt")
    with pytest.raises(ValueError, match=r"stats\.pt' is no file of SlotDiff"):
        SlotDiff.load(tmp_path / "stats.pt")


def test_a_diff_of_another_table_changes_nothing(
    apart: Stack, make_pkm: Any, randn: Any, slots: Tensor
) -> None:
    chosen = {"first.values": slots, "second.values": slots}
    with sparse_finetune(apart, chosen) as session:
        train(apart, session.parameters(), randn)
    diff = session.diff()
    diff.rollback(apart)

    def refused(module: nn.Module, diff: SlotDiff, match: str, undo: bool = False) -> None:
        before = bits(module)
        with pytest.raises(ValueError, match=match):
            diff.rollback(module) if undo else diff.apply(module)
        assert same_bits(bits(module), before)

    refused(apart, diff, r"10 of 10 rows of pool 'first\.values'", undo=True)
    one_row = copy.deepcopy(apart)
    with torch.no_grad():
        one_row.second.values.weight[slots[3], 5] = -one_row.second.values.weight[slots[3], 5]
    refused(one_row, diff, r"1 of 10 rows of pool 'second\.values'")
    zero = copy.deepcopy(apart)
    with torch.no_grad():
        zero.second.values.weight[slots[3]] = 0.0
    with sparse_finetune(zero, {"second.values": slots}) as other:
        pass
    with torch.no_grad():
        zero.second.values.weight[slots[3], 1] = -0.0
    refused(zero, other.diff(), "1 of 10 rows")
    refused(make_pkm(), diff, "the module has \\['values'\\]")
    refused(copy.deepcopy(apart).float(), diff, r"\(10, 12\) of torch\.float64.* torch\.float32")
    refused(Stack(make_pkm(), make_pkm(num_keys=5)), diff, "from 0 to 24, got 0 to 48")
    narrow = Stack(make_pkm(concat_values_and_combine=True), make_pkm())
    refused(narrow, diff, r"rows \(10, 12\) .* needs \(10, 6\)")
    halves = SlotDiff(diff.slots, diff.before, {"first.values": diff.after["first.values"]})
    refused(apart, halves, "the diff is of pools")
    with pytest.raises(ValueError, match="0 memories"):
        diff.apply(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("slots", "error", "match"),
    [
        ([1, 2], TypeError, "a mapping, got list"),
        ({"values": [1, 2]}, TypeError, "'values' must be an int64 or boolean tensor, got list"),
        (torch.tensor([1.0]), TypeError, "got torch.float32"),
        (torch.tensor([1], dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.tensor(1), ValueError, r"\(u,\), got shape \(\)"),
        (torch.tensor([[1, 2]]), ValueError, r"got shape \(1, 2\)"),
        (torch.ones(48, dtype=torch.bool), ValueError, r"mask \(49,\), got shape \(48,\)"),
        (torch.tensor([0, 49]), ValueError, "from 0 to 48, got 0 to 49"),
        (torch.tensor([-1, 3]), ValueError, "from 0 to 48, got -1 to 3"),
        (torch.tensor([3, 4, 3, 3]), ValueError, "distinct, got 2 of 4 again"),
        (torch.zeros(49, dtype=torch.bool), ValueError, "0 slots are chosen of 1 pools"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "0 slots"),
        ({}, ValueError, "0 slots"),
        ({"keys": torch.tensor([1])}, ValueError, r"\['keys'\], the module has \['values'\]"),
    ],
)
def test_bad_slots_are_refused(
    make_pkm: Any, slots: Any, error: type[Exception], match: str
) -> None:
    pkm = make_pkm()
    before = bits(pkm)
    with pytest.raises(error, match=match):
        sparse_finetune(pkm, slots)
    assert same_bits(bits(pkm), before)
    assert all(p.requires_grad for p in pkm.parameters())


def test_modules_that_do_not_fit_are_refused(apart: Stack, slots: Tensor) -> None:
    with pytest.raises(ValueError, match="one of 2 pools"):
        sparse_finetune(apart, slots)
    with pytest.raises(ValueError, match="Linear has 0 memories"):
        sparse_finetune(nn.Linear(1, 1), slots)
    with pytest.raises(TypeError, match="got Tensor"):
        sparse_finetune(slots, slots)  # type: ignore[arg-type]


def test_compiled_inside_and_outside(make_pkm: Any, randn: Any, slots: Tensor) -> None:
    torch._dynamo.reset()
    pkm, x = make_pkm(), randn(2, 3, 12)
    compiled: Any = torch.compile(pkm, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    with sparse_finetune(pkm, slots) as session:
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)
        train(compiled, session.parameters(), randn)
        inside = compiled(x)
        torch.testing.assert_close(inside, pkm(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled(x), inside, rtol=0, atol=1e-12)
    assert not torch.allclose(inside, expected)


def test_new_facts_are_learned_and_old_ones_kept(device: torch.device) -> None:
    """Which label belongs to a token; the new facts contradict nothing old."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"heads": 4, "num_keys": 48, "topk": 4, "dim_head": 16}
    pkm = PKM(32, use_layernorm=False, **settings).to(device)
    facts = F.normalize(torch.randn(192, 32), dim=-1).to(device) * 4
    labels = torch.randint(0, 32, (192,)).to(device)
    old, new = slice(0, 160), slice(160, 192)

    def learn(module: PKM, part: slice, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(module(facts[part]), labels[part]).backward()
            optimizer.step()

    def known(module: PKM, part: slice) -> float:
        with torch.no_grad():
            return float((module(facts[part]).argmax(-1) == labels[part]).double().mean())

    learn(pkm, old, torch.optim.Adam(pkm.parameters(), lr=0.01), 150)
    pkm.eval()
    assert known(pkm, old) == 1.0
    background, stats = SlotStats(pkm), SlotStats(pkm)
    with torch.no_grad(), background:
        for batch in facts[old].split(8):
            pkm(batch)
    with torch.no_grad(), stats:
        pkm(facts[new])

    full = copy.deepcopy(pkm)
    learn(full, new, torch.optim.Adam(full.parameters(), lr=0.01), 40)
    with sparse_finetune(pkm, select_slots(stats, background, 120)) as session:
        learn(pkm, new, torch.optim.Adam(session.parameters(), lr=0.1), 40)
    assert known(full, new) == 1.0
    assert known(pkm, new) == 1.0
    assert known(full, old) < 0.92
    assert known(pkm, old) > 0.96
    session.diff().rollback(pkm)
    assert known(pkm, old) == 1.0
