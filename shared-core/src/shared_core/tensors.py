"""Padding and means of tensors, whatever their lengths and masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to(x: Tensor, multiple: int, dim: int = -2, value: float = 0.0) -> Tensor:
    """Pads `dim` with `value` at its end: (..., n, ...) -> (..., next multiple of n, ...).

    Where nothing is missing this is `x` itself, outside of `torch.compile` and `torch.export`.
    Raises ValueError for a `multiple` below 1, or where `x` has no dimension `dim`.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    _check_dim(x, dim)
    # Not -n % multiple: from a product, export sees that the new length is a multiple.
    missing = (x.shape[dim] + multiple - 1) // multiple * multiple - x.shape[dim]
    # While tracing, this comparison would tie a dynamic length to one of its two outcomes.
    if not torch.compiler.is_compiling() and missing == 0:
        return x
    dims_after = -1 - dim if dim < 0 else x.ndim - 1 - dim
    return F.pad(x, (0, 0) * dims_after + (0, missing), value=value)


def masked_mean(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Mean of `x` over `dim`, of what the mask keeps; 0 where it keeps nothing.

    What it leaves out has no influence, NaN included. `mask` is boolean, True = take part, and has
    the leading dimensions of `x`, as (b, n) has of (b, n, d), or all; size 1 is broadcast. The
    result has the dtype of `x`; half precision is summed in float32.

    Raises TypeError for an `x` that is not floating-point or a mask that is not boolean, ValueError
    for a mask of other dimensions, or where `x` has no dimension `dim`.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    _check_dim(x, dim)
    sizes = zip(mask.shape, x.shape, strict=False)
    if mask.ndim > x.ndim or any(m not in (n, 1) for m, n in sizes):
        raise ValueError(
            f"mask {tuple(mask.shape)} does not have the dimensions of x {tuple(x.shape)}"
        )
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    places = [-1] * x.ndim
    places[dim] = x.shape[dim]
    count = mask.expand(places).sum(dim)
    # Without the wider type a long float16 sum overflows and a bfloat16 count is rounded.
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.masked_fill(~mask, 0.0).sum(dim, dtype=wide)
    return (total / count.clamp(min=1)).to(x.dtype)


def _check_dim(x: Tensor, dim: int) -> None:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim {dim} is outside a tensor of {x.ndim} dimensions")
