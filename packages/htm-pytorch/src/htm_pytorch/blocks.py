"""A few queries at a time: gathering what they attend to, and summing what they find.

What is gathered for a few queries stays in a core's cache, and nothing of its size is kept.

Shapes: b batch, n queries, m tokens, d width, k chunks a query, c tokens a chunk, h heads; r
queries at a time, t = k c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from htm_pytorch.retrieval import NOTHING, takes_part

# Elements that are gathered at a time: what a core's cache holds; what is worth that threads wait
# for each other, as they do after each operation; and what keeps an accelerator busy.
_WORKING_SET = 2**19
_SHARED_WORKING_SET = 2**22
_ACCELERATOR_WORKING_SET = 2**26


class Blocks:
    """What all queries attend to, laid out for a few of them at a time.

    Args:
        q, memories, weights, indices, mask, positions, c: as `fused.attend_fused`.

    Attributes:
        q: (b n, h, d). weights: (b n, k).
        rows: (b n, t) of all b m tokens. valid: (b n, t), whether they are there and take part; if
            not, the row is another one of the query's.
    """

    def __init__(
        self,
        q: Tensor,
        memories: Tensor,
        weights: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        c: int,
    ) -> None:
        (b, n, h, d), m = q.shape, memories.shape[1]
        self.q: Tensor = q.reshape(b * n, h, d)
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
        working_set = _ACCELERATOR_WORKING_SET
        if on_cpu:
            working_set = _WORKING_SET if torch.get_num_threads() == 1 else _SHARED_WORKING_SET
        self._step: int = min(b * n, max(1, working_set // (self.rows.shape[1] * d)))
        self._memories, self._places = _flat(memories, self.rows)
        # Memory that is new each time costs more than what is read into it.
        self._room: Tensor = memories.new_empty(self._step * self.rows.shape[1], d)
        self._converted: Tensor | None = None
        if memories.dtype != q.dtype:
            self._converted = torch.empty_like(self._room, dtype=q.dtype)
        self._offsets: Tensor | None = self.to_positions(self.q)

    def parts(self) -> Iterator[slice]:
        """The queries, a few at a time."""
        for start in range(0, len(self.q), self._step):
            yield slice(start, start + self._step)

    def gather(self, part: slice) -> Tensor:
        """Tokens (r, t, d), in the same memory each time; 0 for a query to which none is valid."""
        rows = self._places[part]
        room = self._room[: rows.numel()]
        torch.index_select(self._memories, 0, rows.flatten(), out=room)
        if not (self._all_see and all(self._all_see[part])):
            # Not by a product: what is masked may hold NaN.
            nothing = ~self.valid[part].any(1)
            room.view(len(rows), -1).masked_fill_(nothing[:, None], 0.0)
        if self._converted is not None:
            room = self._converted[: len(room)].copy_(room)
        return room.view(*rows.shape, -1)

    def to_positions(self, x: Tensor) -> Tensor | None:
        """Products (b n, h, 1, c) of (b n, h, d) and the positions, which all chunks have alike."""
        if self.positions is None:
            return None
        products: Tensor = x @ self.positions.mT
        return products.unsqueeze(-2)

    def products(self, x: Tensor, found: Tensor, offsets: Tensor | None, part: slice) -> Tensor:
        """Products (r, h, k, c) of x (r, h, d) and what was found, in full width."""
        wide = torch.promote_types(x.dtype, torch.float32)
        products: Tensor = torch.bmm(x, found.mT).to(wide).unflatten(-1, (-1, self.c))
        return products if offsets is None else products.add_(offsets[part])

    def probabilities(self, part: slice, found: Tensor) -> Tensor:
        """Softmax inside each chunk: (r, h, k, c)."""
        scores = self.products(self.q[part], found, self._offsets, part)
        if not (self._all_valid and all(self._all_valid[part])):
            seen = self.valid[part].unflatten(-1, (-1, self.c))
            scores.masked_fill_(~seen[:, None], NOTHING)
        return scores.softmax(-1)

    def weighted(self, part: slice, probabilities: Tensor) -> Tensor:
        """Probabilities times the weights of their chunks."""
        return probabilities * self.weights[part][:, None, :, None]


def _flat(memories: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Memories (b, m, d) as one matrix, and where the rows of all b m tokens are in it.

    Of a slice, or of what is expanded or transposed, a view with more rows, or other ones.
    """
    (b, m, d), (over_batch, over_tokens, last) = memories.shape, memories.stride()
    if memories.is_contiguous():
        return memories.view(b * m, d), rows
    apart = math.gcd(over_batch, over_tokens)
    if last != 1 or apart == 0:
        return memories.reshape(b * m, d), rows
    over_batch, over_tokens = over_batch // apart, over_tokens // apart
    reach = (b - 1) * over_batch + (m - 1) * over_tokens + 1
    return memories.as_strided(
        (reach, d), (apart, 1)
    ), rows // m * over_batch + rows % m * over_tokens


class Sums:
    """Sums of what is found, and of positions, into (b n, h, d)."""

    def __init__(self, total: Tensor, positions: Tensor | None, c: int) -> None:
        self._total: Tensor = total
        self._positions: Tensor | None = positions
        self._shares: Tensor = total.new_empty(*total.shape[:2], c if positions is not None else 0)

    def add(self, part: slice, shares: Tensor, found: Tensor) -> None:
        """Sums found (r, t, d) by shares (r, h, k, c)."""
        torch.bmm(shares.flatten(-2), found, out=self._total[part])
        if self._positions is not None:
            torch.sum(shares, -2, out=self._shares[part])

    def finish(self) -> None:
        """Adds the positions, which all chunks have alike, with one product."""
        if self._positions is not None:
            self._total.flatten(0, 1).addmm_(self._shares.flatten(0, 1), self._positions)
