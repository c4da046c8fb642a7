"""What is measured of feedback-transformer; tools/bench.py reads this file.

20000 tokens, width 512, 6 layers, segments of 2 tokens, a memory of 256 slots, 8 heads of 64,
unless a case says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench_speed import PROMPT, reading, saved, sequence, splits, token, token_again
from bench_words import LENGTH, SEEDS, STEPS, answered, time_to_learn

from bench_case import Case, Subject, Target

REFERENCE = {"package": "feedback_transformer_pytorch"}


def cases(device: str) -> list[Case]:
    found = [*timed(), *generated(), *remembered()]
    if device == "cpu":
        return [*found, *exact(), *claim()]
    # The bounds are meant for a CPU.
    return [case.without_bounds() for case in found]


def timed() -> Iterator[Case]:
    for b, n in ((2, 64), (1, 512)):
        size = {"b": b, "n": n}
        yield Case(
            f"forward, {b} x {n} tokens",
            "time",
            [
                Subject("ours", sequence, size),
                Subject("ours, bf16", sequence, {**size, "dtype": "bfloat16"}),
                Subject("reference", sequence, {**size, **REFERENCE}, environment="reference"),
                Subject("reading the weights", reading, size),
            ],
            [
                Target("reference", per="ours", at_least=3),
                Target("reference", per="ours, bf16", at_least=5),
                Target("ours", per="reading the weights"),
            ],
            note="the reference has float32; reading the weights once for each segment is what no "
            "way to compute it can do without.",
        )
    for b, n, target in ((2, 64, 2.5), (1, 256, 3.5)):
        arguments = {"b": b, "n": n, "backward": True}
        yield Case(
            f"forward and backward, {b} x {n} tokens",
            "time",
            [
                Subject("ours", sequence, arguments),
                Subject("reference", sequence, {**arguments, **REFERENCE}, environment="reference"),
            ],
            [Target("reference", per="ours", at_least=target)],
        )


def generated() -> Iterator[Case]:
    yield Case(
        "one generated token",
        "time",
        [
            Subject("ours", token),
            Subject("ours, bf16", token, {"dtype": "bfloat16"}),
            Subject("reference", token_again, environment="reference"),
        ],
        [
            Target("ours, bf16", at_most=6e-3),
            Target("reference", per="ours, bf16", at_least=90),
            Target("reference", per="ours"),
        ],
        note=f"ours with a full memory that is carried along; the reference cannot, and reads "
        f"{PROMPT} tokens again.",
    )


def remembered() -> Iterator[Case]:
    yield Case(
        "activations kept for the backward pass, width 128",
        "value",
        [
            Subject("ours", saved, {"n": 128}),
            Subject("ours, 64 tokens", saved, {"n": 64}),
            Subject("reference", saved, {"n": 128, **REFERENCE}, environment="reference"),
            Subject("reference, 64 tokens", saved, {"n": 64, **REFERENCE}, environment="reference"),
        ],
        [
            Target("reference", per="ours", at_least=3),
            Target("ours", per="ours, 64 tokens", at_most=2.2),
            Target("reference", per="reference, 64 tokens"),
        ],
        unit="MiB",
        note="one row of 128 tokens, and of 64.",
    )
    arguments = {"b": 1, "n": 256, "backward": True}
    warm = {"n": 4}
    yield Case(
        "peak memory, forward and backward, 1 x 256 tokens",
        "memory",
        [
            Subject("ours", sequence, arguments, warm),
            Subject("reference", sequence, {**arguments, **REFERENCE}, warm, "reference"),
        ],
        [Target("reference", per="ours")],
        note="with the gradients of all weights.",
    )


def exact() -> Iterator[Case]:
    yield Case(
        "largest change by a split in two, float64",
        "value",
        [
            Subject("ours", splits),
            Subject("reference", splits, REFERENCE, environment="reference"),
        ],
        [Target("ours", at_most=1e-12)],
        note="of the logits of 40 tokens in segments of 4, split anywhere.",
    )


def claim() -> Iterator[Case]:
    """The paper's claim in miniature, as the demonstration shows it for one seed."""
    for beyond, title, target in (
        (False, f"products of {LENGTH} permutations, trained on as many", 1.0),
        (True, f"products of {LENGTH + 1} to {2 * LENGTH} permutations", 0.95),
    ):
        yield Case(
            title,
            "value",
            [
                Subject("ours", answered, {"kind": "feedback", "beyond": beyond}),
                Subject("plain transformer", answered, {"kind": "plain", "beyond": beyond}),
            ],
            [Target("ours", at_least=target)],
            lower_is_better=False,
            note=f"the share of right answers after {STEPS} steps; {len(SEEDS)} seeds: the worst "
            "of ours, the best of a plain transformer of the same layers; by chance 0.17.",
        )
    yield Case(
        "time to learn them",
        "value",
        [Subject("ours", time_to_learn)],
        [Target("ours", at_most=60)],
        unit="s",
        note="of one processor, for the slowest of the seeds.",
    )
