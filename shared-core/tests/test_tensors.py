"""`masked_mean`: against plain loops, at its edges, traced, in other dtypes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shared_core import masked_mean
from shared_core.testing import assert_compiles, assert_exports

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(st.integers(0, 3), st.integers(0, 6), st.integers(1, 3), st.booleans())
def test_masked_mean_equals_a_loop(b: int, n: int, d: int, whole: bool) -> None:
    x = torch.randn(b, n, d, dtype=torch.float64)
    mask = torch.rand((b, n, d) if whole else (b, n)) < 0.5
    out = masked_mean(x, mask, 1)
    assert out.shape == (b, d)
    for i in range(b):
        for j in range(d):
            column = mask[i, :, j] if whole else mask[i]
            kept = x[i, column, j]
            expected = kept.mean() if len(kept) else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(out[i, j], expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_masked_mean_over_every_dimension(device: torch.device, dim: int) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=device)
    mask = (torch.rand(3, 4) < 0.6).to(device)
    places = mask[:, :, None].expand(3, 4, 5)
    expected = x.where(places, 0).sum(dim) / places.sum(dim).clamp(min=1)
    torch.testing.assert_close(masked_mean(x, mask, dim), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(masked_mean(x, places, dim), expected, atol=1e-14, rtol=0)


def test_masked_mean_broadcasts_size_one() -> None:
    x = torch.randn(2, 3, 4, 5)
    mask = torch.rand(2, 1, 4) < 0.5
    expected = masked_mean(x, mask.expand(2, 3, 4), 2)
    torch.testing.assert_close(masked_mean(x, mask, 2), expected)
    kept = torch.tensor([[True], [False]])
    out = masked_mean(x, kept, 1)
    torch.testing.assert_close(out[0], x[0].mean(0))
    assert (out[1] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_mean_ignores_what_is_masked(device: torch.device, poison: float) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, device=device)
    mask = torch.tensor([[True, False] * 3, [False] * 6], device=device)
    poisoned = x.where(mask[..., None], poison).requires_grad_()
    out = masked_mean(poisoned, mask, 1)
    torch.testing.assert_close(out[0], x[0, ::2].mean(0))
    assert (out[1] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), poisoned)
    assert torch.equal(gradient, mask[..., None].expand_as(x).double() / 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_mean_keeps_the_dtype(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(1, 70_001, 1, dtype=dtype, device=device)
    mask = torch.ones(1, 70_001, dtype=torch.bool, device=device)
    out = masked_mean(x, mask, 1)
    assert out.dtype == dtype
    # A float16 sum would be infinite here.
    assert (out == 1).all()


def test_masked_mean_under_autocast(device: torch.device) -> None:
    x = torch.randn(2, 300, 3, device=device)
    mask = (torch.rand(2, 300) < 0.5).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = masked_mean(x, mask, 1)
    torch.testing.assert_close(out, masked_mean(x, mask, 1))


def test_masked_mean_refuses() -> None:
    x = torch.randn(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        masked_mean(x.long(), mask, 1)
    with pytest.raises(TypeError, match=r"mask must be boolean, got torch\.float32"):
        masked_mean(x, mask.float(), 1)
    with pytest.raises(ValueError, match="dim 3 is outside a tensor of 3 dimensions"):
        masked_mean(x, mask, 3)
    for shape in ((3,), (2, 4), (2, 3, 4, 1)):
        message = re.escape(f"mask {shape} does not have the dimensions of x (2, 3, 4)")
        with pytest.raises(ValueError, match=message):
            masked_mean(x, torch.ones(shape, dtype=torch.bool), 1)


def test_gradients_twice(device: torch.device) -> None:
    x = torch.randn(2, 5, 2, dtype=torch.float64, device=device, requires_grad=True)
    mask = (torch.rand(2, 5) < 0.6).to(device)

    def cubes(x: Tensor) -> Tensor:
        return masked_mean(x**3, mask, 1)

    assert torch.autograd.gradcheck(cubes, (x,))
    assert torch.autograd.gradgradcheck(cubes, (x,))


class Mean(nn.Module):
    """(b, n, d) -> (b, d)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(x, mask, 1)


@pytest.mark.parametrize("n", [7, 8])
def test_traced(device: torch.device, n: int) -> None:
    def inputs(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, n, 3, device=device), (torch.rand(2, n) < 0.5).to(device)

    assert_compiles(Mean(), inputs(n))
    assert_compiles(Mean(), inputs(n), dynamic=True)
    length = torch.export.Dim("length", min=5, max=100)
    dynamic = ({1: length}, {1: length})
    for other in (12, 13, 14, 15):
        assert_exports(Mean(), inputs(n), dynamic, inputs(other))


def test_on_the_meta_device() -> None:
    x = torch.ones(2, 7, 3, device="meta")
    out = Mean()(x, torch.ones(2, 7, device="meta", dtype=torch.bool))
    assert out.shape == (2, 3)
    assert out.device.type == "meta"
