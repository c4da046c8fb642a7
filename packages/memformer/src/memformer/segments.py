"""A long source, segment by segment, and what a decoder sees of it.

Shapes: b batch, n tokens of a segment, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_core.checks import check_mask


class Context(NamedTuple):
    """What a decoder attends to.

    Attributes:
        enc_out: (b, n, d), the output of the encoder.
        mask: (b, n) boolean, what takes part of `enc_out`; None where all does.
    """

    enc_out: Tensor
    mask: Tensor | None

    def after(self, earlier: Context | None, reset: Tensor | None = None) -> Context:
        """With that of an earlier segment for the rows that this one masks whole.

        `reset` (b,) are rows that have none.
        """
        if earlier is None or self.mask is None:
            return self
        if reset is not None:
            kept = ~reset[:, None]
            mask = kept.expand(earlier.enc_out.shape[:2]) if earlier.mask is None else earlier.mask
            earlier = Context(earlier.enc_out, mask & kept)
        n = max(self.enc_out.shape[1], earlier.enc_out.shape[1])
        (new, mask), (old, old_mask) = self._padded(n), earlier._padded(n)
        some = self.mask.any(1, keepdim=True)
        enc_out = torch.where(some[..., None], new, old.to(new.dtype))
        return Context(enc_out, torch.where(some, mask, old_mask))

    def _padded(self, n: int) -> tuple[Tensor, Tensor]:
        missing = n - self.enc_out.shape[1]
        mask = self.mask
        if mask is None:
            mask = torch.ones_like(self.enc_out[..., 0], dtype=torch.bool)
        return F.pad(self.enc_out, (0, 0, 0, missing)), F.pad(mask, (0, missing))


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

    Raises ValueError for no segment at all, or as many masks as there are not segments; TypeError,
    ValueError for a mask of another dtype or shape than the tokens have.
    """
    if isinstance(src, Tensor):
        if not isinstance(src_mask, Sequence):
            check_mask("src_mask", src_mask, src.shape[:2])
        src = src.split(length, dim=1)
        if isinstance(src_mask, Tensor):
            src_mask = src_mask.split(length, dim=1)
    elif isinstance(src_mask, Tensor):
        raise TypeError("src_mask must be a list as src is, got a tensor")
    masks = [None] * len(src) if src_mask is None else src_mask
    if len(src) == 0 or len(masks) != len(src):
        raise ValueError(
            f"src must be one segment or more, each with a mask or None, got "
            f"{len(src)} and {len(masks)} masks"
        )
    return [Segment(*pair) for pair in zip(src, masks, strict=True)]
