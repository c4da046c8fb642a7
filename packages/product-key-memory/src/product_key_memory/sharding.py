"""Tables spread over ranks, by rows or by columns.

Neither gathers a table: what travels are indices, weights and rows that were read. Both take
tokens that are the same on all ranks, or of each rank its own.

Shapes: W ranks, s slots, d width, n tokens of this rank, N tokens of all ranks (n where they are
the same), k slots a token reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from product_key_memory.exchange import OwnTokens, SameTokens, Tokens, chunks, exchange
from product_key_memory.values import LocalReader, MemoryPool

_P = ParamSpec("_P")


def _untraced(method: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Breaks the graph of `torch.compile`: ranks have different numbers of tokens."""
    untraced: Callable[_P, Tensor] = torch.compiler.disable(method)
    return untraced


class _ShardedReader:
    """Reads tables of which every rank has a part.

    Args:
        local: reads the part.
        own_tokens: every rank has its own tokens.
    """

    dim: int

    def __init__(self, local: LocalReader, own_tokens: bool) -> None:
        self.local: LocalReader = local
        self.own_tokens: bool = own_tokens

    def tokens(self, table: DTensor, indices: Tensor) -> Tokens:
        """Tells the ranks how many tokens there are.

        Raises:
            ValueError: the shapes of indices on the ranks do not fit each other.
        """
        group, ranks = table.device_mesh.get_group(), table.device_mesh.size()
        mine = torch.tensor(indices.shape, device=indices.device)
        shapes = exchange(group, [2] * ranks, [2] * ranks, mine.repeat(ranks))
        counts, slots = shapes.view(ranks, 2).T.tolist()
        if len(set(slots)) > 1:
            raise ValueError(f"tokens must read one number of slots on all ranks, got {slots}")
        widths = chunks(table.shape[1], ranks)
        if self.own_tokens:
            return OwnTokens(group, widths, counts)
        if len(set(counts)) > 1:
            raise ValueError(
                "input_layouts=Replicate() takes the same tokens on all ranks, got "
                f"{counts} of them; Shard(0) takes other tokens on each"
            )
        return SameTokens(group, widths)


class _RowwiseReader(_ShardedReader):
    dim: int = 0

    @_untraced
    def read(
        self, table: Tensor, indices: Tensor, weights: Tensor, trainable: Tensor | None
    ) -> Tensor:
        whole, part = _whole_and_part(table)
        tokens = self.tokens(whole, indices)
        rows, elsewhere, trainable = _own_rows(whole, tokens.gather(indices), trainable)
        weights = tokens.gather(weights).masked_fill(elsewhere, 0.0)
        return tokens.sum(self.local.read(part, rows, weights, trainable, whole))

    @_untraced
    def match(self, table: Tensor, indices: Tensor, x: Tensor, trainable: Tensor | None) -> Tensor:
        whole, part = _whole_and_part(table)
        tokens = self.tokens(whole, indices)
        rows, elsewhere, trainable = _own_rows(whole, tokens.gather(indices), trainable)
        scores = self.local.match(part, rows, tokens.gather(x), trainable, whole)
        return tokens.sum(scores.masked_fill(elsewhere, 0.0))


