"""Small models and token batches, the same for every test that does not care which."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from h_transformer_1d import HTransformer1D


class MakeModel(Protocol):
    def __call__(self, **changes: Any) -> HTransformer1D: ...


class MakeTokens(Protocol):
    def __call__(self, *shape: int, seed: int = 1) -> Tensor: ...


@pytest.fixture
def make_model(device: torch.device) -> MakeModel:
    """A model of 20 tokens, blocks of 4 and up to 64 positions, always with the same weights."""

    def make(**changes: Any) -> HTransformer1D:
        settings = {
            "num_tokens": 20,
            "dim": 16,
            "depth": 2,
            "max_seq_len": 64,
            "causal": True,
            "heads": 2,
            "dim_head": 8,
            "block_size": 4,
        }
        torch.manual_seed(0)
        return HTransformer1D(**(settings | changes)).to(device)

    return make


@pytest.fixture
def tokens(device: torch.device) -> MakeTokens:
    """Token ids from 1 to 19, so that 0 is free for padding."""

    def make(*shape: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, 20, shape, generator=generator).to(device)

    return make
