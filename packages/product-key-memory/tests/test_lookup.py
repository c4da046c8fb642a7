"""The lookup: exactly the best of all K1 x K2 sums."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from product_key_memory import product_top_k
from product_key_memory.lookup import best_sub_keys, candidates
from shared_core.testing import assert_compiles, assert_same_gradients


class Case(NamedTuple):
    """Scores of two halves, small enough to be built from a seed."""

    leading: tuple[int, ...]
    sizes: tuple[int, int]
    k: int
    # How many different scores there are; 0 for normal ones, all different.
    levels: int
    dtype: torch.dtype
    seed: int

    def build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        halves = []
        for size in self.sizes:
            shape = (*self.leading, size)
            if self.levels:
                drawn = torch.randint(self.levels, shape, generator=generator) - self.levels // 2
            else:
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            halves.append(drawn.to(device, self.dtype))
        return halves[0], halves[1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k = draw(st.integers(1, 64))
    # From 16 k on sub-keys are chosen in groups, where their number can be divided by 4.
    least = draw(st.sampled_from([k, k, 16 * k]))
    return Case(
        leading=draw(st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0, 3)])),
        sizes=(least + draw(st.integers(0, 20)), least + draw(st.integers(0, 20))),
        k=k,
        levels=draw(st.sampled_from([0, 0, 1, 2, 3, 8])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_exact(case: Case, device: torch.device, **options: Any) -> None:
    first, second = case.build(device)
    scores, slots = product_top_k(first, second, case.k, **options)
    sums = (first[..., :, None] + second[..., None, :]).flatten(-2)
    assert scores.shape == slots.shape == (*case.leading, case.k)
    assert slots.dtype == torch.int64
    # As multisets, since ties may come in any order; both are sorted.
    assert torch.equal(scores, sums.topk(case.k, dim=-1).values)
    assert torch.equal(sums.gather(-1, slots), scores)
    assert (slots.sort(dim=-1).values.diff(dim=-1) > 0).all()


@settings(max_examples=200)
@given(case=cases())
def test_equals_scoring_every_slot(device: torch.device, case: Case) -> None:
    assert_exact(case, device)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(case=cases())
def test_equals_scoring_every_slot_ten_thousand_times(device: torch.device, case: Case) -> None:
    assert_exact(case, device)


@given(k=st.integers(1, 8), quarter=st.integers(4, 9), levels=st.integers(1, 9), seed=st.integers())
def test_sub_keys_in_groups(
    device: torch.device, k: int, quarter: int, levels: int, seed: int
) -> None:
    """As torch.topk, but that ties may be others."""
    generator = torch.Generator().manual_seed(seed % 2**32)
    scores = torch.randint(levels, (5, 4 * quarter * k), generator=generator).to(device)
    best, at = best_sub_keys(scores.double(), k)
    assert torch.equal(best, scores.double().topk(k).values)
    assert torch.equal(scores.gather(-1, at), best.long())
    assert (at.sort().values.diff() > 0).all()


def unsorted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Promises no order, as a sub_top_k of somebody else may not."""
    best, at = scores.topk(k, dim=-1)
    return best.flip(-1), at.flip(-1)


@settings(max_examples=50)
@given(case=cases())
def test_another_choice_among_sub_keys(device: torch.device, case: Case) -> None:
    assert_exact(case, device, sub_top_k=unsorted)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 32, 64])
def test_candidates(device: torch.device, k: int) -> None:
    """A pair of ranks with k better pairs before it cannot be chosen; every other one can."""
    expected = {(i, j) for i, j in product(range(k), repeat=2) if (i + 1) * (j + 1) <= k}
    i, j = candidates(k, torch.zeros(k, device=device))
    assert i.device.type == device.type
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert len(i) == len(expected) == {1: 1, 2: 3, 3: 5, 8: 20, 32: 119, 64: 280}[k]


