"""What is measured of memformer; tools/bench.py reads this file.

A model of width 512 with 2 + 2 layers, 8 heads and 128 slots, on one segment of 1024 tokens and a
target of as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench_exactness import (
    SEEDS,
    STEPS,
    bounded,
    gradient,
    growth,
    held,
    padding,
    recalled,
    seconds,
)
from bench_speed import (
    DIM,
    SLOTS,
    TOKENS,
    at_once,
    backward,
    decode,
    decode_anew,
    forward,
    replay,
)

from bench_case import Case, Subject, Target

LAST = 16
LONG = 64
# Has the C library give freed blocks, from 128 KiB on, back to the system at once.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


def cases(device: str) -> list[Case]:
    found = [*passes(), *replays(), *decoding(), *remembered(device)]
    if device == "cpu":
        return [*found, *long(), *exact(), *recall()]
    # The bounds are meant for a CPU.
    return [case.without_bounds() for case in found]


def passes() -> Iterator[Case]:
    for name, run, targets in (
        ("forward", forward, {"float32": 1.7, "bfloat16": 6.0}),
        ("forward and backward", backward, {"float32": 1.6, "bfloat16": 5.0}),
    ):
        for dtype, target in targets.items():
            yield Case(
                f"{name}, {dtype}",
                "time",
                [
                    Subject("ours", run, {"dtype": dtype}),
                    Subject("reference", run, environment="reference"),
                ],
                [Target("reference", per="ours", at_least=target)],
                note="" if dtype == "float32" else "the reference in float32.",
            )
    yield Case(
        "forward, the paper's writer",
        "time",
        [
            Subject("ours", forward, {"writer": "bmn"}),
            Subject("ours, GRU", forward),
        ],
        [Target("ours", per="ours, GRU")],
    )


def replays() -> Iterator[Case]:
    for every in (True, False):
        arguments = {"segments": 4, "every": every}
        again = arguments | {"checkpoint_layers": True}
        yield Case(
            f"training step, 4 segments, {'a target each' if every else 'a target for the last'}",
            "time",
            [
                Subject("ours", replay, arguments),
                Subject("ours, layers run again", replay, again),
                Subject("all segments at once", at_once, arguments),
                *(
                    []
                    if every
                    else [Subject("reference", replay, arguments, environment="reference")]
                ),
            ],
            [
                Target("ours", per="all segments at once", at_most=1.15 if every else None),
                Target("ours, layers run again", per="ours"),
                *([] if every else [Target("reference", per="ours")]),
            ],
            note="ours: replay.",
        )


def decoding() -> Iterator[Case]:
    yield Case(
        f"decoding a token at {TOKENS}",
        "time",
        [
            Subject("ours", decode, {"length": TOKENS, "last": LAST}, units=LAST),
            Subject("ours, at 64", decode, {"length": 64, "last": LAST}, units=LAST),
            Subject("ours, all tokens anew", decode_anew, {"length": TOKENS}),
            Subject("reference", decode_anew, {"length": TOKENS}, environment="reference"),
        ],
        [
            Target("reference", per="ours", at_least=150),
            Target("ours, all tokens anew", per="ours"),
            Target("ours", per="ours, at 64", at_most=1.2),
        ],
        note=f"with a context of {TOKENS}. The reference's generation fails, so a pass over all "
        "tokens stands for it.",
    )


def remembered(device: str) -> Iterator[Case]:
    warm = {"segments": 2, "n": 16}
    again = {"checkpoint_layers": True}
    title = "peak memory of a training step, 8 segments"
    found = Case(
        title,
        "memory",
        [
            Subject("ours", replay, {"segments": 8}, warm),
            Subject("ours, layers run again", replay, again | {"segments": 8}, again | warm),
            Subject("all segments at once", at_once, {"segments": 8}, warm),
            Subject("reference", replay, {"segments": 8}, warm, environment="reference"),
        ],
        [
            Target("ours", per="reference", at_most=0.25),
            Target("ours", per="all segments at once", at_most=0.1),
            Target("ours, layers run again", per="reference"),
            Target("ours, layers run again", per="all segments at once"),
        ],
        note="ours: replay. The gradients are among it.",
    )
    yield found
    if device == "cpu":
        # Fragments of the heap are a large part of the peak, and the C library's own affair.
        yield replace(
            found.without_bounds(),
            title=f"{title}, freed memory given back",
            variables=GIVEN_BACK,
            note=f"{' '.join(f'{key}={value}' for key, value in GIVEN_BACK.items())} is set, which "
            "costs time.",
        )
    yield Case(
        f"peak memory of a training step, {LONG} segments",
        "memory",
        [Subject("ours", replay, {"segments": LONG}, warm)],
        note="replay, with a target for the last; measured once.",
        once=True,
    )


def long() -> Iterator[Case]:
    yield Case(
        f"time of a training step, {LONG} segments",
        "value",
        [Subject("ours", seconds, {"segments": LONG})],
        unit="s",
        note="replay, with a target for the last; CPU time of one thread, for one segment.",
    )
    yield Case(
        f"growth of the peak with a segment, from 8 to {LONG}",
        "value",
        [Subject("ours", growth, {"segments": LONG})],
        [Target("ours", at_most=0.26)],
        unit="MiB",
        variables=GIVEN_BACK,
        note=f"a stored memory takes {SLOTS * DIM * 4 / 2**20:.2f} MiB; freed memory given back.",
    )


def exact() -> Iterator[Case]:
    for title, prepare, unit, at_most, note in (
        ("padded batch against rows alone", padding, "", 1e-12, "outputs and memory, float64."),
        ("change of the memory by a segment of padding", held, "%", 0.0, ""),
        (
            "norm of a slot after 500 segments",
            bounded,
            "",
            6.0,
            "width 32, with the GRU's gate forced to keep everything.",
        ),
    ):
        yield Case(
            title,
            "value",
            [Subject("ours", prepare), Subject("reference", prepare, environment="reference")],
            [Target("ours", at_most=at_most)],
            unit=unit,
            note=note,
        )
    yield Case(
        "gradients of replay against all segments at once",
        "value",
        [Subject("ours", gradient), Subject("reference", gradient, environment="reference")],
        [Target("ours", at_most=1e-12)],
        note="relative to the largest of a parameter, float64, 6 segments.",
    )


def recall() -> Iterator[Case]:
    bounds = {8: 99.5, 64: 95.0}
    yield Case(
        "values recalled",
        "value",
        # In one case, so that one training serves both.
        [Subject(f"after {n} segments", recalled, {"segments": n}) for n in bounds],
        [Target(f"after {n} segments", at_least=bound) for n, bound in bounds.items()],
        unit="%",
        lower_is_better=False,
        note="4 pairs from the first segment, chance 12.5 %; the paper's writer, trained for "
        f"{STEPS} steps on up to 8 segments; the worst of {len(SEEDS)} seeds.",
        limit=2 * 3600.0,
    )
