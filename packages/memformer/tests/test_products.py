"""Linear layers by faster products: the same numbers, and PyTorch's own where somebody looks on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memformer import products
from memformer.products import feed_forward, multiply, project
from shared_core import FeedForward


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Activations of the products that oneDNN was asked for, of any size."""
    # Each type is tried once.
    products._has_product(torch.bfloat16)
    if not products._has_product(torch.float32):
        pytest.skip("PyTorch was built without oneDNN")
    found = []
    original = products._product

    def product(*args: Any) -> Tensor:
        found.append(args[3] if len(args) > 3 else "none")
        return original(*args)

    monkeypatch.setattr(products, "_product", product)
    monkeypatch.setattr(products, "ROWS", 1)
    monkeypatch.setattr(products, "NUMBERS", 1)
    return found


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(asked: list[str], dtype: torch.dtype, bias: bool) -> None:
    if not products._has_product(dtype):
        pytest.skip("this processor has no such products")
    layer = linear(bias).to(dtype)
    x = torch.randn(6, 4, 3, dtype=dtype).permute(2, 1, 0)
    with torch.no_grad():
        out = project(layer, x)
        near = {"atol": 1e-2, "rtol": 0.0} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(out, layer(x), **near)
    assert out.is_contiguous()
    assert asked == ["none"]


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(asked: list[str], bias: bool) -> None:
    layer = linear(bias)
    # Neither what comes in is contiguous, nor the gradient.
    x = torch.randn(6, 4, 3).permute(2, 1, 0)
    found = []
    for call in (lambda y: project(layer, y), layer):
        y = x.detach().requires_grad_()
        out = call(y).sum(1).exp().sum(0, keepdim=True).expand(3, -1)
        found.append(torch.autograd.grad(out.sum(), [y, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    # Forward, and the gradient of x.
    assert asked == ["none", "none"]


def test_gradients_of_gradients(asked: list[str]) -> None:
    layer, x = linear(), torch.randn(3, 6)
    found = []
    for call in (lambda y: project(layer, y), layer):
        y = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(call(y).tanh().sum(), y, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [y, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert len(asked) >= 2


def keep(kept: list[Tensor], x: Tensor) -> Tensor:
    kept.append(x)
    return x


@pytest.mark.parametrize("trained", ["weight", "bias", "x", None])
def test_only_what_learns_keeps_something(asked: list[str], trained: str | None) -> None:
    found = []
    layer = linear()
    for name, p in layer.named_parameters():
        p.requires_grad_(name == trained)
    x = torch.randn(3, 6)
    for call in (lambda y: project(layer, y), layer):
        y = x.detach().requires_grad_(trained == "x")
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda z: z):
            out = call(y)
        assert out.requires_grad == (trained is not None)
        layer.zero_grad()
        if trained is not None:
            out.square().sum().backward()
        grads = [p.grad for p in (y, *layer.parameters())]
        assert sum(grad is not None for grad in grads) == (trained is not None)
        found.append((len(kept), [grad for grad in grads if grad is not None]))
    (ours, a), (theirs, b) = found
    assert ours <= theirs
    torch.testing.assert_close(a, b)
    assert asked


def test_half_precision_learns_by_pytorchs_own(asked: list[str]) -> None:
    layer, x = linear().bfloat16(), torch.randn(3, 6, dtype=torch.bfloat16)
    assert torch.equal(project(layer, x), layer(x))
    assert asked == []


class Watched(Tensor):
    """A tensor that is told of every operation."""


def traced(layer: nn.Linear, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
    layer.requires_grad_(False)
    return torch.jit.trace(lambda y: call(layer, y), x, check_trace=False)(x)


def counted(layer: nn.Linear, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        call(layer, x)
    return torch.tensor(counter.get_total_flops())


def switched_off(layer: nn.Linear, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
    try:
        torch._C._set_mkldnn_enabled(False)
        return call(layer, x)
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize(
    "look",
    [
        lambda layer, x, call: torch.func.vmap(lambda y: call(layer, y))(x),
        lambda layer, x, call: torch.func.jvp(lambda y: call(layer, y), (x,), (x.cos(),))[1],
        lambda layer, x, call: torch.func.grad(lambda y: call(layer, y).sum())(x),
        lambda layer, x, call: torch.autocast("cpu")(call)(layer, x),
        lambda layer, x, call: call(layer, x.as_subclass(Watched)),
        lambda layer, x, call: call(layer.double(), x.double()),
        traced,
        counted,
        switched_off,
    ],
    ids=[
        "vmap",
        "jvp",
        "grad",
        "autocast",
        "subclass",
        "float64",
        "tracer",
        "modes",
        "switched off",
    ],
)
def test_pytorchs_own_where_it_matters(asked: list[str], look: Callable[..., Tensor]) -> None:
    layer, x = linear(), torch.randn(3, 6)
    assert torch.equal(look(layer, x, project), look(layer, x, nn.Linear.__call__))
    assert asked == []


def test_layers_that_do_more(asked: list[str]) -> None:
    layer, x = linear(), torch.randn(3, 6)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(project(Doubled(layer), x), 2 * expected)
        seen = []
        handle = layer.register_forward_hook(lambda *args: seen.append(args[2]))
        project(layer, x)
        handle.remove()
        handle = layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        assert torch.equal(project(layer, x), layer(x))
        handle.remove()
        layer.forward = lambda _: 3 * expected
        assert torch.equal(project(layer, x), 3 * expected)
        del layer.forward
        with torch.nn.utils.parametrize.cached():
            torch.nn.utils.parametrizations.weight_norm(layer)
            torch.testing.assert_close(project(layer, x), expected)
    assert len(seen) == 1
    assert asked == []


def test_pytorch_refuses_what_does_not_fit(asked: list[str]) -> None:
    x, weight = torch.randn(3, 6), torch.randn(5, 6)
    for y, bias in (
        (x[:, :5], None),
        (x, torch.zeros(5, dtype=torch.float64)),
        (x, torch.zeros(4)),
    ):
        with pytest.raises(RuntimeError) as ours:
            multiply(y, weight, bias)
        with pytest.raises(RuntimeError) as theirs:
            F.linear(y, weight, bias)
        assert str(ours.value) == str(theirs.value)
    # And what only PyTorch can do.
    assert torch.equal(multiply(x.to_sparse(), weight), F.linear(x.to_sparse(), weight))
    assert asked == []


def test_the_activation_is_part_of_a_product(asked: list[str]) -> None:
    body = FeedForward(6)
    x = torch.randn(2, 3, 6)
    expected = body(x)
    torch.testing.assert_close(feed_forward(body, x), expected)
    assert "gelu" not in asked
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(body, x), expected)
    assert "gelu" in asked


@torch.no_grad()
def test_a_feed_forward_layer_that_does_more(asked: list[str]) -> None:
    x = torch.randn(2, 3, 6)
    body = FeedForward(6)
    body.inner = Doubled(body.inner)
    torch.testing.assert_close(feed_forward(body, x), body(x))
    body = FeedForward(6)
    seen = []
    body.register_forward_hook(lambda *_: seen.append("body"))
    feed_forward(body, x)
    body.register_forward_hook(lambda *args: args[2] * 0)
    assert feed_forward(body, x).eq(0).all()
    assert len(seen) == 2
    assert "gelu" not in asked
    # Dropout alone in training mode, as where several answers are drawn.
    body = FeedForward(6, dropout=0.5).eval()
    assert torch.equal(feed_forward(body, x), feed_forward(body, x))
    body.dropout.train()
    assert (feed_forward(body, x) != feed_forward(body, x)).any()
    body.dropout = nn.Identity()
    torch.testing.assert_close(feed_forward(body, x), body(x))
    body = FeedForward(6, gated=True)
    assert torch.equal(feed_forward(body, x), body(x))


class Doubled(nn.Module):
    """An adapter around a layer, which passes for it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.in_features = layer.weight, layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)
