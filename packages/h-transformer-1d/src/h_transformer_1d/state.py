"""What incremental decoding carries from token to token, and how a token attends to it.

Shapes: b batch, h query heads, g key/value heads, f tokens in the open block (f <= c), l closed
levels, c block size, t new tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from h_transformer_1d.pyramid import (
    EMPTY,
    Level,
    accumulator,
    coarser,
    level_windows,
    log_count,
    pyramid,
)


class LayerState(NamedTuple):
    """The keys and values of one layer.

    Attributes:
        open_keys, open_values: (b, g, f, d) tokens of the block being filled.
        closed_keys, closed_values: (b, g, l * c, d) the last full block of every level.
        shifted: the last input of each shifted sub-layer, (b, 1, features); empty without
            token shift.
    """

    open_keys: Tensor
    open_values: Tensor
    closed_keys: Tensor
    closed_values: Tensor
    shifted: tuple[Tensor, ...] = ()

    def append(self, keys: Tensor, values: Tensor) -> LayerState:
        """Adds (b, g, t, d) to the open block, in the type of the state."""
        return self._replace(
            open_keys=torch.cat((self.open_keys, keys.to(self.open_keys.dtype)), 2),
            open_values=torch.cat((self.open_values, values.to(self.open_values.dtype)), 2),
        )


class State(NamedTuple):
    """The memory of a causal model: its size grows with the logarithm of the length.

    A state is never changed in place, so one may be kept and continued more than once.

    Attributes:
        layers: one `LayerState` a layer.
        open_logit: (b, f) 0 for each token of the open block, about -inf where it was masked.
        closed_logit: (b, l * c) logit of the tokens behind each closed slot, for queries in the
            open block: about -inf where they do not see the slot.
        closed_count: (b, l * c) unmasked tokens behind each closed slot.
        length: tokens seen so far.
        scheme, block_size: the partition that the closed blocks are seen by.
    """

    layers: tuple[LayerState, ...]
    open_logit: Tensor
    closed_logit: Tensor
    closed_count: Tensor
    length: int
    scheme: str
    block_size: int

    def detach(self) -> State:
        """Cuts the graph behind the state."""
        return self._map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> State:
        """Moves every tensor to `device`."""
        return self._map(lambda x: x.to(device))

    def reorder(self, index: Tensor) -> State:
        """Takes the rows `index` (b',) of the batch, as beam search does."""
        return self._map(lambda x: x.index_select(0, index.to(x.device)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        layers = tuple(
            LayerState(
                change(layer.open_keys),
                change(layer.open_values),
                change(layer.closed_keys),
                change(layer.closed_values),
                tuple(change(x) for x in layer.shifted),
            )
            for layer in self.layers
        )
        return State(
            layers,
            change(self.open_logit),
            change(self.closed_logit),
            change(self.closed_count),
            self.length,
            self.scheme,
            self.block_size,
        )

    def check(
        self, batch: int, depth: int, groups: int, width: int, c: int, scheme: str, shifts: int
    ) -> None:
        """Raises ValueError unless a model of this shape has made it, for `batch` sequences."""
        if len(self.layers) != depth:
            raise ValueError(f"the state has {len(self.layers)} layers, the model has {depth}")
        if len(self.open_logit) != batch:
            raise ValueError(f"the state holds {len(self.open_logit)} sequences, got {batch}")
        if (self.scheme, self.block_size) != (scheme, c):
            raise ValueError(
                f"the state has {self.scheme!r} blocks of {self.block_size}, the model {scheme!r} "
                f"blocks of {c}"
            )
        closed = (batch, groups, (self.length // c).bit_length() * c, width)
        opened = (batch, groups, self.length % c, width)
        for layer in self.layers:
            shapes = tuple(layer.closed_keys.shape), tuple(layer.open_keys.shape)
            if shapes != (closed, opened):
                raise ValueError(
                    f"after {self.length} tokens the model's closed and open keys are {closed} and "
                    f"{opened}, the state's are {shapes[0]} and {shapes[1]}"
                )
            if len(layer.shifted) != shifts:
                raise ValueError(
                    f"the state has {len(layer.shifted)} shifted inputs a layer, the model {shifts}"
                )


def empty_layer(batch: int, groups: int, width: int, like: Tensor) -> LayerState:
    """A layer that has seen nothing, in the type and on the device of `like`."""
    nothing = like.new_empty(batch, groups, 0, width)
    return LayerState(nothing, nothing, nothing, nothing)


def layer_of_tokens(keys: Tensor, values: Tensor, mask: Tensor | None, c: int) -> LayerState:
    """The layer after (b, g, n, d) keys and values, zero where `mask` (b, n) is False."""
    whole = keys.shape[2] // c * c
    count = None if mask is None else mask[:, :whole].to(accumulator(keys.dtype))
    levels = pyramid(keys[:, :, :whole], values[:, :, :whole], count, (whole // c).bit_length())
    kept = [
        (_last_block(level.keys, level, whole, c), _last_block(level.values, level, whole, c))
        for level in levels
        if whole
    ]
    nothing = keys[:, :, :0]
    # Copies: a view would keep the whole prompt alive.
    return LayerState(
        keys[:, :, whole:].clone(),
        values[:, :, whole:].clone(),
        torch.cat([nothing, *(x for x, _ in kept)], 2),
        torch.cat([nothing, *(x for _, x in kept)], 2),
    )


def state_of_layers(layers: tuple[LayerState, ...], mask: Tensor, scheme: str, c: int) -> State:
    """Joins layers that have all seen the tokens of `mask` (b, n)."""
    n = mask.shape[1]
    whole = n // c * c
    kind = accumulator(layers[0].open_keys.dtype)
    one_per_token = mask[:, None, :, None].to(kind)
    counted = layer_of_tokens(one_per_token, one_per_token, None, c)
    levels = torch.arange((whole // c).bit_length(), device=mask.device)
    scale = (2.0**levels).to(kind).repeat_interleave(c)
    closed_count = counted.closed_keys[:, 0, :, 0] * scale
    open_logit = torch.zeros_like(mask[:, whole:], dtype=kind).masked_fill(~mask[:, whole:], EMPTY)
    closed_logit = _closed_logit(closed_count, n // c, scheme, c)
    return State(layers, open_logit, closed_logit, closed_count, n, scheme, c)


def _last_block(x: Tensor, level: Level, whole: int, c: int) -> Tensor:
    last = ((whole // c) >> level.number) - 1
    return x[:, :, last * c : (last + 1) * c]


def _closed_logit(count: Tensor, block: int, scheme: str, c: int) -> Tensor:
    """The logits of the closed slots (b, l * c) for queries in the open block number `block`."""
    visible = torch.zeros(count.shape[1], dtype=torch.bool)
    for level in range(count.shape[1] // c):
        row = (block * c) >> level
        first = ((block >> level) - 1) * c
        for window in level_windows(level, c, True, scheme):
            period, offset = divmod(row - window.row, window.period)
            if period >= 0 and offset < window.rows and not window.diagonal:
                key = level * c + window.key + period * window.period - first
                visible[key : key + window.keys] = True
    seen = visible.to(count.device)
    return log_count(count * seen)


def close_block(state: State, scheme: str, c: int) -> State:
    """Files the full open block among the closed ones."""
    number = state.length // c - 1
    one = (state.open_logit == 0).to(state.closed_count.dtype)
    counts = state.closed_count.split(c, 1) if number else ()
    layers = []
    for layer in state.layers:
        blocks = zip(
            layer.closed_keys.split(c, 2), layer.closed_values.split(c, 2), counts, strict=False
        )
        closed = _carry(
            [Level(index, *block) for index, block in enumerate(blocks)],
            Level(0, layer.open_keys, layer.open_values, one),
            number,
        )
        empty = layer.open_keys[:, :, :0]
        keys = torch.cat([level.keys for level in closed], 2)
        values = torch.cat([level.values for level in closed], 2)
        layers.append(LayerState(empty, empty, keys, values, layer.shifted))
    count = torch.cat([level.tokens for level in closed if level.tokens is not None], 1)
    logit = _closed_logit(count, number + 1, scheme, c)
    opened = state.open_logit[:, :0]
    return State(tuple(layers), opened, logit, count, state.length, scheme, c)


def _carry(closed: list[Level], new: Level, number: int) -> list[Level]:
    """The last block of every level after block `number`, as a binary counter carries."""
    closed = list(closed)
    while new.number < len(closed):
        before = closed[new.number]
        closed[new.number] = new
        if not number >> new.number & 1:
            return closed
        new = coarser(_join(before, new))
    return [*closed, new]


def _join(first: Level, second: Level) -> Level:
    """Two neighbouring blocks of a level."""
    tokens = [level.tokens for level in (first, second) if level.tokens is not None]
    return Level(
        first.number,
        torch.cat((first.keys, second.keys), 2),
        torch.cat((first.values, second.values), 2),
        torch.cat(tokens, 1),
    )


def state_logits(state: State, t: int) -> Tensor:
    """(b, 1, t, l * c + f) logits of closed and open slots for the last t tokens of the block."""
    logits = torch.cat((state.closed_logit, state.open_logit), 1)[:, None, None]
    if t == 1:
        return logits
    later = torch.ones(t, logits.shape[-1], dtype=torch.bool, device=logits.device)
    later = later.triu(1 + logits.shape[-1] - t)
    return logits.expand(-1, 1, t, -1).masked_fill(later, EMPTY)


def attend_state(
    q: Tensor,
    layer: LayerState,
    logits: Tensor,
    slot_bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the last tokens of the open block.

    Args:
        q: (b, h, t, d).
        logits: (b, 1, t, l * c + f), see `state_logits`.
        slot_bias: (h, 1, l * c + f) added to them, or None.
        dropout: probability of dropping a weight.

    Returns:
        (b, h, t, d).
    """
    b, heads, t, d = q.shape
    groups = layer.open_keys.shape[1]
    closed = layer.closed_keys.shape[2]
    # Query heads that share a key/value head are rows of one product, in the type of the logits:
    # rounded ones would be further from those of a whole sequence.
    rows = q.reshape(b, groups, heads // groups * t, d).to(logits.dtype)
    closed_keys, open_keys = (x.to(logits.dtype) for x in (layer.closed_keys, layer.open_keys))
    products = torch.cat((rows @ closed_keys.mT, rows @ open_keys.mT), 3)
    slots = products.shape[3]
    scores = products.view(b, heads, t, slots) * scale + logits
    if slot_bias is not None:
        scores = scores + slot_bias
    weight = F.dropout(scores.softmax(-1), dropout, training=dropout > 0.0)
    weight = weight.to(layer.open_values.dtype).view(b, groups, heads // groups * t, slots)
    out = weight[..., :closed] @ layer.closed_values + weight[..., closed:] @ layer.open_values
    return out.view(q.shape).to(q.dtype)


def slot_bias(level_bias: Tensor, closed: int, opened: int, c: int) -> Tensor:
    """(h, 1, closed + opened) the bias (levels, h) of the level that each slot belongs to."""
    level = torch.arange(closed // c, device=level_bias.device).repeat_interleave(c)
    level = torch.cat((level, level.new_zeros(opened))).clamp(max=len(level_bias) - 1)
    return level_bias.T[:, None, level]
