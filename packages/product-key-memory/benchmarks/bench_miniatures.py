"""The miniatures of ../examples as subjects of `bench_cases`: figures of five seeds.

Every function prepares a subject. Of the seeds the worst counts for what is to be shown, and the
best for what it is shown against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SEEDS = range(5)


@functools.cache
def _stored(seed: int, kind: str) -> Any:
    """Takes a minute, and the lessons go on with it."""
    import miniatures

    return miniatures.store(seed, kind)


@functools.cache
def _used(seed: int, query_norm: str) -> Any:
    import miniatures

    return miniatures.usage(seed, query_norm)


@functools.cache
def _taught(seed: int, teacher: str) -> Any:
    import miniatures

    _, model, known = _stored(seed, "memory")
    lessons, background, old = miniatures.lessons(known, 320, seed)
    teachers: dict[str, Callable[[], Any]] = {
        "chosen slots": lambda: miniatures.slot_teacher(model, background),
        "all slots it reads": lambda: miniatures.fine_tune_read_slots,
        "all weights": lambda: miniatures.fine_tune_all,
        "all weights, Adam": lambda: miniatures.fine_tune_by_adam,
    }
    return miniatures.forgetting(model, old, lessons, teachers[teacher]())


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
