"""`FeedForward` against its formula and wherever modules go; `eval_mode`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from shared_core import FeedForward, eval_mode
from shared_core.testing import assert_compiles, assert_exports, assert_portable

BOTH = pytest.mark.parametrize("gated", [False, True])


@BOTH
def test_feed_forward_equals_its_formula(device: torch.device, gated: bool) -> None:
    layer = FeedForward(3, 5, gated=gated).to(device, torch.float64)
    x = torch.randn(2, 4, 3, dtype=torch.float64, device=device)
    hidden = x @ layer.inner.weight.T + layer.inner.bias
    assert hidden.shape[-1] == (30 if gated else 15)
    values, gates = (hidden[..., :15], hidden[..., 15:]) if gated else (1.0, hidden)
    hidden = values * gates * (1 + torch.erf(gates / math.sqrt(2))) / 2
    expected = hidden @ layer.outer.weight.T + layer.outer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_feed_forward_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in FeedForward(3).named_parameters()}
    expected = {"inner.weight": (12, 3), "inner.bias": (12,)}
    assert shapes == expected | {"outer.weight": (3, 12), "outer.bias": (3,)}
    assert FeedForward(3, gated=True).inner.weight.shape == (24, 3)
    assert FeedForward(3, 2).outer.weight.shape == (3, 6)


def test_feed_forward_any_leading_dimensions() -> None:
    layer = FeedForward(3)
    for shape in ((3,), (0, 3), (2, 0, 3), (2, 1, 4, 3)):
        assert layer(torch.randn(shape)).shape == shape


def test_dropout_acts_on_the_hidden_features() -> None:
    layer = FeedForward(4, 50, dropout=0.5)
    x = torch.randn(1, 4)
    seen: list[Any] = []
    layer.outer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(x)
    layer.eval()(x)
    trained, evaluated = seen
    dropped = trained == 0
    assert 60 < int(dropped.sum()) < 140
    torch.testing.assert_close(trained[~dropped], 2 * evaluated[~dropped])
    assert (FeedForward(4, dropout=1.0)(x) == FeedForward(4)(x)).sum() == 0


def test_feed_forward_refuses() -> None:
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        FeedForward(0)
    with pytest.raises(ValueError, match="mult must be at least 1, got 0"):
        FeedForward(3, 0)
    for dropout in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"dropout must be from 0 to 1, got {dropout}"):
            FeedForward(3, dropout=dropout)
    for shape in ((2, 4), ()):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., 3\), got shape \("):
            FeedForward(3)(torch.ones(shape))
    with pytest.raises(TypeError):
        FeedForward(3, glu=True)  # type: ignore[call-arg]


@BOTH
def test_feed_forward_goes_everywhere(device: torch.device, gated: bool) -> None:
    x = torch.randn(2, 5, 3)
    assert_portable(partial(FeedForward, 3, gated=gated), (x,), device)
    layer = FeedForward(3, gated=gated).to(device)
    assert_compiles(layer, (x.to(device),))
    length = torch.export.Dim("length", max=50)
    other = torch.randn(2, 9, 3, device=device)
    assert_exports(layer, (x.to(device),), ({1: length},), (other,))


def test_feed_forward_with_inductor(device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    assert_compiles(FeedForward(3, gated=True).to(device), (x,), backend="inductor")


@BOTH
def test_feed_forward_gradients_twice(gated: bool) -> None:
    layer = FeedForward(2, 2, gated=gated).double()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def flags(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("mixed", [[], [0], [1], [0, 3], [0, 1, 2, 3]])
def test_eval_mode_restores_every_flag(mixed: list[int]) -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    parts = list(module.modules())
    for i in mixed:
        parts[i].training = False
    before = flags(module)
    with eval_mode(module) as same:
        assert same is module
        assert not any(flags(module))
    assert flags(module) == before

    with pytest.raises(KeyError, match="inside"), eval_mode(module):
        raise KeyError("inside")
    assert flags(module) == before


def test_eval_mode_nests_and_survives_a_failing_eval() -> None:
    module = nn.Sequential(nn.Dropout())
    with eval_mode(module):
        with eval_mode(module[0]):
            pass
        assert flags(module) == [False, False]
    assert flags(module) == [True, True]

    class Half(nn.Sequential):
        def train(self, mode: bool = True) -> Half:
            super().train(mode)
            raise RuntimeError("no")

    half = Half(nn.Dropout())
    with pytest.raises(RuntimeError, match="no"), eval_mode(half):
        pass
    assert flags(half) == [True, True]
