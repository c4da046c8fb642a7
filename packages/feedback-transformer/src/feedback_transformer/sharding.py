"""Parts that FSDP2 shards on their own, used by their weights and never called."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def sharded(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that FSDP2 shards."""
    # Of the class: a module looks for an attribute that it does not have for long.
    return [module for module in modules if hasattr(type(module), "unshard")]


def gather(modules: list[nn.Module]) -> list[nn.Module]:
    """Has modules that are `sharded` hold all of their weights; those that did not before.

    What an earlier call has gathered may be part of a graph that waits for its backward pass.
    """
    gathered = []
    for module in modules:
        before = [*module.parameters()]
        type(module).unshard(module)  # type: ignore[attr-defined]
        # Shards and whole weights are different parameters.
        if any(x is not y for x, y in zip(before, module.parameters(), strict=True)):
            gathered.append(module)
    return gathered


def shard(gathered: list[nn.Module]) -> None:
    """Gives back what `gather` has gathered: weights that stay are not seen to change."""
    for module in gathered:
        type(module).reshard(module)  # type: ignore[attr-defined]
