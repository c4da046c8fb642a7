"""A long source, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Segment(NamedTuple):
    """Tokens (b, n), and which take part: (b, n) boolean, or None for all."""

    src: Tensor
    mask: Tensor | None


def split_segments(
    src: Tensor | Sequence[Tensor],
    src_mask: Tensor | Sequence[Tensor | None] | None,
    length: int,
) -> list[Segment]:
    """Splits (b, n) tokens and their mask after every `length`, or pairs lists of segments.

    Raises ValueError for no segment at all, or as many masks as there are not segments.
    """
    if isinstance(src, Tensor):
        src = src.split(length, dim=1)
        if isinstance(src_mask, Tensor):
            src_mask = src_mask.split(length, dim=1)
    masks = [None] * len(src) if src_mask is None else src_mask
    if len(src) == 0 or len(masks) != len(src):
        raise ValueError(
            f"src must be one segment or more, each with a mask or None, got "
            f"{len(src)} and {len(masks)} masks"
        )
    return [Segment(*pair) for pair in zip(src, masks, strict=True)]
