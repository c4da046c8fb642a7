"""Relative position bias: the rule of T5, and where queries are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_core import RelativePositionBias
from shared_core.testing import assert_compiles


def bucket(distance: int, bidirectional: bool, buckets: int, most: int) -> int:
    """The rule for one distance, in plain numbers."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance < 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(most / exact)
    return first + min(buckets - 1, exact + int(share * (buckets - exact) + 1e-6))


@given(
    distance=st.integers(-300, 300),
    bidirectional=st.booleans(),
    buckets=st.sampled_from([4, 8, 32, 64]),
    most=st.sampled_from([40, 128, 500]),
)
def test_buckets_follow_the_rule(
    distance: int, bidirectional: bool, buckets: int, most: int, device: torch.device
) -> None:
    bias = RelativePositionBias(
        1, bidirectional=bidirectional, num_buckets=buckets, max_distance=most
    )
    found = bias.buckets(torch.tensor([distance], device=device))
    assert found.item() == bucket(distance, bidirectional, buckets, most)


@given(
    n=st.integers(0, 9),
    m=st.integers(0, 9),
    first=st.none() | st.integers(-4, 12),
    bidirectional=st.booleans(),
)
def test_rows_are_queries_and_columns_keys(
    n: int, m: int, first: int | None, bidirectional: bool, device: torch.device
) -> None:
    bias = RelativePositionBias(3, bidirectional=bidirectional, num_buckets=8, max_distance=16)
    bias = bias.to(device, torch.float64)
    found = bias(n, m, first)
    assert found.shape == (3, n, m)
    start = m - n if first is None else first
    queries, keys = torch.arange(start, start + n), torch.arange(m)
    chosen = bias.buckets((queries[:, None] - keys).to(device))
    expected = bias.relative_attention_bias.weight[chosen].permute(2, 0, 1)
    assert torch.equal(found, expected)
    upstream = torch.linspace(-1.0, 1.0, found.numel(), device=device, dtype=torch.float64)
    weight = bias.relative_attention_bias.weight
    ours, theirs = (torch.autograd.grad(x, weight, upstream.view_as(x)) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_is_behind_and_what_comes_after() -> None:
    one_sided = RelativePositionBias(2)
    assert torch.equal(one_sided(4, 4).triu(1), one_sided(4, 4)[:, :1, :1].expand(2, 4, 4).triu(1))
    both = RelativePositionBias(2, bidirectional=True)(3, 3)
    assert not torch.equal(both, both.mT)


def test_compiles(device: torch.device) -> None:
    bias = RelativePositionBias(2).to(device)
    assert_compiles(lambda x: x + bias(*x.shape), [torch.randn(3, 5, device=device)], dynamic=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 2, "num_buckets": 5}, "num_buckets must be a multiple of 2, got 5"),
        ({"heads": 2, "num_buckets": 0}, "num_buckets must be a multiple of 2, got 0"),
        (
            {"heads": 2, "num_buckets": 6, "bidirectional": True},
            "num_buckets must be a multiple of 4, got 6",
        ),
        ({"heads": 2, "max_distance": 16}, "max_distance must be above 16, got 16"),
    ],
)
def test_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        RelativePositionBias(**options)


def test_says_that_a_length_is_negative() -> None:
    with pytest.raises(ValueError, match=r"^n and m must be at least 0, got -1 and 2$"):
        RelativePositionBias(2)(-1, 2)
