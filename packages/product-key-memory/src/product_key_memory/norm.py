"""Batch normalisation that some tokens take no part in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared_core.checks import check_mask


class MaskedBatchNorm1D(nn.Module):
    """A `BatchNorm1d` over the features of the tokens that a mask keeps.

    Lample et al. (2019) normalise queries so. While training, a token's result depends on the
    other tokens of the batch, later ones included; in evaluation it does not.

    Args:
        fn: what holds the parameters and running statistics.

    Raises:
        TypeError: `fn` is something else.
    """

    def __init__(self, fn: nn.BatchNorm1d) -> None:
        if not isinstance(fn, nn.BatchNorm1d):
            raise TypeError(f"fn must be a BatchNorm1d, got {type(fn).__name__}")
        super().__init__()
        self.fn: nn.BatchNorm1d = fn

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises the tokens which the mask keeps.

        Args:
            x: (..., c).
            mask: (...) boolean, True = take part.

        Returns:
            (..., c); masked tokens are as they were.

        Raises:
            TypeError: the mask is not boolean.
            ValueError: the shapes do not fit.
        """
        fn = self.fn
        if x.ndim < 1 or x.shape[-1] != fn.num_features:
            raise ValueError(f"x must be (..., {fn.num_features}), got shape {tuple(x.shape)}")
        rows = x.reshape(-1, fn.num_features)
        mean, var = fn.running_mean, fn.running_var
        over_batch = fn.training or mean is None
        if mask is None:
            if not over_batch or len(rows) > 1 or isinstance(fn, nn.SyncBatchNorm):
                normalised: Tensor = fn(rows)
                return normalised.view_as(x)
            # torch refuses fewer than two; the masked way takes them.
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if isinstance(fn, nn.SyncBatchNorm):
            raise TypeError(
                f"a mask of {tuple(mask.shape)} needs a BatchNorm1d, got {type(fn).__name__}: "
                "statistics would be of one process"
            )
        check_mask("mask", mask, x.shape[:-1])
        kept = mask.reshape(-1, 1)
        # Sums instead of x[mask], whose length the compiler could not know; in float32 at least,
        # since those of halves overflow.
        given = rows.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~kept, 0.0)
        if over_batch or mean is None or var is None:
            count = mask.sum()
            some = count.clamp(min=1)
            mean = given.sum(0) / some
            var = (given - mean).masked_fill(~kept, 0.0).square().sum(0) / some
            if fn.track_running_stats:
                self._track(mean, var, count)
        out = (given - mean) * (var + fn.eps).rsqrt()
        if fn.affine:
            out = out * fn.weight + fn.bias
        return torch.where(kept, out.to(x.dtype), rows).view_as(x)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Moves the running statistics, if there were tokens enough for a variance."""
        fn = self.fn
        if fn.running_mean is None or fn.running_var is None or fn.num_batches_tracked is None:
            return
        some = count > 1
        batches = fn.num_batches_tracked.add_(some).clamp(min=1)
        share = some.to(mean.dtype) * (1.0 if fn.momentum is None else fn.momentum)
        share = share / batches if fn.momentum is None else share
        # The running variance is the unbiased one, as torch keeps it.
        unbiased = var * count / (count - 1).clamp(min=1)
        fn.running_mean.lerp_(mean.to(fn.running_mean.dtype), share.to(fn.running_mean.dtype))
        fn.running_var.lerp_(unbiased.to(fn.running_var.dtype), share.to(fn.running_var.dtype))
