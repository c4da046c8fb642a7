"""Learning by a few slots of a memory: the others keep every bit.

After Lin et al. 2025, "Continual Learning via Sparse Memory Finetuning" (arXiv 2510.15103).
Shapes: s slots of a table, u of them chosen, d width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from product_key_memory.files import load_file, save_file
from product_key_memory.operators import read
from product_key_memory.stats import find_pools
from product_key_memory.values import LocalReader, MemoryPool, Reader


@dataclass(frozen=True, eq=False)
class SlotDiff:
    """What a fine-tuning changed, on the CPU: to undo it, or to repeat it on a copy.

    Attributes:
        slots: (u,) int64 of each pool, by its path in the module.
        before: (u, d), their rows at the start, of the table's dtype.
        after: (u, d), their rows at the end.
    """

    slots: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def apply(self, module: nn.Module) -> None:
        """Makes the change to tables that are as they were before it, bit for bit.

        Raises:
            TypeError, ValueError: `module` has other tables or other rows; then nothing changed.
        """
        self._exchange(module, self.before, self.after)

    def rollback(self, module: nn.Module) -> None:
        """Undoes the change to tables that are as it left them, bit for bit.

        Raises:
            TypeError, ValueError: `module` has other tables or other rows; then nothing changed.
        """
        self._exchange(module, self.after, self.before)

    def _exchange(self, module: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        pools = find_pools(module)
        if not self.slots.keys() == old.keys() == new.keys() <= pools.keys():
            names = sorted({*self.slots, *old, *new})
            raise ValueError(f"the diff is of pools {names}, the module has {list(pools)}")
        for name, slots in self.slots.items():
            _check_rows(name, pools[name], slots, old[name], new[name])
        for name, slots in self.slots.items():
            table = pools[name].weight
            with torch.no_grad():
                table.index_copy_(0, slots.to(table.device), new[name].to(table.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file, whole or not at all."""
        save_file("SlotDiff", dict(vars(self)), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SlotDiff:
        """What `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        return cls(**load_file("SlotDiff", path))


class SparseFinetuning:
    """One fine-tuning; see `sparse_finetune`, which makes it."""

    def __init__(self, module: nn.Module, slots: Tensor | Mapping[str, Tensor]) -> None:
        self._module = module
        self._slots = _chosen_slots(module, slots)
        self._trained: dict[str, _TrainedRows] = {}
        self._required: dict[str, bool] = {}
        self._diff: SlotDiff | None = None

    def __enter__(self) -> SparseFinetuning:
        """Freezes the module and sets the chosen rows apart.

        Raises:
            ValueError: another fine-tuning holds one of the pools, or it is sharded.
        """
        pools = find_pools(self._module)
        for name in self._slots:
            _check_free(name, pools[name])
        self._trained = {name: _TrainedRows(pools[name], s) for name, s in self._slots.items()}
        for name, parameter in self._module.named_parameters():
            self._required[name] = parameter.requires_grad
            parameter.requires_grad_(False)
            # An optimizer that holds the module would step along what an earlier pass left.
            parameter.grad = None
            parameter.__dict__.get("factors", []).clear()
        for trained in self._trained.values():
            trained.install()
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the rows into their tables, after an exception too, and unfreezes the module."""
        for trained in self._trained.values():
            trained.remove()
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad_(self._required.get(name, parameter.requires_grad))
        trained_rows = self._trained.items()
        self._diff = SlotDiff(
            {name: trained.slots.cpu() for name, trained in trained_rows},
            {name: trained.before.cpu() for name, trained in trained_rows},
            {name: trained.in_table().cpu() for name, trained in trained_rows},
        )
        self._trained, self._required = {}, {}

    def parameters(self) -> list[nn.Parameter]:
        """The chosen rows (u, d) of each pool, for any optimizer.

        float32 where the table has less, so that small steps add up.

        Raises:
            RuntimeError: outside of the context.
        """
        if not self._trained:
            raise RuntimeError("there are rows to train only inside of the context")
        return [trained.rows for trained in self._trained.values()]

    def diff(self) -> SlotDiff:
        """What the last run through the context changed.

        Raises:
            RuntimeError: none has ended.
        """
        if self._diff is None or self._trained:
            raise RuntimeError("there is a diff only after the context has ended")
        return self._diff


def sparse_finetune(module: nn.Module, slots: Tensor | Mapping[str, Tensor]) -> SparseFinetuning:
    """A context inside which a module learns by the chosen slots alone.

        with sparse_finetune(model, slots) as session:
            optimizer = torch.optim.AdamW(session.parameters())
            ...
        session.diff().save("facts.pt")

    Inside, no parameter of the module requires a gradient or has one; the chosen rows of the
    tables are parameters of their own. So nothing else moves by a bit, whatever the optimizer.
    Buffers are not held: statistics of a batch norm stand still in eval mode only. Under data
    parallelism averaging the rows' gradients is the caller's part.

    The tables get the rows at the end, after an exception too (`diff().rollback` takes them back),
    and whenever a state_dict is taken or loaded; in between they are as before.

    Args:
        module: layers with memories.
        slots: for each pool, by its path in the module, (u,) int64 slots or an (s,) boolean mask,
            such as `select_slots` returns; pools that are not named are frozen. A tensor alone
            where the module has one pool.

    Raises:
        TypeError, ValueError: `module` has no memory, or the slots are of a wrong type, shape or
            range, twice the same, or none at all. ValueError on entering while another
            fine-tuning holds one of the pools, or where a table is sharded.
    """
    return SparseFinetuning(module, slots)


class _TrainedRows:
    """The chosen rows of a pool, as a parameter, and the pool's reader of both parts."""

    def __init__(self, pool: MemoryPool, slots: Tensor) -> None:
        self.pool, slots = pool, slots.to(pool.weight.device)
        self.slots: Tensor = slots
        self.reader: Reader = pool.reader
        self.before: Tensor = self.in_table()
        precise = torch.promote_types(self.before.dtype, torch.float32)
        self.rows: nn.Parameter = nn.Parameter(self.before.to(precise, copy=True))
        self.chosen: Tensor = torch.zeros(pool.slots, dtype=torch.bool, device=slots.device)
        self.chosen[slots] = True
        # Where a chosen slot is among the rows.
        self.place: Tensor = torch.zeros(pool.slots, dtype=torch.int64, device=slots.device)
        self.place[slots] = torch.arange(len(slots), device=slots.device)
        self.hooks: list[RemovableHandle] = []

    def read(
        self, table: Tensor, indices: Tensor, weights: Tensor, trainable: Tensor | None
    ) -> Tensor:
        """From the table what is frozen, and the rest from the rows."""
        chosen, rows = self.chosen[indices], self.rows.to(table.dtype)
        frozen: Tensor = read(table.detach(), indices, weights.masked_fill(chosen, 0.0))
        weights = weights.masked_fill(~chosen, 0.0)
        learns = None if trainable is None else trainable[self.slots]
        return frozen + LocalReader(factored=False).read(rows, self.place[indices], weights, learns)

    def match(self, table: Tensor, indices: Tensor, x: Tensor, trainable: Tensor | None) -> Tensor:
        """As before: the inputs of experts are frozen whole."""
        return self.reader.match(table, indices, x, trainable)

    def in_table(self) -> Tensor:
        """A copy of the chosen rows as the table has them: (u, d)."""
        return self.pool.weight.detach()[self.slots]

    def install(self) -> None:
        self.pool.reader = self
        pool: nn.Module = self.pool
        self.hooks = [
            pool.register_state_dict_pre_hook(self.flush),
            # What is loaded may lack this table.
            pool.register_load_state_dict_pre_hook(self.flush),
            pool.register_load_state_dict_post_hook(self.fetch),
        ]

    def remove(self) -> None:
        self.flush()
        self.pool.reader = self.reader
        for hook in self.hooks:
            hook.remove()

    def flush(self, *_: object) -> None:
        """Rows into the table."""
        # By `data`, since a backward pass under way does not mind: it masks these rows.
        table = self.pool.weight.data
        table.index_copy_(0, self.slots.to(table.device), self.rows.data.to(table))

    def fetch(self, *_: object) -> None:
        """Rows out of the table."""
        self.rows.data.copy_(self.in_table())


def _chosen_slots(module: nn.Module, slots: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Valid slots of the pools that have any."""
    pools = find_pools(module)
    if isinstance(slots, Tensor):
        if len(pools) != 1:
            raise ValueError(f"slots must name one of {len(pools)} pools: {list(pools)}")
        slots = dict.fromkeys(pools, slots)
    if not isinstance(slots, Mapping):
        raise TypeError(f"slots must be a tensor or a mapping, got {type(slots).__name__}")
    if unknown := slots.keys() - pools.keys():
        raise ValueError(f"slots names pools {sorted(unknown)}, the module has {list(pools)}")
    chosen = {}
    for name, given in slots.items():
        _check_slots(name, given, pools[name].slots)
        indices = given.nonzero().flatten() if given.dtype == torch.bool else given
        if len(indices):
            chosen[name] = indices.clone()
    if not chosen:
        raise ValueError(f"0 slots are chosen of {len(pools)} pools")
    return chosen


def _check_slots(name: str, slots: Tensor, size: int) -> None:
    """Raises unless `slots` is (u,) distinct int64 below `size`, or (size,) boolean."""
    if not isinstance(slots, Tensor) or slots.dtype not in (torch.int64, torch.bool):
        kind = slots.dtype if isinstance(slots, Tensor) else type(slots).__name__
        raise TypeError(f"slots of {name!r} must be an int64 or boolean tensor, got {kind}")
    mask = slots.dtype == torch.bool
    if slots.ndim != 1 or (mask and len(slots) != size):
        wanted = f"a mask ({size},)" if mask else "(u,)"
        raise ValueError(f"slots of {name!r} must be {wanted}, got shape {tuple(slots.shape)}")
    if mask or not len(slots):
        return
    low, high = int(slots.min()), int(slots.max())
    if low < 0 or high >= size:
        raise ValueError(f"slots of {name!r} must be from 0 to {size - 1}, got {low} to {high}")
    if twice := len(slots) - len(slots.unique()):
        raise ValueError(f"slots of {name!r} must be distinct, got {twice} of {len(slots)} again")


def _check_free(name: str, pool: MemoryPool) -> None:
    """Raises ValueError unless the pool's table is whole, here, and up to date."""
    if isinstance(pool.reader, _TrainedRows):
        held = len(pool.reader.slots)
        raise ValueError(f"another fine-tuning holds {held} of {pool.slots} slots of {name!r}")
    if not isinstance(pool.reader, LocalReader) or type(pool.weight.data) is not Tensor:
        raise ValueError(f"pool {name!r} of {pool.slots} slots is not whole on one device")


def _check_rows(name: str, pool: MemoryPool, slots: Tensor, old: Tensor, new: Tensor) -> None:
    """Raises unless the pool has the old rows, bit for bit, and can have the new ones."""
    _check_free(name, pool)
    _check_slots(name, slots, pool.slots)
    table = pool.weight.detach()
    for rows in (old, new):
        if rows.shape != (len(slots), pool.dim) or rows.dtype != table.dtype:
            raise ValueError(
                f"the diff has rows {tuple(rows.shape)} of {rows.dtype} for pool {name!r}, which "
                f"needs {(len(slots), pool.dim)} of {table.dtype}"
            )
    found = table[slots.to(table.device)].cpu().view(torch.uint8)
    if different := int((found != old.view(torch.uint8)).any(1).sum()):
        raise ValueError(f"{different} of {len(slots)} rows of pool {name!r} are not the diff's")
