"""Reading a table of values sparsely, and the gradients of that.

Three operators, each the derivative of the others: with T = sum_nk w_nk <table[i_nk], x_n>,

    read   dT/dx      (n, d)  out_n  = sum_k w_nk table[i_nk]     the output of a memory
    match  dT/dw      (n, k)  out_nk = <table[i_nk], x_n>         scores of slots, one by one
    write  dT/dtable  (s, d)  out_s  = sum_{nk: i_nk = s} w_nk x_n   the gradient of a table

so that any order of derivative is made of the same three. Each is one opaque operator, which
`torch.compile` and `torch.export` see as a node.

Shapes: s slots, d width, n tokens, k slots a token reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from product_key_memory.checks import (
    check_choice,
    check_dtype,
    check_indices,
    check_positive,
    check_trainable,
)

# Elements of gathered rows that are worked on at a time: what a processor's cache holds, and what
# keeps an accelerator busy.
_WORKING_SET = 2**18
_ACCELERATOR_WORKING_SET = 2**24


@torch.library.custom_op("product_key_memory::read", mutates_args=())
def read(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows.

    Args:
        table: (s, d).
        indices: (n, k) int64 slots.
        weights: (n, k), of the table's dtype.

    Returns:
        (n, d).
    """
    if indices.shape[1] == 0 or indices.shape[0] == 0:
        return table.new_zeros(indices.shape[0], table.shape[1])
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")


