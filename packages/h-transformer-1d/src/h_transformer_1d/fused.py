"""Hierarchical attention in memory linear in the length, with its own backward pass.

Forward: every patch gives its output and log-sum-exp, which are merged into the row's softmax.
Backward: every patch is computed again from the row's final log-sum-exp, so nothing but the
inputs, the output and one number a row is kept. The two passes are opaque operators, so
`torch.compile` and `torch.export` see one node of any length.

Shapes: b batch, h query heads, g key/value heads, n tokens, d head width, s slots of a level,
p rectangles of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from h_transformer_1d.kernels import (
    Rectangles,
    Rows,
    attend_patch,
    attend_patch_backward,
    has_flash_backward,
)
from h_transformer_1d.plain import attend_plain
from h_transformer_1d.pyramid import (
    EMPTY,
    Level,
    Patch,
    accumulator,
    add_gradient_of_means,
    count_levels,
    pairs,
    patch_keys,
    patch_rows,
    plan,
    pyramid,
    token_count,
)
from shared_core import differentiate_twice

# Elements of a tensor that stay in a core's cache: so many heads are worked on at a time.
_WORKING_SET = 2**20
# Log-sum-exp of a row that saw nothing: every weight computed from it is exactly 0.
_NOTHING = -EMPTY

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? level_bias"
_OPTIONS = "int block_size, bool causal, str scheme, bool coarse, float scale"


class _Rule(NamedTuple):
    """What is the same for all heads."""

    patches: tuple[Patch, ...]
    depth: int
    tokens: Tensor | None
    causal: bool
    coarse: bool
    scale: float


class _Heads(NamedTuple):
    """A few query heads and what they attend to.

    Attributes:
        q: (b, h, n, d). k, v: (b, h, n, d), or (b, 1, n, d) where all query heads share one.
        level_bias: (levels, h) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    level_bias: Tensor | None
    rule: _Rule

    def levels(self) -> Iterator[Level]:
        queries = self.q if self.rule.coarse else None
        return pyramid(self.k, self.v, self.rule.tokens, self.rule.depth, queries)

    def patches(self, level: Level) -> Iterator[Patch]:
        return (patch for patch in self.rule.patches if patch.level == level.number)

    def shift(self, level: Level) -> Tensor | float:
        """What all logits of a level have in common: (h, 1) or a number."""
        if self.level_bias is None:
            return level.shift()
        row = min(level.number, len(self.level_bias) - 1)
        return self.level_bias[row, :, None] + level.shift()

    def rectangles(self, level: Level, patch: Patch) -> Rectangles:
        heads = self.q.shape[1]
        rows = self.q if level.queries is None else level.queries
        bias = level.bias()
        if bias is not None:
            bias = patch_keys(bias[:, None], patch).expand(len(self.q), -1, -1, -1).flatten(0, 2)
        return Rectangles(
            _fold(patch_rows(rows, patch), heads),
            _fold(patch_keys(level.keys, patch), heads),
            _fold(patch_keys(level.values, patch), heads),
            bias,
            self.rule.causal and patch.diagonal,
            self.rule.scale,
        )


def _fold(x: Tensor, heads: int) -> Tensor:
    """(b, 1 or h, p, ...) -> (b p, h, ...), a view where the strides allow one."""
    folded: Tensor = x.expand(-1, heads, *x.shape[2:]).transpose(1, 2).flatten(0, 1)
    return folded


def _unfold(x: Tensor, patch: Patch) -> Tensor:
    """(b p, h, ...) -> (b, h, p, ...), a view."""
    return x.view(-1, patch.groups, *x.shape[1:]).transpose(1, 2)


def _forward(heads: _Heads, out: Tensor, lse: Tensor) -> None:
    """Fills out (b, h, n, d) and lse (b, h, n)."""
    if not heads.rule.coarse:
        for level in heads.levels():
            for patch in heads.patches(level):
                _merge(heads, level, patch, out, lse, first=patch.diagonal)
        return
    # From the top of the pyramid down: the tokens of a slot start from what the slot saw.
    above: tuple[Tensor, Tensor] | None = None
    for level in reversed(list(heads.levels())):
        slots = level.keys.shape[2]
        if above is None:
            out_here = out.new_zeros(*out.shape[:2], slots, out.shape[3])
            lse_here = lse.new_full((*lse.shape[:2], slots), -math.inf)
        else:
            out_here, lse_here = (x.repeat_interleave(2, 2)[:, :, :slots] for x in above)
        for patch in heads.patches(level):
            _merge(heads, level, patch, out_here, lse_here, first=False)
        above = out_here, lse_here
    out.copy_(out_here)
    lse.copy_(lse_here)


