"""Each assertion on behaviour passes on a sound model and fails on one with the fault planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_core import masked_mean
from shared_core.testing import (
    assert_causal,
    assert_masked_ignored,
    assert_pieces_equal_whole,
    assert_prefix_consistent,
    assert_same_gradients,
)

Fn = Callable[..., Any]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def earlier(x: Tensor) -> Tensor:
    return x.double().cumsum(1)


# assert_causal

PEEKING: dict[str, Fn] = {
    "one ahead": lambda x: earlier(x) + x.double().roll(-1, 1),
    "the whole": lambda x: earlier(x) + x.double().mean(1, keepdim=True),
    "the last only": lambda x: earlier(x) + x[:, -1:].double(),
    "one pair": lambda x: torch.cat((earlier(x)[:, :3] + x[:, 4:5], earlier(x)[:, 3:]), dim=1),
    "a little": lambda x: earlier(x) + 1e-8 * x.double().roll(-1, 1),
}


def test_causal_passes() -> None:
    assert_causal(earlier, floats(2, 6, 3))
    assert_causal(earlier, torch.randint(0, 9, (2, 6)))
    assert_causal(lambda x: earlier(x).float(), floats(1, 2, 1), atol=1e-5)


@pytest.mark.parametrize("name", PEEKING)
def test_causal_fails(name: str) -> None:
    for x in (floats(2, 6, 3), torch.randint(0, 9, (2, 6))):
        with pytest.raises(AssertionError, match=r"tokens \d to \d changed, outputs before \d"):
            assert_causal(PEEKING[name], x)


def test_causal_needs_something_to_see() -> None:
    with pytest.raises(AssertionError, match="no change of any token changed any output"):
        assert_causal(torch.zeros_like, floats(2, 6, 3))
    with pytest.raises(AssertionError, match=r"outputs before 1: .*not close"):
        assert_causal(lambda x: x / 0 * 0, floats(2, 6, 3))
    with pytest.raises(ValueError, match="causality needs at least 2 tokens, got 1"):
        assert_causal(earlier, floats(2, 1, 3))
    with pytest.raises(ValueError, match="tokens that are all 0"):
        assert_causal(earlier, torch.zeros(2, 3, dtype=torch.long))


# assert_prefix_consistent


def test_prefix_consistent() -> None:
    assert_prefix_consistent(earlier, floats(2, 5, 3))
    for wrong in (lambda x: earlier(x) * x.shape[1], lambda x: earlier(x) / x[:, -1:]):
        with pytest.raises(AssertionError, match="prefix of 1 tokens"):
            assert_prefix_consistent(wrong, floats(2, 5, 3))
    # Wrong only where the length is odd.
    with pytest.raises(AssertionError, match="prefix of 1 tokens"):
        assert_prefix_consistent(lambda x: earlier(x) + x.shape[1] % 2, floats(2, 6, 3))
    with pytest.raises(ValueError, match="a prefix needs at least 2 tokens, got 1"):
        assert_prefix_consistent(earlier, floats(2, 1, 3))


# assert_pieces_equal_whole


def running(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    out = x.cumsum(1) + (0 if state is None else state)
    return out, out[:, -1:]


def test_pieces_equal_whole() -> None:
    x = floats(2, 7, 3)
    assert_pieces_equal_whole(earlier, running, x)
    assert_pieces_equal_whole(earlier, running, x, [(3, 4), (2, 2, 3)])
    start = torch.ones(2, 1, 3, dtype=torch.float64)
    assert_pieces_equal_whole(lambda x: earlier(x) + 1, running, x, state=start)


def test_pieces_fail() -> None:
    x = floats(2, 7, 3)

    def forgets(x: Tensor, _: Any) -> tuple[Tensor, Any]:
        return running(x, None)

    def only_even(x: Tensor, state: Tensor | None) -> tuple[Tensor, Any]:
        out, last = running(x, state)
        return out, last if x.shape[1] % 2 == 0 else last * 0

    def first_two_only(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        total, count = (None, 0) if state is None else state
        out, last = running(x, total if count < 2 else None)
        return out, (last, count + 1)

    with pytest.raises(AssertionError, match=r"pieces of \(1, 6\) tokens"):
        assert_pieces_equal_whole(earlier, forgets, x)
    assert_pieces_equal_whole(earlier, only_even, x, [(2, 5), (4, 3)])
    with pytest.raises(AssertionError, match=r"pieces of \(1, 6\) tokens"):
        assert_pieces_equal_whole(earlier, only_even, x)
    with pytest.raises(AssertionError, match=r"pieces of \(1, 1, 1, 1, 1, 1, 1\) tokens"):
        assert_pieces_equal_whole(earlier, first_two_only, x)
    for split in ((3, 3), (7,)):
        with pytest.raises(ValueError, match="a split needs 2 pieces or more of 7 tokens"):
            assert_pieces_equal_whole(earlier, running, x, [split])


# assert_masked_ignored

MASK = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])


def centred(x: Tensor, mask: Tensor) -> Tensor:
    """Sound: the masked mean is taken off, masked places hold what they may."""
    return (x - masked_mean(x, mask, 1)[:, None]) * 2


class Straight(torch.autograd.Function):
    """Zeroes what is masked, but hands it a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG004
        return x.where(mask, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: ARG004
        return grad + 1, None


def clean(x: Tensor, mask: Tensor) -> Tensor:
    return x.where(mask[..., None], 0)


LEAKING: dict[str, tuple[Fn, str]] = {
    "averages padding": (
        lambda x, _: x - x.mean(1, keepdim=True),
        "gradient of a masked place is not zero",
    ),
    "averages padding without gradient": (
        lambda x, _: x - x.detach().mean(1, keepdim=True),
        "output, other values in masked places",
    ),
    "zero times NaN": (
        lambda x, mask: x + (x * mask[..., None]).sum(1, keepdim=True),
        "output, nan in masked places",
    ),
    "zero times infinity": (
        lambda x, mask: x + (x.where(~x.isnan(), 0) * mask[..., None]).sum(1, keepdim=True),
        "output, inf in masked places",
    ),
    "gradient only": (
        lambda x, mask: x + Straight.apply(x, mask[..., None]).sum(1, keepdim=True),
        "gradient of a masked place is not zero",
    ),
    "NaN in the gradient": (
        lambda x, mask: clean(x, mask) + clean(x * x.detach().exp(), mask),
        "gradient, 1e4 in masked places",
    ),
    "not finite": (lambda x, mask: clean(x, mask) / 0, "an output is not finite"),
    "sees nothing": (
        lambda x, _: x * 0,
        "what the mask keeps has no influence either",
    ),
}


def test_masked_ignored_passes() -> None:
    assert_masked_ignored(centred, floats(2, 5, 3), MASK)
    ones = torch.ones(2, dtype=torch.bool)
    assert_masked_ignored(
        lambda x, mask: masked_mean(x, mask, 1), floats(2, 5, 3), MASK, output_mask=ones
    )
    table = floats(9, 3).requires_grad_()
    assert_masked_ignored(
        lambda x, mask: (centred(table[x], mask), x),
        torch.randint(0, 9, (2, 5)),
        MASK,
        parameters=[table],
    )
    assert_masked_ignored(lambda x, _: x * 2, torch.randint(0, 9, (2, 5)), MASK)


@pytest.mark.parametrize("name", LEAKING)
def test_masked_ignored_fails(name: str) -> None:
    fn, message = LEAKING[name]
    with pytest.raises(AssertionError, match=message):
        assert_masked_ignored(fn, floats(2, 5, 3), MASK)


def test_masked_ignored_fails_on_tokens() -> None:
    with pytest.raises(AssertionError, match="output, other values in masked places"):
        assert_masked_ignored(lambda x, _: x + x.sum(1, True), torch.randint(0, 9, (2, 5)), MASK)


def test_masked_ignored_fails_on_the_gradient_of_a_parameter() -> None:
    """Clean outputs and input gradients; the weight's gradient is 0 * NaN."""
    weight = floats(3, 3).requires_grad_()

    def fn(x: Tensor, mask: Tensor) -> Tensor:
        return clean(x @ weight, mask)

    assert_masked_ignored(fn, floats(2, 5, 3), MASK)
    with pytest.raises(AssertionError, match="gradient, nan in masked places, tensor 1"):
        assert_masked_ignored(fn, floats(2, 5, 3), MASK, parameters=[weight])


def test_masked_ignored_needs_both() -> None:
    x = floats(2, 5, 3)
    for mask in (torch.ones_like(MASK), torch.zeros_like(MASK), MASK.long()):
        with pytest.raises(ValueError, match="must be boolean and hold both True and False"):
            assert_masked_ignored(centred, x, mask)


# assert_same_gradients


def test_same_gradients_pass() -> None:
    x, y = torch.randn(3, 4), torch.randn(4)
    assert_same_gradients(lambda x, y: x @ y, lambda x, y: (x * y).sum(-1), (x, y))
    ids = torch.tensor([0, 2])
    assert_same_gradients(
        lambda x, i: (x[i], x), lambda x, _: [torch.stack([x[0], x[2]]), x], (x, ids)
    )
    # What takes no part has the gradient zero.
    assert_same_gradients(lambda x, _: x * 2, lambda x, y: x + x + 0 * y[0], (x, y))


@pytest.mark.parametrize(
    ("f", "g", "message"),
    [
        (lambda x: x * 2, lambda x: x * 2 + 1e-9, "outputs"),
        (lambda x: x * x, lambda x: x * x.detach(), "gradients"),
        (lambda x: (x, x), lambda x: x, "outputs: 2 tensors against 1"),
        (lambda x: x.float(), lambda x: x, "outputs"),
        (lambda x: x * 0, lambda x: x * 0, "every gradient is zero"),
        (lambda x: x.detach(), lambda x: x, "no output depends on anything"),
        (lambda x: (x * 0).sqrt(), lambda x: (x * 0).sqrt(), "gradients"),
        (lambda x: x / 0 * 0, lambda x: x / 0 * 0, "outputs"),
    ],
)
def test_same_gradients_fail(f: Fn, g: Fn, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_gradients(f, g, (torch.randn(3),))


def test_same_gradients_of_modules() -> None:
    layer = nn.Linear(3, 3).double()
    assert_same_gradients(layer, lambda x: x @ layer.weight.T + layer.bias, (torch.randn(2, 3),))
