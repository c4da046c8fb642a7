"""The examples of the README run as they stand, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared_core.testing import python_blocks

README = Path(__file__).parents[1] / "README.md"
BLOCKS = python_blocks(README)


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) >= 4


def test_the_examples_run_one_after_the_other() -> None:
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["written"].shape == (1, 20)
