"""What is measured of h-transformer-1d; tools/bench.py reads this file.

"core" is attention without projections: from queries, keys and values packed as (1, n, 3 * 512),
the form in which the reference takes them when its projections are replaced by the identity, to
(1, n, 512). All three subjects therefore pay for splitting and merging the heads. Blocks of 128,
8 heads of 64.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench_exactness import (
    SEEDS,
    coverage_ours,
    coverage_reference,
    error_ours,
    error_reference,
    leak_ours,
    leak_reference,
    row_sums_exact,
    row_sums_ours,
    row_sums_reference,
)
from bench_speed import (
    BLOCK,
    DECODED,
    DIM,
    LONGEST,
    cache_size,
    core_exact,
    core_ours,
    core_reference,
    decode_ours,
    decode_reference,
    state_size,
)

from bench_case import Case, Subject, Target

LONG = 16384


def cases(device: str) -> list[Case]:
    found = [*timed("float32"), *remembered()]
    if device == "cpu":
        return [*found, *exact()]
    # The bounds are meant for a CPU.
    return [case.without_bounds() for case in (*found, *timed("bfloat16"))]


def timed(dtype: str) -> Iterator[Case]:
    """Times; the targets are meant for one thread of a CPU, in float32."""
    forward = {"n": LONG, "dtype": dtype}
    both = {**forward, "backward": True}
    suffix = "" if dtype == "float32" else f", {dtype}"
    seen = sum(
        (BLOCK + 1) / 2 + BLOCK * block.bit_count() for block in range(LONG // BLOCK)
    ) * BLOCK  # fmt: skip
    flops = 4.0 * DIM * seen
    size = 4 if dtype == "float32" else 2

    yield Case(
        f"causal core, forward, n = {LONG}{suffix}",
        "time",
        [
            Subject("ours", core_ours, {**forward, "causal": True}),
            Subject(
                "reference", core_reference, {**forward, "causal": True}, environment="reference"
            ),
            Subject("SDPA", core_exact, forward),
        ],
        [Target("reference", per="ours", at_least=6), Target("SDPA", per="ours", at_least=14)],
        flops=flops,
        traffic=4.0 * LONG * DIM * size,
        dtype=dtype,
    )
    yield Case(
        f"causal core, forward and backward, n = {LONG}{suffix}",
        "time",
        [
            Subject("ours", core_ours, {**both, "causal": True}),
            Subject("reference", core_reference, {**both, "causal": True}, environment="reference"),
            Subject("SDPA", core_exact, both),
        ],
        [Target("reference", per="ours", at_least=4), Target("SDPA", per="ours", at_least=14)],
        # The backward pass has five products where the forward pass has two.
        flops=3.5 * flops,
        traffic=12.0 * LONG * DIM * size,
        dtype=dtype,
    )
    yield Case(
        f"bidirectional core, coarse queries, forward, n = {LONG}{suffix}",
        "time",
        [
            Subject("ours", core_ours, {**forward, "causal": False}),
            Subject(
                "reference", core_reference, {**forward, "causal": False}, environment="reference"
            ),
        ],
        [Target("reference", per="ours", at_least=5)],
    )
    yield Case(
        f"crossover with SDPA, causal core, forward{suffix}",
        "crossover",
        [
            Subject("ours", core_ours, {"dtype": dtype, "causal": True}),
            Subject("SDPA", core_exact, {"dtype": dtype}),
        ],
        [Target("ours", at_most=256)],
        sizes=(64, 128, 256, 512, 1024, 2048),
        note="the smallest n from which on ours is at least as fast.",
    )
    if dtype != "float32":
        return
    yield Case(
        f"decoding one token at {DECODED}, one layer",
        "time",
        [
            Subject("ours", decode_ours, units=BLOCK),
            Subject("reference", decode_reference, environment="reference"),
        ],
        [Target("reference", per="ours", at_least=500)],
        note=f"the mean over the {BLOCK} tokens that end at {DECODED}, a whole block, beside the "
        f"reference's forward pass over {DECODED}; width {DIM}, 256 tokens.",
    )


def remembered() -> Iterator[Case]:
    """Peak memory, and the size of the state."""
    for title, n, backward, target in (
        (f"peak memory, causal core, forward, n = {LONGEST}", LONGEST, False, 8),
        (f"peak memory, causal core, forward and backward, n = {LONG}", LONG, True, 4),
    ):
        arguments = {"n": n, "backward": backward, "dtype": "float32", "causal": True}
        yield Case(
            title,
            "memory",
            [
                Subject("ours", core_ours, arguments, {"n": 1024}),
                Subject("reference", core_reference, arguments, {"n": 1024}, "reference"),
            ],
            [Target("reference", per="ours", at_least=target)],
            note="the gradient of the inputs is counted." if backward else "",
        )
    yield Case(
        f"state of a layer at {LONGEST}",
        "value",
        [Subject("ours", state_size, {"n": LONGEST}), Subject("full cache", cache_size)],
        [Target("full cache", per="ours", at_least=50)],
        unit="MiB",
        note="keys and values in float32; the open block is empty at this length.",
    )
    yield Case(
        f"state of a layer at {LONGEST + BLOCK - 1}",
        "value",
        [Subject("ours", state_size, {"n": LONGEST + BLOCK - 1})],
        unit="MiB",
        note="the open block is as full as it gets.",
    )


def exact() -> Iterator[Case]:
    """How far the result is from what it should be, in float64."""
    worst = "the worst of"
    yield Case(
        "error of the row sums",
        "value",
        [
            Subject("ours", row_sums_ours),
            Subject("reference", row_sums_reference, environment="reference"),
            Subject("SDPA", row_sums_exact),
        ],
        [Target("ours", at_most=7e-16)],
        note=f"{worst} lengths 1 to 1024, blocks of 4 to 128, both schemes and resolutions, causal "
        "and not, with and without a mask; reference: n = 1024, blocks of 16; SDPA: causal and "
        "not, without a mask.",
    )
    yield Case(
        "pairs of tokens with a weight",
        "value",
        [
            Subject("ours", coverage_ours),
            Subject("reference", coverage_reference, environment="reference"),
        ],
        [Target("ours", at_least=100)],
        unit="%",
        lower_is_better=False,
        note=f"{worst} the same; of those pairs that a causal model may have.",
    )
    yield Case(
        "leak of masked tokens into the output",
        "value",
        [Subject("ours", leak_ours), Subject("reference", leak_reference, environment="reference")],
        [Target("ours", at_most=0)],
        note=f"{worst} the same with a mask: the change of the other rows when masked tokens "
        "change; reference: n = 1024, blocks of 16.",
    )
    for kind, note, bounds in (
        ("q = k", "queries and keys are one series, values another, 16 wide.", (0.042, 0.032)),
        ("q, k, v apart", "three series, 64 wide.", None),
        ("q = k = v", "one series, 64 wide.", None),
    ):
        names = ("ours", "ours, neighbor")
        yield Case(
            f"relative error to exact softmax, AR(0.95), {kind}",
            "value",
            [
                Subject(names[0], error_ours, {"kind": kind, "scheme": "sibling"}),
                Subject("reference", error_reference, {"kind": kind}, environment="reference"),
                Subject(names[1], error_ours, {"kind": kind, "scheme": "neighbor"}),
            ],
            [Target(name, at_most=bound) for name, bound in zip(names, bounds or (), strict=False)],
            note=f"causal, n = 1024, blocks of 32, 8 heads, unit variance, mean over "
            f"{len(SEEDS)} draws; {note}",
        )
