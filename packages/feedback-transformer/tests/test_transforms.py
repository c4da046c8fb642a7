"""Derivatives of other kinds, types that are mixed, layers that are wrapped: right, or refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, prune

from feedback_transformer import FeedbackTransformer

WIDE: dict[str, Any] = {"dim": 256, "dim_head": 64, "heads": 4}
"""So wide that weights are packed where that is possible."""


def wide(device: torch.device) -> FeedbackTransformer:
    torch.manual_seed(0)
    return FeedbackTransformer(num_tokens=11, depth=2, mem_len=5, **WIDE).to(device)


@pytest.mark.parametrize("gradients", [False, True])
def test_forward_mode(device: torch.device, gradients: bool) -> None:
    """A tangent comes through packed weights and a pass of one's own as it does in float64."""
    model = wide(device)
    both = torch.randn(2, 1, 16, 256, generator=torch.Generator().manual_seed(0)).to(device)

    def tangent(model: FeedbackTransformer, x: Tensor, direction: Tensor) -> Tensor:
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            out = model(forward_ad.make_dual(x, direction))
            return forward_ad.unpack_dual(out).tangent.detach()

    found = tangent(model, *both)
    expected = tangent(copy.deepcopy(model).double(), *both.double())
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_forward_mode_of_a_carried_memory_and_of_weights(kit: Any) -> None:
    model = kit.make()
    x, rest = kit.tokens(2, 4), kit.tokens(2, 6)
    _, memory = model(x, None, True)
    weight = model.layers[0].to_q.weight.detach()

    def run(keys: Tensor, weight: Tensor) -> Tensor:
        given = (rest, (keys, memory.values.detach()))
        out: Tensor = functional_call(model, {"layers.0.to_q.weight": weight}, given)
        return out

    points = (memory.keys.detach(), weight)
    steps = tuple(kit.normal(*y.shape, seed=8) for y in points)
    _, found = jvp(run, points, steps)
    near = 1e-6
    ahead, behind = (
        run(*(y + sign * near * step for y, step in zip(points, steps, strict=True)))
        for sign in (1.0, -1.0)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * near), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_forward_mode_of_position_biases_alone(
    device: torch.device, gradients: bool, frozen: bool
) -> None:
    model = wide(device).requires_grad_(not frozen)
    name = "pos_emb.relative_attention_bias.weight"
    x = torch.randint(11, (1, 24), generator=torch.Generator().manual_seed(0)).to(device)
    weight = model.get_parameter(name).detach()
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def tangent(model: FeedbackTransformer, weight: Tensor, step: Tensor) -> Tensor:
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            out = functional_call(model, {name: forward_ad.make_dual(weight, step)}, (x,))
            return forward_ad.unpack_dual(out).tangent.detach()

    found = tangent(model, weight, step)
    whole = copy.deepcopy(model).double()
    near = 1e-6
    with torch.no_grad():
        ahead, behind = (
            functional_call(whole, {name: weight.double() + sign * near * step.double()}, (x,))
            for sign in (1.0, -1.0)
        )
    expected = (ahead - behind) / (2 * near)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_func_grad_and_vmap(kit: Any) -> None:
    model = kit.make()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tokens = kit.tokens(3, 8)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, weights, (x[None],))
        return out.square().mean()

    found = vmap(grad(loss), (None, 0))(weights, tokens)
    for i, row in enumerate(tokens):
        expected = torch.autograd.grad(model(row[None]).square().mean(), [*model.parameters()])
        for (name, _), theirs in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name][i], theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("n", [1, 8])
def test_autocast_with_embeddings_of_half_precision(kit: Any, n: int, gradients: bool) -> None:
    """As a linear layer before the model hands them over."""
    model = kit.make().float()
    x = kit.normal(2, n, 6).bfloat16().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients), torch.autocast(kit.device.type, torch.bfloat16):
        out = model(x, return_embeddings=True)
    expected = model(x.detach().float(), return_embeddings=True)
    assert (out - expected).norm() < 0.05 * expected.norm()
    if gradients:
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


def test_a_memory_has_the_models_type(kit: Any) -> None:
    """With gradients that nobody wants, too."""
    model = kit.make().bfloat16().requires_grad_(False)
    _, memory = model(kit.tokens(2, 8), None, True)
    assert memory.keys.dtype == memory.values.dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_memory_keeps_no_more_than_its_slots(kit: Any, heads: int, gradients: bool) -> None:
    model = kit.make(heads=heads, mem_len=4)
    with torch.set_grad_enabled(gradients):
        _, memory = model(kit.tokens(1, 100), None, True)
    for x in (memory.keys, memory.values):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.usefixtures("route")
