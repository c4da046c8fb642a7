"""One token after the other: steps with weights that are laid out once, for few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feedback_transformer.feedback import Context, bias_table, run_plain
from feedback_transformer.packing import Matrix, multiply, pack
from feedback_transformer.sequence import Run
from feedback_transformer.state import Memory
from feedback_transformer.weights import Sizes, Weights
from feedback_transformer.window import Window
from shared_core import RelativePositionBias


class Stepper:
    """A step for `shared_core.stream`: tokens (b, n) and a window to logits (b, 1, V) and another.

    The prompt goes through whole segments; then each token through weights laid out for it.
    """

    def __init__(
        self,
        embed: nn.Embedding,
        positions: RelativePositionBias,
        norm: nn.LayerNorm,
        to_logits: nn.Linear,
        weights: Weights,
        sizes: Sizes,
        context: list[Context] | None,
        memory: Memory | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._embed, self._positions = embed, positions
        self._norm, self._to_logits = norm, to_logits
        self._weights, self._sizes, self._context = weights, sizes, context
        self._memory, self._mask = memory, mask
        self._laid_out: Weights | None = None
        self._logits: Matrix = to_logits.weight
        self._table: Tensor | None = None

    def __call__(self, tokens: Tensor, window: Window | None) -> tuple[Tensor, Window]:
        x = self._embed(tokens)
        if window is None:
            if self._mask is not None:
                x = x.masked_fill(~self._mask[..., None], 0.0)
            window = Window.of(self._memory, x, len(self._weights.layers), self._sizes)
            table = self._biases(window.most_slots(x.shape[1], self._sizes))
            run = Run(self._weights, self._sizes, table, self._context)
            x, window = run.all(x, window, self._mask)
            window = window.wide()
        else:
            if self._laid_out is None:
                self._laid_out = lay_out_for_steps(self._weights, self._sizes, len(x))
                self._logits = pack(self._to_logits.weight, len(x))
            if self._table is None or self._table.shape[2] < self._width(window):
                # Twice as much as there is: as biases grow, they are not made for every token.
                self._table = self._biases(2 * window.keys.shape[3] + self._sizes.seq_len)
            x, window = run_plain(
                x, self._laid_out, self._sizes, self._table, window, None, self._context
            )
        logits = multiply(self._norm(x[:, -1:]), self._logits, self._to_logits.bias)
        return logits, window

    def _width(self, window: Window) -> int:
        """Columns of biases that the next token may need."""
        inside = self._sizes.seq_len if self._sizes.seq_len > 1 else 0
        return window.keys.shape[3] + inside

    def _biases(self, m: int) -> Tensor:
        with torch.no_grad():
            return bias_table(self._positions, self._sizes.seq_len, min(m, self._sizes.mem_len))


def lay_out_for_steps(weights: Weights, sizes: Sizes, rows: int) -> Weights:
    """The weights for products with so many rows, without gradients."""
    if not isinstance(weights.key_value, Tensor):
        raise TypeError("weights must not be packed yet")

    def place(weight: Matrix) -> Matrix:
        return pack(weight, rows) if isinstance(weight, Tensor) else weight

    key_value = place(weights.key_value)
    own: tuple[Matrix, ...] = (key_value,)
    if sizes.groups > 1:
        own = tuple(place(part) for part in weights.key_value.chunk(sizes.groups))
    layers = tuple(
        layer._replace(
            query=place(layer.query),
            out=place(layer.out),
            inner=place(layer.inner),
            outer=place(layer.outer),
        )
        for layer in weights.layers
    )
    return weights._replace(layers=layers, key_value=key_value, own=own)
