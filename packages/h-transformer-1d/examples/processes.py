"""Several processes: what each one must be told, and that all of them mean the same run."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from training import Training
from typing_extensions import override

from demonstration import DemoError

# Other tools that start processes bring variables of their own: torchrun and Slurm.
STARTED_BY_OTHERS = ("LOCAL_RANK", "SLURM_NTASKS")


def check_environment(num_nodes: int) -> None:
    """Looks at the variables that tell machines of each other.

    Raises:
        DemoError: one is missing, and the machines would wait for each other, or makes no sense.
    """
    if num_nodes > 1 and not any(name in os.environ for name in STARTED_BY_OTHERS):
        names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
        if missing := [name for name in names if not os.environ.get(name)]:
            raise DemoError(
                f"--num-nodes {num_nodes} needs {', '.join(missing)} in the environment"
            )
    for name, least, most in (("MASTER_PORT", 1, 65535), ("NODE_RANK", 0, num_nodes - 1)):
        value = os.environ.get(name)
        if value and not (value.isdecimal() and least <= int(value) <= most):
            raise DemoError(f"{name} is {value}, not a number from {least} to {most}")


class Agreement(Callback):
    """Ends a run, in every process, whose processes differ in settings, text or checkpoint.

    Args:
        measured: each process has found out for itself which precision is faster. There the first
            one's choice counts.
    """

    def __init__(self, training: Training, *, measured: bool) -> None:
        self._training = training
        self._measured = measured

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        training = self._training
        precision = trainer.strategy.broadcast(training.settings.precision)
        if self._measured:
            training.settings = replace(training.settings, precision=precision)
        everyone: list[dict[str, Any]] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(everyone, self._run())
        for rank, other in enumerate(everyone):
            for name, value in everyone[0].items():
                if other[name] != value:
                    raise DemoError(
                        f"process {rank} differs from the first one in {name}: "
                        f"{other[name]}, not {value}"
                    )

    def _run(self) -> dict[str, Any]:
        """What must be the same in every process; a corpus may lie elsewhere on each machine."""
        training = self._training
        run = asdict(training.settings) | {"step": training.step, "seconds": training.elapsed}
        return {name: run[name] for name in run if name not in ("corpus", "corpus_path")}
