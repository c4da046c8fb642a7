"""Reading a table of values sparsely, and the gradients of that.

Three operators, each the derivative of the others: with T = sum_nk w_nk <table[i_nk], x_n>,

    read   dT/dx      (n, d)  out_n  = sum_k w_nk table[i_nk]     the output of a memory
    match  dT/dw      (n, k)  out_nk = <table[i_nk], x_n>         scores of slots, one by one
    write  dT/dtable  (s, d)  out_s  = sum_{nk: i_nk = s} w_nk x_n   the gradient of a table

so that any order of derivative is made of the same three. Function transforms and forward mode take
plain operations. Each is one opaque operator, which
`torch.compile` and `torch.export` see as a node. `match_known` is a `match` whose result is there.

Shapes: s slots, d width, n tokens, k slots a token reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_core import transformed

# Elements of gathered rows that are worked on at a time: what a processor's cache holds, and what
# keeps an accelerator busy.
_WORKING_SET = 2**18
_ACCELERATOR_WORKING_SET = 2**24


def _operator(name: str, arguments: str) -> Any:
    """A private operator of PyTorch, or None where it is not there or takes other arguments."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "default" not in packet.overloads():
        return None
    names = " ".join(argument.name for argument in packet.default._schema.arguments)
    return packet if names == arguments else None


# What embedding_bag calls for the gradient of its weights: a release where it differs takes the
# slower way.
_PAIRS = _operator(
    "_embedding_bag_per_sample_weights_backward",
    "grad weight indices offsets offset2bag mode padding_idx",
)


def read(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows.

    Args:
        table: (s, d).
        indices: (n, k) int64 slots.
        weights: (n, k), of the table's dtype.

    Returns:
        (n, d).
    """
    if transformed(table, weights):
        return (table[indices] * weights[..., None]).sum(1)
    out: Tensor = _read(table, indices, weights)
    return out


@torch.library.custom_op("product_key_memory::read", mutates_args=())
def _read(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return read_without_gradient(table, indices, weights)


def read_without_gradient(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`read` where no one asks for a gradient; calling an operator costs more than one token."""
    if indices.shape[1] == 0 or indices.shape[0] == 0:
        return table.new_zeros(indices.shape[0], table.shape[1])
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")


def match(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """Inner products of rows with a vector a token.

    Args:
        table: (s, d).
        indices: (n, k) int64 slots.
        x: (n, d), of the table's dtype.

    Returns:
        (n, k).
    """
    if transformed(table, x):
        return _match_plain(table, indices, x)
    out: Tensor = _match(table, indices, x)
    return out


def _match_plain(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("nkd,nd->nk", table[indices], x)


@torch.library.custom_op("product_key_memory::match", mutates_args=())
def _match(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    n, k = indices.shape
    if indices.numel() == 0:
        return table.new_empty(n, k)
    if x.shape != (n, table.shape[1]):
        raise ValueError(f"x must be {(n, table.shape[1])}, got shape {tuple(x.shape)}")
    # By slot, so that a row that several tokens read comes once from memory.
    slots, order = indices.flatten().sort()
    # The private operator looks at no bounds. An accelerator would have to wait for the answer.
    if slots.device.type == "cpu" and not 0 <= slots[0] <= slots[-1] < table.shape[0]:
        raise IndexError(
            f"indices must be from 0 to {table.shape[0] - 1}, got {int(slots[0])} to "
            f"{int(slots[-1])}"
        )
    tokens = torch.div(order, k, rounding_mode="floor")
    out = table.new_empty(n * k)
    return out.scatter_(0, order, _inner_products(table, slots, x, tokens)).view(n, k)


def _inner_products(table: Tensor, slots: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
    """<table[slot], x[token]> of pairs (p,)."""
    if _PAIRS is not None:
        # What it takes for bags are our tokens; where they begin does not matter to it.
        out: Tensor = _PAIRS(x.contiguous(), table, slots, tokens[:1], tokens, 0)
        return out
    step = max(1, _WORKING_SET // table.shape[1])
    parts = zip(slots.split(step), tokens.split(step), strict=True)
    return torch.cat([(table[slot] * x[token]).sum(1) for slot, token in parts])


def match_known(table: Tensor, indices: Tensor, x: Tensor, known: Tensor) -> Tensor:
    """`match` for the sake of its gradients, where the result `known` (n, k) is there already."""
    if transformed(table, x):
        return _match_plain(table, indices, x.to(table.dtype)).to(known.dtype)
    out: Tensor = _match_known(table, indices, x, known)
    return out


@torch.library.custom_op("product_key_memory::match_known", mutates_args=())
def _match_known(table: Tensor, indices: Tensor, x: Tensor, known: Tensor) -> Tensor:  # noqa: ARG001
    return known.clone()


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


@_read.register_fake
def _(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG001
    return table.new_empty(indices.shape[0], table.shape[1])


@_match.register_fake
def _(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:  # noqa: ARG001
    return table.new_empty(indices.shape)


@_match_known.register_fake
def _(table: Tensor, indices: Tensor, x: Tensor, known: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(known)


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


def _differentiate_match_known(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, indices, x = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    # Under autocast they differ in type.
    grad = grad.to(table.dtype)
    return (
        write(indices, grad, x.to(table.dtype), table.shape[0]) if wanted[0] else None,
        None,
        read(table, indices, grad).to(x.dtype) if wanted[2] else None,
        None,
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
    "product_key_memory::match_known", _differentiate_match_known, setup_context=_save
)
torch.library.register_autograd(
    "product_key_memory::write", _differentiate_write, setup_context=_save
)
