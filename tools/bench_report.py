"""RESULTS.md from the samples that bench.py measured: every number in it is computed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median, quantiles
from typing import Any

from bench_case import Case, Target

# A mode that carries the targets, by measure and device; the first one that was measured counts.
_CARRYING = ("cpu", "device", "memory", "value")
_TITLES = {
    "cpu": "CPU time, 1 thread",
    "wall": "Wall time, {threads} threads",
    "device": "Time on the device",
}
Figures = dict[str, float]


def report(
    name: str,
    cases: Iterable[Case],
    records: Mapping[str, Any],
    about: Mapping[str, Any],
    device: str,
    quick: bool = False,
) -> str:
    """The text of RESULTS.md; a case without a record is shown as not measured."""
    cases = list(cases)
    session = f"nox -s \"bench(package='{name}')\"" + (
        "" if device == "cpu" else " -- --device cuda"
    )
    rows = [row for case in cases for row in _target_rows(case, records.get(case.title))]
    bounded = [row for row in rows if row.reached is not None]
    missed = [row.label for row in bounded if not row.reached]
    has_bounds = any(row.has_bound for row in rows)
    parts = [
        f"# {name}: measured beside its reference" + ("" if device == "cpu" else f" ({device})"),
        f"Written by `{session}`; no number here is typed by hand.",
        "**A quick run: its times mean nothing.**" if quick else "",
        _machine(about),
        _method(records, device),
        "## Targets" if has_bounds else "## Results",
        f"{len(bounded) - len(missed)} of {len(bounded)} measured targets are reached."
        + (" Not reached: " + "; ".join(missed) + "." if missed else "")
        if has_bounds
        else "",
        _targets(cases, rows),
        _notes(cases, records),
    ]
    parts += [_times(cases, records, mode, about) for mode in ("wall", "device")]
    parts.append(_crossovers(cases, records, about))
    if "ceilings" in about:
        parts.append(_ceilings(cases, records, about["ceilings"]))
    parts += ["## Where the reference is better", _reference_better(cases, records, about)]
    return "\n\n".join(part for part in parts if part) + "\n"


class _Row:
    """A target of a case, and what was reached."""

    def __init__(self, case: Case, target: Target | None, samples: Mapping[str, Any]) -> None:
        self.case = case
        self.target = target
        self.cells = _cells(case, samples)
        self.value = None if target is None else _value(target, figures(case, samples))
        self.reached = None
        if target is not None and self.value is not None:
            if target.at_least is not None:
                self.reached = self.value >= target.at_least
            elif target.at_most is not None:
                self.reached = self.value <= target.at_most

    @property
    def has_bound(self) -> bool:
        target = self.target
        return target is not None and (target.at_least is not None or target.at_most is not None)

    @property
    def label(self) -> str:
        if self.target is None:
            return self.case.title
        if self.target.per is None:
            first = self.target.subject == self.case.subjects[0].name
            return self.case.title + ("" if first else f": {self.target.subject}")
        return f"{self.case.title}: {self.target.subject} / {self.target.per}"

    def shown(self) -> tuple[str, str, str]:
        """What was reached, the target, and whether it is reached."""
        target = self.target
        if target is None:
            return "", "", ""
        plain = target.per is None

        def text(number: float) -> str:
            return _format(self.case, number) if plain else f"{number:.3g}"

        value = "not measured" if self.value is None else text(self.value)
        bound = ""
        if target.at_least is not None:
            bound = f">= {text(target.at_least)}"
        elif target.at_most is not None:
            bound = f"<= {text(target.at_most)}"
        return value, bound, {True: "yes", False: "**no**", None: ""}[self.reached]


def _target_rows(case: Case, record: Mapping[str, Any] | None) -> list[_Row]:
    samples = _carrying_samples(record)
    return [_Row(case, target, samples) for target in case.targets or (None,)]


def _carrying_samples(record: Mapping[str, Any] | None) -> Mapping[str, Any]:
    samples: Mapping[str, Any] = {} if record is None else record.get("samples", {})
    return next((samples[mode] for mode in _CARRYING if mode in samples), {})


def figures(case: Case, samples: Mapping[str, Any]) -> Figures:
    """One number for each subject that has one: the median, or for "crossover" a size."""
    if case.measure != "crossover":
        return {name: median(found) for name, found in samples.items()}
    if len(samples) < 2:
        return {}
    first, second = (case.subjects[i].name for i in (0, 1))
    size = None
    for candidate in sorted(case.sizes, reverse=True):
        if median(samples[first][str(candidate)]) > median(samples[second][str(candidate)]):
            break
        size = candidate
    return {first: float("inf") if size is None else size}


def _value(target: Target, figures: Figures) -> float | None:
    if target.subject not in figures or (target.per is not None and target.per not in figures):
        return None
    value = figures[target.subject]
    if target.per is None:
        return value
    if per := figures[target.per]:
        return value / per
    return math.inf if value else None


def _machine(about: Mapping[str, Any]) -> str:
    ours, reference = about["ours"], about.get("reference")
    text = (
        f"Machine: {ours['hardware']}, {ours['threads']} CPU threads, {ours['system']}. "
        f"Ours: {ours['version']}, torch {ours['torch']}, Python {ours['python']}. "
    )
    if reference is None:
        return text + "The reference was not measured."
    return text + (
        f"Reference: {reference['name']} {reference['version']}, torch {reference['torch']}, "
        f"Python {reference['python']}."
    )


def _method(records: Mapping[str, Any], device: str) -> str:
    rounds = [
        len(found)
        for record in records.values()
        for mode, samples in record.get("samples", {}).items()
        if mode in _TITLES
        for found in _leaves(samples)
    ]
    text = (
        "Ours and the reference run in a process each, in turn; a figure is the median of its "
        "rounds, a quotient that of two medians; ± is half the distance between the quartiles of "
        "the rounds. "
    )
    if rounds:
        text += f"Times have {min(rounds)} to {max(rounds)} rounds. "
    if device == "cpu":
        return text + (
            "Times that have a target are CPU time of one thread. Peak memory is the high-water "
            "mark of the resident set of a fresh process beyond what it held before the run "
            "(inputs, parameters, code)."
        )
    return text + "Peak memory is what the allocator held beyond inputs and parameters."


def _leaves(samples: Any) -> Iterable[list[float]]:
    if isinstance(samples, Mapping):
        for inner in samples.values():
            yield from _leaves(inner)
    else:
        yield samples


def _cells(case: Case, samples: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of every subject: its figure, and how far its rounds are apart."""
    return {
        name: _format(case, figure)
        + ("" if case.measure == "crossover" else _spread(samples[name]))
        for name, figure in figures(case, samples).items()
    }


