"""The needle of ../examples as subjects of `bench_cases`: figures of five seeds.

Every function prepares a subject. Of the seeds the worst counts for what is to be shown, and the
best for what it is shown against.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

SEEDS = range(5)
TRAINED_ON, ASKED_OF = 16, 1600


def _needle() -> ModuleType:
    # Only where a subject runs: the reference's environment does not have our wheel.
    folder = str(Path(__file__).resolve().parent.parent / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("needle")


@functools.cache
def _trained(seed: int, kind: str) -> Any:
    """A reader, and how it was trained."""
    return _needle().train(seed, kind, events=TRAINED_ON)


@functools.cache
def _accuracy(seed: int, kind: str, events: int) -> float:
    share: float = _needle().accuracy(_trained(seed, kind)[0], seed, events)
    return share


def answered(*, device: str, kind: str, events: int = ASKED_OF) -> Callable[[], float]:  # noqa: ARG001
    """Questions to memories of so many events that a "htm" or a "full" reader answers, in %."""
    pick = min if kind == "htm" else max
    return lambda: 100.0 * pick(_accuracy(seed, kind, events) for seed in SEEDS)


def learned(*, device: str, kind: str) -> Callable[[], float]:  # noqa: ARG001
    """Questions of the last training steps that a reader answered, in %; the least."""
    return lambda: 100.0 * min(_trained(seed, kind)[1].accuracy for seed in SEEDS)
