"""What derivatives ask of a package that has operators of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` concerns a tensor.

    An operator of one's own knows nothing of these: a tangent passes it as 0 without a word. Where
    this is True, take differentiable operations of PyTorch in its place. None counts for nothing.
    While `torch.compile` traces, every transform that is traced concerns every tensor, and a dual
    number of `torch.autograd.forward_ad` is not seen.
    """
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    return any(
        _is_wrapped(x) or forward_ad.unpack_dual(x).tangent is not None
        for x in tensors
        if x is not None
    )


# PyTorch has no public name for this.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def differentiate_twice(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the gradients that an operator's backward pass has given.

    Where a graph is asked for (`create_graph=True`) they can be differentiated again, and so on.

    Args:
        function: what the operator computes, of `inputs`, by differentiable operations.
        inputs: floating-point tensors; None is passed on.
        grad: what the backward pass was given, of the shape of the function's value.
        cotangents: of the gradients of `inputs`, one for each; None where there is none.

    Returns:
        Gradients of `grad` and of each of `inputs`, None where there is none.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the path from one input to another that it came from is not gone twice.
        leaves = [
            x
            if x is None
            else x.view_as(x)
            if again and x.requires_grad
            else x.detach().requires_grad_()
            for x in (grad, *inputs)
        ]
        pairs = zip(leaves[1:], cotangents, strict=True)
        wanted = [(x, y) for x, y in pairs if x is not None and y is not None]
        if not wanted:
            return [None] * len(leaves)
        out = function(*leaves[1:])
        of, weights = zip(*wanted, strict=True)
        first = torch.autograd.grad(out, of, leaves[0], create_graph=True)
        sources = [x for x in leaves if x is not None]
        second = iter(
            torch.autograd.grad(first, sources, weights, allow_unused=True, create_graph=again)
        )
    return [None if x is None else next(second) for x in leaves]
