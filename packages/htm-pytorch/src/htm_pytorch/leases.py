"""Who still needs chunks of a store as they are: graphs of autograd that have kept them."""

from __future__ import annotations

from collections import deque
from threading import Lock
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
        # Filled by whichever thread runs a backward pass, in the middle of anything.
        self._ended: deque[int] = deque()
        self._lock: Lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a store has tokens of its own, which nobody has been lent.
        return {"_taken": self._taken, "_closed": self._closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__ |= state

    @property
    def taken(self) -> int:
        """Leases that have been taken at any time."""
        return self._taken

    def take(self, tokens: Tensor) -> Tensor:
        """The tokens, under a lease."""
        # No view of the tokens: what is written to them counts as no change of the lease. What a
        # graph reads of it does not change, which autograd cannot know.
        lent = tokens.data
        version = lent.detach()
        version.data = version.new_empty(0)
        ended = self._ended
        with self._lock:
            number = self._taken
            self._live[number] = ref(lent, lambda _: ended.append(number)), version
            self._taken += 1
        return lent

    def some_ended(self) -> bool:
        """Whether leases have ended since `live` was asked for."""
        return bool(self._ended)

    def live(self) -> list[int]:
        """Numbers of the leases that last, in the order in which they were taken, from 0."""
        with self._lock:
            while self._ended:
                del self._live[self._ended.popleft()]
            return list(self._live)

    def close(self) -> None:
        """Makes an error of every backward pass that reads what was lent."""
        self._closed = True
        with self._lock:
            for _, version in self._live.values():
                torch.autograd.graph.increment_version(version)

    def check(self, _: Tensor) -> None:
        """Raises ValueError if closed: a hook of what was found in a lease, to say it plainly."""
        if self._closed:
            raise ValueError("no gradients through a store with a path after it was closed")
