"""The memory in the layout that attention wants, and the open segment.

Shapes: b batch, n tokens, p tokens of the open segment, m slots of the memory, h heads, e width of
a head, l layers, g groups of keys: 1 where all layers share theirs, else l.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from feedback_transformer.state import Memory
from feedback_transformer.weights import Sizes


def beyond(m: int, most: int) -> int:
    """How many of m are more than `most`: by a comparison, which a graph can settle for good."""
    return m - most if m > most else 0


def split_heads(x: Tensor, sizes: Sizes) -> Tensor:
    """(b, m, g * h * e) -> (g, b, h, m, e)."""
    x = x.unflatten(-1, (sizes.groups, sizes.heads, sizes.dim_head)).permute(2, 0, 3, 1, 4)
    # Of one row the products take it as it is; of several they would copy it in every layer.
    return x.contiguous() if x.shape[1] > 1 else x


def join_heads(x: Tensor) -> Tensor:
    """(g, b, h, m, e) -> (b, m, g * h * e)."""
    return x.permute(1, 3, 0, 2, 4).flatten(2)


def _without_masked(memory: Memory) -> Memory:
    """0 in slots that do not take part: 0 times NaN would be NaN."""
    mask = memory.mask
    if mask is None:
        return memory
    gone = ~mask[..., None]
    keys, values = (x.masked_fill(gone, 0.0) for x in (memory.keys, memory.values))
    memory = memory._replace(keys=keys, values=values)
    if memory.layer_keys is None or memory.layer_values is None:
        return memory
    gone = gone[:, None, mask.shape[1] - memory.open_length :]
    inside = (x.masked_fill(gone, 0.0) for x in (memory.layer_keys, memory.layer_values))
    return memory._replace(layer_keys=next(inside), layer_values=next(inside))


class Window(NamedTuple):
    """What the tokens of a segment may see, and what they have left there so far.

    Attributes:
        keys, values: (g, b, h, m, e), the slots of all closed segments.
        new_keys, new_values: (g, b, h, p, e), the slots of the open segment, for those after it.
        layer_keys, layer_values: (l, b, h, p, e), for the open segment itself.
        mask: (b, m + p) boolean, or None.
    """

    keys: Tensor
    values: Tensor
    new_keys: Tensor
    new_values: Tensor
    layer_keys: Tensor
    layer_values: Tensor
    mask: Tensor | None

    @property
    def open_length(self) -> int:
        return self.layer_keys.shape[3]

    def most_slots(self, n: int, sizes: Sizes) -> int:
        """The most slots that any of n tokens will see."""
        m, p = self.keys.shape[3], self.open_length
        return m if p + n <= sizes.seq_len else min(m + p + n, sizes.mem_len)

    @staticmethod
    def of(memory: Memory | None, like: Tensor, layers: int, sizes: Sizes) -> Window:
        """From a memory, or an empty one for the rows of `like` (b, n, d)."""
        b = like.shape[0]
        if memory is None:
            slots = like.new_zeros(sizes.groups, b, sizes.heads, 0, sizes.dim_head)
            none = like.new_zeros(layers, b, sizes.heads, 0, sizes.dim_head)
            return Window(slots, slots, slots, slots, none, none, None)
        p = memory.open_length
        m = memory.keys.shape[1] - p
        first = beyond(m, sizes.mem_len)
        memory = _without_masked(memory)
        both = [split_heads(x[:, first:].to(like), sizes) for x in (memory.keys, memory.values)]
        if memory.layer_keys is None or memory.layer_values is None:
            none = like.new_zeros(layers, b, sizes.heads, 0, sizes.dim_head)
            inside = [none, none]
        else:
            inside = [
                x.to(like).unflatten(-1, (sizes.heads, -1)).permute(1, 0, 3, 2, 4)
                for x in (memory.layer_keys, memory.layer_values)
            ]
        m -= first
        mask = None if memory.mask is None else memory.mask[:, first:]
        (keys, new_keys), (values, new_values) = (x.split([m, p], 3) for x in both)
        return Window(keys, values, new_keys, new_values, inside[0], inside[1], mask)

    def wide(self) -> Window:
        """In float32 where the CPU would be slower in half precision, as in attention it is."""
        if self.keys.device.type != "cpu" or self.keys.dtype.itemsize > 2:
            return self
        found = (None if x is None or x.dtype == torch.bool else x.float() for x in self)
        return Window(*found)._replace(mask=self.mask)  # type: ignore[arg-type]

    def detach(self) -> Window:
        """Cuts the graph behind the slots and the open segment."""
        return Window(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def memory(self) -> Memory:
        """As it is carried to the next call."""
        keys, values = self.keys, self.values
        if self.open_length == 0:
            found = Memory(join_heads(keys), join_heads(values), None, None, self.mask)
            return _without_masked(found)
        keys, values = torch.cat((keys, self.new_keys), 3), torch.cat((values, self.new_values), 3)
        own_keys, own_values = (
            x.permute(1, 0, 3, 2, 4).flatten(3) for x in (self.layer_keys, self.layer_values)
        )
        found = Memory(join_heads(keys), join_heads(values), own_keys, own_values, self.mask)
        return _without_masked(found)

    def close(self, mem_len: int) -> Window:
        """Moves the slots of the open segment into the memory, which keeps the last `mem_len`."""
        m = self.keys.shape[3] + self.new_keys.shape[3]
        first = beyond(m, mem_len)
        keys = torch.cat((self.keys, self.new_keys), 3)[..., first:, :]
        values = torch.cat((self.values, self.new_values), 3)[..., first:, :]
        mask = None if self.mask is None else self.mask[:, first:]
        none, empty = self.layer_keys[..., :0, :], self.new_keys[..., :0, :]
        return Window(keys, values, empty, empty, none, none, mask)