def _own_rows(
    table: DTensor, indices: Tensor, trainable: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Slots as rows of this rank, the nearest for those elsewhere; which are; its `trainable`."""
    mesh = table.device_mesh
    sizes, rank = chunks(table.shape[0], mesh.size()), mesh.get_local_rank()
    first, size = sum(sizes[:rank]), sizes[rank]
    rows = (indices - first).clamp(0, size - 1)
    own = None if trainable is None else trainable[first : first + size]
    return rows, rows + first != indices, own


class _ColumnwiseReader(_ShardedReader):
    dim: int = 1

    @_untraced
    def read(
        self, table: Tensor, indices: Tensor, weights: Tensor, trainable: Tensor | None
    ) -> Tensor:
        whole, part = _whole_and_part(table)
        tokens = self.tokens(whole, indices)
        indices, weights = tokens.gather(indices), tokens.gather(weights)
        return tokens.join(self.local.read(part, indices, weights, trainable, whole))

    @_untraced
    def match(self, table: Tensor, indices: Tensor, x: Tensor, trainable: Tensor | None) -> Tensor:
        whole, part = _whole_and_part(table)
        tokens = self.tokens(whole, indices)
        indices, x = tokens.gather(indices), tokens.split(x)
        return tokens.sum(self.local.match(part, indices, x, trainable, whole))


def _whole_and_part(table: Tensor) -> tuple[DTensor, Tensor]:
    if not isinstance(table, DTensor):
        raise TypeError(f"the table was sharded, but has become a {type(table).__name__}")
    return table, table.to_local()


class _ShardedValues(ParallelStyle):
    reader: type[_RowwiseReader | _ColumnwiseReader]

    def __init__(self, input_layouts: Replicate | Shard) -> None:
        super().__init__()
        if input_layouts not in (Replicate(), Shard(0)):
            raise ValueError(
                f"input_layouts must be Replicate() or Shard(0), got {input_layouts!r}"
            )
        self.input_layouts: Replicate | Shard = input_layouts

    def __repr__(self) -> str:
        return f"{type(self).__name__}(input_layouts={self.input_layouts!r})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MemoryPool):
            raise TypeError(
                f"{type(self).__name__} shards a MemoryPool, got {type(module).__name__}"
            )
        if self._is_done(module, device_mesh):
            return module
        self._check(module, device_mesh)
        # Given only where it is not the default, since torch 2.5 does not know it.
        source = getattr(self, "src_data_rank", 0)
        options = {} if source == 0 else {"src_data_rank": source}
        for name, table in list(module.named_parameters()):
            placement = Shard(self.reader.dim)
            part = distribute_tensor(table, device_mesh, [placement], **options)
            module.register_parameter(name, nn.Parameter(part, table.requires_grad))
        local = LocalReader(factored=module.values_grad == "factored")
        module.reader = self.reader(local, self.input_layouts == Shard(0))
        return module

    def _is_done(self, pool: MemoryPool, mesh: DeviceMesh) -> bool:
        """Whether another layer that shares the pool has had this done already."""
        return (
            type(pool.reader) is self.reader
            and pool.reader.own_tokens == (self.input_layouts == Shard(0))
            and isinstance(pool.weight, DTensor)
            and pool.weight.device_mesh == mesh
        )

    def _check(self, pool: MemoryPool, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"the mesh must have one dimension, got {mesh.ndim}: slice it first")
        if isinstance(pool.weight, DTensor) or not isinstance(pool.reader, LocalReader):
            raise ValueError(
                f"the pool is read by a {type(pool.reader).__name__} from a "
                f"{type(pool.weight).__name__} already: shard it first and once"
            )
        size, what = pool.weight.shape[self.reader.dim], ("rows", "columns")[self.reader.dim]
        if 0 in chunks(size, mesh.size()):
            raise ValueError(f"{size} {what} leave a rank of {mesh.size()} without any")


class RowwiseValues(_ShardedValues):
    """Gives every rank of a mesh some rows of a `MemoryPool`.

        parallelize_module(model, mesh, {"pkm.values": RowwiseValues()})

    A rank reads those of the chosen slots that it has, and the ranks add up what they have read.

    A table's gradient is the sum over all tokens, as in one process that sees all of them and adds
    up their losses. `DistributedDataParallel` and `fully_shard` average over ranks instead: where
    the ranks of this mesh have their own tokens, keep the table out of them and divide its gradient
    by the number of ranks. All ranks must call forward and backward, with no tokens if need be, and
    with the same `trainable`. Under `torch.compile` the graph breaks here. Build the optimizer
    afterwards, since the parameters are new ones; state dicts hold DTensors, which
    `torch.distributed.checkpoint` saves and loads for any number of ranks.

    Args:
        input_layouts: `Replicate()`, all ranks have the same tokens and the same loss of them, or
            `Shard(0)`, each rank has its own, of any number.

    Raises:
        TypeError: when applied, the module is no `MemoryPool`.
        ValueError: the layout is another one. When applied: the mesh has several dimensions, a
            rank would have nothing, or the pool is sharded in another way already.
    """

    reader: type[_RowwiseReader | _ColumnwiseReader] = _RowwiseReader

    def __init__(self, *, input_layouts: Replicate | Shard | None = None) -> None:
        super().__init__(input_layouts or Replicate())


class ColumnwiseValues(_ShardedValues):
    """Gives every rank of a mesh some columns of a `MemoryPool`, see `RowwiseValues`.

    A rank reads its columns of all slots that the tokens of all ranks have chosen, then the ranks
    exchange them for whole rows. That moves W times fewer numbers than rows that are added up.

    Args:
        input_layouts: `Shard(0)`, each rank has its own tokens, of any number, or `Replicate()`,
            all ranks have the same tokens and the same loss of them.

    Raises:
        TypeError, ValueError: as `RowwiseValues` does.
    """

    reader: type[_RowwiseReader | _ColumnwiseReader] = _ColumnwiseReader

    def __init__(self, *, input_layouts: Replicate | Shard | None = None) -> None:
        super().__init__(input_layouts or Shard(0))
