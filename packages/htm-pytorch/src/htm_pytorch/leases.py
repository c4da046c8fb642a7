"""Who still needs chunks of a store as they are: graphs of autograd that have kept them."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import Any
from weakref import ref

import torch
from torch import Tensor


class Leases:
    """Leases of tokens, which end by themselves, each with the time at which it was taken.

    A lease is a tensor that shares the tokens' memory. It lasts while the tensor or a view of it
    is alive. So a graph that keeps one for its backward pass holds the lease exactly as long as it
    may need the tokens: until that pass has freed them, or until the graph is dropped.

    Several threads may take leases. There is no lock, which an interrupt could leave closed: each
    change is one operation.
    """

    def __init__(self) -> None:
        self._clock: count[int] = count()
        self._closed: bool = False
        # By time. Beside each lease an empty tensor that shares its version counter.
        self._live: dict[int, tuple[ref[Tensor], Tensor]] = {}
        # Filled by whichever thread runs a backward pass, in the middle of anything.
        self._ended: deque[int] = deque()

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
        version = lent.detach()
        version.data = version.new_empty(0)
        ended, now = self._ended, self.now()
        self._live[now] = ref(lent, lambda _: ended.append(now)), version
        return lent

    def some_ended(self) -> bool:
        """Whether leases have ended since `live` was asked for."""
        return bool(self._ended)

    def live(self) -> list[int]:
        """When the leases that last were taken, in order."""
        while self._ended:
            # In this order: after an interrupt in between it is done once more.
            self._live.pop(self._ended[0], None)
            self._ended.popleft()
        return sorted(self._live)

    def close(self) -> None:
        """Makes an error of every backward pass that reads what was lent."""
        self._closed = True
        for _, version in list(self._live.values()):
            torch.autograd.graph.increment_version(version)

    def check(self, _: Tensor) -> None:
        """Raises ValueError if closed: a hook of what was found in a lease, to say it plainly."""
        if self._closed:
            raise ValueError("no gradients through a store with a path after it was closed")
