"""Weights laid out for products with few rows.

A segment has as few rows as tokens times sequences, so a product takes as long as its weights take
to be read. A matrix as `nn.Linear` keeps it is read at half the speed that the memory has; oneDNN
has a layout that is read faster, which torch uses for compiled graphs with frozen weights, and
FBGEMM one for float16 that is faster still for a row or two, but takes longer to make.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FULL = 4
"""Fewer rows than these take longer in oneDNN's products, and are filled up."""
LARGEST = 64
"""Rows up to which a packed weight is faster."""
FEW = 2
"""Rows up to which float16 is faster than bfloat16."""


class Packed:
    """A constant matrix (out, in) that rows (..., in) are multiplied by, as `linear` does."""

    def __init__(self, weight: Tensor) -> None:
        """Lays a weight out; it must not change afterwards."""
        self._dtype: torch.dtype = weight.dtype
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FULL)
        self._filling: Tensor = weight.new_zeros(FULL, weight.shape[1])

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out) in the type of x, computed in that of the weight."""
        rows = x.numel() // x.shape[-1]
        if x.dtype != self._dtype:
            out = self(x.to(self._dtype)).to(x.dtype)
            return out if bias is None else out.add_(bias)
        if x.ndim == 2 and rows >= FULL and not x.requires_grad:
            return self._multiply(x, bias)
        flat = x.detach().reshape(rows, -1)
        if rows < FULL:
            flat = torch.cat((flat, self._filling[rows:]))
        return self._multiply(flat, bias)[:rows].view(*x.shape[:-1], -1)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, bias, "none", [], ""
        )
        return out


class PackedHalf:
    """The same of a bfloat16 matrix, kept as float16 and multiplied in float32."""

    def __init__(self, weight: Tensor) -> None:
        """Lays out a weight that `fits_half`."""
        self._packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(
            weight.detach().float(), None
        )

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out) in the type of x, without gradients."""
        rows = x.detach() if x.requires_grad else x
        out: Tensor = _multiply_half(rows.float(), self._packed)
        if bias is not None:
            out += bias
        return out.to(x.dtype)


def _multiply_half(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    out: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, packed)
    return out


Matrix = Tensor | Packed | PackedHalf


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


def fits_half(weight: Tensor, rows: int) -> bool:
    """Whether float16 has so many rows faster, and keeps a bfloat16 weight as exact as it was.

    Its numbers are finer than bfloat16's, but end at 65504, and get coarse below 2**-14: by 2**-17
    of the largest at most, where that is at least 2**-8.
    """
    if weight.dtype != torch.bfloat16 or rows > FEW or not _has_half():
        return False
    least, largest = (float(y) for y in weight.aminmax())
    return 2.0**-8 <= max(-least, largest) <= 2.0**15


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


@functools.cache
def _has_half() -> bool:
    """The same of float16."""
    weight = torch.eye(32, dtype=torch.bfloat16)
    try:
        return torch.equal(PackedHalf(weight)(weight), weight)
    except (AttributeError, RuntimeError):
        return False


def pack(weight: Tensor, rows: int) -> Matrix:
    """The weight in the layout that suits so many rows; itself where none suits better."""
    return Packed(weight) if can_pack(weight, rows) else weight.detach()


def multiply(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    if not isinstance(weight, Tensor):
        return weight(x, bias)
    return F.linear(x, weight, bias)


class Packs:
    """Packed weights that are kept from call to call while nobody changes them.

    Whether somebody did is seen by the numbers themselves: versions of tensors do not tell what is
    written to their `data`. Copies and files of it are empty.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, Tensor, Matrix]] = {}

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        return Packs, ()

    def clear(self) -> None:
        """Gives the memory back."""
        self._kept.clear()

    def pack(self, name: str, weight: Tensor, rows: int, *, often: bool, half: bool) -> Matrix:
        """`pack`, from before where there is one of these numbers.

        Args:
            name: which weight it is.
            often: whether so many products follow that packing pays if there is none.
            half: whether so many that float16 does.
        """
        if not can_pack(weight, rows):
            return weight.detach()
        if rows > FEW:
            half = False
        ways = (PackedHalf, Packed) if rows <= FEW else (Packed,)
        known = [way for way in ways if f"{name} {way.__name__}" in self._kept]
        if not known and not often:
            return weight.detach()
        marks = _marks(weight)
        for way in known:
            *before, packed = self._kept[f"{name} {way.__name__}"]
            if marks is not None and all(map(torch.equal, marks, before)):
                if way is Packed and half and fits_half(weight, rows):
                    continue
                return packed
            del self._kept[f"{name} {way.__name__}"]
        if not often:
            return weight.detach()
        chosen = PackedHalf if half and fits_half(weight, rows) else Packed
        made = chosen(weight)
        if marks is not None:
            self._kept[f"{name} {chosen.__name__}"] = (*marks, made)
        return made


def _marks(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Sums of the bits of a matrix by rows and by columns, exact but for what overflows.

    One number that changes changes both, and so do rows or columns that change places.
    """
    each = 8 // weight.dtype.itemsize
    if weight.shape[1] % each or not weight.is_contiguous():
        return None
    bits = weight.detach().view(torch.int64)
    return bits.sum(0), bits.sum(1)
