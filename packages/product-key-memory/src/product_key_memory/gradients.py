"""Gradients of tables, whatever form they have, row by row.

Of a table that is spread over ranks (`DTensor`), a rank has some rows or some columns, of the
gradient and of the optimizer's state, too.

Shapes: s slots, d width, n tokens, u of the slots, p pairs of a slot and a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from product_key_memory.factors import Factors, factors_of
from product_key_memory.operators import Bags, bag_rows, sort_pairs


class Part(NamedTuple):
    """Some rows of a gradient, or what it makes of them.

    Attributes:
        slots: (u,) distinct, ascending. rows: (u, d).
    """

    slots: Tensor
    rows: Tensor


class TableGradient(NamedTuple):
    """A table's gradient, not multiplied out.

    Attributes:
        bags: tokens by slot, u slots.
        x: (n, d) what they add to a slot, times their weight.
        width: of whole rows, where x are some columns.
        norms: (u,) of whole rows, where they are known; not yet scaled.
        scale: (u,) or a number, by which the rows are to be multiplied.
    """

    bags: Bags
    x: Tensor
    width: int
    norms: Tensor | None = None
    scale: Tensor | float = 1.0

    def times(self, scale: Tensor | float) -> TableGradient:
        """The gradient times a number of at least 0, or times (u,) of them."""
        # Kept beside it: where a row cancels, the products of rounded weights might not.
        return self._replace(scale=self.scale * scale)

    def measure(self, table: Tensor) -> Tensor:
        """The norms (u,) of its rows, whichever rank has their columns."""
        return self._norms(table) * self.scale

    def measured(self, table: Tensor) -> TableGradient:
        """The same with its norms known."""
        return self._replace(norms=self._norms(table))

    def _norms(self, table: Tensor) -> Tensor:
        """`measure` without the scale."""
        if self.norms is not None:
            return self.norms
        first, counts = self.bags.starts[:-1], self.bags.starts.diff()
        # Most slots have one token, and with it the norm of its vector.
        tokens = self.x.square().sum(1)
        squares = tokens[self.bags.tokens[first]] * self.bags.weights[first].square()
        several = counts > 1
        pairs = several.repeat_interleave(counts)
        starts = F.pad(counts[several].cumsum(0), (1, 0))
        bags = Bags(
            several.nonzero().squeeze(1), starts, self.bags.tokens[pairs], self.bags.weights[pairs]
        )
        for at, rows in bag_rows(bags, self.x):
            squares[at] = rows.square_().sum(1)
        return sum_over_ranks(squares, table, (1,)).sqrt_()

    def parts(self, *, used: bool) -> Iterator[Part]:
        """Its rows, a few at a time; where `used`, without those that are zero on all ranks."""
        first = 0
        for slots, rows in bag_rows(self.bags, self.x):
            here = slice(first, first + len(slots))
            first = here.stop
            some = rows.any(1) if used else None
            if some is not None and self.norms is not None:
                some |= self.norms[here] != 0
            if isinstance(self.scale, Tensor):
                rows.mul_(self.scale[here, None])
            elif self.scale != 1.0:
                rows.mul_(self.scale)
            if some is None or some.all():
                yield Part(slots, rows)
            else:
                yield Part(slots[some], rows[some])


def gradient_of(table: Tensor, group: dist.ProcessGroup | None = None) -> TableGradient | None:
    """What was collected and what is in `.grad` together, or None where nothing is.

    Args:
        group: ranks with tokens of their own and copies of the table: the mean of what they have
            collected. `.grad` is taken for a mean already, as data parallelism leaves it.
    """
    factors = list(factors_of(table))
    if group is not None:
        factors = _of_all_ranks(factors, table, group)
    if table.grad is not None:
        factors.append(_as_factors(local(table.grad), by_column=bool(_groups(table, (1,)))))
    if not factors:
        return None
    slots, tokens, number = [], [], 0
    for indices, _, x in factors:
        last = number + len(x)
        token = torch.arange(number, last, device=x.device)
        slots.append(indices.flatten())
        tokens.append(token.repeat_interleave(indices.shape[1]))
        number = last
    dtype = precise(table.dtype)
    weights = _concatenate([one.weights.flatten() for one in factors]).to(dtype)
    x = _concatenate([one.x for one in factors]).to(dtype).contiguous()
    bags = sort_pairs(_concatenate(slots), _concatenate(tokens), weights)
    gradient = TableGradient(bags, x, table.shape[1])
    if _groups(table, (1,)):
        return gradient.measured(table)
    return gradient


def _of_all_ranks(factors: list[Factors], table: Tensor, group: dist.ProcessGroup) -> list[Factors]:
    """What every rank of a group has collected, the weights divided by their number."""
    ranks = dist.get_world_size(group)
    own = torch.tensor([len(factors)], device=table.device)
    counts = [torch.zeros_like(own) for _ in range(ranks)]
    dist.all_gather(counts, own, group=group)
    found = []
    for number in range(int(max(counts))):
        # A rank may have fewer, or none: empty ones take their place.
        nothing = table.new_zeros(0, 0)
        empty = Factors(nothing.long(), nothing, table.new_zeros(0, table.shape[1]))
        one = factors[number] if number < len(factors) else empty
        shape = torch.tensor([*one.indices.shape], device=table.device)
        shapes = [torch.zeros_like(shape) for _ in range(ranks)]
        dist.all_gather(shapes, shape, group=group)
        rows, columns = torch.stack(shapes).amax(0).tolist()
        missing = rows - len(one.x), columns - one.indices.shape[1]
        # What is padded has a weight of 0, and so no part in the gradient.
        padded = (
            F.pad(one.indices, (0, missing[1], 0, missing[0])),
            F.pad(one.weights, (0, missing[1], 0, missing[0])) / ranks,
            F.pad(one.x, (0, 0, 0, missing[0])),
        )
        gathered = [torch.empty_like(x).repeat(ranks, 1) for x in padded]
        for into, x in zip(gathered, padded, strict=True):
            dist.all_gather_into_tensor(into, x.contiguous(), group=group)
        found.append(Factors(*gathered))
    return found


def is_finite(table: Tensor, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all that was collected is finite, on all ranks that share or copy the table."""
    wrong = torch.zeros((), device=table.device)
    for _, weights, x in factors_of(table):
        wrong += ~(weights.isfinite().all() & x.isfinite().all())
    if group is not None:
        dist.all_reduce(wrong, group=group)
    return not sum_over_ranks(wrong, table)


