"""Linear layers, as fast as the processor multiplies."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_core import FeedForward, transformed

ROWS = 64
"""From how many rows on oneDNN is faster."""
NUMBERS = 2**17
"""From how many numbers of a weight on."""
LONG = 1024
"""How long the runs of a `RowProduct` are at least: where they are faster."""


class Linear(nn.Linear):
    """`torch.nn.Linear`, which a CPU multiplies by oneDNN where that is faster.

    PyTorch asks another library for float32, which is slower on some processors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return multiply(x, self.weight, self.bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., in) -> (..., out)."""
    if not _suits(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        out: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return _product(x, weight, bias)


class RowProduct(NamedTuple):
    """Linear layers side by side, as they were when it was made, laid out for a single row.

    Such a product takes as long as its weights take to be read, which is faster in long runs.

    Attributes:
        weight: (in, out).
        bias: (out,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(1, 1, in) -> (1, 1, out)."""
        return torch.addmm(self.bias, x[0], self.weight)[None]

    @staticmethod
    def of(*layers: nn.Module) -> RowProduct | None:
        """None where the layers as they are do it better, or do more."""
        plain = [x for x in layers if isinstance(x, Linear) and is_plain(x, Linear)]
        if (
            len(plain) < len(layers)
            or sum(x.out_features for x in plain) < LONG
            or not all(_is_own(x.weight) and x.weight.itemsize >= 4 for x in plain)
        ):
            return None
        weights = torch.cat([x.weight for x in plain])
        return RowProduct(weights.t().contiguous(), torch.cat([x.bias for x in plain]))


def feed_forward(body: FeedForward, x: Tensor, row: RowProduct | None = None) -> Tensor:
    """`body(x)`; without gradients the activation is part of a product where that is faster.

    `row`, of its first layer, takes the place of that.
    """
    inner = body.inner
    if row is not None:
        return cast(Tensor, body.outer(body.dropout(F.gelu(row(x)))))
    if (
        not torch.is_grad_enabled()
        and not (body.gated or (body.training and body.dropout.p))
        and is_plain(body, FeedForward)
        and is_plain(inner, Linear)
        and _suits(x, inner.weight, inner.bias)
    ):
        return cast(Tensor, body.outer(_product(x, inner.weight, inner.bias, "gelu")))
    return cast(Tensor, body(x))


def is_plain(module: nn.Module, of: type[nn.Module]) -> bool:
    """Whether a module does what its class does, and nobody looks on: no adapter, no hook."""
    return (
        type(module) is of
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not nn.modules.module._has_any_global_hook()
    )


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN is there, and faster."""
    return (
        weight.numel() >= NUMBERS
        and x.numel() >= ROWS * weight.shape[1]
        # What does not fit is PyTorch's to refuse.
        and x.shape[-1] == weight.shape[1]
        and all(y is None or (y.dtype == x.dtype and _is_own(y)) for y in (x, weight, bias))
        # In half precision PyTorch asks oneDNN too, and its own gradients are faster.
        and (x.dtype == torch.float32 or not torch.is_grad_enabled())
        and bool(torch.backends.mkldnn.enabled)
        and _has_product(x.dtype)
        and not transformed(x, weight, bias)
    )


def _is_own(x: Tensor) -> bool:
    """Whether this is a CPU's tensor, and nothing has to see PyTorch's own operations on it."""
    return (
        x.device.type == "cpu"
        # What another class makes of an operation, it makes of PyTorch's own.
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _has_product(dtype: torch.dtype) -> bool:
    """Whether this build and this processor have the product of a type: by a trial."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    one = torch.eye(32, dtype=dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        return torch.equal(_product(one, one, None), one)
    # AttributeError: an operation that this build does not have.
    except (AttributeError, RuntimeError):
        return False


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x.contiguous(), weight, bias, activation, [], "none"
    )
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            multiply(grad, weight.t()) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
