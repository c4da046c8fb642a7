"""Training tables of values: their parameters apart from the rest, and an optimizer of rows.

Shapes: s slots, d width, u of the slots that tokens looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from product_key_memory.checks import check_at_least_0
from product_key_memory.factors import collect_factors, factors_of
from product_key_memory.gradients import (
    TableGradient,
    gradient_of,
    is_finite,
    local,
    precise,
    sum_over_ranks,
)
from product_key_memory.rules import RULES, start
from product_key_memory.values import MemoryPool
from shared_core.checks import check_choice


def fetch_pkm_value_parameters(
    module: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of memories, and all others.

    Args:
        module: holds layers or pools, or is one.

    Returns:
        The tables of every `MemoryPool` (`weight`, and `inputs` of experts), and the rest; each
        parameter once, in the order of `module.parameters()`.
    """
    pools = (pool for pool in module.modules() if isinstance(pool, MemoryPool))
    tables = {id(table) for pool in pools for table in pool.parameters(recurse=False)}
    values: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in module.parameters():
        (values if id(parameter) in tables else rest).append(parameter)
    return values, rest


def fetch_optimizer_parameters(
    module: nn.Module, pkm_learning_rate: float = 1e-2
) -> list[dict[str, Any]]:
    """Parameter groups for one optimizer of all: see `fetch_pkm_value_parameters`.

    Args:
        module: holds layers or pools, or is one; their `values_grad` is "dense".
        pkm_learning_rate: of the values. A slot is read, and so trained, rarely: it wants more
            than the rest.

    Raises:
        ValueError: the learning rate is negative.
    """
    check_at_least_0(pkm_learning_rate=pkm_learning_rate)
    values, rest = fetch_pkm_value_parameters(module)
    return [{"params": rest}, {"params": values, "lr": pkm_learning_rate}]


