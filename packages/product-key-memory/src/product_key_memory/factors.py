"""Gradients of a table that are not multiplied out, and the tables which collect them.

Shapes: s slots, d width, n tokens, k slots a token reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from product_key_memory.operators import match, read


class Factors(NamedTuple):
    """The gradient of a table as `write(indices, weights, x)`, not multiplied out.

    Attributes:
        indices: (n, k) slots. weights: (n, k). x: (n, d).
    """

    indices: Tensor
    weights: Tensor
    x: Tensor


class _Factored(torch.autograd.Function):
    """`read` or `match` of a table whose gradient is appended to its list of factors."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        indices: Tensor,
        other: Tensor,
        reads: bool,
        owner: Tensor,
        node: Any,
    ) -> Tensor:
        ctx.save_for_backward(table, indices, other)
        ctx.reads, ctx.owner, ctx.node = reads, owner, node
        out: Tensor = (read if reads else match)(table, indices, other)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, indices, other = ctx.saved_tensors
        if ctx.needs_input_grad[0] and _is_asked_for(ctx.node):
            weights, x = (other, grad) if ctx.reads else (grad, other)
            # They outlive this pass, and must not keep its graph.
            factors_of(ctx.owner).append(Factors(indices, weights.detach(), x.detach()))
        grad_other = None
        if ctx.needs_input_grad[2]:
            grad_other = (match if ctx.reads else read)(table, indices, grad)
        return None, None, grad_other, None, None, None


# `ctx.needs_input_grad` does not know of `torch.autograd.grad` by other inputs; the engine does.
_WILL_EXECUTE = getattr(torch._C, "_will_engine_execute_node", None)


def _is_asked_for(node: Any) -> bool:
    """Whether the backward pass that runs goes on to a node of the graph."""
    return _WILL_EXECUTE is None or node is None or bool(_WILL_EXECUTE(node))


class _Collected(list[Factors]):
    """Gradients that are left behind when the parameter is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def collect_factors(parameter: Tensor) -> list[Factors]:
    """The list into which a factored parameter's gradients go from now on."""
    factors: list[Factors] | None = parameter.__dict__.get("factors")
    if factors is None:
        factors = parameter.__dict__["factors"] = _Collected()
    return factors


def factors_of(parameter: Tensor) -> list[Factors]:
    """Gradients of a factored parameter since the last step, to be added up.

    Raises:
        RuntimeError: nothing collects them, so they would be lost.
    """
    factors: list[Factors] | None = parameter.__dict__.get("factors")
    if factors is None:
        raise RuntimeError(
            "values_grad='factored' keeps gradients for a PKMOptimizer, but none holds this "
            f"table of shape {tuple(parameter.shape)}"
        )
    return factors


@torch.compiler.disable  # type: ignore[untyped-decorator]
def read_factored(
    table: Tensor, indices: Tensor, weights: Tensor, owner: Tensor | None = None
) -> Tensor:
    """`read` with factored gradients for `owner`, the table itself where None."""
    return _factored(table, indices, weights, True, owner)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def match_factored(
    table: Tensor, indices: Tensor, x: Tensor, owner: Tensor | None = None
) -> Tensor:
    """`match` with factored gradients for `owner`, the table itself where None."""
    return _factored(table, indices, x, False, owner)


def _factored(
    table: Tensor, indices: Tensor, other: Tensor, reads: bool, owner: Tensor | None
) -> Tensor:
    node = None
    if table.requires_grad and torch.is_grad_enabled():
        node = torch.autograd.graph.get_gradient_edge(table).node
    owner = table if owner is None else owner
    out: Tensor = _Factored.apply(table, indices, other, reads, owner, node)  # type: ignore[no-untyped-call]
    return out
