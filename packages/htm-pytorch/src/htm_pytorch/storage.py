"""Where the chunks of a store lie, and which of these places are free.

Shapes: p chunks that there is room for, c tokens a chunk, d width, x places or chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from htm_pytorch.leases import Leases

_NONE = torch.empty(0, dtype=torch.int64)


class Room(NamedTuple):
    """Places that nobody has. Never changed: another one takes its place.

    Attributes:
        used: places that have been handed out at some time; beyond them all are free.
        free: (x,) those before `used` that may be handed out again.
        pending: (x,) those that may be after the next `MappedPool.flush`.
    """

    used: int
    free: Tensor
    pending: Tensor


class Released(NamedTuple):
    """Places (x,) that were given back at a time of `Leases.now`."""

    when: int
    places: Tensor


class Pool:
    """Room for chunks, in memory.

    Args:
        limit: chunks beyond which room grows by a quarter instead of doubling.

    Attributes:
        tokens: (p, c, d).
        leases: of those who want to read tokens later. A place that is given back is handed out
            again when all have ended that were taken while it was somebody's.
        room: what is free.
    """

    def __init__(
        self, c: int, d: int, dtype: torch.dtype, device: torch.device, limit: int | None
    ) -> None:
        self.tokens: Tensor = torch.empty(0, c, d, dtype=dtype, device=device)
        self.limit: int | None = limit
        self.leases: Leases = Leases()
        self.room: Room = Room(0, _NONE, _NONE)
        # What was given back and not looked at yet, and what was, and is still read.
        self._released: list[Released] = []
        self._held: list[Released] = []
        # The leases that lasted when what is held was looked at.
        self._lasting: list[int] = []
        # When a place was handed out: (p,) or more.
        self._begun: Tensor = _NONE

    @property
    def is_foreign(self) -> bool:
        """Whether this is what a fork has left of a pool that another process writes to."""
        return False

    def collect(self) -> Room:
        """Notes as free what nobody reads any more, and returns `room`."""
        if not (self._held or self._released):
            return self.room
        live = self.leases.live()
        # What is held waits for leases that lasted then.
        ended = not set(self._lasting).issubset(live)
        waiting = [*self._held, *self._released] if ended else self._released
        if waiting:
            times = torch.tensor(live, dtype=torch.int64)
            held, free = [] if ended else self._held, []
            for entry in waiting:
                # Whether any of the leases lasts that were taken in the meantime.
                first, last = torch.searchsorted(times, self._begun[entry.places]), entry.when
                read = first < torch.searchsorted(times, last)
                free.append(entry.places[~read])
                if bool(read.any()):
                    held = [*held, entry._replace(places=entry.places[read])]
            room = self._freed(torch.cat(free))
            # In this order: an interrupt in between loses places, and gives none out twice.
            self._released, self._held, self.room, self._lasting = [], held, room, live
        return self.room

    def take(self, n: int) -> Tensor:
        """N places (n,), on the CPU, which `room` names no longer."""
        used, free, pending = self.room
        again = min(n, len(free))
        used_then = used + n - again
        if used_then > len(self.tokens):
            self._grow(used_then)
        kept = len(free) - again
        taken = torch.cat((free[kept:], torch.arange(used, used_then)))
        self._begun[taken] = self.leases.now()
        self.room = Room(used_then, free[:kept], pending)
        return taken

    def release(self, released: Released) -> None:
        """Takes places back."""
        self._released.append(released)

    def retract(self, released: Released) -> None:
        """Undoes `release`, if it was the last that was done."""
        if self._released and self._released[-1] is released:
            self._released.pop()

    def write(self, places: Tensor, within: Tensor, tokens: Tensor) -> None:
        """Writes tokens (x, d) to chunks at places (x,), the one of number `within` (x,)."""
        c, d = self.tokens.shape[1:]
        self.tokens.view(-1, d).index_copy_(0, places * c + within, tokens)

    def write_means(self, places: Tensor, means: Tensor) -> None:
        """Writes means (x, d) of chunks at places (x,), where they are kept."""

    def close(self) -> None:
        """Lets go of everything."""
        self.tokens = self.tokens[:0].clone()

    def _freed(self, places: Tensor) -> Room:
        """`room` when places (x,) are free, too."""
        return self.room._replace(free=torch.cat((self.room.free, places)))

    def _grow(self, least: int) -> None:
        old = self.tokens
        room = 2 * len(old)
        if self.limit is not None and room > self.limit:
            # Graphs may have kept the smaller pools, too: not one for each chunk more.
            room = self.limit if len(old) < self.limit else len(old) + len(old) // 4
        tokens = old.new_empty(max(least, room), *old.shape[1:])
        tokens[: self.room.used] = old[: self.room.used]
        self._begun = resized(self._begun, len(tokens))
        # Last: an interrupt before it leaves the others longer, never shorter than the tokens.
        self.tokens = tokens


def resized(x: Tensor, n: int) -> Tensor:
    """Numbers (n,) that begin with those of x, and go on with 0."""
    found, kept = x.new_zeros(n), x[:n]
    found[: len(kept)] = kept
    return found
