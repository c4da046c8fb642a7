"""Assertions that the test suites of all packages share. Never imported by a model."""

from __future__ import annotations

from .behaviour import (
    assert_causal,
    assert_masked_ignored,
    assert_pieces_equal_whole,
    assert_prefix_consistent,
    assert_same_gradients,
)
from .graphs import assert_compiles, assert_exports
from .messages import assert_refused
from .modules import load_beside
from .numbers import Randn, displace, normal, wave
from .parallel import assert_data_parallel
from .portability import assert_hub_round_trip, assert_portable
from .processes import run_ranks
from .readme import python_blocks, run_blocks

__all__ = [
    "Randn",
    "assert_causal",
    "assert_compiles",
    "assert_data_parallel",
    "assert_exports",
    "assert_hub_round_trip",
    "assert_masked_ignored",
    "assert_pieces_equal_whole",
    "assert_portable",
    "assert_prefix_consistent",
    "assert_refused",
    "assert_same_gradients",
    "displace",
    "load_beside",
    "normal",
    "python_blocks",
    "run_blocks",
    "run_ranks",
    "wave",
]
