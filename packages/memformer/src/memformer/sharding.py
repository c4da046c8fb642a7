"""Generation by parts that are not called, while FSDP2 shards their weights.

FSDP2 gathers the weights of a module when it is called. A decoder's step uses those of its parts
without calling them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class Gathered:
    """The weights of modules, whole from the first step in a `with` block to its end.

    Does nothing for modules that are not sharded.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # Asked of the class, which FSDP2 changes.
        self._parts: list[Any] = [x for x in modules if hasattr(type(x), "unshard")]

    def __enter__(self) -> Gathered:
        # What a forward pass has left whole may be of before the optimizer's last step.
        self._reshard()
        return self

    def __exit__(self, *_: object) -> None:
        self._reshard()

    def step(self, step: Step) -> Step:
        """The same with whole weights, each time: between two steps a forward pass may be run.

        Ranks may take different numbers of steps: only the first one waits for the others.
        """

        def gathered(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            for part in self._parts:
                part.unshard()
            return step(tokens, state)

        return gathered

    def stream(self, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same, until its end or until it is closed."""
        with self:
            yield from tokens

    def _reshard(self) -> None:
        for part in self._parts:
            part.reshard()
