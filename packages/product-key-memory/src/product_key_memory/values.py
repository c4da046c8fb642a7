"""Tables of values, and how they are read.

Shapes: n tokens, k slots a token reads.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from product_key_memory.checks import as_dtype, check_indices, check_rows
from product_key_memory.factors import match_factored, read_factored
from product_key_memory.operators import match, read, read_without_gradient
from shared_core import transformed
from shared_core.checks import check_at_least, check_choice, check_mask


class Reader(Protocol):
    """How a pool reads its tables. A pool's `reader` may be replaced, as sharding does."""

    def read(
        self, table: Tensor, indices: Tensor, weights: Tensor, trainable: Tensor | None
    ) -> Tensor:
        """`read`; rows that are not trainable get a gradient of zero."""

    def match(self, table: Tensor, indices: Tensor, x: Tensor, trainable: Tensor | None) -> Tensor:
        """`match`; rows that are not trainable get a gradient of zero."""


class LocalReader:
    """Reads tables that are whole on one device; `owner` see `read_factored`."""

    def __init__(self, factored: bool) -> None:
        self.factored = factored

    def read(
        self,
        table: Tensor,
        indices: Tensor,
        weights: Tensor,
        trainable: Tensor | None,
        owner: Tensor | None = None,
    ) -> Tensor:
        frozen: Tensor | None = None
        if trainable is not None:
            chosen = trainable[indices]
            frozen = read(table.detach(), indices, weights.masked_fill(chosen, 0.0))
            weights = weights.masked_fill(~chosen, 0.0)
        if not torch.is_grad_enabled() and not transformed(table, weights):
            out = read_without_gradient(table, indices, weights)
        elif self.factored:
            out = read_factored(table, indices, weights, owner)
        else:
            out = read(table, indices, weights)
        return out if frozen is None else out + frozen

    def match(
        self,
        table: Tensor,
        indices: Tensor,
        x: Tensor,
        trainable: Tensor | None,
        owner: Tensor | None = None,
    ) -> Tensor:
        out: Tensor
        if self.factored:
            out = match_factored(table, indices, x, owner)
        else:
            out = match(table, indices, x)
        if trainable is None:
            return out
        return torch.where(trainable[indices], out, match(table.detach(), indices, x))


class MemoryPool(nn.Module):
    """A table of values which one layer reads, or several share.

    Args:
        slots: rows.
        dim: width of a row.
        experts: a second table `inputs` beside the values; every slot is a neuron which answers
            `gelu(<input, x>)` times its value (PEER, He 2024, arXiv 2407.04153).
        values_grad: "dense", a gradient as any parameter has it, or "factored", in memory of the
            tokens and not of the table, for a `PKMOptimizer`.
        dtype: of the tables, such as torch.bfloat16, or its name, "bfloat16"; the default one where
            None.

    Raises:
        TypeError, ValueError: a number or option is out of range.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        *,
        experts: bool = False,
        values_grad: str = "dense",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        check_at_least(1, slots=slots, dim=dim)
        check_choice("values_grad", values_grad, ("dense", "factored"))
        dtype = as_dtype("dtype", dtype)
        super().__init__()
        self.slots: int = slots
        self.dim: int = dim
        self.values_grad: str = values_grad
        self.reader: Reader = LocalReader(factored=values_grad == "factored")
        self.weight: nn.Parameter = nn.Parameter(torch.empty(slots, dim, dtype=dtype))
        self.inputs: nn.Parameter | None = None
        if experts:
            self.inputs = nn.Parameter(torch.empty(slots, dim, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every row anew, with a standard deviation of dim**-0.5."""
        for table in self.parameters():
            nn.init.normal_(table, std=self.dim**-0.5)

    def forward(
        self,
        indices: Tensor,
        weights: Tensor,
        trainable: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Weighted sums of values.

        Args:
            indices: (n, k) int64 slots.
            weights: (n, k).
            trainable: (slots,) boolean; the others get a gradient of exactly zero.
            x: (n, dim) tokens; where given, weights are multiplied by their `activations`.

        Returns:
            (n, dim), of the table's dtype.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
        """
        check_indices(indices, weights)
        check_mask("trainable", trainable, (self.slots,))
        if x is not None:
            weights = weights * self.activations(indices, x, trainable)
        weights = weights.to(self.weight.dtype)
        return self.reader.read(self.weight, indices, weights, trainable)

    def activations(self, indices: Tensor, x: Tensor, trainable: Tensor | None = None) -> Tensor:
        """What the chosen neurons answer: gelu(<input, x>), (n, k) for x (n, dim).

        `trainable` as in `forward`.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or the pool has no
                `inputs`.
        """
        if self.inputs is None:
            raise ValueError("only a pool with experts=True has activations")
        check_rows(x, indices.shape[0], self.dim)
        check_mask("trainable", trainable, (self.slots,))
        x = x.to(self.inputs.dtype)
        return F.gelu(self.reader.match(self.inputs, indices, x, trainable))
