"""Filters against a plain loop and at their edges; the draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from shared_core import filter_logits, sample, top_k
from shared_core.testing import assert_compiles

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1},
]


def probabilities(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [w / sum(weights) for w in weights]


def kept(out: Tensor) -> set[int]:
    return set(out.isfinite().nonzero().flatten().tolist())


finite = st.integers(-60, 60).map(lambda x: x / 10)
vocabulary = st.lists(finite, min_size=1, max_size=12, unique=True)


@given(
    vocabulary,
    st.none() | st.integers(1, 14),
    st.none() | st.floats(0, 1),
    st.none() | st.floats(0, 1),
)
def test_filters_equal_a_loop(
    logits: list[float], k: int | None, p: float | None, m: float | None
) -> None:
    best = sorted(range(len(logits)), key=lambda i: -logits[i])
    if k is not None:
        best = best[:k]
    if p is not None:
        share = probabilities([logits[i] for i in best])
        # Nobody can tell on which side of the border rounding falls.
        sums = [sum(share[:i]) for i in range(1, len(best) + 1)]
        assume(p in (0, 1) or all(abs(total - p) > 1e-9 for total in sums))
        best = [i for i, so_far in zip(best, [0.0, *sums], strict=False) if so_far < p or p == 1]
        best = best or [max(range(len(logits)), key=logits.__getitem__)]
    if m is not None:
        share = probabilities([logits[i] for i in best])
        assume(all(abs(s - m * share[0]) > 1e-9 for s in share[1:]))
        best = [i for i, s in zip(best, share, strict=True) if s >= m * share[0]]
    x = torch.tensor(logits, dtype=torch.float64)
    out = filter_logits(x, top_k=k, top_p=p, min_p=m)
    assert kept(out) == set(best)
    assert torch.equal(out[best], x[best])
    assert (out[~out.isfinite()] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filters_in_every_dtype(
    device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Half precision is compared in float32, so it keeps what float32 keeps."""
    x = torch.randn(3, 2, 40).to(device, dtype)
    out = filter_logits(x, **options)
    assert out.dtype == dtype
    assert out.device == x.device
    wide = filter_logits(x.to(torch.promote_types(dtype, torch.float32)), **options)
    assert torch.equal(out.isfinite(), wide.isfinite())
    assert torch.equal(out[out.isfinite()], x[out.isfinite()])
    assert 0 < out.isfinite().sum() < x.numel()


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"top_k": 500}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_p": 1, "min_p": 0}],
    ids=str,
)
def test_filters_that_keep_everything(options: dict[str, Any]) -> None:
    # The last ones have probability 0 in float32.
    x = torch.tensor([[5.0, 4.0, 4.0, -200.0, -300.0]])
    assert torch.equal(filter_logits(x, **options), x)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_filters_that_keep_the_most_likely(options: dict[str, Any]) -> None:
    x = torch.randn(20, 30)
    out = filter_logits(x, **options)
    assert (out.isfinite().sum(-1) == 1).all()
    assert torch.equal(out.argmax(-1), x.argmax(-1))


def test_ties() -> None:
    x = torch.zeros(2, 7)
    assert (filter_logits(x, top_k=3).isfinite().sum(-1) == 3).all()
    assert (filter_logits(x, top_p=0.5).isfinite().sum(-1) == 4).all()
    assert (filter_logits(x, top_p=0.0).isfinite().sum(-1) == 1).all()
    assert torch.equal(filter_logits(x, min_p=1.0), x)
    half = torch.tensor([1.0, 1.0, -math.inf])
    assert kept(filter_logits(half, top_p=0.5)) in ({0}, {1})
    assert kept(filter_logits(half, top_p=0.51)) == {0, 1}


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.999}, {"min_p": 1e-9}], ids=str)
def test_minus_infinity_stays(options: dict[str, Any]) -> None:
    x = torch.tensor([1.0, -math.inf, 0.5, -math.inf, -math.inf])
    out = filter_logits(x, **options)
    assert torch.equal(out, x)
    nothing = torch.full((3,), -math.inf)
    assert torch.equal(filter_logits(nothing, **options), nothing)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plus_infinity_is_kept(options: dict[str, Any]) -> None:
    x = torch.tensor([1.0, math.inf, 0.5])
    assert filter_logits(x, **options)[1] == math.inf


def test_filters_act_one_after_the_other() -> None:
    x = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two kept first, the better alone has 0.57.
    assert kept(filter_logits(x, top_k=2, top_p=0.55)) == {0}
    assert kept(filter_logits(x, top_p=0.55)) == {0, 1}
    assert kept(filter_logits(x, top_p=0.75, min_p=0.6)) == {0, 1}


def test_filters_do_not_write_into_their_input() -> None:
    x = torch.randn(2, 9)
    before = x.clone()
    for options in OPTIONS:
        filter_logits(x, **options)
    top_k(x)
    sample(x)
    assert torch.equal(x, before)


