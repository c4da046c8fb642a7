"""One token after the other: steps with weights that are laid out once, for few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feedback_transformer.feedback import Context, bias_table, run_plain
from feedback_transformer.layout import matrix
from feedback_transformer.packing import Matrix, Packs, multiply
from feedback_transformer.sequence import Run
from feedback_transformer.state import Memory
from feedback_transformer.weights import ContextWeights, LayerWeights, Sizes, Weights
from feedback_transformer.window import Window
from shared_core import RelativePositionBias

MANY = 100
"""Tokens from which on it pays to lay out weights in float16."""


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
        memory: Memory | None,
        mask: Tensor | None,
        packs: Packs,
        length: int,
    ) -> None:
        self._embed, self._positions = embed, positions
        self._norm, self._to_logits = norm, to_logits
        self._weights, self._sizes, self._context = weights, sizes, context
        self._memory, self._mask, self._packs, self._length = memory, mask, packs, length
        self._laid_out: Weights | None = None
        self._logits: Matrix = to_logits.weight
        self._table: Tensor | None = None

    def __call__(self, tokens: Tensor, window: Window | None) -> tuple[Tensor, Window]:
        if window is None:
            x, window = self._prompt(tokens)
            return self._to_logits(self._norm(x[:, -1:])), window
        if self._laid_out is None:
            self._laid_out = self._lay_out(len(tokens), window.keys.dtype)
            weight = self._to_logits.weight
            self._logits = self._place("logits", weight, len(tokens), weight.dtype)
        # A step is many small operations, which keep less of a record there.
        with torch.inference_mode():
            logits, window = self._step(tokens, self._laid_out, window)
        # What goes to the caller's filter must be a tensor like any other.
        return logits.clone(), window

    def _prompt(self, tokens: Tensor) -> tuple[Tensor, Window]:
        """States (b, n, d) of a prompt, by whole segments."""
        x = self._embed(tokens)
        if self._mask is not None:
            x = x.masked_fill(~self._mask[..., None], 0.0)
        window = Window.of(self._memory, x, len(self._weights.layers), self._sizes)
        table = self._biases(window.most_slots(x.shape[1], self._sizes))
        run = Run(self._weights, self._sizes, table, self._context, packs=self._packs)
        x, window = run.all(x, window, self._mask)
        window = window.wide()
        if self._context is not None:
            self._context = [one.to(window.keys.dtype) for one in self._context]
        return x, window

    def _step(self, tokens: Tensor, weights: Weights, window: Window) -> tuple[Tensor, Window]:
        """Logits (b, 1, V) behind one token a row."""
        if self._table is None or self._table.shape[2] < self._width(window):
            # Twice as much as there is: as biases grow, they are not made for every token.
            self._table = self._biases(2 * window.keys.shape[3] + self._sizes.seq_len)
        x = self._embed(tokens).to(window.keys.dtype)
        x, window = run_plain(x, weights, self._sizes, self._table, window, None, self._context)
        last = self._norm(x.to(self._norm.weight.dtype))
        return multiply(last, self._logits, self._to_logits.bias), window

    def _width(self, window: Window) -> int:
        """Columns of biases that the next token may need."""
        inside = self._sizes.seq_len if self._sizes.seq_len > 1 else 0
        return window.keys.shape[3] + inside

    def _biases(self, m: int) -> Tensor:
        with torch.no_grad():
            return bias_table(self._positions, self._sizes.seq_len, min(m, self._sizes.mem_len))

    def _lay_out(self, rows: int, dtype: torch.dtype) -> Weights:
        """The weights for products with so many rows, without gradients, of states of a type."""
        weights, sizes = self._weights, self._sizes

        def place(name: str, weight: Matrix) -> Matrix:
            return self._place(name, matrix(weight), rows, dtype)

        key_value = place("key_value", weights.key_value)
        own: tuple[Matrix, ...] = (key_value,)
        if sizes.groups > 1:
            parts = matrix(weights.key_value).chunk(sizes.groups)
            own = tuple(place(f"key_value {i}", part) for i, part in enumerate(parts))
        layers = []
        for i, layer in enumerate(weights.layers):
            every = {name: matrix(y) for name, y in layer._asdict().items()}
            moved = {name: y.to(dtype) for name, y in every.items() if y.ndim == 1}
            placed = {name: place(f"{name} {i}", y) for name, y in every.items() if y.ndim == 2}
            layers.append(LayerWeights(**{**moved, **placed}))  # type: ignore[arg-type]
        norm = weights.memory_norm
        if norm is not None:
            norm = (norm[0].to(dtype), norm[1].to(dtype))
        context = weights.context
        if context is not None:
            context = tuple(ContextWeights(*(y.to(dtype) for y in one)) for one in context)
        return Weights(tuple(layers), key_value, weights.mix, norm, own, context)

    def _place(self, name: str, weight: Tensor, rows: int, dtype: torch.dtype) -> Matrix:
        """A matrix for so many rows of a type."""
        placed = self._packs.pack(name, weight, weight, rows, half=self._length >= MANY)
        return placed.to(dtype) if isinstance(placed, Tensor) else placed