def _spread(found: list[float]) -> str:
    """Half the distance between the quartiles, as a part of the median."""
    if len(found) < 4:
        return ""
    low, middle, high = quantiles(found, n=4)
    return f" ±{(high - low) / 2 / middle:.0%}" if middle else ""


def _targets(cases: list[Case], rows: list[_Row]) -> str:
    names = _columns(cases)
    lines = [
        _line(
            [row.label, *row.shown(), *(row.cells.get(name, "") for name in names)],
        )
        for row in rows
    ]
    return _table(["case", "reached", "target", "", *names], lines)


def _notes(cases: list[Case], records: Mapping[str, Any]) -> str:
    lines = [f"- {case.title}: {case.note}" for case in cases if case.note]
    lines += [
        f"- {case.title}: **not measured**: {records[case.title]['error'].splitlines()[0]}"
        for case in cases
        if "error" in records.get(case.title, {})
    ]
    return "\n".join(lines)


def _times(
    cases: list[Case], records: Mapping[str, Any], mode: str, about: Mapping[str, Any]
) -> str:
    timed = [
        (case, samples[mode])
        for case in cases
        if case.measure == "time"
        and mode in (samples := records.get(case.title, {}).get("samples", {}))
    ]
    if not timed:
        return ""
    names = _columns([case for case, _ in timed])
    lines = []
    for case, found in timed:
        quotients = [
            f"{target.subject} / {target.per} = {value:.3g}"
            for target in case.targets
            if target.per is not None
            and (value := _value(target, figures(case, found))) is not None
        ]
        cells = _cells(case, found)
        shown = [cells.get(name, "") for name in names]
        lines.append(_line([case.title, "; ".join(quotients), *shown]))
    title = _TITLES[mode].format(threads=about["ours"]["threads"])
    return f"## {title}\n\n" + _table(["case", "reached", *names], lines)


