"""Rules by which rows of a table move.

Each takes a table's state, a part of its gradient, whose rows it may overwrite, and the options of
the group. It advances the state of the part's slots and returns what to subtract from their rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from product_key_memory.gradients import Part, local, zeros_beside

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


def adagrad(state: dict[str, Any], part: Part, options: dict[str, Any]) -> Tensor:
    """Adagrad of one accumulator a row: the sum of the mean squares of its gradients."""
    sums = local(state["sum"])
    total = part.norms.square_().div_(part.width).add_(sums.index_select(0, part.slots))
    sums.index_copy_(0, part.slots, total)
    scale = total.sqrt_().add_(_eps(options)).reciprocal_().mul_(float(options["lr"]))
    return part.rows.mul_(scale[:, None])


def adam(state: dict[str, Any], part: Part, options: dict[str, Any]) -> Tensor:
    """`torch.optim.SparseAdam`."""
    beta1, beta2 = options["betas"]
    averages, squares = local(state["exp_avg"]), local(state["exp_avg_sq"])
    average = averages.index_select(0, part.slots).lerp_(part.rows, 1.0 - beta1)
    averages.index_copy_(0, part.slots, average)
    square = squares.index_select(0, part.slots).mul_(beta2)
    square.addcmul_(part.rows, part.rows, value=1.0 - beta2)
    squares.index_copy_(0, part.slots, square)
    bias1, bias2 = (1.0 - beta ** state["step"] for beta in (beta1, beta2))
    step_size = float(options["lr"]) * bias2**0.5 / bias1
    return average.div_(square.sqrt_().add_(_eps(options))).mul_(step_size)


def sgd(state: dict[str, Any], part: Part, options: dict[str, Any]) -> Tensor:  # noqa: ARG001
    """Gradient descent."""
    return part.rows.mul_(float(options["lr"]))


RULES = {"adagrad": adagrad, "adam": adam, "sgd": sgd}


def _eps(options: dict[str, Any]) -> float:
    eps: float | None = options["eps"]
    return _EPS[options["rule"]] if eps is None else eps
