"""The needle of ../examples as subjects of `bench_cases`: figures of five seeds.

Every function prepares a subject. Of the seeds the worst counts for what is to be shown, and the
best for what it is shown against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SEEDS = range(5)
TRAINED_ON, ASKED_OF = 16, 1600


@functools.cache
def _trained(seed: int, kind: str) -> Any:
    """A reader, and how it was trained."""
    import needle

    return needle.train(seed, kind, events=TRAINED_ON)


@functools.cache
def _accuracy(seed: int, kind: str, events: int) -> float:
    import needle

    return needle.accuracy(_trained(seed, kind)[0], seed, events)


def answered(*, device: str, kind: str, events: int = ASKED_OF) -> Callable[[], float]:  # noqa: ARG001
    """Questions to memories of so many events that a "htm" or a "full" reader answers, in %."""
    pick = min if kind == "htm" else max
    return lambda: 100.0 * pick(_accuracy(seed, kind, events) for seed in SEEDS)


def learned(*, device: str, kind: str) -> Callable[[], float]:  # noqa: ARG001
    """Questions of the last training steps that a reader answered, in %; the least."""
    return lambda: 100.0 * min(_trained(seed, kind)[1].accuracy for seed in SEEDS)
