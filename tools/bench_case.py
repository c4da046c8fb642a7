"""What a package's benchmarks/bench_cases.py is written in.

That file has one function `cases(device: str) -> list[Case]`. It is imported in both environments:
ours and the one of the reference, so it imports neither package at its top, nor a module of
packages/<dist>/examples, only inside the `prepare` functions of subjects that run there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Measure = Literal["time", "crossover", "memory", "value"]


@dataclass(frozen=True)
class Subject:
    """One thing that is measured: a column of the results.

    Attributes:
        name: the column; "ours" and "reference" are known to the report.
        prepare: called as prepare(device=..., **arguments), returns what is measured: a function
            without arguments, run once for each measurement. It must not keep what it returns. For
            the measure "value" it returns the number.
        arguments: of `prepare`; JSON types.
        warm: arguments that take the place of those for a small run that loads all code before a
            memory measurement.
        environment: whether the process has our wheel or the reference.
        units: what one run does, counted (say, tokens): times are given for one of them.
    """

    name: str
    prepare: Callable[..., Callable[[], Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    warm: Mapping[str, Any] = field(default_factory=dict)
    environment: Literal["ours", "reference"] = "ours"
    units: int = 1


@dataclass(frozen=True)
class Target:
    """A bound for a subject's figure, or for its quotient by the figure of the subject `per`.

    Without a bound it is a quotient to be shown.
    """

    subject: str
    per: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Case:
    """A row of the results for each target.

    Attributes:
        title: unique; says sizes and what is done.
        measure: "time"; "crossover": the smallest of `sizes` from which on the first subject is at
            least as fast as the second at every size; "memory": the peak of one run in a fresh
            process beyond what was there before it; "value": a number that `prepare`'s function
            returns.
        subjects: measured in turn.
        targets: what is to be reached; for times, as CPU time of one thread.
        sizes: for "crossover", given to `prepare` as the argument `size`.
        unit: of a value.
        lower_is_better: of a value.
        note: a sentence for the reader of the results.
        flops, traffic: of one unit of our subject: operations, and bytes that have to be moved.
            Where given, results on an accelerator show them beside the device's measured ceilings.
        dtype: of the operations counted by `flops`.
        limit: seconds after which a value is given up, where it may take longer than others.
        once: of "memory": one process is enough, since a run takes minutes.
        variables: of the environment of the processes that measure it.
    """

    title: str
    measure: Measure
    subjects: Sequence[Subject]
    targets: Sequence[Target] = ()
    sizes: Sequence[int] = ()
    unit: str = ""
    lower_is_better: bool = True
    note: str = ""
    flops: float = 0.0
    traffic: float = 0.0
    dtype: str = "float32"
    limit: float | None = None
    once: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    def without_bounds(self) -> Case:
        """The same case, whose quotients are only shown."""
        return replace(self, targets=[Target(one.subject, one.per) for one in self.targets])

    def __post_init__(self) -> None:
        names = [subject.name for subject in self.subjects]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"case {self.title!r} needs subjects of different names, got {names}")
        for target in self.targets:
            for name in (target.subject, target.per):
                if name is not None and name not in names:
                    raise ValueError(f"case {self.title!r} has no subject {name!r}, only {names}")
        if (self.measure == "crossover") != bool(self.sizes):
            raise ValueError(f"case {self.title!r}: sizes belong to the measure 'crossover'")
        if self.measure == "crossover" and len(names) < 2:
            raise ValueError(f"case {self.title!r} needs two subjects, got {names}")
