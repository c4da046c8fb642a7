"""Whole segments through all layers, with gradients computed by hand.

The recurrence decides the order of the work: a segment's products have few rows, and there is one
after the other. So the forward pass does nothing but them, in buffers that are allocated once and
have the layout that attention wants, with weights laid out for few rows. The backward pass goes
back in the same way for the activations alone; the gradients of the weights need no order, and each
is one large product at the end. Both are exact.

Shapes: n tokens, b batch, d model width, s tokens of a segment, r = s * b rows, h heads, e width of
a head, l layers, g groups of keys, m slots. Sequences are (n, b, ...): a segment's rows lie
together, and so do all rows of a weight's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback_transformer.feedback import LayerWeights, Sizes, Weights, Window, run_piece
from feedback_transformer.packing import Matrix, multiply, pack

FEWEST, FEWEST_BACK = 6, 16
"""Segments from which on it pays to lay out weights for them, and to transpose them for that."""


class Shape(NamedTuple):
    """Sizes of a model and of a call: `slots` of the memory before, `tokens` n, `rows` b."""

    sizes: Sizes
    depth: int
    rows: int
    tokens: int
    slots: int
    norm_memory: bool
    matrix_dtype: torch.dtype

    @property
    def inside(self) -> bool:
        """Whether tokens see their own segment."""
        return self.sizes.seq_len > 1

    @property
    def segments(self) -> int:
        return self.tokens // self.sizes.seq_len

    def spans(self, k: int) -> tuple[int, int, int, int]:
        """Segment k: its first token, the slots it sees, from and to, and where its own end."""
        start = k * self.sizes.seq_len
        high = self.slots + start
        low = max(0, high - self.sizes.mem_len)
        return start, low, high, high + (self.sizes.seq_len if self.inside else 0)


class Activations(NamedTuple):
    """What the backward pass needs: all that is linear in the number of tokens, nothing else.

    Attributes:
        states: (l + 1, n, b, d), the input of every layer, and the output.
        middle: (l, n, b, d), between attention and feed-forward.
        query: (l, n, b, h * e).
        own: (l, n, b, h * 2 * e), keys and values inside the segment; empty where it has one token.
        found: (l, n, b, h * e), what attention found.
        inner: (l, n, b, f), before GEGLU.
        dropped: (l, n, b, f / 2), factors of the feed-forward's dropout; empty without.
        slots: (2, g, b * h, m + n, e), keys and values of the memory before and of all tokens.
        shares: of each segment the attention weights (l, b * h, s, m_k), then its factors of
            dropout where there is some.
    """

    states: Tensor
    middle: Tensor
    query: Tensor
    own: Tensor
    found: Tensor
    inner: Tensor
    dropped: Tensor
    slots: Tensor
    shares: tuple[Tensor, ...]


def can_fuse(x: Tensor, weights: Weights) -> bool:
    """Whether this file computes what `run_plain` does, here and now."""
    return (
        not torch.compiler.is_compiling()
        and weights.context is None
        and x.numel() > 0
        and x.device.type != "meta"
        and isinstance(weights.key_value, Tensor)
    )


def run_fused(
    x: Tensor,
    weights: Weights,
    sizes: Sizes,
    table: Tensor,
    window: Window,
    mask: Tensor | None,
) -> tuple[Tensor, Window]:
    """`run_plain` for whole segments and a window without an open one."""
    b, n, _ = x.shape
    m = window.keys.shape[3]
    seen = None
    if mask is not None or window.mask is not None:
        before = x.new_ones(b, m, dtype=torch.bool) if window.mask is None else window.mask
        seen = torch.cat((before, before.new_ones(b, n) if mask is None else mask), 1)
    matrix_dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        matrix_dtype = torch.get_autocast_dtype(x.device.type)
    depth = len(weights.layers)
    norm = weights.memory_norm
    shape = Shape(sizes, depth, b, n, m, norm is not None, matrix_dtype)
    tensors = (
        x.transpose(0, 1).contiguous(),
        window.keys.flatten(1, 2),
        window.values.flatten(1, 2),
        table,
        matrix(weights.key_value),
        weights.mix.to(x.dtype),
    )
    flat = (*(norm or ()), *(tensor for layer in weights.layers for tensor in map(matrix, layer)))
    with torch.autocast(x.device.type, enabled=False):
        # Inside of the function it would not be known that nobody wants gradients.
        if torch.is_grad_enabled():
            found = _Recurrence.apply(shape, seen, *tensors, *flat)  # type: ignore[no-untyped-call]
        else:
            found = forward_pass(shape, seen, *tensors, flat, save=False)[:3]
            found = [y.to(x.dtype) for y in found]
    out, keys, values = found
    new = (y.unflatten(1, (b, sizes.heads)) for y in (keys, values))
    window = window._replace(
        keys=_last(window.keys, next(new), sizes.mem_len),
        values=_last(window.values, next(new), sizes.mem_len),
        mask=None if seen is None else seen[:, max(0, m + n - sizes.mem_len) :],
    )
    return out.transpose(0, 1), window


def _last(before: Tensor, new: Tensor, mem_len: int) -> Tensor:
    """The last slots of both, (g, b, h, m, e)."""
    old = min(before.shape[3], max(0, mem_len - new.shape[3]))
    new = new[..., max(0, new.shape[3] - mem_len) :, :]
    return torch.cat((before[..., before.shape[3] - old :, :], new), 3) if old else new


class Matrices(NamedTuple):
    """The matrices of the recurrence, (out, in), for one direction.

    Attributes:
        query, out, inner, outer: of each layer.
        own: of each group, rows ordered by heads: h, then key and value, then e.
        slot: rows ordered by heads: h, then groups, then key and value, then e. With one group
            it is `own`, so that it stays in a cache.
    """

    query: tuple[Matrix, ...]
    own: tuple[Matrix, ...]
    out: tuple[Matrix, ...]
    inner: tuple[Matrix, ...]
    outer: tuple[Matrix, ...]
    slot: Matrix


def lay_out(
    layers: list[LayerWeights], key_value: Tensor, shape: Shape, *, transposed: bool
) -> Matrices:
    """Matrices for the forward pass, or transposed ones for the way back."""
    sizes = shape.sizes
    h, e, g = sizes.heads, sizes.dim_head, sizes.groups
    rows = sizes.seq_len * shape.rows
    by_group = key_value.view(g, 2, h, e, -1)

    def place(weight: Tensor) -> Matrix:
        weight = weight.detach().to(shape.matrix_dtype)
        weight = weight.t() if transposed else weight
        fewest = FEWEST_BACK if transposed else FEWEST
        return pack(weight, rows) if shape.segments >= fewest else weight

    slot = place(by_group.permute(2, 0, 1, 3, 4).flatten(0, 3))
    own: tuple[Matrix, ...] = (slot,)
    if g > 1:
        own = tuple(place(group.transpose(0, 1).flatten(0, 2)) for group in by_group)
    return Matrices(
        tuple(place(matrix(layer.query)) for layer in layers),
        own if shape.inside else (),
        tuple(place(matrix(layer.out)) for layer in layers),
        tuple(place(matrix(layer.inner)) for layer in layers),
        tuple(place(matrix(layer.outer)) for layer in layers),
        slot,
    )


def matrix(weight: Matrix) -> Tensor:
    """A weight that is not packed."""
    if not isinstance(weight, Tensor):
        raise TypeError("weights must not be packed yet")
    return weight


def product(x: Tensor, weight: Matrix, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, computed in `dtype`, in the type of x."""
    if x.dtype == dtype:
        return multiply(x, weight, bias)
    out = multiply(x.to(dtype), weight).to(x.dtype)
    return out if bias is None else out + bias


