"""Checkpoints that are whole or absent: the last one and, in case, the one before it."""

from __future__ import annotations

import itertools
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from progress import LOSSES, PLOT, say
from settings import Settings
from training import Training
from typing_extensions import override

from demonstration import DemoError

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"


def to_resume(folder: Path) -> Path:
    """The checkpoint that a run in `folder` goes on from.

    Raises:
        DemoError: there is none.
    """
    # Killed between two renames, a run leaves only the previous one.
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            return path
    raise DemoError(f"nothing to resume: there is no {folder / LAST}")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of this demonstration.

    Raises:
        DemoError: it is missing or damaged; names the one before it, where that is whole.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums.
            if broken := archive.testzip():
                raise zipfile.BadZipFile(broken)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        Settings(**checkpoint["demo"]["settings"])
    except FileNotFoundError as problem:
        raise DemoError(f"nothing to resume: there is no {path}") from problem
    # Reading damaged bytes may raise anything.
    except Exception as problem:
        message = f"{path} is damaged or no checkpoint of this demo"
        raise DemoError(message + _way_out(path)) from problem
    return checkpoint


def _way_out(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name == PREVIOUS or not previous.exists():
        return ""
    try:
        read(previous)
    except DemoError:
        return ""
    return f"; the one before it is whole: --resume {previous}"


def keep(folder: Path) -> Path | None:
    """Moves what a run has left in `folder` into a folder below it, which it returns."""
    # The last checkpoint first: stopped midway, either folder holds one to go on from.
    left = [name for name in (LAST, PREVIOUS, LOSSES, PLOT) if (folder / name).exists()]
    if not left:
        return None
    number = next(number for number in itertools.count(1) if not _run(folder, number).exists())
    kept = _run(folder, number)
    kept.mkdir()
    for name in left:
        (folder / name).replace(kept / name)
    return kept


def _run(folder: Path, number: int) -> Path:
    return folder / f"run-{number}"


class Checkpoints(Callback):
    """Saves at the start, whenever the plan is made anew, and at the end.

    Args:
        folder: where to. Another run that lies there is kept in a folder below it.
        source: the checkpoint that this run goes on from.
    """

    def __init__(self, training: Training, folder: Path, source: Path | None) -> None:
        self._training = training
        self._folder = folder
        here = source is not None and source.parent.resolve() == folder.resolve()
        name = source.name if source is not None and here else None
        self._same_run = name in (LAST, PREVIOUS)
        # The last one is damaged, then, and must not take the place of the one before it.
        self._keep_previous = name == PREVIOUS

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not self._same_run and (kept := keep(self._folder)):
            say(f"          the run that was in {self._folder} is now in {kept}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        training = self._training
        if not training.done:
            if training.step < training.plan.renewal:
                return
            training.renew_plan()
        trainer.should_stop = training.done
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Writes beside the last checkpoint, then takes its place."""
        new, last = self._folder / "new.ckpt", self._folder / LAST
        trainer.save_checkpoint(new)
        if not trainer.is_global_zero:
            return
        with new.open("r+b") as file:
            os.fsync(file.fileno())
        if last.exists() and not self._keep_previous:
            last.replace(self._folder / PREVIOUS)
        new.replace(last)
        self._keep_previous = False
