"""Who still needs chunks of a store as they are: graphs of autograd that have kept them."""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import ref

import torch
from torch import Tensor


class Leases:
    """Counts leases of tokens, which end by themselves.

    A lease is a tensor that shares the tokens' memory. It lasts while the tensor or a view of it
    is alive. So a graph that keeps one for its backward pass holds the lease exactly as long as it
    may need the tokens: until that pass has freed them, or until the graph is dropped.
    """

    def __init__(self) -> None:
        self._taken: int = 0
        self._closed: bool = False
        # Beside each lease an empty tensor that shares its version counter.
        self._live: dict[int, tuple[ref[Tensor], Tensor]] = {}
        # Filled by whichever thread runs a backward pass, emptied by the thread of the store.
        self._ended: deque[int] = deque()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a store has tokens of its own, which nobody has been lent.
        return self.__dict__ | {"_live": {}, "_ended": deque()}

    @property
    def taken(self) -> int:
        """Leases that have been taken at any time."""
        return self._taken

    def take(self, tokens: Tensor) -> Tensor:
        """The tokens, under a lease."""
        self.ended()
        # No view of the tokens: what is written to them counts as no change of the lease. What a
        # graph reads of it does not change, which autograd cannot know.
        lent = tokens.data
        version = lent.detach()
        version.data = version.new_empty(0)
        number, ended = self._taken, self._ended
        self._live[number] = ref(lent, lambda _: ended.append(number)), version
        self._taken += 1
        return lent

    def ended(self) -> int:
        """How many of the leases taken first have all ended."""
        while self._ended:
            del self._live[self._ended.popleft()]
        return next(iter(self._live), self._taken)

    def close(self) -> None:
        """Makes an error of every backward pass that reads what was lent."""
        self._closed = True
        for _, version in self._live.values():
            torch.autograd.graph.increment_version(version)

    def check(self, _: Tensor) -> None:
        """Raises ValueError if closed: a hook of what was found in a lease, to say it plainly."""
        if self._closed:
            raise ValueError("no gradients through a store with a path after it was closed")