def _merge(
    heads: _Heads, level: Level, patch: Patch, out: Tensor, lse: Tensor, first: bool
) -> None:
    """Adds a patch to the softmax of its rows; `first` where they have seen nothing yet."""
    patch_out, patch_lse = attend_patch(heads.rectangles(level, patch))
    patch_out = _unfold(patch_out, patch)
    patch_lse = _unfold(patch_lse + heads.shift(level), patch)
    out, lse = patch_rows(out, patch), patch_rows(lse, patch)
    if first:
        out.copy_(patch_out)
        lse.copy_(patch_lse)
        return
    share = (patch_lse - lse).sigmoid_()
    out.lerp_(patch_out.to(out.dtype), share[..., None])
    lse.copy_(torch.logaddexp(lse, patch_lse))


class _Gradients(NamedTuple):
    """Gradients of each level's means and of the level bias (levels, h), in a wide type."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    level_bias: Tensor | None


def _zero_gradients(heads: _Heads, levels: list[Level], finest: list[Tensor]) -> _Gradients:
    """Sums to add to; those of level 0 are `finest` (q, k, v), where these are wide enough."""
    kind = accumulator(heads.q.dtype)

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=kind, device=x.device)

    q, k, v = (x.zero_() if x.dtype == kind else zeros(x) for x in finest)
    coarse = levels[1:]
    return _Gradients(
        [q, *(zeros(level.queries) for level in coarse if level.queries is not None)],
        [k, *(zeros(level.keys) for level in coarse)],
        [v, *(zeros(level.values) for level in coarse)],
        None if heads.level_bias is None else zeros(heads.level_bias),
    )


def _backward(
    heads: _Heads, grad: Tensor, out: Tensor, lse: Tensor, finest: list[Tensor]
) -> Tensor | None:
    """Writes the gradients of a few heads to `finest` (q, k, v) and returns the level bias's."""
    levels = list(heads.levels())
    sums = _zero_gradients(heads, levels, finest)
    coarse = heads.rule.coarse
    delta = None
    if coarse or sums.level_bias is not None or not has_flash_backward(heads.q):
        delta = (grad * out).sum(-1, dtype=lse.dtype)
    rows = Rows(grad, lse, None if coarse else out, delta)
    for level in levels:
        if coarse and level.number > 0:
            rows = _rows_of_slots(rows)
        for patch in heads.patches(level):
            _patch_backward(heads, level, patch, rows, sums)
    for index in range(len(levels) - 1, 0, -1):
        tokens = levels[index - 1].tokens
        for means in (sums.k, sums.v, *([sums.q] if coarse else [])):
            add_gradient_of_means(means[index - 1], means[index], tokens)
    for x, total in zip(finest, (sums.q[0], sums.k[0], sums.v[0]), strict=True):
        if x is not total:
            x.copy_(total)
    return sums.level_bias


def _patch_backward(
    heads: _Heads, level: Level, patch: Patch, rows: Rows, sums: _Gradients
) -> None:
    """Adds what a patch asks of its queries, keys, values and level bias."""
    x = heads.rectangles(level, patch)
    width = x.q.shape[1]

    def rows_of(y: Tensor) -> Tensor:
        return _fold(patch_rows(y, patch), width)

    rows = Rows(
        rows_of(rows.grad),
        rows_of(rows.lse) - heads.shift(level),
        None if rows.out is None else rows_of(rows.out),
        None if rows.delta is None else rows_of(rows.delta),
    )
    grad_q, grad_k, grad_v = (_unfold(y, patch) for y in attend_patch_backward(x, rows))

    into = patch_rows(sums.q[level.number if heads.rule.coarse else 0], patch)
    into += grad_q
    for total, part in ((sums.k, grad_k), (sums.v, grad_v)):
        into = patch_keys(total[level.number], patch)
        into += part if into.shape[1] == width else part.sum(1, keepdim=True)

    if sums.level_bias is not None and rows.delta is not None:
        patch_out, patch_lse = attend_patch(x)
        share = (patch_lse - rows.lse).exp()
        row = min(level.number, len(sums.level_bias) - 1)
        sums.level_bias[row] += (share * ((rows.grad * patch_out).sum(-1) - rows.delta)).sum((0, 2))


def _rows_of_slots(rows: Rows) -> Rows:
    """Joins pairs of rows that ask with one query, for their slot in the next level.

    A weight exp(logit - lse_i) is exp(logit - low) * exp(low - lse_i) with low = min lse_i, so
    the pair adds up with factors of exp(low - lse_i) <= 1.
    """
    lse = rows.lse
    if lse.shape[2] % 2:
        lse = F.pad(lse, (0, 1), value=_NOTHING)
    even, odd = pairs(lse, -1, keep_single=True)
    low = torch.minimum(even, odd)
    even, odd = (low - even).exp(), (low - odd).exp()

    def join(x: Tensor, dim: int) -> Tensor:
        first, second = pairs(x, dim, keep_single=True)
        scales = (even, odd) if dim == -1 else (even[..., None], odd[..., None])
        return first * scales[0].to(x.dtype) + second * scales[1].to(x.dtype)

    delta = None if rows.delta is None else join(rows.delta, -1)
    return Rows(join(rows.grad, -2), low, None, delta)