def test_masked_slots_of_a_memory_change_nothing(kit: Any) -> None:
    """NaN in them included, be they of the open segment; gradients too."""
    model = kit.make(seq_len=3, mem_len=8)
    mask = torch.ones(2, 8, dtype=torch.bool, device=kit.device)
    mask[0, 1] = mask[1, 7] = False
    memory = model(kit.tokens(2, 8), None, True, mask=mask)[1].detach()
    rest = kit.tokens(2, 7)
    spoilt = memory._replace(keys=memory.keys.clone(), values=memory.values.clone())
    gone = ~mask[:, None].expand(2, 2, 8)[..., 6:]
    for x in spoilt[:2]:
        x[~mask] = float("nan")
    inside = (x.masked_fill(gone[..., None], float("nan")) for x in spoilt[2:4])
    spoilt = spoilt._replace(layer_keys=next(inside), layer_values=next(inside))
    found = []
    for given in (memory, spoilt):
        out = model(rest, given)
        found.append((out, *torch.autograd.grad(out.square().sum(), [*model.parameters()])))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"seq_len": 1, "norm_memory": True}, {"seq_len": 4}])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_parameter_has_a_gradient(kit: Any, n: int, settings: dict[str, Any]) -> None:
    """Where no later segment sees the slots of the first, too."""
    for context in (None, kit.normal(2, 3, 5)):
        model = kit.make(dim_context=None if context is None else 5, **settings)
        model(kit.tokens(2, n), context=context).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


class Adapted(nn.Module):
    """A low-rank change beside a layer, as adapters add it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.change = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.change(x)
        return out


class AdaptedLinear(nn.Linear):
    """The same, by a subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


@pytest.mark.parametrize(
    "place", ["layers.1.to_q", "layers.0.ff.outer", "to_kv", "layers.0.cross.to_kv"]
)
def test_parts_of_another_class_are_refused(kit: Any, place: str) -> None:
    other = AdaptedLinear(5, 5)
    for kind in ("module", "subclass"):
        model = kit.make(dim_context=5)
        part = model.get_submodule(place)
        owner, _, name = place.rpartition(".")
        given = Adapted(part) if kind == "module" else other
        setattr(model.get_submodule(owner), name, given)
        words = f"^{re.escape(place)} is never called"
        with pytest.raises(TypeError, match=words) as caught:
            model(kit.tokens(1, 3), context=kit.normal(1, 2, 5))
        assert f"it must be a Linear, got {type(given).__name__}" in str(caught.value)


def test_layers_of_another_class_are_refused(kit: Any) -> None:
    model = kit.make()
    model.layers[1] = nn.Sequential(model.layers[1])
    with pytest.raises(TypeError, match=r"layers\.1 is never called.* a Layer, got Sequential"):
        model(kit.tokens(1, 3))
    model = kit.make()
    model.to_logits = AdaptedLinear(6, 11)
    with pytest.raises(TypeError, match="to_logits is never called"):
        model.generate(kit.tokens(1, 3), 2)


def test_weights_that_hooks_make_are_refused(kit: Any) -> None:
    model = kit.make()
    prune.identity(model.layers[0].to_out, "weight")
    with pytest.raises(TypeError, match=r"^layers\.0\.to_out is never called.*without hooks"):
        model(kit.tokens(1, 3))


def test_parametrizations_are_seen(kit: Any) -> None:
    model = kit.make()
    before = model(kit.tokens(1, 5))
    layer = parametrizations.weight_norm(model.layers[0].to_q)
    torch.testing.assert_close(model(kit.tokens(1, 5)), before)
    layer.parametrizations.weight.original0.data.mul_(5.0)
    assert (model(kit.tokens(1, 5)) - before).abs().max() > 1e-3


def test_no_packing_where_it_is_switched_off_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from feedback_transformer import packing

    weight = torch.zeros(256, 256)
    torch.backends.mkldnn.set_flags(False)
    try:
        assert not packing.can_pack(weight, 4)
    finally:
        torch.backends.mkldnn.set_flags(True)
    monkeypatch.setattr(packing.Packed, "__init__", lambda *_: torch.zeros(1, 2) @ torch.zeros(3))
    packing._has_products.cache_clear()
    try:
        assert not packing.can_pack(weight, 4)
    finally:
        packing._has_products.cache_clear()
