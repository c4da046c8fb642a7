"""Who still needs chunks of a store as they are: graphs of autograd that have kept them."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import ref

import torch
from torch import Tensor


class _Lease(ref[Tensor]):
    """A reference to what is lent.

    Attributes:
        when: the time at which it was.
        version: an empty tensor that shares its version counter.
    """

    __slots__ = ("version", "when")
    when: int
    version: Tensor
    # One is no other, whatever it refers to.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Leases:
    """Leases of tokens, which end by themselves.

    A lease is a tensor that shares the tokens' memory. It lasts while the tensor or a view of it
    is alive. So a graph that keeps one for its backward pass holds the lease exactly as long as it
    may need the tokens: until that pass has freed them, or until the graph is dropped.

    Several threads may take leases, and any thread may end one, in the middle of anything. There is
    no lock, which an interrupt could leave closed: each change is one operation of a set.
    """

    def __init__(self) -> None:
        self._clock: count[int] = count()
        self._closed: bool = False
        self._live: set[_Lease] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a store has tokens of its own, which nobody has been lent.
        return {"now": self.now(), "closed": self._closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._clock, self._closed = count(state["now"]), state["closed"]

    def now(self) -> int:
        """The time: after every lease that has been taken, before every other."""
        return next(self._clock)

    def take(self, tokens: Tensor) -> Tensor:
        """The tokens, under a lease."""
        # No view of the tokens: what is written to them counts as no change of the lease. What a
        # graph reads of it does not change, which autograd cannot know.
        lent = tokens.data
        # It takes itself out, and no line of Python is run for it that could be interrupted.
        lease = _Lease(lent, self._live.discard)
        lease.when, lease.version = self.now(), lent.detach()
        lease.version.data = lent.new_empty(0)
        self._live.add(lease)
        return lent

    def live(self) -> list[int]:
        """When the leases that last were taken, in order."""
        return sorted(lease.when for lease in list(self._live))

    def close(self) -> None:
        """Makes an error of every backward pass that reads what was lent."""
        self._closed = True
        for lease in list(self._live):
            torch.autograd.graph.increment_version(lease.version)

    def check(self, _: Tensor) -> None:
        """Raises ValueError if closed: a hook of what was found in a lease, to say it plainly."""
        if self._closed:
            raise ValueError("no gradients through a store with a path after it was closed")
