"""Products of linear layers, as fast as the processor multiplies.

On a CPU PyTorch asks one library for those in float32, and oneDNN for others; oneDNN is faster in
float32 too on some processors.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_core import FeedForward, transformed

ROWS = 64
"""From how many rows on oneDNN is faster."""
NUMBERS = 2**17
"""From how many numbers of a weight on."""


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` of a linear layer, (..., in) -> (..., out)."""
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear):
        return multiply(x, layer.weight, layer.bias)
    return cast(Tensor, layer(x))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., in) -> (..., out)."""
    if not _suits(x, weight, bias):
        return F.linear(x, weight, bias)
    if _learns(x, weight, bias):
        out: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return _product(x, weight, bias)


def feed_forward(body: FeedForward, x: Tensor) -> Tensor:
    """`body(x)`, with the activation as part of a product where nothing is learned."""
    if body.gated or not is_plain(body, FeedForward):
        return cast(Tensor, body(x))
    return project(body.outer, body.dropout(_activated(body.inner, x)))


def _activated(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x))."""
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear):
        tensors = x, layer.weight, layer.bias
        if _suits(*tensors) and not _learns(*tensors):
            return _product(*tensors, "gelu")
    return F.gelu(project(layer, x))


def is_plain(module: nn.Module, of: type[nn.Module]) -> bool:
    """Whether a module does what its class does, and nobody looks on: no adapter, no hook."""
    return (
        # A compiler would rather see modules.
        not torch.compiler.is_compiling()
        and type(module) is of
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not nn.modules.module._has_any_global_hook()
    )


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN is there, and faster."""
    tensors = x, weight, bias
    return (
        # First, since a tracer would rather not be asked for numbers.
        all(y is None or _is_own(y) for y in tensors)
        and weight.numel() >= NUMBERS
        and x.numel() >= ROWS * weight.shape[1]
        # What does not fit is PyTorch's to refuse.
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(y is None or y.dtype == x.dtype for y in tensors)
        # In half precision PyTorch's own gradients are faster.
        and (x.dtype == torch.float32 or not _learns(*tensors))
        and bool(torch.backends.mkldnn.enabled)
        and _has_product(x.dtype)
        and not transformed(*tensors)
    )


def _is_own(x: Tensor) -> bool:
    """Whether this is a CPU's tensor, and nothing has to see PyTorch's own operations on it."""
    return (
        x.device.type == "cpu"
        # What a class, a mode or a tracer makes of an operation, it makes of PyTorch's own.
        and type(x) in (Tensor, nn.Parameter)
        and x.layout == torch.strided
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
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
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
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
