"""Weights laid out for products with few rows.

A segment has as few rows as tokens times sequences, so a product takes as long as its weights take
to be read. A matrix as `nn.Linear` keeps it is read at half the speed that the memory has; oneDNN
has a layout that is read at full speed, which torch uses for compiled graphs with frozen weights.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FULL = 4
"""Fewer rows of float32 than these take longer, and are filled up."""
LARGEST = 64
"""Rows up to which a packed weight is faster."""


class Packed:
    """A constant matrix (out, in) that rows (..., in) are multiplied by, as `linear` does."""

    def __init__(self, weight: Tensor) -> None:
        """Lays a weight out; it must not change afterwards."""
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FULL)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out), without gradients."""
        rows = x.numel() // x.shape[-1]
        missing = FULL - rows if x.dtype == torch.float32 else 0
        if x.ndim == 2 and missing <= 0 and not x.requires_grad:
            return self._multiply(x, bias)
        flat = x.detach().reshape(rows, -1)
        if missing > 0:
            flat = F.pad(flat, (0, 0, 0, missing))
        return self._multiply(flat, bias)[:rows].view(*x.shape[:-1], -1)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, bias, "none", [], ""
        )
        return out


Matrix = Tensor | Packed


def can_pack(weight: Tensor, rows: int) -> bool:
    """Whether packing this weight for so many rows is possible here, and worth while."""
    return (
        weight.device.type == "cpu"
        and 1 <= rows <= LARGEST
        # Smaller ones stay in a cache, where the layout does not matter.
        and weight.numel() >= 2**16
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and _has_products(weight.dtype)
    )


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """Whether this build and this processor have packed products of a type: by a trial."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = torch.eye(32, dtype=dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        return torch.equal(Packed(weight)(weight), weight)
    # AttributeError: an operation that this build does not have.
    except (AttributeError, RuntimeError):
        return False


def pack(weight: Tensor, rows: int) -> Matrix:
    """The weight in the layout that suits so many rows; itself where none suits better."""
    return Packed(weight) if can_pack(weight, rows) else weight.detach()


def multiply(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    if isinstance(weight, Packed):
        return weight(x, bias)
    return F.linear(x, weight, bias)
