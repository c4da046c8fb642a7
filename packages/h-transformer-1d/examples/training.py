"""Training on Lightning: a time budget, a plan that survives being killed, two optimizers.

A step depends on nothing but the seed, the step's number and the plan, and all of a run's state is
in its checkpoint. So a run that is killed repeats, bit by bit, the steps that it lost.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from corpus import Windows
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from settings import Settings
from torch import Tensor, nn

from demonstration import DemoError

WARM_UP_STEPS = 20
# A plan is made anew, and saved, after so many steps at first, and then after this part of the
# budget, or this many seconds if that is less.
FIRST_PLAN_STEPS = 1
PLAN_SHARE = 0.05
PLAN_SECONDS = 15.0


@dataclass(frozen=True)
class Plan:
    """How far through its budget a run is at each step.

    With a budget of time nobody knows the number of steps, so the plan is made anew from time to
    time. Whatever a step needs of the clock is in here, and a plan is saved before it is used.

    Attributes:
        step: where the plan begins.
        progress: share of the budget used there.
        pace: share of the budget that a step uses.
        renewal: step at which the plan is made anew.
    """

    step: int = 0
    progress: float = 0.0
    pace: float = 0.0
    renewal: int = FIRST_PLAN_STEPS

    def at(self, step: int) -> float:
        """Share of the budget used at `step`, 1 at the end."""
        share = self.progress + (step - self.step) * self.pace
        # Sums of many paces miss 1 by a rounding.
        return share if share < 1.0 - 1e-9 else 1.0

    def renew(self, step: int, elapsed: float, seconds_per_step: float, settings: Settings) -> Plan:
        """The plan from `step` on, which the run reached after `elapsed` seconds."""
        budget = 60.0 * settings.minutes
        if settings.steps is not None:
            pause = max(1, round(PLAN_SECONDS / seconds_per_step))
            # Pace and progress stay what they are, to the bit.
            return replace(self, renewal=step + pause)
        if elapsed >= budget:
            return Plan(step, 1.0, 0.0, step)
        progress = self.at(step)
        left = max(1, round((budget - elapsed) / seconds_per_step))
        pause = round(min(PLAN_SECONDS, PLAN_SHARE * budget) / seconds_per_step)
        return Plan(step, progress, (1.0 - progress) / left, step + min(left, max(1, pause)))

    @staticmethod
    def first(settings: Settings) -> Plan:
        return Plan() if settings.steps is None else Plan(pace=1.0 / settings.steps)

    @staticmethod
    def extended(step: int, elapsed: float, settings: Settings) -> Plan:
        """A plan for a run that goes on with a larger budget than it had."""
        if settings.steps is not None:
            return Plan(pace=1.0 / settings.steps, renewal=step + FIRST_PLAN_STEPS)
        progress = elapsed / (60.0 * settings.minutes)
        return Plan(step, progress, 0.0, step + FIRST_PLAN_STEPS)


class Training(LightningModule):
    """The model, the text and the plan: all that a step needs.

    Attributes:
        step: steps done.
        bits: bits per byte of the last step, the mean over all processes.
    """

    def __init__(self, settings: Settings, windows: Windows) -> None:
        super().__init__()
        # Two optimizers take every step together.
        self.automatic_optimization = False
        self.settings = settings
        self.model = settings.model()
        self.windows = windows
        self.plan = Plan.first(settings)
        self.step = 0
        self.bits = math.nan
        self._elapsed_before = 0.0
        self._started: float | None = None
        self._plan_started = (0, 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resumption included."""
        if self._started is None:
            return self._elapsed_before
        return self._elapsed_before + time.perf_counter() - self._started

    def train_dataloader(self) -> Iterator[int]:
        """Endless; a step fetches its windows by its own number."""
        return itertools.count()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Muon for the matrices within the layers, Adam for everything else."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            inner = name.startswith("layers.") and parameter.ndim == 2
            (matrices if inner else others).append(parameter)
        return [
            torch.optim.Muon(matrices, lr=self.settings.muon_rate, weight_decay=0.1),
            torch.optim.AdamW(
                others, lr=self.settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0
            ),
        ]

    def on_train_start(self) -> None:
        self._started = time.perf_counter()
        self._plan_started = (self.step, self.elapsed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (b, n, 256) of tokens (b, n).

        In bf16 the weights are rounded for one use, and the optimizers keep them in full. Autocast
        would leave what lies between the layers in float32, a fifth slower on a CPU.
        """
        weights: dict[str, Tensor] = {}
        if self.settings.precision == "bf16":
            trained = (x for x in self.model.named_parameters() if x[1].requires_grad)
            weights = {name: weight.bfloat16() for name, weight in trained}
        # functional_call is not typed.
        return cast(Tensor, torch.func.functional_call(self.model, weights, (tokens,)))

    def training_step(self, *_: Any) -> None:
        windows = self.windows(self.step)[self.global_rank :: self.trainer.world_size]
        windows = windows.to(self.device)
        logits = self(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        self.manual_backward(loss)
        share = min(1.0, (self.step + 1) / WARM_UP_STEPS) * (1.0 - self.plan.at(self.step))
        rates = (self.settings.muon_rate, self.settings.adam_rate)
        for optimizer, rate in zip(self.optimizers(), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.bits = float(mean) / math.log(2.0)
        if not math.isfinite(self.bits):
            raise DemoError(f"the loss is {self.bits} after step {self.step}")

    def renew_plan(self) -> None:
        """Makes the plan anew from what the clock says in the first process."""
        before, then = self._plan_started
        now = self.elapsed
        seconds_per_step = (now - then) / (self.step - before)
        plan = self.plan.renew(self.step, now, seconds_per_step, self.settings)
        self.plan = self.trainer.strategy.broadcast(plan)
        self._plan_started = (self.step, now)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["demo"] = {
            "settings": asdict(self.settings),
            "plan": asdict(self.plan),
            "step": self.step,
            "elapsed": self.elapsed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["demo"]
        self.step, self._elapsed_before = saved["step"], saved["elapsed"]
        self.plan = Plan(**saved["plan"])
        budget = self.settings.minutes, self.settings.steps
        if budget != (saved["settings"]["minutes"], saved["settings"]["steps"]):
            self.plan = Plan.extended(self.step, self._elapsed_before, self.settings)

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.plan.at(self.step) == 1.0
