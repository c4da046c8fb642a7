"""Which chunks environments hold, where these lie, and their means.

Shapes: e environments, d width, c tokens a chunk, j columns, x chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.storage import MappedPool, Pool


class Chunks(NamedTuple):
    """Chunks of some environments, whose numbers count from an environment's last reset.

    Attributes:
        rows: (x,) which of the environments in question.
        numbers: (x,).
        first: (e,) number of each environment's first.
        start: (e,) where its chunks begin in x.
    """

    rows: Tensor
    numbers: Tensor
    first: Tensor
    start: Tensor

    @classmethod
    def between(cls, first: Tensor, last: Tensor) -> Chunks:
        """Those of numbers from `first` (e,) up to before `last` (e,)."""
        many = last - first
        start = many.cumsum(0) - many
        rows = torch.arange(len(many)).repeat_interleave(many)
        return cls(rows, torch.arange(len(rows)) - (start - first)[rows], first, start)


class View(NamedTuple):
    """What some environments hold, by columns, j of the one that holds most.

    Attributes:
        table: (e, j) place of a chunk in the pool.
        means: (e, j, d) of chunks.
        some: (e, j) boolean, whether there is a chunk; None where there is in all.
        ages: (e, j) how many older chunks its environment holds; None where that is the column.
    """

    table: Tensor
    means: Tensor
    some: Tensor | None
    ages: Tensor | None


class Layout:
    """A table of environments and columns.

    Args:
        environments: independent memories.
        kept: chunks that an environment holds at most. They are in a ring: the chunk that replaces
            the oldest is in its column.
        pool: where chunks lie. What it resumes is taken up.

    Attributes:
        seen: (environments,) tokens since the last reset, on the CPU.
        table: (environments, j) place of a chunk in the pool, -1 for none.
        means: (environments, j, d) of chunks; anything where there is none.
    """

    def __init__(self, environments: int, kept: int | None, pool: Pool) -> None:
        self.pool: Pool = pool
        self.c: int = pool.tokens.shape[1]
        self.kept: int | None = kept
        self.seen: Tensor = torch.zeros(environments, dtype=torch.int64)
        self.table: Tensor = pool.counts.new_empty(environments, 0)
        wide = torch.promote_types(pool.tokens.dtype, torch.float32)
        self.means: Tensor = pool.tokens.new_empty(
            environments, 0, pool.tokens.shape[2], dtype=wide
        )
        if isinstance(pool, MappedPool):
            self._resume(pool)

    def _resume(self, pool: MappedPool) -> None:
        self.seen = pool.manifest["seen"].clone()
        table = pool.manifest["table"]
        self._widen(table.shape[1])
        self.table[:, : table.shape[1]] = table
        chunks = self.held(torch.arange(len(self.seen)))
        columns = self.column(chunks.numbers)
        places = self.table[chunks.rows, columns]
        has = (self.seen[chunks.rows] - chunks.numbers * self.c).clamp(max=self.c)
        means = pool.means[places]
        for i in (has < self.c).nonzero()[:, 0].tolist():
            means[i] = pool.tokens[places[i], : has[i]].to(means.dtype).mean(0)
        self.means[chunks.rows, columns] = means
        pool.write_means(places, means, has)

    def count(self, tokens: Tensor) -> Tensor:
        """Chunks of so many tokens."""
        return (tokens + self.c - 1) // self.c

    def oldest(self, seen: Tensor) -> Tensor:
        """Number of the first chunk that is held after so many tokens."""
        if self.kept is None:
            return torch.zeros_like(seen)
        return (self.count(seen) - self.kept).clamp(min=0)

    def held(self, ids: Tensor) -> Chunks:
        """What environments (e,) hold."""
        return Chunks.between(self.oldest(self.seen[ids]), self.count(self.seen[ids]))

    def view(self, ids: Tensor) -> View:
        """Of environments (e,)."""
        oldest = self.oldest(self.seen[ids])
        held = self.count(self.seen[ids]) - oldest
        j = int(held.max()) if len(ids) else 0
        table, means, device = self.table[:, :j], self.means[:, :j], self.table.device
        if not torch.equal(ids, torch.arange(len(self.seen))):
            table, means = table[ids.to(device)], means[ids.to(device)]
        columns = torch.arange(j)
        some = None if bool(held.eq(j).all()) else (columns < held[:, None]).to(device)
        # Where an environment has forgotten chunks, j is all that it may hold, and its oldest chunk
        # is in any column.
        turned = bool(oldest.any())
        ages = ((columns - oldest[:, None]) % j).to(device) if turned else None
        return View(table, means, some, ages)

    def column(self, numbers: Tensor) -> Tensor:
        """Where the chunks of these numbers are in the table."""
        return numbers if self.kept is None else numbers % self.kept

    def tokens(self, env_id: int) -> Tensor:
        """A copy of the tokens that an environment holds: (length, d), oldest first."""
        numbers = self.held(torch.tensor([env_id])).numbers
        places = self.table[env_id, self.column(numbers).to(self.table.device)]
        seen = self.seen[env_id]
        length = int(seen - self.oldest(seen) * self.c)
        return self.pool.tokens[places].flatten(0, 1)[:length].clone()

    def append(self, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Adds tokens (e, t, d), t at least 1, to environments (e,).

        Returns:
            Environments (x,) and columns (x,) of the chunks that have changed.
        """
        c, before = self.c, self.seen[ids]
        after = before + tokens.shape[1]
        if tokens.shape[1] == 1:
            # The usual way, step by step: a token for each chunk that changes.
            had = before % c
            changed = self._write(ids, before // c, had, had + 1, tokens[:, 0], had, None)
            self.seen[ids] = after
            return changed
        # Of many tokens at once only those are written that will be held.
        oldest = self.oldest(after)
        chunks = Chunks.between(torch.maximum(before // c, oldest), self.count(after))
        positions = before[:, None] + torch.arange(tokens.shape[1])
        owners = (positions // c - (chunks.first - chunks.start)[:, None]).flatten()
        within = (positions % c).flatten()
        tokens = tokens.flatten(0, 1)
        if bool((before < oldest * c).any()):
            kept = (positions >= oldest[:, None] * c).flatten()
            owners, within, tokens = owners[kept], within[kept], tokens[kept.to(tokens.device)]
        begins, rows = chunks.numbers * c, chunks.rows
        had, has = (before[rows] - begins).clamp(min=0), (after[rows] - begins).clamp(max=c)
        changed = self._write(ids[rows], chunks.numbers, had, has, tokens, within, owners)
        self.seen[ids] = after
        return changed

    def _write(
        self,
        ids: Tensor,
        numbers: Tensor,
        had: Tensor,
        has: Tensor,
        tokens: Tensor,
        within: Tensor,
        owners: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Writes to chunks (x,) of environments (x,); returns as `append`.

        Args:
            numbers: (x,) of the chunks, which hold `had` (x,) tokens, and are to hold `has` (x,).
            tokens: (y, d), for the places `within` (y,) a chunk.
            owners: (y,) which of the x chunks a token is for; where None, each is for its own.
        """
        device = self.table.device
        changed = ids, self.column(numbers)
        self._widen(int(changed[1].max()) + 1)
        at = ids.to(device), changed[1].to(device)
        sums = tokens.to(self.means.dtype)
        if owners is not None:
            owners = owners.to(device)
            sums = self.means.new_zeros(len(ids), tokens.shape[1]).index_add_(0, owners, sums)
        begun = had == 0
        new = self.pool.take(int(begun.sum()))

        # From here on nothing fails.
        places = self.table[at]
        if len(new):
            begun, old = begun.to(device), places
            places = places.masked_scatter(begun, new.to(device))
            self.table[at] = places
            self.pool.release(old[begun & (old >= 0)])
        self.pool.write(places if owners is None else places[owners], within.to(device), tokens)
        has = has.to(device)
        # The sum of a chunk that has tokens already is what its mean tells.
        rest = (self.means[at] * had[:, None].to(device)).masked_fill(
            begun.to(device)[:, None], 0.0
        )
        means = (sums + rest) / has[:, None]
        self.means[at] = means
        self.pool.write_means(places, means, has)
        return changed

    def forget(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Forgets what environments (e,) hold; returns as `append`."""
        chunks = self.held(ids)
        changed = ids[chunks.rows], self.column(chunks.numbers)
        at = changed[0].to(self.table.device), changed[1].to(self.table.device)
        places = self.table[at]
        self.table[at] = -1
        self.seen[ids] = 0
        self.pool.release(places)
        return changed

    def flush(self) -> None:
        """See `MappedPool.flush`; nothing in memory."""
        if isinstance(self.pool, MappedPool):
            width = int((self.table >= 0).any(0).sum())
            self.pool.flush(self.seen, self.table[:, :width])

    def to(self, device: torch.device) -> None:
        self.pool.to(device)
        self.table = self.table.to(device)
        self.means = self.means.to(device)

    def close(self) -> None:
        """Lets go of everything."""
        self.pool.close()
        self.table = self.table[:, :0].clone()
        self.means = self.means[:, :0].clone()

    def _widen(self, j: int) -> None:
        """Makes room for j columns, and for many more if there is none."""
        room = self.table.shape[1]
        if j <= room:
            return
        j = max(j, 2 * room if self.kept is None else min(2 * room, self.kept))
        table = self.table.new_full((len(self.table), j), -1)
        means = self.means.new_empty(len(table), j, self.means.shape[2])
        table[:, :room], means[:, :room] = self.table, self.means
        self.table = table
        self.means = means
