"""Linear layers by faster products: the same numbers, and PyTorch's own where somebody looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memformer import Decoder, products
from memformer.products import Linear, RowProduct, feed_forward
from shared_core import FeedForward


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Activations of the products that oneDNN was asked for, of any size."""
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


def pair(width: int = 6, out: int = 5, bias: bool = True) -> tuple[Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(width, out, bias=bias)
    ours = Linear(width, out, bias=bias)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(asked: list[str], dtype: torch.dtype, bias: bool) -> None:
    ours, plain = (x.to(dtype) for x in pair(bias=bias))
    # Neither what comes in is contiguous, nor the gradient.
    x = torch.randn(6, 4, 3, dtype=dtype).permute(2, 1, 0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        assert torch.allclose(ours(x), plain(x), atol=tolerance)
    assert asked
    found = []
    for layer in (ours, plain):
        y = x.detach().requires_grad_()
        grads = torch.autograd.grad(layer(y).square().sum(1).sum(), [y, *layer.parameters()])
        found.append(grads)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=10 * tolerance)


def test_gradients_of_gradients(asked: list[str]) -> None:
    x = torch.randn(3, 6)
    found = []
    for layer in pair():
        y = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(layer(y).tanh().sum(), y, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [y, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert len(asked) >= 2


def test_a_part_that_is_not_trained(asked: list[str]) -> None:
    for trained in ("weight", "bias", None):
        ours, plain = pair()
        x = torch.randn(3, 6)
        y, z = (x.detach().requires_grad_(trained is None) for _ in range(2))
        for layer in (ours, plain):
            for name, p in layer.named_parameters():
                p.requires_grad_(name == trained)
        ours(y).square().sum().backward()
        plain(z).square().sum().backward()
        for a, b in ((y, z), *zip(ours.parameters(), plain.parameters(), strict=True)):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5)
    assert asked


class Watched(Tensor):
    """A tensor that is told of every operation."""


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: torch.func.vmap(layer)(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1],
        lambda layer, x: torch.func.grad(lambda y: layer(y).sum())(x),
        lambda layer, x: torch.autocast("cpu")(layer)(x),
        lambda layer, x: layer(x.as_subclass(Watched)),
        lambda layer, x: layer.double()(x.double()),
        lambda layer, x: torch._C._set_mkldnn_enabled(False) or layer(x),
    ],
    ids=["vmap", "jvp", "grad", "autocast", "subclass", "float64", "switched off"],
)
def test_pytorchs_own_where_it_matters(
    asked: list[str], call: Callable[[nn.Linear, Tensor], Tensor]
) -> None:
    (ours, plain), x = pair(), torch.randn(3, 6)
    try:
        assert torch.equal(call(ours, x), call(plain, x))
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert asked == []


def test_pytorch_refuses_what_does_not_fit(asked: list[str]) -> None:
    ours, _ = pair()
    for x, of_bias in ((torch.randn(3, 5), torch.float32), (torch.randn(3, 6), torch.float64)):
        ours.bias = nn.Parameter(torch.zeros(5, dtype=of_bias))
        with pytest.raises(RuntimeError):
            ours(x)
    assert asked == []


def test_the_activation_is_part_of_a_product(asked: list[str]) -> None:
    body = FeedForward(6, linear=Linear)
    x = torch.randn(2, 3, 6)
    expected = body.outer(F.gelu(body.inner(x)))
    assert torch.allclose(feed_forward(body, x), expected, atol=1e-6)
    assert "gelu" not in asked
    with torch.no_grad():
        assert torch.allclose(feed_forward(body, x), expected, atol=1e-5)
    assert "gelu" in asked


@torch.no_grad()
def test_a_feed_forward_layer_that_somebody_looks_at(asked: list[str]) -> None:
    x = torch.randn(2, 3, 6)
    body = FeedForward(6, linear=Linear)
    seen = []
    body.inner.register_forward_hook(lambda *args: seen.append(args[2]))
    feed_forward(body, x)
    assert len(seen) == 1
    body = FeedForward(6, linear=Linear)
    body.inner = Doubled(body.inner)
    assert torch.equal(feed_forward(body, x), body(x))
    body = FeedForward(6, dropout=0.5, linear=Linear)
    assert (feed_forward(body, x) != feed_forward(body, x)).any()
    body.eval()
    assert "gelu" not in asked
    feed_forward(body, x)
    assert "gelu" in asked
    with pytest.raises(ValueError, match=r"\(\.\.\., 6\)"):
        feed_forward(body, x[..., :5])


class Doubled(nn.Module):
    """An adapter around a layer, which passes for it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.in_features = layer.weight, layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_at_a_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, adapted: bool
) -> None:
    monkeypatch.setattr(products, "LONG", 1)
    decoder = Decoder(16, 2, 4).to(dtype).eval()
    layers = list(decoder.layers)
    if adapted:
        layers[0].self_attn.body.to_kv = Doubled(layers[0].self_attn.body.to_kv)
        layers[1].feed_forward.body.inner = Doubled(layers[1].feed_forward.body.inner)
    x, context = torch.randn(1, 7, 16, dtype=dtype), torch.randn(1, 3, 16, dtype=dtype)
    expected = decoder(x, context)
    state = decoder.init_state(1, 7, context)
    of_attention, of_feed_forward = zip(*state.rows, strict=True)
    assert [row is None for row in of_attention] == [adapted, False]
    assert [row is None for row in of_feed_forward] == [False, adapted]
    calls = []
    original = RowProduct.__call__
    monkeypatch.setattr(
        RowProduct, "__call__", lambda row, y: calls.append(row) or original(row, y)
    )
    out, state = decoder.step(x[:, :3], state)
    assert calls == []
    pieces = [out]
    for i in range(3, 7):
        out, state = decoder.step(x[:, i : i + 1], state)
        pieces.append(out)
    assert len(calls) == 4 * (2 if adapted else 4)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=tolerance)
    # Two continuations of one state are two rows.
    _, two = decoder.step(x[:, :1], decoder.init_state(1, 7, context))
    two = two.reorder(torch.tensor([0, 0]))
    calls.clear()
    both, _ = decoder.step(x[:, 1:2].expand(2, -1, -1), two)
    assert calls == []
    assert torch.allclose(both, expected[:, 1:2].expand(2, -1, -1), atol=tolerance)


def test_rows_are_of_a_cpu(device: torch.device) -> None:
    state = Decoder(512, 1).to(device).init_state(1, 4)
    assert all((row is None) == (device.type != "cpu") for row in state.rows[0])
    assert state.to("meta").rows == ((None, None),)
    assert Decoder(512, 1).init_state(2, 4).rows == ((None, None),)
