"""The examples of the README run as they stand, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shared_core.testing import python_blocks

README = Path(__file__).parents[1] / "README.md"
BLOCKS = python_blocks(README)


@pytest.fixture
def _as_torchrun_starts_one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) >= 8


@pytest.mark.usefixtures("_as_torchrun_starts_one_process")
def test_the_examples_run_one_after_the_other() -> None:
    namespace = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["y"].shape == namespace["x"].shape
    assert torch.equal(namespace["more"].isfinite().all(), torch.tensor(True))
