"""The miniatures of ../examples as subjects of `bench_cases`: figures of five seeds.

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


def _miniatures() -> ModuleType:
    # Only where a subject runs: the reference's environment does not have our wheel.
    folder = str(Path(__file__).resolve().parent.parent / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("miniatures")


@functools.cache
def _stored(seed: int, kind: str) -> Any:
    """Takes a minute, and the lessons go on with it."""
    return _miniatures().store(seed, kind)


@functools.cache
def _used(seed: int, query_norm: str) -> Any:
    return _miniatures().usage(seed, query_norm)


@functools.cache
def _taught(seed: int, teacher: str) -> Any:
    module = _miniatures()
    _, model, known = _stored(seed, "memory")
    lessons, background, old = module.lessons(known, 320, seed)
    teach = {
        "chosen slots": lambda: module.slot_teacher(model, background),
        "all slots it reads": lambda: module.fine_tune_read_slots,
        "all weights": lambda: module.fine_tune_all,
        "all weights, Adam": lambda: module.fine_tune_by_adam,
    }[teacher]()
    return module.forgetting(model, old, lessons, teach)


def recalled(*, device: str, kind: str) -> Callable[[], float]:  # noqa: ARG001
    """Facts stored by a "memory" or by a "feed-forward" layer."""
    pick = min if kind == "memory" else max
    return lambda: 100.0 * pick(_stored(seed, kind)[0].recalled for seed in SEEDS)


def slots_used(*, device: str, query_norm: str) -> Callable[[], float]:  # noqa: ARG001
    """Slots read at least once."""
    pick = min if query_norm == "batch" else max
    return lambda: 100.0 * pick(_used(seed, query_norm).usage for seed in SEEDS)


def divergence(*, device: str, query_norm: str) -> Callable[[], float]:  # noqa: ARG001
    """KL of the slots' weights to uniform, in nats."""
    pick = max if query_norm == "batch" else min
    return lambda: pick(_used(seed, query_norm).kl for seed in SEEDS)


def kept(*, device: str, teacher: str) -> Callable[[], float]:  # noqa: ARG001
    """Old facts that are recalled after ten lessons."""
    pick = min if teacher == "chosen slots" else max
    return lambda: 100.0 * pick(_taught(seed, teacher).kept[-1] for seed in SEEDS)


def learned(*, device: str, teacher: str) -> Callable[[], float]:  # noqa: ARG001
    """Facts of the ten lessons that are recalled after the last."""
    pick = min if teacher == "chosen slots" else max
    return lambda: 100.0 * pick(_taught(seed, teacher).learned for seed in SEEDS)