def precise(dtype: torch.dtype) -> torch.dtype:
    """In which a table of `dtype` is computed, and its state kept."""
    return torch.promote_types(dtype, torch.float32)


def local(table: Tensor) -> Tensor:
    """What this rank has of it."""
    return table.to_local() if isinstance(table, DTensor) else table


def zeros_beside(table: Tensor, *, columns: bool) -> Tensor:
    """Zeros (s, d), or (s,), spread over ranks as the table is."""
    part, ndim = local(table), 2 if columns else 1
    zeros = torch.zeros(part.shape[:ndim], dtype=precise(table.dtype), device=part.device)
    if not isinstance(table, DTensor):
        return zeros
    placements = [one if one.is_shard(0) or columns else Replicate() for one in table.placements]
    shape, stride = table.shape[:ndim], (table.shape[1], 1)[-ndim:]
    return DTensor.from_local(
        zeros, table.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def sum_over_ranks(x: Tensor, table: Tensor, dims: tuple[int, ...] = (0, 1)) -> Tensor:
    """Adds up, in place, what ranks have that share rows (dim 0) or columns (dim 1) of a table."""
    for group in _groups(table, dims):
        dist.all_reduce(x, group=group)
    return x


def _groups(table: Tensor, dims: tuple[int, ...]) -> list[dist.ProcessGroup]:
    if not isinstance(table, DTensor):
        return []
    mesh = table.device_mesh
    spread = [any(one.is_shard(dim) for dim in dims) for one in table.placements]
    return [mesh.get_group(at) for at, is_spread in enumerate(spread) if is_spread]


def _as_factors(grad: Tensor, *, by_column: bool) -> Factors:
    """A gradient (s, d), dense or sparse, as one token for each row."""
    if grad.is_sparse and grad.sparse_dim() == 1:
        slots, rows = grad._indices()[0], grad._values()
    else:
        rows = grad.to_dense()
        slots = torch.arange(len(rows), device=rows.device)
        # Another rank's columns of a row may be something else than zero.
        if not by_column:
            slots = rows.any(1).nonzero().squeeze(1)
            rows = rows.index_select(0, slots)
    return Factors(slots[:, None], rows.new_ones(len(slots), 1), rows)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