def unflatten(flat: tuple[Tensor, ...], shape: Shape) -> tuple[Any, list[LayerWeights]]:
    """Gain and shift of the memory's norm, or None, and the layers."""
    norm = flat[:2] if shape.norm_memory else None
    flat = flat[2:] if shape.norm_memory else flat
    width = len(LayerWeights._fields)
    layers = [LayerWeights(*flat[width * i : width * (i + 1)]) for i in range(shape.depth)]
    return norm, layers


def kept(seen: Tensor | None, shape: Shape, k: int) -> tuple[Tensor | None, Tensor | None]:
    """What segment k may see: (b * h, 1, m_k) boolean, and rows (s, b, 1) that see something.

    None where all is seen; the second alone is there where there is nothing to see.
    """
    _, low, high, end = shape.spans(k)
    s, h = shape.sizes.seq_len, shape.sizes.heads
    if seen is None:
        return None, None
    keep = seen[:, low:end]
    alive = keep[:, : high - low].any(1).expand(s, -1)
    if shape.inside:
        alive = alive | (keep[:, high - low :].cumsum(1) > 0).t()
    keep = keep[:, None, None].expand(-1, h, 1, -1).flatten(0, 1)
    return keep, alive[..., None]


@torch.no_grad()
def forward_pass(
    shape: Shape,
    seen: Tensor | None,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    key_value: Tensor,
    mix: Tensor,
    flat: tuple[Tensor, ...],
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Activations | None]:
    """States (n, b, d) of the last layer, keys and values of slots, and activations if wanted."""
    sizes, n, b, d = shape.sizes, shape.tokens, shape.rows, x.shape[2]
    s, h, e, g = sizes.seq_len, sizes.heads, sizes.dim_head, sizes.groups
    dtype = shape.matrix_dtype
    norm, layers = unflatten(flat, shape)
    weights = lay_out(layers, key_value, shape, transposed=False)
    out = torch.empty_like(x)
    # Attention in half precision is slow on the CPU; it is its own way back, so only without one.
    wide = torch.float32 if x.device.type == "cpu" and x.dtype.itemsize < 4 else x.dtype
    slots = x.new_empty(2, g, b * h, shape.slots + n, e, dtype=x.dtype if save else wide)
    slots[0, :, :, : shape.slots] = keys
    slots[1, :, :, : shape.slots] = values
    saved = _allocate(shape, x, layers, slots) if save else None
    shares: list[Tensor] = []
    table = table.repeat(b, 1, 1).to(slots.dtype)
    columns = table.shape[2] - (s if shape.inside else 0)

    for k in range(shape.segments):
        start, low, high, end = shape.spans(k)
        tokens = slice(start, start + s)
        bias = table[:, :, columns - (high - low) : columns + (end - high)]
        keep, alive = kept(seen, shape, k)
        # Of each group what is seen, its keys transposed, and the places of the segment in it.
        windows = [
            (slots[0, j, :, low:end].mT, slots[1, j, :, low:end], slots[:, j, :, high:end])
            for j in range(g)
        ]
        states = [x[tokens].view(s * b, d)]
        segment_shares, segment_factors = [], []
        for i, layer in enumerate(layers):
            group = i if g > 1 else 0
            seen_keys, seen_values, places = windows[group]
            y = states[-1]
            hidden = F.layer_norm(y, (d,), layer.attn_gain, layer.attn_shift)
            query = product(hidden, weights.query[i], dtype)
            if shape.inside:
                own = product(hidden, weights.own[group], dtype)
                places.copy_(own.view(s, b * h, 2, e).permute(2, 1, 0, 3))
            by_head = query.view(s, b * h, e).transpose(0, 1).to(slots.dtype)
            share, factors, found = _attend(
                by_head, seen_keys, seen_values, bias, keep, sizes.attn_dropout
            )
            found = found.transpose(0, 1).reshape(s * b, h * e).to(x.dtype)
            middle = y
            if alive is not None:
                shift = alive.reshape(-1, 1) * layer.out_bias
                middle = product(found, weights.out[i], dtype).add_(shift).add_(y)
            elif end > low:
                middle = product(found, weights.out[i], dtype, layer.out_bias).add_(y)
            hidden = F.layer_norm(middle, (d,), layer.ff_gain, layer.ff_shift)
            inner = product(hidden, weights.inner[i], dtype, layer.inner_bias)
            half = inner.shape[1] // 2
            active = F.gelu(inner[:, half:]).mul_(inner[:, :half])
            if sizes.ff_dropout:
                factor = _factors(active, sizes.ff_dropout)
                active.mul_(factor)
            states.append(product(active, weights.outer[i], dtype, layer.outer_bias).add_(middle))
            if saved is not None:
                saved.query[i, tokens].view(s * b, -1).copy_(query)
                if shape.inside:
                    saved.own[i, tokens].view(s * b, -1).copy_(own)
                saved.found[i, tokens].view(s * b, -1).copy_(found)
                saved.middle[i, tokens].view(s * b, d).copy_(middle)
                saved.inner[i, tokens].view(s * b, -1).copy_(inner)
                if sizes.ff_dropout:
                    saved.dropped[i, tokens].view(s * b, -1).copy_(factor)
                segment_shares.append(share)
                segment_factors.append(factors)
        out[tokens].view(s * b, d).copy_(states[-1])
        stacked = torch.stack(states)
        mixed = (mix @ stacked.view(len(states), -1)).view(s * b, d)
        if norm is not None:
            mixed = F.layer_norm(mixed, (d,), *norm)
        both = product(mixed, weights.slot, dtype).view(s, b * h, g, 2, e)
        slots[:, :, :, high : high + s] = both.permute(3, 2, 1, 0, 4)
        if saved is not None:
            saved.states[:, tokens] = stacked.view(-1, s, b, d)
            shares.append(torch.stack(segment_shares))
            if sizes.attn_dropout:
                shares.append(torch.stack(segment_factors))
    if saved is not None:
        saved = saved._replace(shares=tuple(shares))
    return out, slots[0, :, :, shape.slots :], slots[1, :, :, shape.slots :], saved


