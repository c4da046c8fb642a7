"""Half precision costs digits, and neither chunks nor the order of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import SinusoidalPosition, Summary, blocks
from htm_pytorch.fused import attend_fused
from htm_pytorch.retrieval import find, summarise

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def in_half(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to half precision, in the type that it had."""
    return x.to(dtype).to(x)


@HALF
@pytest.mark.parametrize("autocast", [False, True])
def test_search_misses_nothing(
    device: torch.device, randn: Any, dtype: torch.dtype, autocast: bool
) -> None:
    """Of 500 chunks that half precision cannot tell apart."""
    queries = in_half(randn(1, 40, 32), dtype)
    means = randn(1, 500, 32, seed=2, dtype=torch.float32)
    expected = (queries @ means.double().mT).topk(6).indices
    with torch.autocast(device.type, dtype=dtype, enabled=autocast):
        indices, weights = find(queries.to(dtype), Summary(means, None), 6)
    assert torch.equal(indices, expected)
    assert weights.dtype == dtype
    assert not weights.diff(dim=-1).gt(0).any()


def test_relevance_decides_the_order_whatever_the_search_returns(randn: Any) -> None:
    """A chunk that it returns twice counts once, and the free place is at the end."""
    queries, means = randn(2, 3, 8), randn(2, 9, 8, seed=2)
    best = (queries @ means.mT).topk(3).indices

    def search(*_: Any) -> Tensor:
        return torch.cat((best.flip(-1), best[..., :1]), -1)

    indices, weights = find(queries, Summary(means, None), 4, None, search)
    assert torch.equal(indices[..., :3], best)
    assert indices[..., 3].eq(-1).all()
    assert weights[..., 3].eq(0.0).all()
    expected, shares = find(queries, Summary(means, None), 3)
    assert torch.equal(expected, best)
    torch.testing.assert_close(weights[..., :3], shares, atol=1e-12, rtol=0)


@HALF
@pytest.mark.parametrize("m", [24, 26])
@pytest.mark.parametrize("is_masked", [False, True])
def test_summaries_are_not_rounded(
    device: torch.device, randn: Any, dtype: torch.dtype, m: int, is_masked: bool
) -> None:
    tokens = in_half(randn(2, m, 5), dtype)
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(1)) < 0.7
    mask = mask.to(device) if is_masked else None
    means = summarise(tokens.to(dtype), mask, 4).means
    assert means.dtype == torch.float32
    expected = summarise(tokens, mask, 4).means
    torch.testing.assert_close(means.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("m", [8, 10])
def test_summaries_under_autocast(device: torch.device, randn: Any, m: int) -> None:
    tokens = randn(2, m, 5, dtype=torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        means = summarise(tokens, None, 4).means
    assert torch.equal(means, summarise(tokens, None, 4).means)


@HALF
def test_gradients_of_memories_are_summed_in_full_width(
    device: torch.device, randn: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3000 queries to one chunk, two at a time."""
    for name in ("_WORKING_SET", "_SHARED_WORKING_SET", "_ACCELERATOR_WORKING_SET"):
        monkeypatch.setattr(blocks, name, 64)
    n, c, e = 3000, 4, 8
    q, keys = (in_half(randn(1, *shape), dtype) for shape in ((n, 1, e), (c, e)))
    weights = torch.ones(1, n, 1, device=device, dtype=torch.float64)
    indices = torch.zeros(1, n, 1, device=device, dtype=torch.int64)
    gradients = []
    for kind in (torch.float64, dtype):
        leaf = keys.to(kind).requires_grad_()
        given = (q.to(kind), leaf, weights.to(kind), indices, None, None, c)
        gradients.append(torch.autograd.grad(attend_fused(*given).sum() / 100, leaf)[0].double())
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 2 * torch.finfo(dtype).eps


@HALF
def test_second_derivatives(device: torch.device, make_attention: Any, dtype: torch.dtype) -> None:
    module = make_attention(impl="absorbed")
    generator = torch.Generator().manual_seed(3)
    queries, memories = (
        torch.randn(2, n, 6, generator=generator).to(device, dtype) for n in (3, 8)
    )
    found = []
    for kind in (torch.float64, dtype):
        x = queries.to(kind).requires_grad_()
        out = module.to(kind)(x, memories.to(kind))
        (first,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), x)
        found.append(second.double())
    torch.testing.assert_close(found[1], found[0], atol=0.1 * float(found[0].abs().max()), rtol=0)


def test_positions_after_meta_initialisation(device: torch.device) -> None:
    with torch.device("meta"):
        module = SinusoidalPosition(7)
    module = module.to_empty(device=device)
    module.reset_parameters()
    expected = SinusoidalPosition(7).to(device)
    assert torch.equal(module.inv_freqs, expected.inv_freqs)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_empty_memory_gives_zero_to_any_query(
    make_attention: Any, randn: Any, bad: float
) -> None:
    queries = torch.full_like(randn(2, 3, 6), bad)
    assert make_attention()(queries, randn(2, 0, 6)).eq(0.0).all()
