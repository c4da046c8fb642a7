"""What ranks send each other about tokens, with derivatives of any order.

Shapes: W ranks, d width, n tokens of this rank, N tokens of all ranks (n where all have the same).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map `there` whose derivative is its adjoint `back`, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Map, back: Map) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _linear(grad, ctx.back, ctx.there), None, None


def _linear(x: Tensor, there: Map, back: Map) -> Tensor:
    out: Tensor = _Linear.apply(x, there, back)  # type: ignore[no-untyped-call]
    return out


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def exchange(group: ProcessGroup, sent: list[int], received: list[int], x: Tensor) -> Tensor:
    """Rows of x for each rank in turn -> rows from each rank in turn; numbers may differ."""
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def chunks(size: int, ranks: int) -> list[int]:
    """How many of `size` rows or columns each rank has, as DTensor spreads them."""
    step = -(-size // ranks)
    return [max(0, min(step, size - rank * step)) for rank in range(ranks)]


class Tokens(Protocol):
    """What ranks have to tell each other of their tokens; all of it is differentiable."""

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) -> (N, ...): all tokens, for every rank's part of the result."""

    def sum(self, x: Tensor) -> Tensor:
        """(N, ...) -> (n, ...): this rank's tokens, the parts of all ranks added up."""

    def split(self, x: Tensor) -> Tensor:
        """(n, d) -> (N, columns of this rank)."""

    def join(self, x: Tensor) -> Tensor:
        """(N, columns of this rank) -> (n, d)."""


class SameTokens:
    """All ranks have the same tokens, and do the same with the results.

    Args:
        group: the ranks.
        widths: columns of each rank.
    """

    def __init__(self, group: ProcessGroup, widths: list[int]) -> None:
        self.group: ProcessGroup = group
        self.widths: list[int] = widths

    def gather(self, x: Tensor) -> Tensor:
        return _linear(x, _same, self._sum)

    def sum(self, x: Tensor) -> Tensor:
        return _linear(x, self._sum, _same)

    def split(self, x: Tensor) -> Tensor:
        return _linear(x, self._split, self._join)

    def join(self, x: Tensor) -> Tensor:
        return _linear(x, self._join, self._split)

    def _sum(self, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.group)
        return out

    def _split(self, x: Tensor) -> Tensor:
        columns: Tensor = x.split(self.widths, -1)[dist.get_rank(self.group)]
        return columns

    def _join(self, x: Tensor) -> Tensor:
        ranks, n = len(self.widths), len(x)
        sizes = [n * width for width in self.widths]
        flat = exchange(self.group, [x.numel()] * ranks, sizes, x.flatten().repeat(ranks))
        return _side_by_side(flat, n, self.widths)


class OwnTokens:
    """Every rank has tokens of its own.

    Args:
        group: the ranks.
        widths: columns of each rank.
        counts: tokens of each rank.
    """

    def __init__(self, group: ProcessGroup, widths: list[int], counts: list[int]) -> None:
        self.group: ProcessGroup = group
        self.widths: list[int] = widths
        self.counts: list[int] = counts
        rank = dist.get_rank(group)
        self.n: int = counts[rank]
        self.width: int = widths[rank]

    def gather(self, x: Tensor) -> Tensor:
        copies = x.repeat(len(self.counts), *[1] * (x.ndim - 1))
        return self._exchange(copies, [self.n] * len(self.counts), self.counts)

    def sum(self, x: Tensor) -> Tensor:
        parts = self._exchange(x, self.counts, [self.n] * len(self.counts))
        summed: Tensor = parts.unflatten(0, (len(self.counts), self.n)).sum(0)
        return summed

    def split(self, x: Tensor) -> Tensor:
        columns = torch.cat([part.flatten() for part in x.split(self.widths, -1)])
        return self._exchange(columns, *self._sizes()).view(-1, self.width)

    def join(self, x: Tensor) -> Tensor:
        flat = self._exchange(x.flatten(), *reversed(self._sizes()))
        return _side_by_side(flat, self.n, self.widths)

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Elements of all columns of the own tokens, and of the own columns of all tokens."""
        return [self.n * w for w in self.widths], [n * self.width for n in self.counts]

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        there = partial(exchange, self.group, sent, received)
        return _linear(x, there, partial(exchange, self.group, received, sent))


def _side_by_side(flat: Tensor, n: int, widths: Sequence[int]) -> Tensor:
    """(n, w) matrices one after the other -> (n, sum of w)."""
    parts = flat.split([n * width for width in widths])
    return torch.cat([part.view(n, w) for part, w in zip(parts, widths, strict=True)], 1)
