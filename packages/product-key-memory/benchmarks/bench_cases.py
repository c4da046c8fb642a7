"""What is measured of product-key-memory; tools/bench.py reads this file.

A layer of width 512 with 4 heads, sub-queries of 128 and 32 slots a head, on (1, 1024, 512). A
train step is a forward pass, a backward pass and the optimizers: in the reference Adam for
everything, as its README says; in ours Adam for the rest and a `PKMOptimizer` for the values, whose
gradients are factored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench_miniatures import SEEDS, divergence, kept, learned, recalled, slots_used
from bench_speed import DIM, TOKENS, forward, train_ours, train_reference, whole

from bench_case import Case, Subject, Target

STEPS = ((256, 4.0), (512, 10.0), (1024, 30.0))


def cases(device: str) -> list[Case]:
    found = [*forwards(), *steps(), *remembered()]
    if device == "cpu":
        return [*found, *claims()]
    # The bounds are meant for a CPU.
    return [case.without_bounds() for case in found]


def forwards() -> Iterator[Case]:
    for title, arguments, target in (
        ("forward, num_keys 256", {"num_keys": 256}, 2.0),
        ("forward, num_keys 512", {"num_keys": 512}, None),
        ("forward of one token, num_keys 256", {"num_keys": 256, "n": 1}, None),
        ("forward of one token, compiled, num_keys 256", {"num_keys": 256, "n": 1}, 4.0),
    ):
        compiled = {"compiled": True} if "compiled" in title else {}
        yield Case(
            title,
            "time",
            [
                Subject("ours", forward, {**arguments, **compiled}),
                Subject("reference", forward, arguments, environment="reference"),
            ],
            [Target("reference", per="ours", at_least=target)],
            note="ours by torch.compile; the reference as it is." if compiled else "",
        )


def steps() -> Iterator[Case]:
    for num_keys, target in STEPS:
        arguments = {"num_keys": num_keys}
        yield Case(
            f"train step, {num_keys**2} slots",
            "time",
            [
                Subject("ours", train_ours, arguments),
                Subject("ours, lazy Adam", train_ours, {**arguments, "rule": "adam"}),
                Subject("reference", train_reference, arguments, environment="reference"),
            ],
            [
                Target("reference", per="ours", at_least=target),
                Target("reference", per="ours, lazy Adam"),
            ],
            note=f"{TOKENS} tokens; ours: row-wise Adagrad.",
        )


def remembered() -> Iterator[Case]:
    warm: dict[str, object] = {"num_keys": 64, "n": 16}
    kinds: dict[str, dict[str, object]] = {
        "ours": {"trainer": "ours"},
        "ours, bf16 values": {"trainer": "ours", "values": "bfloat16"},
        "reference": {"trainer": "reference"},
    }
    for num_keys, target in ((512, 11.0), (1024, None)):
        yield Case(
            f"peak memory of training, {num_keys**2} slots",
            "memory",
            [
                Subject(
                    name,
                    whole,
                    {**arguments, "num_keys": num_keys},
                    {**arguments, **warm},
                    environment="reference" if name == "reference" else "ours",
                )
                for name, arguments in kinds.items()
            ],
            [
                Target("reference", per="ours", at_least=target),
                Target("reference", per="ours, bf16 values"),
            ],
            note="the layer, its optimizers and two steps: parameters, state and gradients. The "
            f"values alone take {num_keys**2 * DIM * 4 / 2**20:,.0f} MiB in float32.",
        )


def claims() -> Iterator[Case]:
    """The papers' claims in miniature, as the demonstration shows them for one seed."""
    seeds = f"{len(SEEDS)} seeds: the worst of ours, the best of the others"
    yield Case(
        "facts stored of 16,384 in 1000 steps",
        "value",
        [
            Subject("ours", recalled, {"kind": "memory"}),
            Subject("feed-forward", recalled, {"kind": "feed-forward"}),
        ],
        [Target("ours", at_least=99)],
        unit="%",
        lower_is_better=False,
        note=f"both layers multiply and add equally often; {seeds}.",
    )
    norms = [
        Subject("ours", slots_used, {"query_norm": "batch"}),
        Subject("layer norm", slots_used, {"query_norm": "layer"}),
    ]
    note = f"32,768 tokens of a narrow cone in an untrained layer; ours: batch norm; {seeds}."
    yield Case(
        "slots used, of 16,384",
        "value",
        norms,
        [Target("ours", at_least=99)],
        unit="%",
        lower_is_better=False,
        note=note,
    )
    yield Case(
        "divergence of the slots' weights from uniform",
        "value",
        [replace(subject, prepare=divergence) for subject in norms],
        [Target("ours", at_most=0.3)],
        unit="nats",
        note=note,
    )
    yield Case(
        "facts known after ten lessons",
        "value",
        [
            Subject("ours", kept, {"teacher": "chosen slots"}),
            Subject("ours, new facts", learned, {"teacher": "chosen slots"}),
            Subject("all slots it reads", kept, {"teacher": "all slots it reads"}),
            Subject("all weights", kept, {"teacher": "all weights"}),
            Subject("all weights, Adam", kept, {"teacher": "all weights, Adam"}),
        ],
        [Target("ours", at_least=99.9), Target("ours, new facts", at_least=99)],
        unit="%",
        lower_is_better=False,
        note="old facts, where the column does not say new ones; 10 lessons of 32 facts, each "
        "for 200 steps or until 99 % of it is learned; ours: 512 chosen slots of about 1000 that a "
        f"lesson reads; {seeds}.",
    )
