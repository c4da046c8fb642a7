"""What is measured of htm-pytorch; tools/bench.py reads this file.

Width 512, 8 heads of 64, the 8 best chunks of 32 tokens; 128 queries unless a case says otherwise.
The memories come with a mask, whose last 48 tokens are padding unless a case says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench_needle import ASKED_OF, SEEDS, TRAINED_ON, answered, learned
from bench_search import build_time, recall, search_of
from bench_speed import (
    core,
    from_store,
    from_vast_store,
    streaming_ours,
    streaming_reference,
    vast_memory,
)

from bench_case import Case, Subject, Target

SOME, MANY = 20_000, 200_000
ENVIRONMENTS, EACH = 32, 4096
DENSE = 512
INDEXED = {"chunks": 32_768, "dim": 128}
VAST = {"m": 10_000_000, "dim": 256}


def cases(device: str) -> list[Case]:
    found = [*timed(), *streaming(), *remembered()]
    if device == "cpu":
        return [*found, *vast(), *searched(), *claim()]
    # The bounds are meant for a CPU.
    return [case.without_bounds() for case in found]


def beside(title: str, arguments: dict[str, object], target: float | None = None) -> Case:
    return Case(
        title,
        "time",
        [
            Subject("ours", core, arguments),
            Subject("reference", core, arguments, environment="reference"),
        ],
        [Target("reference", per="ours", at_least=target)],
    )


def timed() -> Iterator[Case]:
    yield beside(f"forward, {SOME} tokens", {"m": SOME}, 35)
    yield beside(f"forward and backward, {SOME} tokens", {"m": SOME, "backward": True}, 30)
    yield beside(f"forward, {MANY} tokens", {"m": MANY}, 35)
    for masked in ("four fifths", "here and there"):
        title = f"forward, {SOME} tokens, masked {masked}"
        yield beside(title, {"m": SOME, "masked": masked})
    title = f"forward and backward, {DENSE} queries to {DENSE} tokens"
    yield beside(title, {"m": DENSE, "n": DENSE, "backward": True})
    yield Case(
        f"forward from a store, {MANY} tokens",
        "time",
        [
            Subject("ours, bf16", from_store, {"m": MANY, "dtype": "bfloat16"}),
            Subject("ours", from_store, {"m": MANY, "dtype": "float32"}),
            Subject("reference", core, {"m": MANY}, environment="reference"),
        ],
        [
            Target("reference", per="ours, bf16", at_least=60),
            Target("reference", per="ours"),
        ],
        note="the store keeps the tokens in the type that the column says, and their summaries; "
        "the reference has float32.",
    )


def streaming() -> Iterator[Case]:
    for title, arguments, target in (
        (f"streaming, a token more than {MANY}", {"m": MANY}, 500),
        (
            f"streaming, {ENVIRONMENTS} environments of {EACH} tokens",
            {"m": EACH, "rows": ENVIRONMENTS},
            40,
        ),
    ):
        yield Case(
            title,
            "time",
            [
                Subject("ours", streaming_ours, arguments),
                Subject("reference", streaming_reference, arguments, environment="reference"),
            ],
            [Target("reference", per="ours", at_least=target)],
            note="append a token to each environment and attend with it.",
        )


def remembered() -> Iterator[Case]:
    for title, backward, target in (
        (f"peak memory, forward, {SOME} tokens", False, 20),
        (f"peak memory, forward and backward, {SOME} tokens", True, 15),
    ):
        arguments = {"m": SOME, "backward": backward}
        warm = {"m": 1024, "n": 2, "backward": backward}
        yield Case(
            title,
            "memory",
            [
                Subject("ours", core, arguments, warm),
                Subject("reference", core, arguments, warm, environment="reference"),
            ],
            [Target("reference", per="ours", at_least=target)],
        )


def vast() -> Iterator[Case]:
    title = f"{VAST['m']:,} tokens of width {VAST['dim']} in bf16"
    yield Case(
        f"{title}, one query",
        "time",
        [
            Subject("ours", from_vast_store, {**VAST, "part": "attend"}),
            Subject("ours, search alone", from_vast_store, {**VAST, "part": "search"}),
        ],
        note="gathering chunks and attending to them is the difference.",
    )
    yield Case(
        f"peak memory, {title}",
        "memory",
        [Subject("ours", vast_memory, VAST, {"m": 4096, "dim": 256})],
        note=f"filling the store and asking it; the tokens alone take "
        f"{VAST['m'] * VAST['dim'] * 2 / 2**30:.2f} GiB.",
    )


def searched() -> Iterator[Case]:
    """Random means: those of a real memory lie in groups, and are found more easily."""
    title = f"the best 8 of {INDEXED['chunks']:,} chunks of width {INDEXED['dim']}"
    yield Case(
        f"{title}, 16 queries",
        "time",
        [
            Subject("exact", search_of, {**INDEXED, "kind": "exact"}),
            Subject("FaissSearch", search_of, {**INDEXED, "kind": "faiss"}),
        ],
        [Target("exact", per="FaissSearch")],
    )
    yield Case(
        f"{title}, found",
        "value",
        [Subject("FaissSearch", recall, INDEXED)],
        unit="%",
        lower_is_better=False,
        note="by default; `parameters` trades time for it. An index is built once, within the "
        "first search that needs it.",
    )
    yield Case(
        f"building an index of {INDEXED['chunks']:,} chunks of width {INDEXED['dim']}",
        "value",
        [Subject("FaissSearch", build_time, INDEXED)],
        unit="s",
    )


def claim() -> Iterator[Case]:
    """The paper's claim in miniature, as the demonstration shows it for one seed."""
    yield Case(
        f"answers about one of {ASKED_OF} events, trained on {TRAINED_ON}",
        "value",
        [
            Subject("ours", answered, {"kind": "htm"}),
            Subject("ours, while training", learned, {"kind": "htm"}),
            Subject("full attention", answered, {"kind": "full"}),
            Subject("full attention, while training", learned, {"kind": "full"}),
        ],
        [Target("ours", at_least=98)],
        unit="%",
        lower_is_better=False,
        note=f"{len(SEEDS)} seeds: the worst of ours, the best of full attention; by chance 6 %.",
    )
