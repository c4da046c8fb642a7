"""RESULTS.md says what the samples say."""

from __future__ import annotations

from typing import Any

import pytest
from results_tables import row

from bench_case import Case, Subject, Target
from bench_report import figures, report


def nothing(**_: Any) -> Any:
    raise NotImplementedError


OURS = Subject("ours", nothing)
REFERENCE = Subject("reference", nothing, environment="reference")
SDPA = Subject("SDPA", nothing)
ABOUT = {
    "ours": {
        "version": "1.0.0",
        "torch": "2.99",
        "python": "3.11.1",
        "hardware": "A Processor",
        "threads": 6,
        "system": "Linux",
    },
    "reference": {"name": "old", "version": "0.1", "torch": "2.98", "python": "3.10.1"},
}
SPEED = Case(
    "forward",
    "time",
    [OURS, REFERENCE, SDPA],
    [Target("reference", per="ours", at_least=6), Target("SDPA", per="ours", at_least=14)],
)
SPEED_SAMPLES = {
    "cpu": {
        "ours": [0.01, 0.011, 0.3],
        "reference": [0.07, 0.077, 0.08],
        "SDPA": [0.11, 0.1, 0.12],
    },
    "wall": {"ours": [0.02], "reference": [0.01], "SDPA": [2.0]},
}


def written(case: Case, samples: dict[str, Any] | None, **more: Any) -> str:
    records = {} if samples is None else {case.title: {"samples": samples}}
    return report("thing", [case], records, {**ABOUT, **more}, "cpu")


def test_quotients_of_medians_are_held_against_the_targets() -> None:
    text = written(SPEED, SPEED_SAMPLES)
    assert row(text, "case") == ["case", "reached", "target", "", "ours", "reference", "SDPA"]
    times = ["11 ms", "77 ms", "110 ms"]
    assert row(text, "forward: reference / ours")[1:] == ["7", ">= 6", "yes", *times]
    assert row(text, "forward: SDPA / ours")[1:] == ["10", ">= 14", "**no**", *times]
    assert "1 of 2 measured targets are reached. Not reached: forward: SDPA / ours." in text


def test_wall_time_has_a_table_of_its_own() -> None:
    text = written(SPEED, SPEED_SAMPLES).partition("## Wall time, 6 threads")[2]
    assert row(text, "forward")[1:] == [
        "reference / ours = 0.5; SDPA / ours = 100", "20 ms", "10 ms", "2 s"
    ]  # fmt: skip


def test_the_reference_is_named_where_it_is_better() -> None:
    text = written(SPEED, SPEED_SAMPLES)
    better = text.partition("## Where the reference is better\n\n")[2]
    assert better == "- forward (Wall time, 6 threads): reference 10 ms, ours 20 ms\n"
    equal = written(SPEED, {"cpu": {"ours": [1.0], "reference": [1.0]}})
    assert "Nowhere, in 1 comparisons." in equal
    share = Case("share", "value", [OURS, REFERENCE], unit="%", lower_is_better=False)
    assert "Nowhere" in written(share, {"value": {"ours": [90.0], "reference": [80.0]}})
    text = written(share, {"value": {"ours": [70.0], "reference": [80.0]}})
    assert "- share (value): reference 80 %, ours 70 %" in text


def test_what_was_not_measured_is_said() -> None:
    text = written(SPEED, None)
    assert row(text, "forward: reference / ours")[1:] == ["not measured", ">= 6", "", "", "", ""]
    assert "0 of 0 measured targets" in text
    text = report("thing", [SPEED], {"forward": {"error": "ours: E: no\nmore"}}, ABOUT, "cpu")
    assert "- forward: **not measured**: ours: E: no\n" in text
    only_ours = {"ours": ABOUT["ours"]}
    text = report(
        "thing", [SPEED], {"forward": {"samples": {"cpu": {"ours": [1.0]}}}}, only_ours, "cpu"
    )
    assert row(text, "forward: reference / ours")[1:5] == ["not measured", ">= 6", "", "1 s"]
    assert text.count("The reference was not measured.") == 2


@pytest.mark.parametrize(
    ("ours", "size"),
    [
        ([1.0, 1.0, 1.0], 8),
        ([3.0, 1.0, 1.0], 16),
        ([1.0, 3.0, 1.0], 32),
        ([3.0, 3.0, 2.0], 32),
        ([1.0, 1.0, 3.0], float("inf")),
    ],
)
def test_a_crossover_holds_from_there_on(ours: list[float], size: float) -> None:
    case = Case(
        "crossover", "crossover", [OURS, SDPA], [Target("ours", at_most=16)], sizes=(8, 16, 32)
    )
    samples = {
        "ours": {str(n): [9.0, t, 0.1] for n, t in zip(case.sizes, ours, strict=True)},
        "SDPA": {str(n): [2.0] for n in case.sizes},
    }
    assert figures(case, samples) == {"ours": size}
    text = written(case, {"cpu": samples})
    shown = "none" if size == float("inf") else str(size)
    outcome = "yes" if size <= 16 else "**no**"
    assert row(text, "crossover")[1:] == [shown, "<= 16", outcome, shown, ""]
    assert row(text, "SDPA") == ["SDPA", "2 s", "2 s", "2 s"]