def _crossovers(cases: list[Case], records: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    parts = []
    for case in cases:
        if case.measure != "crossover":
            continue
        for mode, samples in records.get(case.title, {}).get("samples", {}).items():
            lines = [
                _line([name, *(_seconds(median(x)) + _spread(x) for x in by_size)])
                for name, found in samples.items()
                if (by_size := [found[str(size)] for size in case.sizes])
            ]
            title = _TITLES[mode].format(threads=about["ours"]["threads"])
            parts.append(
                f"## {case.title}: {title}\n\n" + _table(["", *map(str, case.sizes)], lines)
            )
    return "\n\n".join(parts)


def _ceilings(cases: list[Case], records: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    measured = ", ".join(
        f"{rate / 1e12:.3g} TB/s copied" if name == "bytes" else f"{rate / 1e12:.3g} TFLOP/s {name}"
        for name, rate in ceilings.items()
    )
    lines = []
    for case in cases:
        found = figures(case, _carrying_samples(records.get(case.title)))
        seconds = found.get("ours")
        if case.measure != "time" or not seconds or not (case.flops or case.traffic):
            continue
        rate, bandwidth = case.flops / seconds, case.traffic / seconds
        lines.append(
            _line(
                [
                    case.title,
                    _seconds(seconds),
                    f"{case.flops / 1e9:.3g} GFLOP",
                    f"{rate / ceilings[case.dtype]:.0%}",
                    f"{case.traffic / 2**20:.3g} MiB",
                    f"{bandwidth / ceilings['bytes']:.0%}",
                ]
            )
        )
    if not lines:
        return ""
    columns = ["case", "ours", "work", "of the device's rate", "traffic", "of its bandwidth"]
    return f"## Beside the device's ceilings\n\nMeasured: {measured}.\n\n" + _table(columns, lines)


def _reference_better(
    cases: list[Case], records: Mapping[str, Any], about: Mapping[str, Any]
) -> str:
    lines = []
    compared = 0
    for case in cases:
        for mode, samples in records.get(case.title, {}).get("samples", {}).items():
            found = figures(case, samples)
            if not {"ours", "reference"} <= set(found):
                continue
            compared += 1
            ours, reference = found["ours"], found["reference"]
            lower = case.lower_is_better or case.measure != "value"
            if (reference < ours) if lower else (reference > ours):
                what = _TITLES.get(mode, mode).format(threads=about["ours"]["threads"])
                lines.append(
                    f"- {case.title} ({what}): reference {_format(case, reference)}, "
                    f"ours {_format(case, ours)}"
                )
    if not compared:
        return "The reference was not measured."
    return "\n".join(lines) or f"Nowhere, in {compared} comparisons."


def _columns(cases: Iterable[Case]) -> list[str]:
    names = [subject.name for case in cases for subject in case.subjects]
    return list(dict.fromkeys(name for name in ("ours", "reference", *names) if name in names))


def _format(case: Case, number: float) -> str:
    if case.measure == "time":
        return _seconds(number)
    if case.measure == "memory":
        return (
            f"{number / 2**20:.3g} MiB" if number < 999.5 * 2**20 else f"{number / 2**30:.3g} GiB"
        )
    if case.measure == "crossover":
        return "none" if number == float("inf") else f"{number:.0f}"
    return f"{number:.3g} {case.unit}".rstrip()


def _seconds(number: float) -> str:
    unit, size = ("s", 1.0) if number >= 0.9995 else ("ms", 1e-3)
    if number < 0.9995e-3:
        unit, size = "µs", 1e-6
    return f"{number / size:.3g} {unit}"


def _table(columns: list[str], lines: list[str]) -> str:
    return "\n".join([_line(columns), _line(["---"] * len(columns)), *lines])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
