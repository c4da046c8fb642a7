"""Batch normalisation with a mask: torch's own on the tokens that the mask keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from product_key_memory import MaskedBatchNorm1D
from shared_core.testing import assert_compiles, assert_masked_ignored, assert_portable

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.4, "eps": 1e-2},
    "cumulative": {"momentum": None},
    "no affine map": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def pair(device: torch.device, features: int = 3, **options: Any) -> list[nn.BatchNorm1d]:
    """Two equal norms in float64 that have seen something else already."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(features, **options).to(device, torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(features).to(parameter))
    norm(1 + 2 * torch.randn(7, features).to(device, torch.float64))
    return [norm, copy.deepcopy(norm)]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, x in ours.state_dict().items():
        torch.testing.assert_close(x, expected[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [pytest.param(o, id=name) for name, o in OPTIONS.items()])
@settings(max_examples=30)
@given(
    leading=st.sampled_from([(9,), (3, 4), (2, 3, 2), (1, 9)]),
    masked=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_torch_on_trimmed_tokens(
    device: torch.device,
    options: dict[str, Any],
    leading: tuple[int, ...],
    masked: bool,
    training: bool,
    seed: int,
) -> None:
    """Outputs, gradients, and running statistics after each of three batches."""
    fn, plain = pair(device, **options)
    norm = MaskedBatchNorm1D(fn).train(training)
    plain.train(training)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        x = 3 + 2 * torch.randn(*leading, 3, generator=generator, dtype=torch.float64)
        keep = torch.rand(leading, generator=generator) < (0.6 if masked else 2)
        # torch refuses a single token.
        keep.flatten()[:2] = True
        x, keep = x.to(device).requires_grad_(), keep.to(device)
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device)
        out = norm(x, keep if masked else None)
        expected = plain(x[keep])
        torch.testing.assert_close(out[keep], expected, atol=1e-11, rtol=0)
        assert out[~keep].equal(x[~keep])
        wanted = [x, *fn.parameters()]
        actual = torch.autograd.grad((out * weight)[keep].sum(), wanted)
        wanted = [x, *plain.parameters()]
        slopes = torch.autograd.grad((expected * weight[keep]).sum(), wanted)
        for a, e in zip(actual, slopes, strict=True):
            torch.testing.assert_close(a, e, atol=1e-10, rtol=0)
        assert_same_state(fn, plain)


@pytest.mark.parametrize("training", [True, False])
def test_masked_tokens_have_no_influence(device: torch.device, training: bool) -> None:
    norm = MaskedBatchNorm1D(pair(device)[0]).train(training)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).to(device)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]], device=device).bool()

    def kept(x: Tensor, mask: Tensor) -> Tensor:
        # The others are as they were, so they must not count as outputs.
        return norm(x, mask).masked_fill(~mask[..., None], 0.0)

    assert_masked_ignored(kept, x, mask, parameters=list(norm.parameters()))
    states = []
    for rubbish in (0.0, 1e9, torch.nan, torch.inf):
        other = MaskedBatchNorm1D(pair(device)[0]).train(training)
        other(torch.where(mask[..., None], x, rubbish), mask)
        assert all(y.isfinite().all() for y in other.state_dict().values())
        states.append(other)
    for state in states[1:]:
        assert_same_state(state, states[0])


@pytest.mark.parametrize("training", [True, False])
def test_no_token_at_all(device: torch.device, training: bool) -> None:
    fn, before = pair(device)
    norm = MaskedBatchNorm1D(fn).train(training)
    x = torch.randn(2, 3, 3, device=device, dtype=torch.float64).requires_grad_()
    out = norm(x, torch.zeros(2, 3, dtype=torch.bool, device=device))
    assert out.equal(x)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for shape in ((0, 3), (0, 5, 3), (2, 0, 3)):
        for mask in (None, torch.ones(shape[:-1], dtype=torch.bool, device=device)):
            empty = norm(torch.zeros(shape, device=device, dtype=torch.float64), mask)
            assert empty.shape == shape
    assert_same_state(fn, before)


def test_a_single_token(device: torch.device) -> None:
    """Kept by a mask or alone in its batch: its deviation from itself is 0, and tells nothing."""
    fn, other = pair(device)
    before = copy.deepcopy(fn)
    x = torch.randn(1, 4, 3, device=device, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, False]], device=device)
    masked = MaskedBatchNorm1D(fn)(x, mask)
    torch.testing.assert_close(masked[mask], fn.bias[None].detach())
    alone = MaskedBatchNorm1D(other)(x[mask])
    torch.testing.assert_close(alone, masked[mask])
    assert_same_state(fn, before)
    assert_same_state(other, before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_vector(device: torch.device, masked: bool, training: bool) -> None:
    """One token without any leading dimension."""
    norm = MaskedBatchNorm1D(pair(device)[0]).train(training)
    x = torch.randn(3, device=device, dtype=torch.float64)
    mask = torch.tensor(True, device=device) if masked else None
    torch.testing.assert_close(norm(x, mask), norm(x[None])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Sums over many tokens neither overflow nor lose the small ones."""
    fn, plain = (norm.float() for norm in pair(device))
    norm = MaskedBatchNorm1D(fn.to(dtype))
    plain.load_state_dict(fn.state_dict())
    generator = torch.Generator().manual_seed(0)
    x = (60 + torch.randn(3000, 3, generator=generator)).to(device, dtype)
    mask = torch.rand(3000, generator=generator).to(device) < 0.9
    out = norm(x, mask)
    assert out.dtype == dtype
    expected = plain(x.float()[mask])
    torch.testing.assert_close(out[mask].float(), expected, atol=0.05, rtol=0.05)
    for name, y in fn.state_dict().items():
        torch.testing.assert_close(y.float(), plain.state_dict()[name].float(), atol=0.1, rtol=0.02)


def test_evaluation_sees_each_token_for_itself(device: torch.device) -> None:
    norm = MaskedBatchNorm1D(pair(device)[0]).eval()
    x = torch.randn(4, 5, 3, device=device, dtype=torch.float64)
    mask = torch.rand(4, 5, device=device) < 0.5
    torch.testing.assert_close(norm(x, mask)[mask], norm(x)[mask], atol=1e-12, rtol=0)
    torch.testing.assert_close(norm(x)[2, 3], norm(x[2, 3:4])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(device: torch.device, training: bool) -> None:
    norm = MaskedBatchNorm1D(pair(device, track_running_stats=not training)[0]).train(training)
    x = torch.randn(2, 4, 3, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]], device=device).bool()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: norm(x, mask), (x,))


@pytest.mark.parametrize("training", [True, False])
def test_portable_and_compiles(device: torch.device, training: bool) -> None:
    def build() -> nn.Module:
        return MaskedBatchNorm1D(nn.BatchNorm1d(3)).train(training)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, generator=generator).to(device)
    mask = (torch.rand(2, 5, generator=generator) < 0.7).to(device)
    assert_portable(build, (x, mask), device)
    if not training:
        return
    assert_compiles(build().to(device), (x, mask))
    # The compiled one counts as the eager one does.
    eager, other = build().to(device), build().to(device)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        eager(x, mask)
        compiled(x, mask)
    for name, y in eager.state_dict().items():
        torch.testing.assert_close(y, other.state_dict()[name])
    torch.compiler.reset()
