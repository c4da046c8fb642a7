"""What a model carries from one call to the next.

Shapes: b batch, m slots of the memory, p tokens of the open segment, l layers, h heads, e width of
a head, g groups of keys: 1 where all layers share theirs, else l.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared_core.checks import check_mask


class Memory(NamedTuple):
    """Keys and values of past tokens, oldest first, one slot a token.

    A segment that is not complete yet is open: its tokens have the last p slots, which only the
    segments after it will see, and their keys and values inside the segment come beside. A plain
    pair (keys, values) is a memory without an open segment, as the reference has it.

    Attributes:
        keys, values: (b, m, g * h * e). At most `mem_len` slots and those of the open segment.
        layer_keys, layer_values: (b, l, p, h * e) of the open segment in each layer, or None.
        mask: (b, m) boolean, True = take part; None: all do.
    """

    keys: Tensor
    values: Tensor
    layer_keys: Tensor | None = None
    layer_values: Tensor | None = None
    mask: Tensor | None = None

    @property
    def open_length(self) -> int:
        """Tokens of the open segment."""
        return 0 if self.layer_keys is None else self.layer_keys.shape[2]

    def detach(self) -> Memory:
        """Cuts the graph behind the memory."""
        return self._map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> Memory:
        """Moves every tensor to `device`."""
        return self._map(lambda x: x.to(device))

    def reorder(self, index: Tensor) -> Memory:
        """Takes the rows `index` (b',) of the batch, as beam search does."""
        return self._map(lambda x: x.index_select(0, index.to(x.device)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Memory:
        return Memory(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]


def as_memory(
    given: Memory | Sequence[Tensor], batch: int, width: int, layer_shape: tuple[int, int], s: int
) -> Memory:
    """A memory from what a caller gives: one of ours, or a plain pair.

    Args:
        batch: rows of the input.
        width: of a slot, g * h * e.
        layer_shape: layers and h * e.
        s: length of a segment.

    Raises:
        TypeError, ValueError: it is none, or of another model or batch.
    """
    if isinstance(given, Tensor) or not isinstance(given, (tuple, list)):
        raise TypeError(f"memory must be a Memory or a pair of tensors, got {type(given).__name__}")
    if not isinstance(given, Memory):
        if len(given) != 2:
            raise ValueError(
                f"memory must be a Memory or a pair of tensors, got {len(given)} parts"
            )
        given = Memory(*given)
    keys, values = given.keys, given.values
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        raise TypeError(
            f"memory must hold tensors, got {type(keys).__name__} and {type(values).__name__}"
        )
    if not keys.is_floating_point() or not values.is_floating_point():
        raise TypeError(f"memory must be floating point, got {keys.dtype} and {values.dtype}")
    if keys.shape != values.shape or keys.ndim != 3:
        raise ValueError(
            "keys and values of a memory must be of one shape (b, m, width), got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if keys.shape[0] != batch or keys.shape[2] != width:
        raise ValueError(
            f"memory must be ({batch}, m, {width}) for this model and input, got shape "
            f"{tuple(keys.shape)}"
        )
    _check_open(given, batch, layer_shape, s)
    check_mask("mask of the memory", given.mask, keys.shape[:2])
    return given


def _check_open(memory: Memory, batch: int, layer_shape: tuple[int, int], s: int) -> None:
    keys, values = memory.layer_keys, memory.layer_values
    if keys is None and values is None:
        return
    if keys is None or values is None or keys.shape != values.shape or keys.ndim != 4:
        shapes = [None if x is None else tuple(x.shape) for x in (keys, values)]
        raise ValueError(
            "layer_keys and layer_values of a memory must be of one shape (b, layers, p, width), "
            f"got {shapes[0]} and {shapes[1]}"
        )
    layers, width = layer_shape
    p = keys.shape[2]
    if keys.shape != (batch, layers, p, width):
        raise ValueError(
            f"layer_keys of the memory must be ({batch}, {layers}, p, {width}) for this model and "
            f"input, got shape {tuple(keys.shape)}"
        )
    if not p < s or p > memory.keys.shape[1]:
        raise ValueError(
            f"a memory of {memory.keys.shape[1]} slots has {p} tokens in an open segment, the "
            f"model has segments of {s}"
        )
