"""Small layers and sequences, the same for every test that does not care which."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMAttention, HTMBlock
from shared_core.testing import load_beside

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


class Randn(Protocol):
    def __call__(
        self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64
    ) -> Tensor: ...


def filled(module: torch.nn.Module) -> None:
    """No parameter at its initial value: ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter))


def make(cls: type[torch.nn.Module], device: torch.device, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    module = cls(**(SETTINGS | changes)).to(device, torch.float64)
    filled(module)
    return module


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


@pytest.fixture(scope="session")
def randn(device: torch.device) -> Randn:
    """Normal numbers that depend on the seed alone."""

    def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw
