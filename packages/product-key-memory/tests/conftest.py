"""Small layers and tokens, the same for every test that does not care which."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from product_key_memory import PKM

# The tensors of the tests are tiny. A second thread has nothing to do, and where other processes
# keep the machine busy the threads wait for each other many times longer than they work.
torch.set_num_threads(1)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"use_layernorm": False},
    "bare": {"query_norm": "none", "non_competitive_gates": True},
    "rectangular": {"num_keys": [4, 9], "gate": "sigmoid", "key_norm": True},
    "concat": {"concat_values_and_combine": True},
    "gated": {"gated_output": True},
    "experts": {"experts": True, "gate": "relu"},
    "everything": {
        "query_norm": "batch",
        "num_keys": [9, 4],
        "key_norm": True,
        "pre_layernorm": True,
        "norm_output": True,
        "gated_output": True,
        "experts": True,
        "gate": "sigmoid",
    },
    "everything concatenated": {
        "key_norm": True,
        "pre_layernorm": True,
        "norm_output": True,
        "gated_output": True,
        "concat_values_and_combine": True,
    },
}


class MakePKM(Protocol):
    def __call__(self, **changes: Any) -> PKM: ...


class Randn(Protocol):
    def __call__(
        self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64
    ) -> Tensor: ...


@pytest.fixture(params=[pytest.param(changes, id=name) for name, changes in VARIANTS.items()])
def changes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every kind of layer in turn, as constructor arguments."""
    return dict(request.param)


@pytest.fixture(params=["everything", "everything concatenated"])
def everything(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The two that have all between them, for tests too long to go through every kind."""
    return dict(VARIANTS[request.param])


@pytest.fixture
def make_pkm(device: torch.device) -> MakePKM:
    """A layer of width 12 with 7 x 7 slots, in float64, always with the same weights.

    None of them at its initial value: ones and zeros hide mistakes.
    """

    def make(**changes: Any) -> PKM:
        settings = {"dim": 12, "heads": 2, "num_keys": 7, "topk": 4, "dim_head": 6}
        torch.manual_seed(0)
        pkm = PKM(**(settings | changes)).to(device, torch.float64)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in pkm.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter))
        return pkm

    return make


@pytest.fixture
def randn(device: torch.device) -> Randn:
    """Normal numbers that depend on the seed alone."""

    def make(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return make
