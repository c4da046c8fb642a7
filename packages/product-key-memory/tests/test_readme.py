"""The examples of the README run as they stand, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shared_core.testing import run_blocks

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def _as_torchrun_starts_one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_as_torchrun_starts_one_process")
def test_the_examples_run_one_after_the_other() -> None:
    namespace = run_blocks(README, at_least=8)
    assert namespace["y"].shape == namespace["x"].shape
    assert torch.equal(namespace["more"].isfinite().all(), torch.tensor(True))
