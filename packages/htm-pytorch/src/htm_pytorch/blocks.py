"""A few queries at a time: gathering what they attend to, and summing what they find.

What is gathered for a few queries stays in a core's cache, and nothing of its size is kept.

Shapes: b batch, n queries, h query heads, g heads of keys and values (1 or h), m tokens, e width of
a key or value, k chunks a query, c tokens a chunk; r queries at a time, t = k c.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from htm_pytorch.retrieval import NOTHING, takes_part

# Elements of keys that are gathered at a time: what a core's cache holds, and what keeps an
# accelerator busy.
_WORKING_SET = 2**19
_ACCELERATOR_WORKING_SET = 2**26


class Gathered:
    """Rows of keys or values for a few queries at a time, always in the same memory."""

    def __init__(self, job: Job, x: Tensor) -> None:
        self._job = job
        self._x: Tensor = x
        # Memory that is new each time costs more than what is read into it.
        self._room: Tensor = x.new_empty(job.step * job.rows.shape[1], x.shape[1])
        self._converted: Tensor | None = None
        if x.dtype != job.q.dtype:
            self._converted = torch.empty_like(self._room, dtype=job.q.dtype)

    def __call__(self, part: slice) -> Tensor:
        """(r, g, t, e), for a query to which nothing is valid 0."""
        rows = self._job.rows[part]
        room = self._room[: rows.numel()]
        torch.index_select(self._x, 0, rows.flatten(), out=room)
        if not self._job.all_see(part):
            # Not by a product: what is masked may hold NaN.
            nothing = ~self._job.valid[part].any(1)
            room.view(len(rows), -1).masked_fill_(nothing[:, None], 0.0)
        if self._converted is not None:
            room = self._converted[: len(room)].copy_(room)
        return room.view(*rows.shape, self._job.q.shape[1], -1).transpose(1, 2)


class Job:
    """What all queries attend to, laid out for a few of them at a time.

    Attributes:
        q: (b n, g, h / g, e). weights: (b n, k).
        rows: (b n, t) of all b m tokens. valid: (b n, t), whether they are there and take part; if
            not, the row is another one of the query's.
        keys, values: the gatherers; one and the same where the keys are the values.
    """

    def __init__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor | None,
        weights: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        c: int,
    ) -> None:
        b, n, h, e = q.shape
        m, g = keys.shape[1:3]
        self.q: Tensor = q.reshape(b * n, g, h // g, e)
        self.weights: Tensor = weights.reshape(b * n, -1)
        self.positions: Tensor | None = positions
        self.c: int = c
        batch = torch.arange(b, device=q.device)[:, None, None]
        tokens, valid = takes_part(indices, m, mask, batch, c)
        rows = (tokens + batch[..., None] * m).view(b * n, -1)
        self.valid: Tensor = valid.view(b * n, -1)
        # What is masked may hold NaN, and 0 times NaN is no 0: what is seen anyway stands in.
        instead = rows.gather(1, self.valid.to(torch.uint8).argmax(1, keepdim=True))
        self.rows: Tensor = torch.where(self.valid, rows, instead)
        # An accelerator would have to be waited for; it always masks.
        on_cpu = q.device.type == "cpu"
        self._all_valid: list[bool] = self.valid.all(1).tolist() if on_cpu else []
        self._all_see: list[bool] = self.valid.any(1).tolist() if on_cpu else []
        working_set = _WORKING_SET if on_cpu else _ACCELERATOR_WORKING_SET
        self.step: int = min(b * n, max(1, working_set // (self.rows.shape[1] * g * e)))
        self.keys: Gathered = Gathered(self, keys.reshape(b * m, g * e))
        self.values: Gathered = self.keys
        if values is not None:
            self.values = Gathered(self, values.reshape(b * m, -1))
        self._offsets: Tensor | None = self.to_positions(self.q)

    def parts(self) -> Iterator[slice]:
        for start in range(0, len(self.q), self.step):
            yield slice(start, start + self.step)

    def all_valid(self, part: slice) -> bool:
        """Whether all tokens of a few queries are known to be valid."""
        return bool(self._all_valid) and all(self._all_valid[part])

    def all_see(self, part: slice) -> bool:
        """Whether each of a few queries is known to have a valid token."""
        return bool(self._all_see) and all(self._all_see[part])

    def to_positions(self, x: Tensor) -> Tensor | None:
        """Products (b n, g, h / g, 1, c) of (b n, g, h / g, e) and the positions of any chunk."""
        return None if self.positions is None else (x @ self.positions.mT).unsqueeze(-2)

    def products(self, x: Tensor, found: Tensor, offsets: Tensor | None, part: slice) -> Tensor:
        """Products (r, g, h / g, k, c) of x (r, g, h / g, e) and what was found, in full width."""
        wide = torch.promote_types(x.dtype, torch.float32)
        products: Tensor = (x @ found.mT).to(wide).unflatten(-1, (-1, self.c))
        return products if offsets is None else products.add_(offsets[part])

    def probabilities(self, part: slice, keys: Tensor) -> Tensor:
        """Softmax inside each chunk: (r, g, h / g, k, c)."""
        scores = self.products(self.q[part], keys, self._offsets, part)
        if not self.all_valid(part):
            seen = self.valid[part].unflatten(-1, (-1, self.c))
            scores.masked_fill_(~seen[:, None, None], NOTHING)
        return scores.softmax(-1)

    def weighted(self, part: slice, probabilities: Tensor) -> Tensor:
        """Probabilities times the weights of their chunks."""
        return probabilities * self.weights[part][:, None, None, :, None]


class Sums:
    """Sums of what is found, and of positions, into (b n, g, h / g, e)."""

    def __init__(self, job: Job, total: Tensor) -> None:
        self._total: Tensor = total
        self._positions: Tensor | None = job.positions
        shape = (*total.shape[:3], job.c)
        self._shares: Tensor = total.new_empty(shape if job.positions is not None else 0)

    def add(self, part: slice, shares: Tensor, found: Tensor) -> None:
        """Sums found (r, g, t, e) by shares (r, g, h / g, k, c)."""
        torch.matmul(shares.flatten(-2), found, out=self._total[part])
        if self._positions is not None:
            torch.sum(shares, -2, out=self._shares[part])

    def finish(self) -> None:
        """Adds the positions, which all chunks have alike, with one product."""
        if self._positions is not None:
            total = self._total.view(-1, self._total.shape[-1])
            total.addmm_(self._shares.view(-1, self._shares.shape[-1]), self._positions)


class MemoryGradients:
    """Sums of what the queries add to the gradients of keys and values, in full width."""

    def __init__(self, job: Job, keys: Tensor, values: Tensor | None) -> None:
        def zeros(x: Tensor) -> Tensor:
            wide = torch.promote_types(torch.promote_types(x.dtype, job.q.dtype), torch.float32)
            return x.new_zeros(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], dtype=wide)

        self._job = job
        self._keys: Tensor = zeros(keys)
        self._values: Tensor = self._keys if values is None else zeros(values)

    def add(self, part: slice, grad_scores: Tensor, weighted: Tensor, grad: Tensor) -> None:
        """Of a few queries; what is masked gets 0."""
        rows = self._job.rows[part].flatten()
        for total, shares, x in (
            (self._keys, grad_scores, self._job.q[part]),
            (self._values, weighted, grad),
        ):
            added = (shares.flatten(-2).mT @ x).transpose(1, 2).reshape(len(rows), -1)
            total.index_add_(0, rows, added.to(total.dtype))

    def results(self, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
        grad_keys = self._keys.view(keys.shape).to(keys.dtype)
        if values is None:
            return grad_keys, keys.new_empty(0)
        return grad_keys, self._values.view(values.shape).to(values.dtype)
