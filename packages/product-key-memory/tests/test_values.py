"""Reading a table: the three operators, their derivatives, and the pool that owns the table."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from product_key_memory import MemoryPool, operators
from product_key_memory.factors import Factors, collect_factors, factors_of
from product_key_memory.operators import match, match_known, read, write, write_rows
from shared_core.testing import assert_compiles, assert_exports, assert_same_gradients


def plain_read(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return (table[indices] * weights[..., None]).sum(1)


def plain_match(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    return (table[indices] * x[:, None]).sum(-1)


def plain_write(indices: Tensor, weights: Tensor, x: Tensor, slots: int) -> Tensor:
    chosen = F.one_hot(indices, slots).to(x)
    return torch.einsum("nks,nk,nd->sd", chosen, weights, x)


def build(
    n: int, k: int, slots: int, d: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, indices that repeat themselves, weights and vectors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    # Half of the table stays untouched now and then.
    reach = slots if seed % 2 else (slots + 1) // 2
    indices = torch.randint(reach, (n, k), generator=generator).to(device)
    return normal(slots, d), indices, normal(n, k), normal(n, d)


sizes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(1, 5))


@given(size=sizes, seed=st.integers(0, 2**16))
def test_operators_equal_indexing(
    device: torch.device, size: tuple[int, int, int, int], seed: int
) -> None:
    table, indices, weights, x = build(*size, device, seed)
    assert_same_gradients(
        lambda t, w: read(t, indices, w), lambda t, w: plain_read(t, indices, w), (table, weights)
    )
    assert_same_gradients(
        lambda t, x: match(t, indices, x), lambda t, x: plain_match(t, indices, x), (table, x)
    )
    assert_same_gradients(
        lambda w, x: write(indices, w, x, size[2]),
        lambda w, x: plain_write(indices, w, x, size[2]),
        (weights, x),
    )


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_every_derivative(device: torch.device, check: Any) -> None:
    table, indices, weights, x = build(3, 4, 5, 2, device)
    for y in (table, weights, x):
        y.requires_grad_()
    assert check(lambda t, w: read(t, indices, w), (table, weights))
    assert check(lambda t, y: match(t, indices, y), (table, x))
    assert check(lambda w, y: write(indices, w, y, 5), (weights, x))


@given(size=sizes, seed=st.integers(0, 2**16))
def test_what_is_known_is_not_computed(
    device: torch.device, size: tuple[int, int, int, int], seed: int
) -> None:
    table, indices, weights, x = build(*size, device, seed)
    assert torch.equal(match_known(table, indices, x, weights), weights)
    known = plain_match(table, indices, x)
    assert_same_gradients(
        lambda t, y: match_known(t, indices, y, known),
        lambda t, y: plain_match(t, indices, y),
        (table, x),
    )


def test_what_is_known_may_be_less_precise(device: torch.device) -> None:
    """As under autocast."""
    table, indices, _, x = build(3, 4, 5, 2, device)
    known = match(table, indices, x).bfloat16()
    leaves = table.float().requires_grad_(), x.bfloat16().requires_grad_()
    match_known(leaves[0], indices, leaves[1], known).float().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
    expected = torch.autograd.grad(
        plain_match(leaves[0], indices, leaves[1].float()).sum(), leaves[0]
    )
    torch.testing.assert_close(leaves[0].grad, expected[0])


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_derivative_by_one_argument_alone(device: torch.device, check: Any, wanted: int) -> None:
    table, indices, weights, x = build(3, 4, 5, 2, device)
    calls = [
        (lambda t, w: read(t, indices, w).sin(), [table, weights]),
        (lambda t, y: match(t, indices, y).sin(), [table, x]),
        (lambda w, y: write(indices, w, y, 5).sin(), [weights, x]),
    ]
    for function, arguments in calls:
        leaves = [y.clone() for y in arguments]
        leaves[wanted].requires_grad_()
        assert check(function, leaves)


def test_operators_are_registered_as_torch_wants_them(device: torch.device) -> None:
    table, indices, weights, x = build(3, 4, 5, 2, device)
    for y in (table, weights, x):
        y.requires_grad_()
    operators = torch.ops.product_key_memory
    torch.library.opcheck(operators.read, (table, indices, weights))
    torch.library.opcheck(operators.match, (table, indices, x))
    known = match(table, indices, x).detach()
    torch.library.opcheck(operators.match_known, (table, indices, x, known))
    torch.library.opcheck(write, (indices, weights, x, 5))


@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_nothing_to_read(device: torch.device, n: int, k: int) -> None:
    table, indices, weights, x = build(n, k, 5, 2, device)
    for y in (table, weights, x):
        y.requires_grad_()
    for out, expected in (
        (read(table, indices, weights), plain_read(table, indices, weights)),
        (match(table, indices, x), plain_match(table, indices, x)),
        (write(indices, weights, x, 5), plain_write(indices, weights, x, 5)),
    ):
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        out.sum().backward()
    for y in (table, weights, x):
        assert y.grad is not None
        assert y.grad.isfinite().all()


def test_match_without_the_private_operator(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, indices, _, x = build(7, 3, 5, 4, device)
    expected = plain_match(table, indices, x)
    assert operators._PAIRS is not None
    torch.testing.assert_close(match(table, indices, x), expected, atol=1e-12, rtol=0)
    monkeypatch.setattr(operators, "_PAIRS", None)
    # One pair at a time, six, nine, and all.
    for elements in (1, 24, 36, 2**10):
        monkeypatch.setattr(operators, "_WORKING_SET", elements)
        torch.testing.assert_close(match(table, indices, x), expected, atol=1e-12, rtol=0)


def test_strides_do_not_matter(device: torch.device) -> None:
    def other(x: Tensor) -> Tensor:
        moved = x.t().contiguous().t()
        assert not moved.is_contiguous()
        return moved

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=1)[:, ::2]

    table, indices, weights, x = build(4, 3, 5, 2, device)
    for change in (other, spread):
        t, i, w, y = (change(part) for part in (table, indices, weights, x))
        assert_same_gradients(
            lambda t, w, i=i: read(t, i, w), lambda t, w: plain_read(t, indices, w), (t, w)
        )
        assert_same_gradients(
            lambda t, y, i=i: match(t, i, y), lambda t, y: plain_match(t, indices, y), (t, y)
        )
        assert_same_gradients(
            lambda w, y, i=i: write(i, w, y, 5),
            lambda w, y: plain_write(indices, w, y, 5),
            (w, y),
        )
        # fresh_leaves copies; the operators themselves must see the strides, too.
        torch.testing.assert_close(read(t, i, w), plain_read(t, i, w))
        torch.testing.assert_close(match(t, i, y), plain_match(t, i, y))
        torch.testing.assert_close(write(i, w, y, 5), plain_write(i, w, y, 5))


def test_a_gradient_without_strides(device: torch.device) -> None:
    """What a plain sum sends back is one number, repeated."""
    table, indices, weights, x = build(4, 3, 5, 2, device)
    for y in (table, weights, x):
        y.requires_grad_()
    for ours, plain, wanted in (
        (read(table, indices, weights), plain_read(table, indices, weights), (table, weights)),
        (match(table, indices, x), plain_match(table, indices, x), (table, x)),
        (write(indices, weights, x, 5), plain_write(indices, weights, x, 5), (weights, x)),
    ):
        expected = torch.autograd.grad(plain.sum(), wanted)
        for a, e in zip(torch.autograd.grad(ours.sum(), wanted), expected, strict=True):
            torch.testing.assert_close(a, e, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    table, indices, weights, x = (
        y.to(dtype) if y.is_floating_point() else y for y in build(6, 4, 5, 8, device)
    )
    exact = [y.double() if y.is_floating_point() else y for y in (table, indices, weights, x)]
    tolerance = {"atol": 8 * torch.finfo(dtype).eps, "rtol": 8 * torch.finfo(dtype).eps}
    for out, expected in (
        (read(table, indices, weights), plain_read(*exact[:3])),
        (match(table, indices, x), plain_match(exact[0], indices, exact[3])),
        (write(indices, weights, x, 5), plain_write(indices, exact[2], exact[3], 5)),
    ):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, **tolerance)


def test_compiles(device: torch.device) -> None:
    table, indices, weights, x = build(4, 3, 5, 2, device)

    def all_three(table: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        scores = match(table, indices, x)
        out = read(table, indices, weights * scores)
        return scores, out, write(indices, weights, out, 5)

    assert_compiles(all_three, (table, weights, x), dynamic=True)


@pytest.mark.parametrize("at_a_time", [1, 2, 3, 100])
def test_rows_in_parts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    """Each touched slot once, in order; the table is the same whatever the size of a part."""
    for name in ("_WORKING_SET", "_ACCELERATOR_WORKING_SET"):
        monkeypatch.setattr(operators, name, 3 * at_a_time)
    _, indices, weights, x = build(6, 4, 20, 3, device)
    out = x.new_zeros(20, 3)
    seen: list[int] = []
    for slots, rows in write_rows(indices, weights, x):
        assert 1 <= len(slots) <= at_a_time
        assert rows.shape == (len(slots), 3)
        out[slots] = rows
        seen += slots.tolist()
    assert seen == sorted(set(indices.flatten().tolist()))
    expected = plain_write(indices, weights, x, 20)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(write(indices, weights, x, 20), expected, atol=1e-12, rtol=0)


def test_a_weight_of_zero_touches_nothing(device: torch.device) -> None:
    """Frozen slots and masked tokens: an optimizer that is lazy must not meet their rows."""
    _, indices, weights, x = build(6, 4, 20, 3, device)
    slot = int(indices[0, 0])
    weights = weights.masked_fill(indices == slot, 0.0)
    touched = torch.cat([slots for slots, _ in write_rows(indices, weights, x)])
    assert slot not in touched
    assert list(write_rows(indices, torch.zeros_like(weights), x)) == []
    torch.testing.assert_close(
        write(indices, weights, x, 20), plain_write(indices, weights, x, 20), atol=1e-12, rtol=0
    )


# The pool


def pool_of(device: torch.device, **options: Any) -> MemoryPool:
    torch.manual_seed(0)
    return MemoryPool(20, 3, **options).to(device, torch.float64)


def gradients(
    pool: MemoryPool, indices: Tensor, weights: Tensor, x: Tensor, trainable: Tensor | None
) -> dict[str, Tensor]:
    """By the dense way or from factors, of two uses in a row."""
    tables = dict(pool.named_parameters())
    factored = pool.values_grad == "factored"
    if factored:
        for table in tables.values():
            collect_factors(table)
    leaves = {"weights": weights.clone().requires_grad_(), "x": x.clone().requires_grad_()}
    for scale in (1.0, 0.3):
        inner = leaves["weights"] * scale
        if pool.inputs is not None:
            inner = inner * pool.activations(indices, leaves["x"], trainable)
        out = pool(indices, inner, trainable)
        (out * leaves["x"].cos()).sum().backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for name, table in tables.items():
        if factored:
            assert table.grad is None
            parts = [write(*factors, pool.slots) for factors in factors_of(table)]
            assert len(parts) == 2
            found[name] = torch.stack(parts).sum(0)
        else:
            assert table.grad is not None
            found[name] = table.grad
    return found


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_factors_are_the_dense_gradient(device: torch.device, experts: bool, frozen: bool) -> None:
    _, indices, weights, x = build(6, 4, 20, 3, device, seed=1)
    trainable = torch.arange(20, device=device) % 3 > 0 if frozen else None
    found = [
        gradients(pool_of(device, experts=experts, values_grad=way), indices, weights, x, trainable)
        for way in ("dense", "factored")
    ]
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 4 if experts else 3
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-12, rtol=0)
        assert expected.ne(0).any()


def test_experts_answer_before_they_are_read(device: torch.device) -> None:
    pool = pool_of(device, experts=True)
    _, indices, weights, x = build(6, 4, 20, 3, device)
    expected = pool(indices, weights * pool.activations(indices, x))
    assert pool(indices, weights, x=x).equal(expected)
    assert pool.inputs is not None
    answers = F.gelu(plain_match(pool.inputs, indices, x))
    torch.testing.assert_close(
        expected, plain_read(pool.weight, indices, weights * answers), atol=1e-12, rtol=0
    )


def test_factors_keep_no_graph(device: torch.device) -> None:
    """They outlive the backward pass, and must not take the router's graph with them."""
    pool = pool_of(device, values_grad="factored", experts=True)
    _, indices, weights, x = build(6, 4, 20, 3, device)
    weights.requires_grad_()
    x.requires_grad_()
    lists = [collect_factors(table) for table in pool.parameters()]
    pool(indices, weights.exp() * pool.activations(indices, x.exp())).sum().backward()
    for factors in lists:
        (one,) = factors
        assert isinstance(one, Factors)
        assert not any(part.requires_grad for part in one)


