"""A small model and tokens, the same for every test that does not care which."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from memformer import Memformer
from shared_core.testing import displace

TOKENS = 11
LENGTH = 9
SETTINGS: dict[str, Any] = {
    "dim": 12,
    "num_memory_slots": 3,
    "mem_update_attn_heads": 3,
    "enc_num_tokens": TOKENS,
    "enc_depth": 2,
    "enc_heads": 2,
    "enc_max_seq_len": LENGTH,
    "dec_num_tokens": TOKENS,
    "dec_depth": 2,
    "dec_heads": 3,
    "dec_max_seq_len": LENGTH,
}


class MakeModel(Protocol):
    def __call__(self, **changes: Any) -> Memformer: ...


class Tokens(Protocol):
    def __call__(self, *shape: int, seed: int = 1) -> Tensor: ...


@pytest.fixture(params=["gru", "bmn"])
def writer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings() -> dict[str, Any]:
    """What `make_model` builds, as constructor arguments."""
    return dict(SETTINGS)


@pytest.fixture
def make_model(device: torch.device) -> MakeModel:
    """In float64, always with the same weights, none of them at its initial value."""

    def make(**changes: Any) -> Memformer:
        torch.manual_seed(0)
        return displace(Memformer(**{**SETTINGS, **changes}).to(device, torch.float64))

    return make


@pytest.fixture
def tokens(device: torch.device) -> Tokens:
    def make(*shape: int, seed: int = 1) -> Tensor:
        return torch.randint(TOKENS, shape, generator=torch.Generator().manual_seed(seed)).to(
            device
        )

    return make
