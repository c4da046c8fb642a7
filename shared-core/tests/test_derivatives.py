"""What function transforms concern, and derivatives of any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from shared_core import differentiate_twice, transformed

Scalar = Callable[[Tensor], Tensor]


def test_a_plain_tensor_is_not_transformed(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    assert not transformed(x, None, x.clone().requires_grad_())
    assert not transformed()


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.hessian,
        torch.func.jacfwd,
        torch.func.jacrev,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        lambda f: lambda x: torch.func.vmap(f)(x[None]),
        lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(x[None]),
    ],
    ids=["grad", "hessian", "jacfwd", "jacrev", "jvp", "vmap", "vmap of grad"],
)
def test_every_transform_is_seen(
    transform: Callable[[Scalar], Scalar], device: torch.device
) -> None:
    found: list[tuple[bool, bool]] = []
    other = torch.ones(3, device=device)

    def record(x: Tensor) -> Tensor:
        found.append((transformed(other, x), transformed(other)))
        return (x * x).sum()

    transform(record)(torch.ones(3, device=device))
    assert found
    assert all(own and not others for own, others in found)


def test_a_tangent_is_seen_while_its_level_is_open(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert transformed(x, dual)
        assert not transformed(x)
    assert not transformed(dual)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_sees_the_transforms_that_it_traces(device: torch.device, backend: str) -> None:
    def double(x: Tensor) -> Tensor:
        return x * 3 if transformed(x) else x * 2

    def gradient(x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: double(x).sum())(x)
        return found

    x = torch.ones(3, device=device)
    for function, expected in ((double, x * 2), (gradient, x * 3), (double, x * 2)):
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_an_exported_graph_has_no_transform(device: torch.device) -> None:
    class Double(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3 if transformed(x) else x * 2

    x = torch.ones(3, device=device)
    torch.testing.assert_close(torch.export.export(Double(), (x,)).module()(x), x * 2)


@torch.library.custom_op("shared_core_tests::cubed", mutates_args=())
def _cubed(x: Tensor, y: Tensor) -> Tensor:
    return x**3 * y.exp()


@torch.library.custom_op("shared_core_tests::cubed_backward", mutates_args=())
def _cubed_backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 3 * x**2 * y.exp() * grad, x**3 * y.exp() * grad


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return _cubed_backward(grad, *ctx.saved_tensors)


def _differentiate_again(ctx: Any, *cotangents: Tensor | None) -> Any:
    grad, *inputs = ctx.saved_tensors
    return tuple(differentiate_twice(_formula, inputs, grad, cotangents))


torch.library.register_autograd("shared_core_tests::cubed", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "shared_core_tests::cubed_backward", _differentiate_again, setup_context=_save
)


def _formula(x: Tensor, y: Tensor) -> Tensor:
    return x**3 * y.exp()


@pytest.mark.parametrize("learns", ["x", "y", "both", "one of the other"])
def test_gradients_of_gradients_of_any_order(learns: str, device: torch.device) -> None:
    kinds = {"dtype": torch.float64, "device": device}

    def gradients(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        x = torch.linspace(0.5, 1.5, 4, **kinds).requires_grad_(learns != "y")
        y = torch.linspace(-1.0, 2.0, 4, **kinds).requires_grad_(learns in ("y", "both"))
        leaves = [z for z in (x, y) if z.requires_grad]
        found, value = [], function(x, x * x if learns == "one of the other" else y)
        for order in range(4):
            grads = torch.autograd.grad(value.sum(), leaves, create_graph=order < 3)
            found += [z.detach() for z in grads]
            value = sum(((z * z).sum() for z in grads), torch.zeros((), **kinds))
        return found

    torch.testing.assert_close(gradients(_cubed), gradients(_formula))


def test_what_has_no_cotangent_has_no_gradient(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    assert differentiate_twice(_formula, (x, x), x, (None, None)) == [None, None, None]
    found = differentiate_twice(lambda x, _, y: _formula(x, y), (x, None, x), x, (x, None, None))
    of_grad, of_x, of_nothing, of_y = found
    assert of_nothing is None
    # The gradient of x is 3 x^2 exp(y) grad.
    for value, expected in ((of_grad, 3.0), (of_x, 6.0), (of_y, 3.0)):
        torch.testing.assert_close(value, expected * x.exp())
