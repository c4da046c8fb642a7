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

from typing import Any

import torch
from torch import Tensor

from feedback_transformer.feedback import run_piece
from feedback_transformer.fused_backward import backward_pass
from feedback_transformer.fused_forward import forward_pass
from feedback_transformer.layout import Activations, Shape, matrix, unflatten
from feedback_transformer.packing import FEW, Packs
from feedback_transformer.weights import Sizes, Weights
from feedback_transformer.window import Window
from shared_core import transformed

FEWEST_SEGMENTS = 2
"""With gradients a single segment is faster by `run_plain`."""


def can_fuse(x: Tensor, weights: Weights, table: Tensor, window: Window, segments: int) -> bool:
    """Whether this file computes what `run_plain` does, here and now, and faster."""
    if torch.compiler.is_compiling() or weights.context is not None or x.numel() == 0:
        return False
    if torch.is_grad_enabled() and segments < FEWEST_SEGMENTS:
        return False
    matrices = (matrix(y) for layer in weights.layers for y in layer)
    others = (matrix(weights.key_value), weights.mix, *(weights.memory_norm or ()))
    return x.device.type != "meta" and not transformed(x, table, *matrices, *others, *window)


def run_fused(
    x: Tensor,
    weights: Weights,
    sizes: Sizes,
    table: Tensor,
    window: Window,
    mask: Tensor | None,
    packs: Packs | None = None,
) -> tuple[Tensor, Window]:
    """`run_plain` for whole segments and a window without an open one.

    Without gradients packed weights are taken from `packs`, and kept there.
    """
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
            if x.device.type == "cpu" and x.dtype.itemsize < 4 and sizes.seq_len * b <= FEW:
                # As products of so few rows take it; for those of more it had to be halved again.
                *rest, key_value, mix = tensors
                first, before, after, biases = (y.float() for y in rest)
                tensors = (first, before, after, biases, key_value, mix.float())
                flat = tuple(y.float() if y.ndim == 1 else y for y in flat)
            found = forward_pass(shape, seen, *tensors, flat, save=False, packs=packs)[:3]
    out, keys, values = (y.to(x.dtype) for y in found)
    new = (y.unflatten(1, (b, sizes.heads)) for y in (keys, values))
    window = window._replace(
        keys=_last(window.keys, next(new), sizes.mem_len),
        values=_last(window.values, next(new), sizes.mem_len),
        mask=None if seen is None else seen[:, max(0, m + n - sizes.mem_len) :],
    )
    return out.transpose(0, 1), window


def _last(before: Tensor, new: Tensor, mem_len: int) -> Tensor:
    """The last slots of both, (g, b, h, m, e), a copy: a view would keep those of all tokens."""
    old = min(before.shape[3], max(0, mem_len - new.shape[3]))
    new = new[..., max(0, new.shape[3] - mem_len) :, :]
    return torch.cat((before[..., before.shape[3] - old :, :], new), 3)


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
    # Views: of the tensors themselves a gradient would come along every other way that leads to
    # them, too, such as a memory that was carried with its graph.
    inputs = [y.view_as(y) for y in inputs]
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