def test_factors_that_nobody_collects(device: torch.device) -> None:
    """They would be lost, and the table would never learn."""
    pool = pool_of(device, values_grad="factored")
    _, indices, weights, _ = build(6, 4, 20, 3, device)
    out = pool(indices, weights)
    with pytest.raises(RuntimeError, match=r"PKMOptimizer.*\(20, 3\)"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match=r"\(20, 3\)"):
        factors_of(pool.weight)
    with torch.no_grad():
        assert pool(indices, weights).equal(out)
    # A table that does not learn has no factors.
    pool.weight.requires_grad_(False)
    pool(indices, weights.requires_grad_()).sum().backward()
    assert weights.grad is not None


def test_factors_have_no_second_derivative(device: torch.device) -> None:
    pool = pool_of(device, values_grad="factored")
    collect_factors(pool.weight)
    _, indices, weights, _ = build(6, 4, 20, 3, device)
    weights.requires_grad_()
    (slope,) = torch.autograd.grad(
        pool(indices, weights).square().sum(), weights, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_copy_collects_for_itself(device: torch.device) -> None:
    pool = pool_of(device, values_grad="factored")
    collect_factors(pool.weight)
    _, indices, weights, _ = build(6, 4, 20, 3, device)
    other = copy.deepcopy(pool)
    collect_factors(other.weight)
    other(indices, weights).sum().backward()
    assert len(factors_of(other.weight)) == 1
    assert len(factors_of(pool.weight)) == 0
    assert pickle.loads(pickle.dumps(pool))(indices, weights).equal(pool(indices, weights))


@pytest.mark.parametrize("way", ["dense", "factored"])
def test_frozen_slots(device: torch.device, way: str) -> None:
    """Gradients of exactly zero, also under a huge one of the output; all else as it was."""
    _, indices, weights, x = build(6, 4, 20, 3, device, seed=1)
    trainable = torch.arange(20, device=device) % 3 > 0
    pool = pool_of(device, experts=True, values_grad=way)
    free = gradients(pool, indices, weights, x, None)
    held = gradients(pool_of(device, experts=True, values_grad=way), indices, weights, x, trainable)
    for name in ("weight", "inputs"):
        assert free[name][~trainable].ne(0).any()
        assert held[name][~trainable].eq(0).all()
        torch.testing.assert_close(held[name][trainable], free[name][trainable], atol=1e-12, rtol=0)
    for name in ("weights", "x"):
        torch.testing.assert_close(held[name], free[name], atol=1e-12, rtol=0)
    torch.testing.assert_close(pool(indices, weights, trainable), pool(indices, weights))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_a_new_pool(device: torch.device, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    pool = MemoryPool(1000, 25, experts=True, dtype=dtype).to(device)
    assert {name: p.shape for name, p in pool.named_parameters()} == {
        "weight": (1000, 25),
        "inputs": (1000, 25),
    }
    assert pool.inputs is not None
    assert not pool.inputs.equal(pool.weight)
    for table in (pool.weight, pool.inputs):
        assert table.dtype == (dtype or torch.float32)
        assert abs(table.double().std().item() - 0.2) < 0.01
        assert abs(table.double().mean().item()) < 0.01
    before = pool.weight.detach().clone()
    pool.reset_parameters()
    assert not pool.weight.equal(before)
    assert abs(pool.weight.double().std().item() - 0.2) < 0.01
    assert set(MemoryPool(4, 2).state_dict()) == {"weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", ["dense", "factored"])
def test_weights_of_another_dtype(device: torch.device, dtype: torch.dtype, way: str) -> None:
    """The result has the table's dtype, the gradients those of what they belong to."""
    pool = MemoryPool(20, 3, dtype=dtype, experts=True, values_grad=way).to(device)
    for table in pool.parameters():
        collect_factors(table)
    _, indices, weights, x = build(6, 4, 20, 3, device)
    weights, x = (y.float().requires_grad_() for y in (weights, x))
    answers = pool.activations(indices, x)
    out = pool(indices, weights * answers)
    assert answers.dtype == out.dtype == dtype
    exact = F.gelu(plain_match(pool.inputs.double(), indices, x.double())) * weights
    torch.testing.assert_close(
        out.double(), plain_read(pool.weight.double(), indices, exact), atol=0.05, rtol=0.05
    )
    out.sum().backward()
    for y in (weights, x):
        assert y.grad is not None
        assert y.grad.dtype == torch.float32
        assert y.grad.isfinite().all()


def test_a_pool_compiles_and_exports(device: torch.device) -> None:
    pool = pool_of(device, experts=True)
    _, indices, weights, x = build(4, 3, 20, 3, device)
    trainable = torch.arange(20, device=device) % 2 > 0

    def run(weights: Tensor, x: Tensor) -> Tensor:
        return pool(indices, weights * pool.activations(indices, x), trainable)

    assert_compiles(run, (weights, x))
    n = torch.export.Dim("n")
    _, more, other, _ = build(9, 3, 20, 3, device)
    assert_exports(
        pool, (indices, weights, trainable), ({0: n}, {0: n}, None), (more, other, trainable)
    )


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("slot", [-1, 20, 10**9])
def test_slots_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, private: bool, slot: int
) -> None:
    if not private:
        monkeypatch.setattr(operators, "_PAIRS", None)
    pool = MemoryPool(20, 8, experts=True)
    indices = torch.randint(20, (6, 4))
    indices[2, 1] = slot
    with pytest.raises(IndexError, match="indices must be from 0 to 19, got"):
        pool.activations(indices, torch.randn(6, 8))


@pytest.mark.parametrize("shape", [(1, 8), (9, 8), (6, 5)])
def test_tokens_that_do_not_fit(device: torch.device, shape: tuple[int, int]) -> None:
    pool = MemoryPool(20, 8, experts=True).to(device)
    indices = torch.randint(20, (6, 4), device=device)
    with pytest.raises(ValueError, match=r"x must be \(6, 8\), got shape"):
        pool(indices, torch.rand(6, 4, device=device), None, torch.randn(*shape, device=device))
    with pytest.raises(ValueError, match=r"x must be \(6, 8\), got shape"):
        match(pool.weight, indices, torch.randn(*shape, device=device))
    with pytest.raises(TypeError, match="x must be floating point"):
        pool.activations(indices, torch.ones(6, 8, dtype=torch.int64, device=device))


def test_gradients_that_nobody_asked_for(device: torch.device) -> None:
    """Those of other inputs go through the table's, too."""
    _, indices, weights, _ = build(3, 4, 5, 2, device)
    pool = MemoryPool(5, 2, values_grad="factored").to(device, torch.float64)
    weights.requires_grad_()
    # No one has to hold the table for them.
    torch.autograd.grad(pool(indices, weights).sum(), weights)
    factors = collect_factors(pool.weight)
    torch.autograd.grad(pool(indices, weights).sum(), weights)
    pool(indices, weights).sum().backward(inputs=[weights])
    assert factors == []
    pool(indices, weights).sum().backward()
    assert len(factors) == 1


def test_a_pickled_table_has_collected_nothing(device: torch.device) -> None:
    _, indices, weights, _ = build(3, 4, 5, 2, device)
    pool = MemoryPool(5, 2, values_grad="factored").to(device, torch.float64)
    collect_factors(pool.weight)
    pool(indices, weights).sum().backward()
    twin = pickle.loads(pickle.dumps(pool))
    with pytest.raises(RuntimeError, match="none holds this"):
        twin(indices, weights).sum().backward()
    assert collect_factors(twin.weight) == []
    assert len(factors_of(pool.weight)) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_factored_gradients_break_a_graph_and_train(device: torch.device) -> None:
    _, indices, weights, _ = build(3, 4, 5, 2, device)
    pool = MemoryPool(5, 2, values_grad="factored").to(device, torch.float64)
    factors = collect_factors(pool.weight)
    torch.compile(pool, backend="eager")(indices, weights).sum().backward()
    assert len(factors) == 1


def test_a_type_by_its_name() -> None:
    assert MemoryPool(4, 3, dtype="bfloat16").weight.dtype == torch.bfloat16
    for wrong in ("int64", "nonsense", "nn"):
        with pytest.raises(TypeError, match=f"dtype or its name, got '{wrong}'"):
            MemoryPool(4, 3, dtype=wrong)
