"""Weights laid out for products with few rows.

A segment has as few rows as tokens times sequences, so a product takes as long as its weights take
to be read. A matrix as `nn.Linear` keeps it is read at half the speed that the memory has; oneDNN
has a layout that is read faster, which torch uses for compiled graphs with frozen weights, and
FBGEMM one for float16 that is faster still for a row or two, but takes longer to make. Two rows of
float32 are best read by the processor's BLAS, as two columns to a matrix that is not wide.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FULL = 4
"""Fewer rows than these take longer in oneDNN's products, and are filled up."""
LARGEST = 64
"""Rows up to which a packed weight is faster."""
FEW = 2
"""Rows up to which float16 is faster than bfloat16."""
PAIR = 2
"""Rows that are faster as columns, in float32."""
NARROW = 1024
"""Columns of a matrix up to which they are."""
PART = 512
"""Columns of the parts of a wider one."""


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


class PackedPair:
    """The same of a float32 matrix that `suits_pair`, in narrow parts: (parts, out, in / parts)."""

    def __init__(self, weight: Tensor) -> None:
        """Lays a weight out; a narrow one stays where it is."""
        out, wide = weight.shape
        parts = 1 if wide <= NARROW else wide // PART
        # Contiguous by itself: the strides of a single part are anything.
        whole = weight.detach().contiguous()
        self._parts: Tensor = whole.view(out, parts, -1).transpose(0, 1).contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out) in the type of x, computed in float32, without gradients."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self(x, bias)
        rows = x.numel() // x.shape[-1]
        # Columns whose numbers follow one another are multiplied several times faster.
        flat = x.detach().to(self._parts.dtype).reshape(rows, -1).contiguous()
        columns = flat.view(rows, len(self._parts), -1).permute(1, 2, 0)
        if len(columns) == 1:
            out = self._parts[0] @ columns[0]
        else:
            out = torch.bmm(self._parts, columns).sum(0)
        # A sum turns it round faster than a copy does.
        turned = torch.add(
            out.t(), 0.0 if bias is None else bias.detach(), out=out.new_empty(rows, len(out))
        )
        return turned.to(x.dtype).view(*x.shape[:-1], -1)


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


AnyPacked = Packed | PackedPair | PackedHalf
Matrix = Tensor | AnyPacked


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


def suits_pair(weight: Tensor, rows: int) -> bool:
    """Whether so many rows of this weight, which can be packed, are columns to it."""
    wide = weight.shape[1]
    return rows == PAIR and weight.dtype == torch.float32 and (wide <= NARROW or wide % PART == 0)


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
    if not can_pack(weight, rows):
        return weight.detach()
    return PackedPair(weight) if suits_pair(weight, rows) else Packed(weight)


def multiply(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    if not isinstance(weight, Tensor):
        return weight(x, bias)
    return F.linear(x, weight, bias)


class Packs:
    """Packed weights that are kept from call to call while nobody changes them.

    Whether somebody did is seen by the version and the address of the parameter, and by sums of its
    bits: on these alone rests what is written to its `data`, which moves no version, and what
    inference mode writes to a parameter that was made in it. Copies and files of it are empty.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[_Marks, AnyPacked]] = {}

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        return Packs, ()

    def clear(self) -> None:
        """Gives the memory back."""
        self._kept.clear()

    def pack(self, name: str, weight: Tensor, source: Tensor, rows: int, *, half: bool) -> Matrix:
        """`pack`, from before where there is one of these numbers and of the layout that suits.

        The layout is the call's own choice, so that a call gives the same after any other.

        Args:
            name: which weight it is.
            source: what the weight was made of: the parameter, or a view of it.
            half: whether so many products follow that float16 pays.
        """
        pair = suits_pair(weight, rows)
        # There is nothing to lay out, and nothing to keep.
        if not can_pack(weight, rows) or (pair and weight.shape[1] <= NARROW):
            return pack(weight, rows)
        half = half and rows <= FEW and weight.dtype == torch.bfloat16
        marks = _Marks.of(weight, source)
        # Another thread may drop it, or keep another, between two looks.
        kept = self._kept.get(name)
        same = kept is not None and marks is not None and marks.same(kept[0])
        found = kept[1] if kept is not None and same else None
        kind: type[AnyPacked] = PackedHalf if half else PackedPair if pair else Packed
        # Whether float16 fits is asked last, since it takes a look at all numbers.
        if not isinstance(found, kind) and half and not fits_half(weight, rows):
            kind = Packed
        if isinstance(found, kind):
            return found
        # Before the other is made: two of them would be held, and one would do.
        del kept, found
        self._kept.pop(name, None)
        made = kind(weight)
        if marks is not None:
            self._kept[name] = (marks, made)
        return made


class _Marks(NamedTuple):
    """What tells whether a matrix is what it was.

    Attributes:
        version: of its source; None for what was made in inference mode.
        address: of its source.
        columns, rows: sums of the bits, exact but for what overflows.
    """

    version: int | None
    address: int
    columns: Tensor
    rows: Tensor

    @staticmethod
    def of(weight: Tensor, source: Tensor) -> _Marks | None:
        """None where bits cannot be summed as they lie."""
        each = 8 // weight.dtype.itemsize
        if weight.shape[1] % each or weight.storage_offset() % each or not weight.is_contiguous():
            return None
        version = None if source.is_inference() else source._version
        bits = weight.detach().view(torch.int64)
        return _Marks(version, source.data_ptr(), bits.sum(0), bits.sum(1))

    def same(self, other: _Marks) -> bool:
        """Whether nobody has changed it, as far as is seen."""
        return (
            self[:2] == other[:2]
            and torch.equal(self.columns, other.columns)
            and torch.equal(self.rows, other.rows)
        )
