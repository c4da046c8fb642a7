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
        ctx: Any, table: Tensor, indices: Tensor, other: Tensor, reads: bool, owner: Tensor
    ) -> Tensor:
        ctx.save_for_backward(table, indices, other)
        ctx.reads, ctx.owner = reads, owner
        out: Tensor = (read if reads else match)(table, indices, other)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, indices, other = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            weights, x = (other, grad) if ctx.reads else (grad, other)
            # They outlive this pass, and must not keep its graph.
            factors_of(ctx.owner).append(Factors(indices, weights.detach(), x.detach()))
        grad_other = None
        if ctx.needs_input_grad[2]:
            grad_other = (match if ctx.reads else read)(table, indices, grad)
        return None, None, grad_other, None, None


def collect_factors(parameter: Tensor) -> list[Factors]:
    """The list into which a factored parameter's gradients go from now on."""
    factors: list[Factors] = parameter.__dict__.setdefault("factors", [])
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


def read_factored(
    table: Tensor, indices: Tensor, weights: Tensor, owner: Tensor | None = None
) -> Tensor:
    """`read` with factored gradients for `owner`, the table itself where None."""
    owner = table if owner is None else owner
    out: Tensor = _Factored.apply(table, indices, weights, True, owner)  # type: ignore[no-untyped-call]
    return out


def match_factored(
    table: Tensor, indices: Tensor, x: Tensor, owner: Tensor | None = None
) -> Tensor:
    """`match` with factored gradients for `owner`, the table itself where None."""
    owner = table if owner is None else owner
    out: Tensor = _Factored.apply(table, indices, x, False, owner)  # type: ignore[no-untyped-call]
    return out