@torch.library.custom_op("product_key_memory::match", mutates_args=())
def match(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """Inner products of rows with a vector a token.

    Args:
        table: (s, d).
        indices: (n, k) int64 slots.
        x: (n, d), of the table's dtype.

    Returns:
        (n, k).
    """
    n, k = indices.shape
    out = table.new_empty(n, k)
    step = max(1, _WORKING_SET // max(1, k * table.shape[1]))
    for first in range(0, n, step):
        part = slice(first, first + step)
        rows = table.index_select(0, indices[part].flatten()).unflatten(0, indices[part].shape)
        torch.matmul(rows, x[part, :, None], out=out[part, :, None])
    return out


@torch.library.custom_op("product_key_memory::write", mutates_args=())
def write(indices: Tensor, weights: Tensor, x: Tensor, slots: int) -> Tensor:
    """Weighted vectors added up by slot.

    Args:
        indices: (n, k) int64 slots.
        weights: (n, k), of the dtype of x.
        x: (n, d).
        slots: rows of the table.

    Returns:
        (slots, d), zero where no token looked.
    """
    out = x.new_zeros(slots, x.shape[1])
    for touched, rows in write_rows(indices, weights, x):
        out.index_copy_(0, touched, rows)
    return out


class Bags(NamedTuple):
    """Who looked at which slot, sorted by slot: each slot has a bag of tokens.

    Attributes:
        slots: (u,) those that were looked at, ascending.
        starts: (u + 1,) where the bag of each starts; the last one's end.
        tokens: (p,). weights: (p,).
    """

    slots: Tensor
    starts: Tensor
    tokens: Tensor
    weights: Tensor


def sort_pairs(slots: Tensor, tokens: Tensor, weights: Tensor) -> Bags:
    """Pairs of a slot and a token, all (p,), sorted by slot, without those of weight 0."""
    if not weights.all():
        used = weights.nonzero().squeeze(1)
        slots, tokens, weights = slots[used], tokens[used], weights[used]
    slots, order = slots.sort()
    touched, counts = torch.unique_consecutive(slots, return_counts=True)
    starts = F.pad(counts.cumsum(0), (1, 0))
    return Bags(touched, starts, tokens.index_select(0, order), weights.index_select(0, order))


def bag_rows(bags: Bags, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of `write` that are touched: (slots (u,) ascending, their rows (u, d)), in parts.

    A row is a bag's weighted sum of tokens x (n, d): a transposed read.
    """
    working_set = _WORKING_SET if x.device.type == "cpu" else _ACCELERATOR_WORKING_SET
    at_a_time = max(1, working_set // x.shape[1])
    number = len(bags.slots)
    bounds = [*range(0, number, at_a_time), number]
    ends = bags.starts[bounds].tolist()
    for first, last, begin, end in zip(bounds, bounds[1:], ends, ends[1:], strict=False):
        rows = F.embedding_bag(
            bags.tokens[begin:end],
            x,
            offsets=bags.starts[first : last + 1] - begin,
            per_sample_weights=bags.weights[begin:end],
            mode="sum",
            include_last_offset=True,
        )
        yield bags.slots[first:last], rows


def write_rows(indices: Tensor, weights: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`bag_rows` of tokens' slots and weights, both (n, k)."""
    n, k = indices.shape
    tokens = torch.arange(n, device=indices.device).repeat_interleave(k)
    yield from bag_rows(sort_pairs(indices.flatten(), tokens, weights.flatten()), x)


@read.register_fake
def _(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG001
    return table.new_empty(indices.shape[0], table.shape[1])


@match.register_fake
def _(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:  # noqa: ARG001
    return table.new_empty(indices.shape)


@write.register_fake
def _(indices: Tensor, weights: Tensor, x: Tensor, slots: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(slots, x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])


def _differentiate_read(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, indices, weights = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        write(indices, weights, grad, table.shape[0]) if wanted[0] else None,
        None,
        match(table, indices, grad) if wanted[2] else None,
    )


def _differentiate_match(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, indices, x = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        write(indices, grad, x, table.shape[0]) if wanted[0] else None,
        None,
        read(table, indices, grad) if wanted[2] else None,
    )


def _differentiate_write(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, weights, x = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        None,
        match(grad, indices, x) if wanted[1] else None,
        read(grad, indices, weights) if wanted[2] else None,
        None,
    )


torch.library.register_autograd(
    "product_key_memory::read", _differentiate_read, setup_context=_save
)
torch.library.register_autograd(
    "product_key_memory::match", _differentiate_match, setup_context=_save
)
torch.library.register_autograd(
    "product_key_memory::write", _differentiate_write, setup_context=_save
)


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


class Reader(Protocol):
    """How a pool reads its tables. A pool's `reader` may be replaced, as sharding does."""

    def read(
        self, table: Tensor, indices: Tensor, weights: Tensor, trainable: Tensor | None
    ) -> Tensor:
        """`read`; rows that are not trainable get a gradient of zero."""

    def match(self, table: Tensor, indices: Tensor, x: Tensor, trainable: Tensor | None) -> Tensor:
        """`match`; rows that are not trainable get a gradient of zero."""


class LocalReader:
    """Reads tables that are whole on one device; `owner` see `read_factored`."""

    def __init__(self, factored: bool) -> None:
        self.factored = factored

    def read(
        self,
        table: Tensor,
        indices: Tensor,
        weights: Tensor,
        trainable: Tensor | None,
        owner: Tensor | None = None,
    ) -> Tensor:
        frozen: Tensor | None = None
        if trainable is not None:
            chosen = trainable[indices]
            frozen = read(table.detach(), indices, weights.masked_fill(chosen, 0.0))
            weights = weights.masked_fill(~chosen, 0.0)
        if self.factored:
            out = read_factored(table, indices, weights, owner)
        else:
            out = read(table, indices, weights)
        return out if frozen is None else out + frozen

    def match(
        self,
        table: Tensor,
        indices: Tensor,
        x: Tensor,
        trainable: Tensor | None,
        owner: Tensor | None = None,
    ) -> Tensor:
        if self.factored:
            out = match_factored(table, indices, x, owner)
        else:
            out = match(table, indices, x)
        if trainable is None:
            return out
        return torch.where(trainable[indices], out, match(table.detach(), indices, x))


class MemoryPool(nn.Module):
    """A table of values which one layer reads, or several share.

    Args:
        slots: rows.
        dim: width of a row.
        experts: a second table `inputs` beside the values; every slot is a neuron which answers
            `gelu(<input, x>)` times its value (PEER, He 2024, arXiv 2407.04153).
        values_grad: "dense", a gradient as any parameter has it, or "factored", in memory of the
            tokens and not of the table, for a `PKMOptimizer`.
        dtype: of the tables, such as torch.bfloat16; the default one where None.

    Raises:
        TypeError, ValueError: a number or option is out of range.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        *,
        experts: bool = False,
        values_grad: str = "dense",
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(slots=slots, dim=dim)
        check_choice("values_grad", values_grad, ("dense", "factored"))
        check_dtype("dtype", dtype)
        super().__init__()
        self.slots: int = slots
        self.dim: int = dim
        self.values_grad: str = values_grad
        self.reader: Reader = LocalReader(factored=values_grad == "factored")
        self.weight: nn.Parameter = nn.Parameter(torch.empty(slots, dim, dtype=dtype))
        self.inputs: nn.Parameter | None = None
        if experts:
            self.inputs = nn.Parameter(torch.empty(slots, dim, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every row anew, with a standard deviation of dim**-0.5."""
        for table in self.parameters():
            nn.init.normal_(table, std=self.dim**-0.5)

    def forward(
        self,
        indices: Tensor,
        weights: Tensor,
        trainable: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Weighted sums of values.

        Args:
            indices: (n, k) int64 slots.
            weights: (n, k).
            trainable: (slots,) boolean; the others get a gradient of exactly zero.
            x: (n, dim) tokens; where given, weights are multiplied by their `activations`.

        Returns:
            (n, dim), of the table's dtype.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
        """
        check_indices(indices, weights)
        if trainable is not None:
            check_trainable(trainable, self.slots)
        if x is not None:
            weights = weights * self.activations(indices, x, trainable)
        weights = weights.to(self.weight.dtype)
        return self.reader.read(self.weight, indices, weights, trainable)

    def activations(self, indices: Tensor, x: Tensor, trainable: Tensor | None = None) -> Tensor:
        """What the chosen neurons answer: gelu(<input, x>), (n, k) for x (n, dim).

        `trainable` as in `forward`.

        Raises:
            ValueError: the pool has no `inputs`.
        """
        if self.inputs is None:
            raise ValueError("only a pool with experts=True has activations")
        if trainable is not None:
            check_trainable(trainable, self.slots)
        x = x.to(self.inputs.dtype)
        return F.gelu(self.reader.match(self.inputs, indices, x, trainable))
