"""Which slots of a memory are read, and which of them are specific to new data.

Shapes: s slots of a table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from product_key_memory.checks import check_indices
from product_key_memory.files import load_file, save_file
from product_key_memory.values import MemoryPool
from shared_core.checks import check_at_least


@dataclass(eq=False)
class PoolStats:
    """What was read of one table.

    Attributes:
        counts: (s,) int64, how often each slot was read with a weight that is not zero.
        documents: (s,) int64, the batches in which it was.
        mass: (s,) float64, the sum of its weights, without their sign.
        batches: how many there were.
    """

    counts: Tensor
    documents: Tensor
    mass: Tensor
    batches: int = 0

    @property
    def usage(self) -> float:
        """Share of slots that were read at least once (Lample et al. 2019, section 4)."""
        return float((self.counts > 0).double().mean())

    @property
    def kl(self) -> float:
        """Divergence of the sums of weights from uniform, in nats (Lample et al. 2019, section 4).

        log(s) + sum_i p_i log(p_i): 0 where all slots weigh the same, log(s) where one has it all,
        NaN where nothing was read.
        """
        share = self.mass / self.mass.sum()
        return math.log(len(share)) + float(torch.xlogy(share, share).sum())

    def to(self, device: torch.device) -> PoolStats:
        """The same on a device."""
        counts, documents, mass = (x.to(device) for x in (self.counts, self.documents, self.mass))
        return PoolStats(counts, documents, mass, self.batches)

    def __add__(self, other: PoolStats) -> PoolStats:
        """What was read in the batches of both."""
        other = other.to(self.counts.device)
        return PoolStats(
            self.counts + other.counts,
            self.documents + other.documents,
            self.mass + other.mass,
            self.batches + other.batches,
        )


class SlotStats:
    """Counts what a module's memories are asked for, while used as a context manager.

    It may be entered again and goes on counting. A batch is one call of `module`, however often
    the pool is read in it; a read outside of such a call is a batch of its own. Reads that
    activation checkpointing repeats are counted once; a module that was compiled and called
    before goes unseen.

    Args:
        module: layers with memories. A pool that several share is one pool.

    Attributes:
        pools: a `PoolStats` for each, by the pool's path in the module.

    Raises:
        TypeError: `module` is none.
        ValueError: it has no memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tables: dict[str, MemoryPool] = find_pools(module)
        self._module: nn.Module | None = module
        self.pools: dict[str, PoolStats] = {}
        for name, pool in self._tables.items():
            zeros = torch.zeros(pool.slots, dtype=torch.int64, device=pool.weight.device)
            self.pools[name] = PoolStats(zeros, zeros.clone(), zeros.double())
        self._start()

    def _start(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._fresh: dict[str, Tensor] = {}  # reads of the batch that has not ended
        self._depth = 0  # of calls of the module in one another

    @classmethod
    def _detached(cls, pools: dict[str, PoolStats]) -> SlotStats:
        stats = cls.__new__(cls)
        stats._tables, stats._module, stats.pools = {}, None, pools
        stats._start()
        return stats

    def __enter__(self) -> SlotStats:
        """Starts counting.

        Raises:
            RuntimeError: it counts already, or it was loaded or added up and has no module.
        """
        if self._module is None or self._hooks:
            state = "count already" if self._hooks else "were loaded or added up: none to count"
            raise RuntimeError(f"these statistics {state}")
        for name, pool in self._tables.items():
            self.pools[name] = self.pools[name].to(pool.weight.device)
            self._fresh[name] = torch.zeros_like(self.pools[name].counts)
            count = self._counter(name)
            hook = pool.register_forward_pre_hook(count, prepend=True, with_kwargs=True)
            self._hooks.append(hook)
        # After those of the pools, so as to come first where the module is a pool.
        self._hooks.append(self._module.register_forward_pre_hook(self._begin, prepend=True))
        self._hooks.append(self._module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Stops counting."""
        for hook in self._hooks:
            hook.remove()
        if self._depth:  # an interrupt leaves a call without its end
            self._finish(self.pools)
        self._start()

    def _begin(self, *_: object) -> None:
        self._depth += 1

    def _end(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._finish(self.pools)

    def _finish(self, names: Iterable[str]) -> None:
        """Ends a batch."""
        for name in names:
            stats, fresh = self.pools[name], self._fresh[name]
            stats.counts += fresh
            stats.documents += fresh > 0
            stats.batches += 1
            fresh.zero_()

    def _counter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # In a backward pass it is a repetition, whose first time was counted.
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
                self._count(name, *args, **kwargs)

        return hook

    @torch.no_grad()
    def _count(self, name: str, indices: Tensor, weights: Tensor, *_: object) -> None:
        check_indices(indices, weights)
        slots, weights = indices.flatten(), weights.flatten()
        self._fresh[name].index_add_(0, slots, (weights != 0).to(torch.int64))
        self.pools[name].mass.index_add_(0, slots, weights.abs().to(torch.float64))
        if self._depth == 0:
            self._finish([name])

    def _only(self) -> PoolStats:
        if len(self.pools) != 1:
            raise ValueError(f"there are {len(self.pools)} pools, choose one: {list(self.pools)}")
        return next(iter(self.pools.values()))

    @property
    def counts(self) -> Tensor:
        """`PoolStats.counts` of the only pool; with several, ValueError."""
        return self._only().counts

    @property
    def documents(self) -> Tensor:
        """`PoolStats.documents` of the only pool; with several, ValueError."""
        return self._only().documents

    @property
    def batches(self) -> int:
        """`PoolStats.batches` of the only pool; with several, ValueError."""
        return self._only().batches

    @property
    def usage(self) -> float:
        """`PoolStats.usage` of the only pool; with several, ValueError."""
        return self._only().usage

    @property
    def kl(self) -> float:
        """`PoolStats.kl` of the only pool; with several, ValueError."""
        return self._only().kl

    def __add__(self, other: SlotStats) -> SlotStats:
        """What both counted, such as another rank or an earlier run; it has no module itself.

        Raises:
            ValueError: they are of other pools.
        """
        _check_same_pools(self, other)
        return self._detached(
            {name: stats + other.pools[name] for name, stats in self.pools.items()}
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file, whole or not at all."""
        save_file("SlotStats", {name: vars(stats) for name, stats in self.pools.items()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SlotStats:
        """What `save` wrote, on the CPU and without a module: to compare with, or to add to.

        Raises:
            ValueError: the file holds something else.
        """
        pools = load_file("SlotStats", path)
        return cls._detached({name: PoolStats(**fields) for name, fields in pools.items()})


def select_slots(stats: SlotStats, background: SlotStats, top: int) -> dict[str, Tensor]:
    """The slots that new data reads often and other data seldom, for `sparse_finetune`.

    Scored as words are, counts_i / sum_j counts_j * log((B + 1) / (documents_i + 1)), B the
    batches of the background (Lin et al. 2025, arXiv 2510.15103, section 3).

    Args:
        stats: of the new data.
        background: of data whose knowledge is to stay, over batches of the same kind.
        top: slots to choose of each pool.

    Returns:
        For each pool int64 slots, best first, of equal ones the lower first; fewer than `top`
        where fewer were read.

    Raises:
        TypeError, ValueError: `top` is no positive integer, or the two are of other pools.
    """
    check_at_least(1, top=top)
    _check_same_pools(stats, background)
    chosen = {}
    for name, new in stats.pools.items():
        old = background.pools[name].to(new.counts.device)
        slots = new.counts.nonzero().flatten()
        frequency = new.counts[slots].double() / new.counts.sum()
        rarity = ((old.batches + 1) / (old.documents[slots].double() + 1)).log()
        order = (frequency * rarity).argsort(descending=True, stable=True)
        chosen[name] = slots[order[:top]]
    return chosen


def _check_same_pools(one: SlotStats, other: SlotStats) -> None:
    sizes, others = (
        {name: len(stats.counts) for name, stats in each.pools.items()} for each in (one, other)
    )
    if sizes != others:
        raise ValueError(f"the statistics are of other pools: {sizes} and {others} slots")


def find_pools(module: nn.Module) -> dict[str, MemoryPool]:
    """The distinct memories of a module by their paths; TypeError or ValueError without one."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    pools = {name: part for name, part in module.named_modules() if isinstance(part, MemoryPool)}
    if not pools:
        raise ValueError(f"{type(module).__name__} has 0 memories")
    return pools
