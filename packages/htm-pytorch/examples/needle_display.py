"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from needle import ANSWERS, Trained

from demonstration import new_figure, percent, save_figure, table


@dataclass(frozen=True)
class Result:
    """Of a reader: its training, and by the number of events what it answers and costs."""

    trained: Trained
    parameters: int
    accuracy: dict[int, float]
    seconds: dict[int, float]
    bytes: dict[int, int]


def tables(results: Mapping[str, Result]) -> None:
    """Prints how the readers were trained, what they answer, and what that costs."""
    trained = {
        name: (f"{one.parameters:,}", str(one.trained.steps), percent(one.trained.accuracy))
        for name, one in results.items()
    }
    print()
    table("trained", ("parameters", "steps", "answered in the last ones"), trained)
    sizes = [f"{events:,} events" for events in next(iter(results.values())).accuracy]
    for title, rows in (
        ("answered", [map(percent, one.accuracy.values()) for one in results.values()]),
        (
            "time for all questions of a memory",
            [(f"{1000 * x:.2f} ms" for x in one.seconds.values()) for one in results.values()],
        ),
        (
            "memory for that, beside the events",
            [(f"{x / 1e6:.2f} MB" for x in one.bytes.values()) for one in results.values()],
        ),
    ):
        table(title, sizes, dict(zip(results, map(list, rows), strict=True)))


def plot(results: Mapping[str, Result], path: Path) -> None:
    """Draws what readers answer, and how long they take, over the number of events."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    for name, one in results.items():
        left.plot([*one.accuracy], [100 * x for x in one.accuracy.values()], marker="o", label=name)
        right.plot([*one.seconds], [1000 * x for x in one.seconds.values()], marker="o", label=name)
    left.axhline(100 / ANSWERS, color="0.4", lw=1, ls="--", label="chance")
    left.set(ylabel="questions answered, %", ylim=(0, 105))
    right.set(ylabel="time for all questions of a memory, ms", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="events in the memory", xscale="log")
        axes.set_xticks([*one.accuracy], [f"{events:,}" for events in one.accuracy], minor=False)
        axes.legend(loc="center left")
    save_figure(figure, path)