def test_bounds_of_values_carry_their_unit() -> None:
    case = Case(
        "error",
        "value",
        [OURS, Subject("ours, other", nothing)],
        [Target("ours", at_most=0.04), Target("ours, other", at_most=0.03)],
        unit="parts",
        note="small is good.",
    )
    text = written(case, {"value": {"ours": [0.04], "ours, other": [0.031]}})
    assert row(text, "error")[1:4] == ["0.04 parts", "<= 0.04 parts", "yes"]
    assert row(text, "error: ours, other")[1:4] == ["0.031 parts", "<= 0.03 parts", "**no**"]
    assert "- error: small is good." in text


def test_units() -> None:
    case = Case("memory", "memory", [OURS, REFERENCE, SDPA])
    samples = {"ours": [2.0**20], "reference": [1000 * 2.0**20], "SDPA": [3 * 2.0**30, 1, 2**40]}
    assert row(written(case, {"memory": samples}), "memory")[4:] == ["1 MiB", "0.977 GiB", "3 GiB"]
    for seconds, shown in ((0.9996, "1 s"), (0.5, "500 ms"), (0.0004, "400 µs"), (1e-7, "0.1 µs")):
        text = written(SPEED, {"cpu": {"ours": [seconds]}})
        assert row(text, "forward: SDPA / ours")[4] == shown


def test_the_spread_of_the_rounds_is_shown() -> None:
    text = written(
        SPEED, {"cpu": {"ours": [1.0, 1.0, 1.0, 1.0]}, "wall": {"ours": [1, 2, 3, 4, 5]}}
    )
    assert "Times have 4 to 5 rounds." in text
    assert row(text, "forward: SDPA / ours")[4] == "1 s ±0%"
    assert row(text.partition("## Wall time")[2], "forward")[2] == "3 s ±50%"
    case = Case("crossover", "crossover", [OURS, SDPA], sizes=(8, 16))
    times = {"8": [1.0, 2.0, 3.0, 4.0, 5.0], "16": [1.0]}
    text = written(case, {"cpu": {"ours": times, "SDPA": times}})
    assert row(text, "SDPA") == ["SDPA", "3 s ±50%", "1 s"]


def test_nothing_at_all_is_no_divisor() -> None:
    case = Case("memory", "memory", [OURS, REFERENCE], [Target("reference", "ours", at_least=2)])
    text = written(case, {"memory": {"ours": [0.0] * 4, "reference": [2.0**20]}})
    assert row(text, "memory: reference / ours")[1:] == ["inf", ">= 2", "yes", "0 MiB", "1 MiB"]
    text = written(case, {"memory": {"ours": [0.0], "reference": [0.0]}})
    assert row(text, "memory: reference / ours")[1:4] == ["not measured", ">= 2", ""]


def test_an_accelerator_is_held_against_its_ceilings() -> None:
    case = Case(
        "forward", "time", [OURS], [Target("ours")], flops=2e12, traffic=1e11, dtype="bfloat16"
    )
    about = {**ABOUT, "ceilings": {"float32": 5e13, "bfloat16": 8e14, "bytes": 4e12}}
    records = {"forward": {"samples": {"device": {"ours": [0.01]}}}}
    text = report("thing", [case], records, about, "cuda")
    assert "## Results" in text
    assert "800 TFLOP/s bfloat16" in text
    ceilings = text.partition("## Beside the device's ceilings")[2]
    assert row(ceilings, "forward")[2:] == ["2e+03 GFLOP", "25%", "9.54e+04 MiB", "250%"]


@pytest.mark.parametrize(
    ("subjects", "targets", "more", "message"),
    [
        ([OURS, OURS], [], {}, "different names"),
        ([OURS], [Target("reference", per="ours")], {}, "no subject 'reference'"),
        ([OURS], [Target("ours", per="SDPA")], {}, "no subject 'SDPA'"),
        ([OURS], [], {"sizes": (1, 2)}, "sizes belong"),
        ([OURS], [], {"sizes": (1, 2), "measure": "crossover"}, "two subjects"),
    ],
)
def test_a_case_that_makes_no_sense(
    subjects: list[Subject], targets: list[Target], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**{"title": "a", "measure": "time", "subjects": subjects, "targets": targets, **more})
