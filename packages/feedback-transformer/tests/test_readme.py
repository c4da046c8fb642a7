"""The examples of the README run as they stand, in order."""

from __future__ import annotations

from pathlib import Path

from shared_core.testing import run_blocks

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run_one_after_the_other() -> None:
    namespace = run_blocks(README, at_least=4)
    assert namespace["written"].shape == (1, 20)
