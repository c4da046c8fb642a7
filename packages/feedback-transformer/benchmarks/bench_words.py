"""The word problem of ../examples as subjects of `bench_cases`: figures of five seeds.

Every function prepares a subject. Of the seeds the worst counts for what is to be shown, and the
best for what it is shown against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

SEEDS = range(5)
LENGTH, STEPS = 16, 500


@functools.cache
def _trained(seed: int, kind: str) -> tuple[list[float], float]:
    """Right answers at every place of words twice as long, and the time that training took."""
    import words

    model = words.build(kind, seed)
    trained = words.train(model, LENGTH, seed, steps=STEPS)
    return words.accuracy(model, 2 * LENGTH, seed), trained.seconds


def answered(*, device: str, kind: str, beyond: bool) -> Callable[[], float]:  # noqa: ARG001
    """The share of right answers of a "feedback" or a "plain" transformer.

    In words of the trained length, or `beyond` it in words twice as long.
    """
    part = slice(LENGTH, None) if beyond else slice(LENGTH)
    pick = min if kind == "feedback" else max

    def share(seed: int) -> float:
        places = _trained(seed, kind)[0][part]
        return sum(places) / len(places)

    return lambda: pick(share(seed) for seed in SEEDS)


def time_to_learn(*, device: str) -> Callable[[], float]:  # noqa: ARG001
    """Seconds of a processor that training of a feedback transformer takes; the most."""
    return lambda: max(_trained(seed, "feedback")[1] for seed in SEEDS)