def test_no_candidate_is_superfluous(device: torch.device) -> None:
    """For each pair of ranks there are scores by which it is the last that is chosen."""
    k = 12
    pairs = torch.stack(candidates(k, torch.zeros(k, device=device)), -1)
    for i, j in pairs.tolist():
        first = -torch.arange(k, device=device, dtype=torch.float64) * 1e-3
        second = first.clone()
        first[i + 1 :] -= 10
        second[j + 1 :] -= 10
        order = torch.randperm(k, generator=torch.Generator().manual_seed(1)).to(device)
        scores, slots = product_top_k(first[order], second[order], k)
        rows = order[slots // k], order[slots % k]
        assert [i, j] in torch.stack(rows, -1).tolist()
        assert scores[(i + 1) * (j + 1) - 1] == first[i] + second[j]


@settings(max_examples=50)
@given(case=cases(), custom=st.booleans())
def test_gradients(device: torch.device, case: Case, custom: bool) -> None:
    """Those that were chosen get one, through their own scores."""
    if 0 in case.leading:
        case = case._replace(leading=(2,))
    # No two alike: between ties the gradient may go either way.
    case = case._replace(levels=0, dtype=torch.float64)
    options: dict[str, Any] = {"sub_top_k": unsorted} if custom else {}

    def dense(first: Tensor, second: Tensor) -> Tensor:
        sums = (first[..., :, None] + second[..., None, :]).flatten(-2)
        return sums.topk(case.k, dim=-1).values

    assert_same_gradients(
        lambda first, second: product_top_k(first, second, case.k, **options)[0],
        dense,
        case.build(device),
    )


def test_gradcheck(device: torch.device) -> None:
    first, second = Case((2,), (4, 6), 3, 0, torch.float64, 0).build(device)
    inputs = (first.requires_grad_(), second.requires_grad_())
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a, b: product_top_k(a, b, 3)[0].sin(), inputs)


def test_strides_do_not_matter(device: torch.device) -> None:
    first, second = Case((3, 2), (6, 9), 5, 0, torch.float64, 0).build(device)
    expected = product_top_k(first, second, 5)
    other_first = first.transpose(0, 2).contiguous().transpose(0, 2)
    other_second = second.repeat_interleave(2, dim=-1)[..., ::2]
    assert not other_first.is_contiguous()
    assert not other_second.is_contiguous()
    for actual, wanted in zip(product_top_k(other_first, other_second, 5), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_infinite_scores(device: torch.device) -> None:
    """Sub-keys can be ruled out by a score of minus infinity."""
    first, second = Case((4,), (8, 8), 3, 0, torch.float64, 0).build(device)
    first[:, :5] = -torch.inf
    second[:, 3:] = -torch.inf
    scores, slots = product_top_k(first, second, 3)
    assert scores.isfinite().all()
    assert (slots // 8 >= 5).all()
    assert (slots % 8 < 3).all()


def test_far_slots(device: torch.device) -> None:
    """Slot numbers beyond what 32 bits hold."""
    size = 2**17
    first = torch.zeros(size, device=device)
    second = torch.zeros(size, device=device)
    first[-1] = second[-2] = 1
    _, slots = product_top_k(first, second, 1)
    assert slots.tolist() == [(size - 1) * size + size - 2]


def test_compiles(device: torch.device) -> None:
    inputs = Case((3, 2), (6, 9), 5, 0, torch.float32, 0).build(device)
    assert_compiles(lambda a, b: product_top_k(a, b, 5), inputs, dynamic=True)


def test_leaves_nothing_behind_in_other_modes(device: torch.device) -> None:
    """What a call under inference mode or with fake tensors keeps, later calls can work with."""
    # A k that no other test has used.
    k = 21
    first, second = Case((3,), (25, 23), k, 0, torch.float64, 0).build(device)
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode()):
        with mode:
            product_top_k(first.clone(), second.clone(), k)
        assert_exact(Case((3,), (25, 23), k, 0, torch.float64, 0), device)
        leaf = first.clone().requires_grad_()
        product_top_k(leaf, second, k)[0].sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.sum() == 3 * k


def test_fake_tensors_after_real_ones(device: torch.device) -> None:
    first, second = Case((3,), (25, 23), 4, 0, torch.float64, 0).build(device)
    product_top_k(first, second, 4)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (first, second)]
        scores, slots = product_top_k(fakes[0], fakes[1], 4)
    assert scores.shape == slots.shape == (3, 4)
