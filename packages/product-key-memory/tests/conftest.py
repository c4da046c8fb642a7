"""Small layers and tokens, the same for every test that does not care which."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch

from product_key_memory import PKM
from shared_core.testing import displace

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
        return displace(pkm)

    return make
