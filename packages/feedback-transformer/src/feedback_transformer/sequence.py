"""How a sequence of any length goes through the segments, from wherever the last call stopped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from feedback_transformer.feedback import Context, run_plain
from feedback_transformer.fused import can_fuse, run_fused
from feedback_transformer.jacobi import run_jacobi
from feedback_transformer.layout import matrix
from feedback_transformer.packing import Packs
from feedback_transformer.weights import Sizes, Weights
from feedback_transformer.window import Window


@dataclass(frozen=True)
class Run:
    """One call: what it multiplies by, and how.

    Attributes:
        table: of `bias_table`.
        context: of each layer, or None.
        jacobi: whether to try that first.
        packs: packed weights of earlier calls, or None.
    """

    weights: Weights
    sizes: Sizes
    table: Tensor
    context: list[Context] | None = None
    jacobi: bool = False
    packs: Packs | None = None

    def all(
        self,
        x: Tensor,
        window: Window,
        mask: Tensor | None = None,
        detach_every: int | None = None,
        checkpoint_every: int | None = None,
    ) -> tuple[Tensor, Window]:
        """States (b, n, d) of the last layer, and the window for what follows."""
        p, n = window.open_length, x.shape[1]
        # Counted from the beginning of the open segment, so that the ends are ends of segments.
        detached = range(-p, n, detach_every or n + p)
        cuts = {*detached, *range(-p, n, checkpoint_every or n + p)}
        stops = [*sorted(cut for cut in cuts if 0 < cut < n), n]
        outputs, start = [], 0
        for stop in stops:
            if start in detached and start > 0:
                window = window.detach()
            part = None if mask is None else mask[:, start:stop]
            if checkpoint_every is None or not torch.is_grad_enabled():
                out, window = self._part(x[:, start:stop], window, part)
            else:
                out, window = checkpoint(
                    self._part, x[:, start:stop], window, part, use_reentrant=False
                )
            outputs.append(out)
            start = stop
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), window

    def _part(self, x: Tensor, window: Window, mask: Tensor | None) -> tuple[Tensor, Window]:
        """The rest of the open segment, whole segments at once, and the beginning of another."""
        s, p, n = self.sizes.seq_len, window.open_length, x.shape[1]
        first = min(n, (s - p) % s)
        last = n - (n - first) % s
        if not can_fuse(x, self.weights, self.table, window, (last - first) // s):
            return self._plain(x, window, mask)
        outputs = []
        for start, stop in ((0, first), (first, last), (last, n)):
            if start == stop:
                continue
            piece, part = x[:, start:stop], None if mask is None else mask[:, start:stop]
            run = self._whole if (start, stop) == (first, last) else self._plain
            out, window = run(piece, window, part)
            outputs.append(out)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), window

    def _plain(self, x: Tensor, window: Window, mask: Tensor | None) -> tuple[Tensor, Window]:
        weights = self.weights
        out, window = run_plain(x, weights, self.sizes, self.table, window, mask, self.context)
        if not torch.is_grad_enabled():
            return out, window
        # Where no later segment asks for the slots, their weights still have a gradient, of 0, as
        # data parallelism wants it: that of a sum of nothing.
        makers = (weights.mix, *(weights.memory_norm or ()), matrix(weights.key_value))
        return out + sum(maker.flatten()[:0].sum().to(out.dtype) for maker in makers), window

    def _whole(self, x: Tensor, window: Window, mask: Tensor | None) -> tuple[Tensor, Window]:
        if self.jacobi:
            found = run_jacobi(x, self.weights, self.sizes, self.table, window, mask)
            if found is not None:
                return found
        return run_fused(x, self.weights, self.sizes, self.table, window, mask, self.packs)
