"""Small models and sequences, the same for every test that does not care which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from feedback_transformer import FeedbackTransformer, oracle
from shared_core.testing import displace, normal

SETTINGS: dict[str, Any] = {
    "num_tokens": 11,
    "dim": 6,
    "depth": 2,
    "mem_len": 5,
    "heads": 2,
    "dim_head": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "segments of two": {},
    "segments of one": {"seq_len": 1},
    "segments of four": {"seq_len": 4, "mem_len": 6},
    "no memory": {"mem_len": 0, "seq_len": 3},
    "long memory": {"mem_len": 100, "seq_len": 3},
    "last layer alone": {"keep_last_hidden": True},
    "paper": {"shared_kv": False, "norm_memory": True, "seq_len": 1},
    "keys for each layer": {"shared_kv": False, "seq_len": 3},
    "normalised memory": {"norm_memory": True},
}


class Kit:
    """What the tests need on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def make(self, **changes: Any) -> FeedbackTransformer:
        """A model of width 6 and two layers, in float64, always with the same weights."""
        torch.manual_seed(0)
        return displace(FeedbackTransformer(**(SETTINGS | changes)).to(self.device, torch.float64))

    def normal(self, *shape: int, seed: int = 1) -> Tensor:
        return normal(*shape, seed=seed, device=self.device)

    def tokens(self, b: int, n: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(SETTINGS["num_tokens"], (b, n), generator=generator).to(self.device)

    def mask(self, b: int, n: int, seed: int = 1) -> Tensor:
        """About two thirds take part; in the first row the first token does not."""
        mask = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < 0.65
        mask[0, 0] = False
        mask[-1, -1] = True
        return mask.to(self.device)

    def by_oracle(
        self,
        model: FeedbackTransformer,
        embeddings: Tensor,
        parameters: dict[str, Tensor],
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Normalised states (b, n, d) by loops."""
        rows = []
        for row in range(len(embeddings)):
            states, _ = oracle.run(
                embeddings[row],
                parameters,
                depth=model.depth,
                heads=model.heads,
                seq_len=model.seq_len,
                mem_len=model.mem_len,
                keep_last_hidden=model.keep_last_hidden,
                mask=None if mask is None else mask[row].tolist(),
                context=None if context is None else context[row],
                context_mask=None if context_mask is None else context_mask[row].tolist(),
            )
            rows.append(torch.stack([oracle.norm(state, parameters, "norm") for state in states]))
        return torch.stack(rows)


@pytest.fixture(scope="session")
def kit(device: torch.device) -> Kit:
    return Kit(device)


@pytest.fixture(params=VARIANTS)
def changes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every kind of memory and segment, as constructor arguments."""
    return dict(VARIANTS[request.param])


@pytest.fixture(params=["fused", "plain"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whole segments with gradients by hand, or operations that autograd knows."""
    if request.param == "plain":
        monkeypatch.setattr("feedback_transformer.sequence.can_fuse", lambda *_: False)
    return str(request.param)
