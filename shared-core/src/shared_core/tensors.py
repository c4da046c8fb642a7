"""Means of tensors, whatever their masks."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Mean of `x` over `dim`, of what the mask keeps; 0 where it keeps nothing.

    What it leaves out has no influence, NaN included. `mask` is boolean, True = take part, and has
    the leading dimensions of `x`, as (b, n) has of (b, n, d), or all; size 1 is broadcast. The
    result has the dtype of `x`; half precision is summed in float32.

    Raises TypeError for an `x` that is not floating point or a mask that is not boolean, ValueError
    for a mask of other dimensions, or where `x` has no dimension `dim`.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim {dim} is outside a tensor of {x.ndim} dimensions")
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
