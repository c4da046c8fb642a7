"""Facts, the two layers that are to store them, and what a layer costs.

A fact is a random question, a vector from a normal distribution, and one of 256 answers, drawn
too. There is nothing to generalise: a layer knows a fact only by having stored it. A model is the
layer and a linear readout of the answers, whose cost is the same for every layer and not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demonstration import Tick
from product_key_memory import PKM, PKMOptimizer, fetch_pkm_value_parameters

WIDTH = 128
ANSWERS = 256
# Found by trying, for each kind of layer its own: of the table's rows (row-wise Adagrad), of the
# memory's other weights and of a feed-forward layer (Adam).
TABLE_RATE = 1.0
MEMORY_RATE = 3e-3
FEED_FORWARD_RATE = 5e-2


class Facts(NamedTuple):
    """Questions (n, WIDTH) and their answers (n,), int64."""

    questions: Tensor
    answers: Tensor

    @staticmethod
    def draw(number: int, generator: torch.Generator) -> Facts:
        return Facts(
            torch.randn(number, WIDTH, generator=generator),
            torch.randint(ANSWERS, (number,), generator=generator),
        )

    def at(self, places: Tensor | slice) -> Facts:
        return Facts(self.questions[places], self.answers[places])

    def batches(self, size: int) -> list[Facts]:
        return [self.at(slice(first, first + size)) for first in range(0, len(self.answers), size)]


class FactModel(nn.Module):
    """A layer and a readout: questions (n, WIDTH) to logits (n, ANSWERS)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(WIDTH, ANSWERS)

    def forward(self, questions: Tensor) -> Tensor:
        logits: Tensor = self.readout(self.layer(questions))
        return logits

    @torch.no_grad()
    def recalls(self, facts: Facts) -> Tensor:
        """Which facts have their answer on top, (n,) boolean."""
        self.eval()
        found = [self(part.questions).argmax(-1) == part.answers for part in facts.batches(2048)]
        return torch.cat(found)


def memory() -> PKM:
    """16,384 slots, of which a question reads 32."""
    return PKM(
        WIDTH,
        heads=2,
        num_keys=128,
        topk=16,
        dim_head=8,
        query_norm="batch",
        values_grad="factored",
    )


def feed_forward(mac: int) -> nn.Sequential:
    """The smallest layer with a hidden layer that multiplies and adds at least so often."""
    hidden = -(-mac // (2 * WIDTH))
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))


def multiply_adds(layer: nn.Module) -> int:
    """Multiplications with additions which a layer makes for a question.

    Of a memory: the queries, the scores of all sub-keys, and the weighted sum of the values.
    """
    if isinstance(layer, PKM):
        queries = layer.to_queries.weight.numel()
        return queries + layer.keys.numel() + layer.heads * layer.topk * layer.values.dim
    return sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))


def learn(
    model: FactModel, facts: Facts, *, steps: int, rows: int, generator: torch.Generator, tick: Tick
) -> None:
    """Trains on random batches of `rows` facts; learning rates fall linearly to nothing."""
    optimizers = optimizers_of(model)
    highest = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(steps):
        for optimizer, rate in zip(optimizers, highest, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1.0 - step / steps)
        if len(order) < rows:
            order = torch.randperm(len(facts.answers), generator=generator)
        batch, order = facts.at(order[:rows]), order[rows:]
        take_step(model, batch, optimizers)
        tick((step + 1) / steps)


def optimizers_of(model: FactModel) -> list[torch.optim.Optimizer]:
    """Adam, and for a table an optimizer of its own."""
    tables, rest = fetch_pkm_value_parameters(model)
    if not tables:
        return [torch.optim.Adam(rest, FEED_FORWARD_RATE)]
    return [torch.optim.Adam(rest, MEMORY_RATE), PKMOptimizer(tables, TABLE_RATE)]


def take_step(model: FactModel, batch: Facts, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    F.cross_entropy(model(batch.questions), batch.answers).backward()
    for optimizer in optimizers:
        optimizer.step()
