"""What a person sees while the model trains, and the record of the loss."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from training import Training
from typing_extensions import override

LOSSES = "loss.csv"
PLOT = "loss.png"
# The loss of one step is noisy: the bar shows a running mean over about so many steps.
SMOOTHING = 20


@rank_zero_only
def say(text: str, end: str = "\n") -> None:
    """Prints, in the first process only."""
    print(text, end=end, flush=True)


class LiveProgress(ProgressBar):
    """A bar with the live loss; without a terminal, a line for every tenth of the budget."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self._training = training
        self._console = Console()
        self._bar = Progress(
            BarColumn(32),
            TextColumn("{task.percentage:3.0f}%  {task.fields[status]}"),
            console=self._console,
            auto_refresh=False,
        )
        self._task: TaskID | None = None
        self._bits: float | None = None
        self._tenth = 0

    @override
    def disable(self) -> None:
        self._console.quiet = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tenth = int(10 * self._share())
        if self._console.is_terminal:
            self._task = self._bar.add_task("", total=1.0, status="")
            self._bar.start()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        last = self._training.bits
        self._bits = last if self._bits is None else self._bits + (last - self._bits) / SMOOTHING
        share = self._share()
        if self._task is not None:
            self._bar.update(self._task, completed=share, status=self._status(), refresh=True)
        elif int(10 * share) > self._tenth:
            self._tenth = int(10 * share)
            self._console.print(f"          {share:4.0%}  {self._status()}", highlight=False)

    def _share(self) -> float:
        """Share of the budget used: of the steps, or of the time."""
        training, settings = self._training, self._training.settings
        if settings.steps is not None:
            return training.step / settings.steps
        return min(1.0, training.elapsed / (60.0 * settings.minutes))

    def _status(self) -> str:
        training, settings = self._training, self._training.settings
        text = f"{self._bits:.3f} bits per byte, step {training.step:,}"
        if settings.steps is not None:
            return f"{text} of {settings.steps:,}"
        left = max(0, round(60.0 * settings.minutes - training.elapsed))
        return f"{text}, {left // 60}:{left % 60:02} left"

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._bar.stop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._bar.stop()
        if isinstance(exception, KeyboardInterrupt):
            self._console.print("stopped; --resume goes on", highlight=False)


class LossRecord(Callback):
    """A row for every step, in full precision.

    A resumed run drops the rows after its checkpoint and writes them again.

    Args:
        folder: where to.
        before: the rows of the run that is resumed.
    """

    FIELDS = ("step", "seconds", "bits_per_byte")

    def __init__(
        self, training: Training, folder: Path, before: list[tuple[int, float, float]]
    ) -> None:
        self._training = training
        self._path = folder / LOSSES
        self._before = before

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            kept = [row for row in self._before if row[0] <= self._training.step]
            # Beside the file, then in its place: a kill loses no row.
            new = self._path.with_suffix(".new.csv")
            self._write(new, "w", self.FIELDS, *kept)
            new.replace(self._path)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            training = self._training
            row = (training.step, f"{training.elapsed:.2f}", training.bits)
            self._write(self._path, "a", row)

    @staticmethod
    def _write(path: Path, mode: str, *rows: tuple[object, ...]) -> None:
        # Opened for every step, so that a kill loses no row.
        with path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def read_losses(path: Path) -> list[tuple[int, float, float]]:
    """The rows of a `LossRecord`: steps, seconds and bits per byte."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            # The names of the fields, and a row that was cut short by a kill, hold no numbers.
            with contextlib.suppress(ValueError):
                step, seconds, bits = row
                rows.append((int(step), float(seconds), float(bits)))
    return rows
