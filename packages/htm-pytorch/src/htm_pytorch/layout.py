"""Which chunks environments hold, where these lie, and their means.

Shapes: e environments, d width, c tokens a chunk, j columns, x chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.mapped import MappedPool
from htm_pytorch.storage import Pool, Released, Room

Tell = Callable[[Tensor, Tensor], None]


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
        last: (2, e) column of the newest chunk, and how many tokens it has.
    """

    table: Tensor
    means: Tensor
    some: Tensor | None
    ages: Tensor | None
    last: Tensor


class Change(NamedTuple):
    """Rows (x,) of a tensor that are to be replaced.

    Attributes:
        of: the tensor. before, after: the rows.
    """

    of: Tensor
    rows: Tensor
    before: Tensor
    after: Tensor


class Layout:
    """A table of environments and columns.

    Args:
        environments: independent memories.
        kept: chunks that an environment holds at most. They are in a ring: the chunk that replaces
            the oldest is in its column.
        pool: where chunks lie. What it resumes is taken up.
        tell: called with environments (x,) and columns (x,) of chunks that are about to change.

    Attributes:
        seen: (environments,) tokens since the last reset, on the CPU.
        table: (environments, j) place of a chunk in the pool, -1 for none.
        means: (environments, j, d) of chunks; anything where there is none.
    """

    def __init__(self, environments: int, kept: int | None, pool: Pool, tell: Tell | None) -> None:
        self.pool: Pool = pool
        self._tell: Tell | None = tell
        self.c: int = pool.tokens.shape[1]
        self.kept: int | None = kept
        self.seen: Tensor = torch.zeros(environments, dtype=torch.int64)
        self.table: Tensor = pool.tokens.new_empty(environments, 0, dtype=torch.int64)
        wide = torch.promote_types(pool.tokens.dtype, torch.float32)
        self.means: Tensor = pool.tokens.new_empty(
            environments, 0, pool.tokens.shape[2], dtype=wide
        )
        if isinstance(pool, MappedPool):
            self._resume(pool)

    def _resume(self, pool: MappedPool) -> None:
        self.seen = pool.manifest.seen.clone()
        table = pool.manifest.table
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
        first = int(ids[0]) if len(ids) else 0
        if torch.equal(ids, torch.arange(first, first + len(ids))):
            table, means = (x[first : first + len(ids)] for x in (table, means))
        else:
            table, means = (x.index_select(0, ids.to(device)) for x in (table, means))
        columns = torch.arange(j)
        some = None if bool(held.eq(j).all()) else (columns < held[:, None]).to(device)
        # Where an environment has forgotten chunks, j is all that it may hold, and its oldest chunk
        # is in any column.
        turned = bool(oldest.any())
        ages = ((columns - oldest[:, None]) % j).to(device) if turned else None
        newest = self.count(self.seen[ids]) - 1
        last = torch.stack((self.column(newest), self.seen[ids] - newest * self.c))
        return View(table, means, some, ages, last.to(device))

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

    def append(self, tokens: Tensor, ids: Tensor) -> None:
        """Adds tokens (e, t, d), t at least 1, to environments (e,); on an error nothing."""
        c, before = self.c, self.seen[ids]
        after = before + tokens.shape[1]
        seen = Change(self.seen, ids, before, after)
        if tokens.shape[1] == 1:
            # The usual way, step by step: a token for each chunk that changes.
            had = before % c
            self._write(ids, before // c, had, had + 1, tokens[:, 0], had, None, seen)
            return
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
        self._write(ids[rows], chunks.numbers, had, has, tokens, within, owners, seen)

    def _write(
        self,
        ids: Tensor,
        numbers: Tensor,
        had: Tensor,
        has: Tensor,
        tokens: Tensor,
        within: Tensor,
        owners: Tensor | None,
        seen: Change,
    ) -> None:
        """Writes to chunks (x,) of environments (x,).

        Args:
            numbers: (x,) of the chunks, which hold `had` (x,) tokens, and are to hold `has` (x,).
            tokens: (y, d), for the places `within` (y,) a chunk.
            owners: (y,) which of the x chunks a token is for; where None, each is for its own.
            seen: by what the tokens come to be there.
        """
        columns, device = self.column(numbers), self.table.device
        self._widen(int(columns.max()) + 1)
        rows = (ids * self.table.shape[1] + columns).to(device)
        table, means = self.table.view(-1), self.means.flatten(0, 1)
        places, averages = table.index_select(0, rows), means.index_select(0, rows)
        changes, released, room = [seen], None, self.pool.collect()
        begun = had == 0
        new = int(begun.sum())
        try:
            sums, rest = tokens.to(means.dtype), averages
            if owners is not None:
                owners = owners.to(device)
                sums = means.new_zeros(len(ids), tokens.shape[1]).index_add_(0, owners, sums)
            if new:
                begun, before = begun.to(device), places
                places = before.masked_scatter(begun, self.pool.take(new).to(device))
                changes.append(Change(table, rows, before, places))
                released = self._released(before[begun & (before >= 0)])
                rest = rest.masked_fill(begun[:, None], 0.0)
            # The sum of a chunk that has tokens already is what its mean tells.
            had, has = (x[:, None].to(device) for x in (had, has))
            changes.append(Change(means, rows, averages, (sums + rest * had) / has))
            # Where nothing is yet that anybody could see.
            to = places if owners is None else places[owners]
            self.pool.write(to, within.to(device), tokens)
            self.pool.write_means(places, changes[-1].after)
            self._commit(changes, released, ids, columns)
        except BaseException:
            self._undo(changes, released, room)
            raise

    def _released(self, places: Tensor) -> Released | None:
        """Places (x,) that are to be given back, if any."""
        return Released(self.pool.leases.now(), places.cpu()) if len(places) else None

    def _commit(
        self, changes: list[Change], released: Released | None, ids: Tensor, columns: Tensor
    ) -> None:
        """Makes changes of chunks (x,) visible, by what allocates nothing."""
        if self._tell is not None:
            self._tell(ids, columns)
        for change in changes:
            change.of.index_copy_(0, change.rows, change.after)
        if released is not None:
            self.pool.release(released)

    def _undo(self, changes: list[Change], released: Released | None, room: Room) -> None:
        """All of `_commit`, however far it came, and what was taken of `room`."""
        if released is not None:
            self.pool.retract(released)
        for change in changes:
            change.of.index_copy_(0, change.rows, change.before)
        self.pool.room = room

    def forget(self, ids: Tensor) -> None:
        """Forgets what environments (e,) hold; on an error nothing."""
        chunks = self.held(ids)
        envs, columns = ids[chunks.rows], self.column(chunks.numbers)
        rows = (envs * self.table.shape[1] + columns).to(self.table.device)
        table, before = self.table.view(-1), self.seen[ids]
        places = table.index_select(0, rows)
        changes = [
            Change(self.seen, ids, before, torch.zeros_like(before)),
            Change(table, rows, places, torch.full_like(places, -1)),
        ]
        released, room = self._released(places), self.pool.room
        try:
            self._commit(changes, released, envs, columns)
        except BaseException:
            self._undo(changes, released, room)
            raise

    def flush(self) -> None:
        """See `MappedPool.flush`; nothing in memory."""
        if isinstance(self.pool, MappedPool):
            width = int((self.table >= 0).any(0).sum())
            self.pool.flush(self.seen, self.table[:, :width])

    def to(self, device: torch.device) -> None:
        """Moves all, or nothing."""
        parts = self.pool.tokens, self.table, self.means
        tokens, table, means = (x.to(device) for x in parts)
        self.pool.tokens, self.table, self.means = tokens, table, means

    def close(self) -> None:
        """Lets go of everything."""
        self.pool.close()
        self.table = self.table[:, :0].clone()
        self.means = self.means[:, :0].clone()

    def _widen(self, j: int) -> None:
        """Makes room for j columns, and for half as many more if there is none."""
        room = self.table.shape[1]
        if j <= room:
            return
        more = room + room // 2
        j = max(j, more if self.kept is None else min(more, self.kept))
        table = self.table.new_full((len(self.table), j), -1)
        means = self.means.new_empty(len(table), j, self.means.shape[2])
        table[:, :room], means[:, :room] = self.table, self.means
        self.table, self.means = table, means