def _split(
    q: Tensor, k: Tensor, v: Tensor, level_bias: Tensor | None, rule: _Rule
) -> Iterator[tuple[slice, slice, _Heads]]:
    """Takes the heads a few at a time: (query heads, key/value heads, their attention)."""
    b, h, n, d = q.shape
    groups = k.shape[1]
    share = h // groups
    step = max(1, _WORKING_SET // (b * n * d)) if share == 1 else 1
    for first in range(0, groups, step):
        kv = slice(first, min(first + step, groups))
        queries = slice(kv.start * share, kv.stop * share)
        bias = None if level_bias is None else level_bias[:, queries]
        yield queries, kv, _Heads(q[:, queries], k[:, kv], v[:, kv], bias, rule)


def _with_dense_rows(x: Tensor) -> Tensor:
    """The kernels walk along the last dimension without looking at its stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rule(
    q: Tensor, mask: Tensor | None, block_size: int, causal: bool, scheme: str, coarse: bool,
    scale: float,
) -> _Rule:  # fmt: skip
    n = q.shape[2]
    depth = count_levels(n, block_size)
    patches = plan(n, block_size, causal, scheme, coarse)
    return _Rule(patches, depth, token_count(mask, q, causal, depth), causal, coarse, scale)


@torch.library.custom_op(
    "h_transformer_1d::attend",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    level_bias: Tensor | None,
    block_size: int,
    causal: bool,
    scheme: str,
    coarse: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `hierarchy.h_attention`.

    Args:
        q: (b, h, n, d). k, v: (b, g, n, d), zero where masked.

    Returns:
        The output (b, h, n, d) and every row's log-sum-exp (b, h, n).
    """
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    rule = _rule(q, mask, block_size, causal, scheme, coarse, scale)
    out, lse = _new_outputs(q)
    for queries, _, heads in _split(q, k, v, level_bias, rule):
        part_out, part_lse = out[:, queries], lse[:, queries]
        sums = part_out if out.dtype == lse.dtype else part_out.to(lse.dtype)
        _forward(heads, sums, part_lse)
        if mask is not None:
            nothing = part_lse < EMPTY / 2
            sums.masked_fill_(nothing[..., None], 0.0)
            part_lse.masked_fill_(nothing, _NOTHING)
        if sums is not part_out:
            part_out.copy_(sums)
    return out, lse


@attend_fused.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new_outputs(q)


def _new_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """The output lies in memory as (b, n, h, d), so that merging the heads later is free."""
    b, h, n, d = q.shape
    out = q.new_empty(b, n, h, d).transpose(1, 2)
    return out, q.new_empty(b, h, n, dtype=accumulator(q.dtype))


@torch.library.custom_op(
    "h_transformer_1d::attend_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS})"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    level_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scheme: str,
    coarse: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, q, k, v = (_with_dense_rows(x) for x in (grad, q, k, v))
    rule = _rule(q, mask, block_size, causal, scheme, coarse, scale)
    new = _new_gradients(q, k, v, level_bias)
    for queries, kv, heads in _split(q, k, v, level_bias, rule):
        finest = [new[0][:, queries], new[1][:, kv], new[2][:, kv]]
        grad_bias = _backward(heads, grad[:, queries], out[:, queries], lse[:, queries], finest)
        if grad_bias is not None:
            new[3][:, queries] = grad_bias
    return new


@_attend_backward.register_fake
def _(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    return _new_gradients(q, k, v, inputs[1])


def _new_gradients(
    q: Tensor, k: Tensor, v: Tensor, level_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        q.new_empty(0) if level_bias is None else torch.empty_like(level_bias),
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    unused = (None,) * 5
    if grad is None:
        return (None,) * 5 + unused
    *inputs, out, lse = ctx.saved_tensors
    grads = _attend_backward(grad, *inputs, out, lse, *ctx.options)
    level_bias = None if inputs[4] is None else grads[3]
    return (*grads[:3], None, level_bias, *unused)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the gradients, through the plain path; out and lse follow from q, k and v."""
    grad, q, k, v, mask, level_bias = ctx.saved_tensors

    def attend(q: Tensor, k: Tensor, v: Tensor, level_bias: Tensor | None) -> Tensor:
        return attend_plain(q, k, v, mask, level_bias, *ctx.options)

    of = (*cotangents[:3], None if level_bias is None else cotangents[3])
    second = differentiate_twice(attend, (q, k, v, level_bias), grad, of)
    return (*second[:4], None, second[4], None, None, *(None,) * 5)


torch.library.register_autograd(
    "h_transformer_1d::attend", _differentiate, setup_context=_save_forward
)
torch.library.register_autograd(
    "h_transformer_1d::attend_backward", _differentiate_twice, setup_context=_save_backward
)