class PKMOptimizer(torch.optim.Optimizer):
    """Trains tables of values, changing no row but those that got a gradient.

    For the first list of `fetch_pkm_value_parameters`; any other optimizer takes the second. Takes
    gradients as `values_grad="factored"` collects them, multiplied out a few rows at a time so that
    no gradient of a table's size is ever made, and those in `.grad`, dense or sparse; both are
    added up. A row whose gradient is exactly zero is left alone: neither moved, nor decayed, nor
    its state touched. Rules, for a row's gradient g (computed in float32 for tables of less):

    - "adagrad": v += mean(g ** 2); row -= lr * g / (sqrt(v) + eps), with one v a row. Its steps
      shrink as v grows: a good learning rate is about ten times that of "adam".
    - "adam": `torch.optim.SparseAdam`, that is Adam on the rows that got a gradient, with the
      table's number of steps for its bias correction; state twice the table.
    - "sgd": row -= lr * g.

    Collected gradients belong to the optimizer: `step` uses them up, `zero_grad` of the optimizer
    drops them, and `zero_grad` of a module does not reach them. A copy of a model collects none
    before an optimizer of its own holds its tables.

    With a `torch.amp.GradScaler`, gradients are unscaled here and a step is left out where they, or
    others that the scaler saw, are not finite. The scale itself follows those in `.grad`, so let
    the same scaler step the optimizer of the rest, too.

    Under data parallelism the ranks collect gradients of their own tokens: `process_group` says
    between which of them `step` takes the mean, as `DistributedDataParallel` does for the rest.

    Args:
        params: tables (s, d) or groups of them, which may have options of their own.
        lr: learning rate; the default is meant for "adagrad".
        rule: "adagrad", "adam" or "sgd".
        betas: of "adam".
        eps: added to the denominator; 1e-10 for "adagrad" and 1e-8 for "adam" where None.
        weight_decay: a row that gets a gradient is first multiplied by 1 - lr * weight_decay.
        max_grad_norm: scale the gradients of a group down to this norm, all tables' together.
        process_group: ranks that have copies of whole tables; None for one process, and for tables
            that are spread over ranks.

    Raises:
        TypeError, ValueError: an option is out of range, or a parameter is no table.
    """

    # Tells GradScaler to leave scale and findings here instead of unscaling `.grad` alone.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-1,
        *,
        rule: str = "adagrad",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group: dist.ProcessGroup | None = process_group
        options = {
            "lr": lr,
            "rule": rule,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        _check_options(options)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, and collects the factored gradients of its tables from now on.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        _check_options(group)
        for table in group["params"]:
            _check_table(table)
        for table in group["params"]:
            collect_factors(table)
        self.param_groups.append(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A group of processes cannot be copied.
        self.__dict__.setdefault("process_group", None)
        # Tables that were copied or unpickled with the optimizer have forgotten their lists.
        for table in self._tables():
            collect_factors(table)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops collected gradients, and `.grad` as every optimizer does."""
        super().zero_grad(set_to_none)
        for table in self._tables():
            factors_of(table).clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of an optimizer of the same groups, on the devices of its tables."""
        super().load_state_dict(state_dict)
        # torch has rounded it to the tables' dtype.
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, table in zip(saved, self._tables(), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[table][name] = value.to(table.device, precise(table.dtype))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves the rows that got a gradient, and forgets what was collected.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What the closure does.

        Raises:
            RuntimeError: `GradScaler.unscale_` was called, which does not reach factored gradients;
                or there are several processes and no `process_group`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_processes()
        scale = self._unscaling()
        if scale is not None:
            for group in self.param_groups:
                self._step_group(group, scale)
        for table in self._tables():
            factors_of(table).clear()
        return loss

    def _tables(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _group_of(self, table: Tensor) -> dist.ProcessGroup | None:
        """The ranks that have copies of a table."""
        return None if isinstance(table, DTensor) else self.process_group

    def _check_processes(self) -> None:
        """Raises where copies of a table would drift apart."""
        if self.process_group is not None or not dist.is_initialized():
            return
        ranks = dist.get_world_size()
        copied = [table for table in self._tables() if not isinstance(table, DTensor)]
        collected = sum(len(factors_of(table)) for table in copied)
        if ranks > 1 and collected:
            raise RuntimeError(
                f"{ranks} processes collect gradients of their own, {collected} reads in this one: "
                "PKMOptimizer needs the process_group which shares the tables"
            )

    def _unscaling(self) -> float | None:
        """What a GradScaler wants gradients multiplied by; None where they are not finite."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return 1.0
        scale: Tensor | None = getattr(self, "grad_scale", None)
        collected = sum(len(factors_of(table)) for table in self._tables())
        if scale is None and collected:
            raise RuntimeError(
                f"GradScaler.unscale_ has not reached the factored gradients of {collected} reads: "
                "leave it out, and clip by max_grad_norm"
            )
        # All of them, since ranks answer together.
        finite = [is_finite(table, self._group_of(table)) for table in self._tables()]
        if found_inf or not all(finite):
            return None
        return 1.0 if scale is None else 1.0 / float(scale)

    def _step_group(self, group: dict[str, Any], scale: float) -> None:
        tables: list[Tensor] = group["params"]
        gradients = [
            (table, gradient)
            for table in tables
            if (gradient := gradient_of(table, self._group_of(table))) is not None
        ]
        if group["max_grad_norm"] is not None:
            # Kept, since a rule may want them, too.
            gradients = [(table, gradient.measured(table)) for table, gradient in gradients]
            squares = [
                sum_over_ranks(gradient.measure(table).double().square().sum(), table, (0,))
                for table, gradient in gradients
            ]
            norm = scale * sum(map(float, squares)) ** 0.5
            # As torch.nn.utils.clip_grad_norm_ does.
            scale *= min(1.0, group["max_grad_norm"] / (norm + 1e-6))
        for table, gradient in gradients:
            self._step_table(table, gradient.times(scale), group)

    def _step_table(self, table: Tensor, gradient: TableGradient, group: dict[str, Any]) -> None:
        state: dict[str, Any] = self.state[table]
        start(state, group["rule"], table)
        values = local(table)
        decay = float(group["lr"]) * group["weight_decay"]
        for slots, moves in RULES[group["rule"]](table, state, gradient, group):
            if decay == 0.0 and moves.dtype == values.dtype:
                values.sub_(_sparse(slots, moves, values))
                continue
            moved = values.index_select(0, slots).to(moves.dtype)
            moved.mul_(1.0 - decay).sub_(moves)
            values.index_copy_(0, slots, moved.to(values.dtype))


def _sparse(slots: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """A tensor like a table that has some rows, ascending and distinct; unlike `index_add_`, adding
    it takes all processors."""
    return torch.sparse_coo_tensor(
        slots[None], rows, table.shape, is_coalesced=True, check_invariants=False
    )


def _check_options(options: dict[str, Any]) -> None:
    check_choice("rule", options["rule"], tuple(RULES))
    check_at_least_0(lr=options["lr"], weight_decay=options["weight_decay"])
    if options["eps"] is not None:
        check_at_least_0(eps=options["eps"])
    betas = options["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas}")
    limit = options["max_grad_norm"]
    if limit is not None and not limit > 0.0:
        raise ValueError(f"max_grad_norm must be above 0, got {limit}")


def _check_table(table: Tensor) -> None:
    if not table.is_floating_point():
        raise TypeError(f"a table must be floating point, got {table.dtype}")
    if table.ndim != 2:
        raise ValueError(
            f"PKMOptimizer trains tables (slots, dim), got a parameter of shape "
            f"{tuple(table.shape)}: see fetch_pkm_value_parameters"
        )
