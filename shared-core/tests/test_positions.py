"""Relative position bias: the rule of T5."""

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


def test_each_distance_has_the_numbers_of_its_bucket(device: torch.device) -> None:
    bias = RelativePositionBias(3, num_buckets=8, max_distance=16).to(device)
    distances = torch.arange(-5, 25, device=device).view(5, 6)
    found = bias(distances)
    assert found.shape == (5, 6, 3)
    weight = bias.relative_attention_bias.weight
    for place, distance in enumerate(distances.flatten().tolist()):
        expected = weight[bucket(distance, False, 8, 16)]
        assert torch.equal(found.view(-1, 3)[place], expected)


def test_what_is_behind_and_what_comes_after() -> None:
    """One-sided, all keys after the query count as its own place."""
    after = torch.tensor([-1, -50, 0])
    assert RelativePositionBias(2).buckets(after).tolist() == [0, 0, 0]
    both = RelativePositionBias(2, bidirectional=True).buckets(torch.tensor([-3, 3, 0]))
    assert both.tolist() == [19, 3, 0]


def test_compiles(device: torch.device) -> None:
    bias = RelativePositionBias(2).to(device)
    distances = torch.arange(5, device=device)
    assert_compiles(bias, [distances], dynamic=True)


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
