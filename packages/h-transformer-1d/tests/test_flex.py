"""The flex_attention path: one kernel over the concatenated pyramid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from h_transformer_1d import h_attention
from h_transformer_1d.oracle import h_attention_oracle

MODES = [
    pytest.param({"causal": True, "scheme": "sibling"}, id="causal-sibling"),
    pytest.param({"causal": True, "scheme": "neighbor"}, id="causal-neighbor"),
    pytest.param({"causal": False, "scheme": "sibling"}, id="bidirectional-sibling"),
    pytest.param({"causal": False, "scheme": "neighbor"}, id="bidirectional-neighbor"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 33, 100])
@pytest.mark.parametrize("options", ["plain", "mask", "everything"])
def test_flex_forward_equals_oracle(
    device: torch.device, mode: dict[str, Any], n: int, options: str
) -> None:
    generator = torch.Generator().manual_seed(n)
    heads = 2 if options == "everything" else 4
    q = torch.randn(2, 4, n, 16, generator=generator).to(device)
    k, v = torch.randn(2, 2, heads, n, 16, generator=generator).to(device)
    mask = bias = None
    if options in ("mask", "everything"):
        mask = (torch.rand(2, n, generator=generator) < 0.6).to(device)
        mask[1, n // 2 :] = False
    if options == "everything":
        bias = torch.randn(3, 4, generator=generator).to(device)
    settings = {**mode, "block_size": 8, "mask": mask}
    with torch.no_grad():
        out = h_attention(q, k, v, level_bias=bias, impl="flex", **settings)
        expected = h_attention_oracle(
            q.double(),
            k.double(),
            v.double(),
            level_bias=None if bias is None else bias.double(),
            **settings,
        )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
