"""Small layers and sequences, the same for every test that does not care which."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import pytest
import torch

from htm_pytorch import HTMAttention, HTMBlock
from shared_core.testing import load_beside

# Tests are imported by path, so it would not be found beside them.
memories = load_beside(__file__, "memories")


class Make(Protocol):
    def __call__(self, **changes: Any) -> Any: ...


@pytest.fixture(scope="session")
def make_attention(device: torch.device) -> Make:
    """An attention of width 6 to 2 chunks of 3, in float64, always with the same weights."""
    return partial(memories.make_module, HTMAttention, device)


@pytest.fixture(scope="session")
def make_block(device: torch.device) -> Make:
    return partial(memories.make_module, HTMBlock, device)


@pytest.fixture(params=["absorbed", "projected"], scope="session")
def impl(request: pytest.FixtureRequest) -> str:
    """Both ways to compute it, in turn."""
    return str(request.param)