def _allocate(shape: Shape, x: Tensor, layers: list[LayerWeights], slots: Tensor) -> Activations:
    sizes = shape.sizes
    n, b, depth, d = shape.tokens, shape.rows, shape.depth, x.shape[2]
    inner = matrix(layers[0].inner).shape[0]
    return Activations(
        x.new_empty(depth + 1, n, b, d),
        x.new_empty(depth, n, b, d),
        x.new_empty(depth, n, b, sizes.inner),
        x.new_empty(depth, n if shape.inside else 0, b, 2 * sizes.inner),
        x.new_empty(depth, n, b, sizes.inner),
        x.new_empty(depth, n, b, inner),
        x.new_empty(depth, n if sizes.ff_dropout else 0, b, inner // 2),
        slots,
        (),
    )


def _factors(like: Tensor, dropout: float) -> Tensor:
    """Factors of dropout: 0, or what keeps the mean."""
    return F.dropout(torch.ones_like(like), dropout)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their factors of dropout, and what queries (b * h, s, e) find; keys transposed."""
    scores = torch.baddbmm(bias, query, keys, alpha=query.shape[-1] ** -0.5)
    if keep is not None:
        scores.masked_fill_(~keep, torch.finfo(scores.dtype).min)
    share = scores.softmax(-1)
    if keep is not None:
        share.mul_(keep)
    factors = share
    if not dropout:
        return share, factors, share @ values
    factors = _factors(share, dropout)
    return share, factors, (share * factors) @ values


class _Recurrence(torch.autograd.Function):
    """`forward_pass` with its gradients; a second derivative goes through `run_plain`."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, seen: Tensor | None, *tensors: Tensor) -> Any:
        x, keys, values, table, key_value, mix, *flat = tensors
        save = any(ctx.needs_input_grad)
        out, new_keys, new_values, saved = forward_pass(
            shape, seen, x, keys, values, table, key_value, mix, tuple(flat), save=save
        )
        if saved is not None:
            # What is returned is the caller's to change.
            new_keys, new_values = new_keys.clone(), new_values.clone()
            kept_tensors = (*tensors, *saved[:-1], *saved.shares)
            ctx.shape, ctx.inputs = shape, len(tensors)
            ctx.save_for_backward(seen, *kept_tensors)
        return out, new_keys, new_values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        from feedback_transformer.fused_backward import backward_pass

        seen, *tensors = ctx.saved_tensors
        inputs, rest = tensors[: ctx.inputs], tensors[ctx.inputs :]
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            found = _differentiable(ctx.shape, seen, inputs, gradients, needed)
        else:
            fields = len(Activations._fields) - 1
            saved = Activations(*rest[:fields], shares=tuple(rest[fields:]))  # type: ignore[misc]
            with torch.autocast(gradients[0].device.type, enabled=False):
                found = backward_pass(ctx.shape, seen, inputs, saved, gradients)
        return None, None, *found


def _differentiable(
    shape: Shape,
    seen: Tensor | None,
    inputs: list[Tensor],
    gradients: tuple[Tensor, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, of the same thing computed the plain way."""
    if shape.sizes.attn_dropout or shape.sizes.ff_dropout:
        raise RuntimeError("second derivatives need dropout to be 0")
    x, keys, values, table, key_value, mix, *flat = inputs
    norm, layers = unflatten(tuple(flat), shape)
    weights = Weights(tuple(layers), key_value, mix, norm)
    b, n, m = shape.rows, shape.tokens, shape.slots
    window = Window.of(None, x.transpose(0, 1), shape.depth, shape.sizes)
    window = window._replace(
        keys=keys.unflatten(1, (b, -1)),
        values=values.unflatten(1, (b, -1)),
        mask=None if seen is None else seen[:, :m],
    )
    all_keys, all_values, outputs = [], [], []
    for start in range(0, n, shape.sizes.seq_len):
        stop = start + shape.sizes.seq_len
        if window.mask is not None and seen is not None:
            mask = torch.cat((window.mask, seen[:, m + start : m + stop]), 1)
            window = window._replace(mask=mask)
        piece = x[start:stop].transpose(0, 1)
        out, window = run_piece(piece, weights, shape.sizes, table, window, None)
        outputs.append(out)
        all_keys.append(window.new_keys)
        all_values.append(window.new_values)
        window = window.close(shape.sizes.mem_len)
    found = (
        torch.cat(outputs, 1).transpose(0, 1),
        torch.cat(all_keys, 3).flatten(1, 2),
        torch.cat(all_values, 3).flatten(1, 2),
    )
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    results = iter(
        torch.autograd.grad(found, wanted, gradients, create_graph=True, allow_unused=True)
    )
    return [next(results) if need else None for need in needed]
