"""Small layers and sequences, the same for every test that does not care which."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch

from htm_pytorch import HTMAttention, HTMBlock
from shared_core.testing import displace, load_beside

# The tensors of the tests are tiny. A second thread has nothing to do, and where other processes
# keep the machine busy the threads wait for each other many times longer than they work.
torch.set_num_threads(1)

# What the tests of stores import. They are imported by path, so it would not be found beside them.
load_beside(__file__, "memories")

SETTINGS: dict[str, Any] = {
    "dim": 6,
    "heads": 2,
    "topk_mems": 2,
    "mem_chunk_size": 3,
    "dim_head": 4,
}


class Make(Protocol):
    def __call__(self, **changes: Any) -> Any: ...


def make(cls: type[torch.nn.Module], device: torch.device, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return displace(cls(**(SETTINGS | changes)).to(device, torch.float64))


@pytest.fixture(scope="session")
def make_attention(device: torch.device) -> Make:
    """An attention of width 6 to 2 chunks of 3, in float64, always with the same weights."""
    return lambda **changes: make(HTMAttention, device, changes)


@pytest.fixture(scope="session")
def make_block(device: torch.device) -> Make:
    return lambda **changes: make(HTMBlock, device, changes)


@pytest.fixture(params=["absorbed", "projected"], scope="session")
def impl(request: pytest.FixtureRequest) -> str:
    """Both ways to compute it, in turn."""
    return str(request.param)
