"""Rules by which rows of a table move.

Each takes a table, its state, its gradient and the options of the group. It advances the state of
the slots that got a gradient and yields what to subtract from their rows, a few at a time. Rows of
zero are left out where they would move all the same, by momentum or by weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from product_key_memory.gradients import Part, TableGradient, local, zeros_beside

# What keeps a division by zero away unless it is given: Adagrad's and SparseAdam's in torch.
_EPS = {"adagrad": 1e-10, "adam": 1e-8}


def start(state: dict[str, Any], rule: str, table: Tensor) -> None:
    """Makes a table's state before its first step, and counts steps."""
    if rule == "adagrad" and "sum" not in state:
        state["sum"] = zeros_beside(table, columns=False)
    if rule == "adam":
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = zeros_beside(table, columns=True)
            state["exp_avg_sq"] = zeros_beside(table, columns=True)
        state["step"] += 1


def adagrad(
    table: Tensor, state: dict[str, Any], gradient: TableGradient, options: dict[str, Any]
) -> Iterator[Part]:
    """Adagrad of one accumulator a row: the sum of the mean squares of its gradients."""
    sums, slots = local(state["sum"]), gradient.bags.slots
    total = gradient.measure(table).square().div_(gradient.width)
    total.add_(sums.index_select(0, slots))
    sums.index_copy_(0, slots, total)
    scale = total.sqrt_().add_(_eps(options)).reciprocal_().mul_(float(options["lr"]))
    # Without an eps, a row that never got a gradient would be divided by zero.
    scale.masked_fill_(scale.isinf(), 0.0)
    return gradient.times(scale).parts(used=options["weight_decay"] > 0.0)


def adam(
    table: Tensor,  # noqa: ARG001
    state: dict[str, Any],
    gradient: TableGradient,
    options: dict[str, Any],
) -> Iterator[Part]:
    """`torch.optim.SparseAdam`."""
    beta1, beta2 = options["betas"]
    averages, squares = local(state["exp_avg"]), local(state["exp_avg_sq"])
    bias1, bias2 = (1.0 - beta ** state["step"] for beta in (beta1, beta2))
    step_size = float(options["lr"]) * bias2**0.5 / bias1
    for slots, rows in gradient.parts(used=True):
        average = averages.index_select(0, slots).lerp_(rows, 1.0 - beta1)
        averages.index_copy_(0, slots, average)
        square = squares.index_select(0, slots).mul_(beta2)
        square.addcmul_(rows, rows, value=1.0 - beta2)
        squares.index_copy_(0, slots, square)
        yield Part(slots, average.div_(square.sqrt_().add_(_eps(options))).mul_(step_size))


def sgd(
    table: Tensor,  # noqa: ARG001
    state: dict[str, Any],  # noqa: ARG001
    gradient: TableGradient,
    options: dict[str, Any],
) -> Iterator[Part]:
    """Gradient descent."""
    return gradient.times(float(options["lr"])).parts(used=options["weight_decay"] > 0.0)


RULES = {"adagrad": adagrad, "adam": adam, "sgd": sgd}


def _eps(options: dict[str, Any]) -> float:
    eps: float | None = options["eps"]
    return _EPS[options["rule"]] if eps is None else eps