def test_filters_refuse() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
        filter_logits(x.long())
    for shape in ((), (2, 0)):
        with pytest.raises(ValueError, match=r"with V >= 1, got shape \("):
            filter_logits(torch.zeros(shape))
    for k in (2.0, True, "3"):
        with pytest.raises(TypeError, match=f"top_k must be an integer, got {k!r}"):
            filter_logits(x, top_k=k)  # type: ignore[arg-type]
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"top_k must be at least 1, got {k}"):
            filter_logits(x, top_k=k)
    for name in ("top_p", "min_p"):
        for share in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be from 0 to 1, got {share}"):
                filter_logits(x, **{name: share})


@pytest.mark.parametrize(
    ("thres", "size", "count"),
    [(0.9, 40, 4), (0.9, 20, 2), (0.9, 19, 1), (0.9, 5, 1), (0.0, 7, 7), (1.0, 7, 1), (0.5, 7, 3)],
)
def test_top_k_keeps_a_share(thres: float, size: int, count: int) -> None:
    x = torch.randn(3, size)
    out = top_k(x, thres)
    assert (out.isfinite().sum(-1) == count).all()
    assert torch.equal(out.topk(count).values, x.topk(count).values)
    assert torch.equal(top_k(x), top_k(x, thres=0.9))


def test_top_k_refuses() -> None:
    for thres in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"thres must be from 0 to 1, got {thres}"):
            top_k(torch.zeros(2, 3), thres)
    with pytest.raises(TypeError, match="logits must be floating point"):
        top_k(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="with V >= 1"):
        top_k(torch.zeros(2, 0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sample_draws_from_the_softmax(device: torch.device, temperature: float) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, -1.0, -math.inf], device=device)
    draws = sample(x.expand(40_000, 5), temperature=temperature)
    assert draws.shape == (40_000,)
    assert draws.dtype == torch.int64
    expected = (x / temperature).softmax(0)
    frequencies = draws.bincount(minlength=5) / 40_000
    torch.testing.assert_close(frequencies, expected, atol=0.012, rtol=0)
    assert frequencies[4] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_the_most_likely(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randint(3, (50, 40)).to(device, dtype)
    first = [row.index(max(row)) for row in x.tolist()]
    assert sample(x, temperature=0).tolist() == first


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_at_extreme_temperatures(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(200, 9).to(device, dtype)
    x[:, 4] = -math.inf
    best = x.argmax(-1)
    assert torch.equal(sample(x, temperature=0), best)
    for temperature in (5e-324, 1e-40, 1e-30):
        drawn = sample(x, temperature=temperature)
        assert torch.equal(x.gather(1, drawn[:, None]), x.gather(1, best[:, None]))
    hot = sample(x, temperature=1e300)
    assert set(hot.tolist()) == {0, 1, 2, 3, 5, 6, 7, 8}


def test_sample_of_large_logits() -> None:
    x = torch.tensor([[6e4, 6e4 - 1, -6e4]], dtype=torch.float64).expand(1000, 3)
    for dtype in DTYPES[:2]:
        draws = sample(x.to(dtype), temperature=0.5)
        assert set(draws.tolist()) == {0, 1}


def test_sample_uses_the_generator(device: torch.device) -> None:
    x = torch.zeros(50, 100, device=device)
    first, second = (
        sample(x, generator=torch.Generator(device).manual_seed(seed)) for seed in (1, 2)
    )
    state = torch.get_rng_state()
    again = sample(x, generator=torch.Generator(device).manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_of_an_empty_batch() -> None:
    for temperature in (0.0, 1.0):
        assert sample(torch.zeros(0, 3), temperature=temperature).shape == (0,)


def test_sample_refuses() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="logits must be floating point"):
        sample(x.long())
    for shape in ((3,), (2, 1, 3)):
        with pytest.raises(ValueError, match=r"logits must be \(b, V\), got shape \("):
            sample(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"V >= 1, got shape \(2, 0\)"):
        sample(torch.zeros(2, 0))
    for temperature in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"finite and at least 0, got {temperature}"):
            sample(x, temperature=temperature)
    with pytest.raises(ValueError, match="generator is on cpu, but the tokens are on meta"):
        sample(x.to("meta"), generator=torch.Generator())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_traced(device: torch.device, options: dict[str, Any]) -> None:
    x = torch.randn(2, 11, device=device)

    def share(x: Tensor) -> Tensor:
        return filter_logits(x, **options).softmax(-1)

    assert_compiles(share, (x,))
    assert_compiles(lambda x: top_k(x).softmax(-1), (x,))
    assert_compiles(lambda x: sample(x, temperature=0), (x.long().float(),))


def test_sample_traced(device: torch.device) -> None:
    x = torch.randn(500, 11, device=device)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    drawn = []
    for function in (compiled, sample):
        torch.manual_seed(3)
        drawn.append(function(x, temperature=0.7))
    assert torch.equal(*drawn)


def test_on_the_meta_device() -> None:
    x = torch.zeros(2, 5, device="meta")
    assert sample(filter_logits(x, top_k=2, top_p=0.5, min_p=0.1)).shape == (2,)
    assert sample(top_k(x), temperature=0).device.type == "meta"


def test_gradients_reach_what_is_kept() -> None:
    x = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)
    for options in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.3}):
        out = filter_logits(x, **options).softmax(0)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(out[0], x)
        assert (gradient != 0).tolist() == [True, True, False]
