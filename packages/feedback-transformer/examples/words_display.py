"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from words import PERMUTATIONS, Trained

from demonstration import new_figure, percent, save_figure, table


@dataclass(frozen=True)
class Result:
    """A model as it was trained, and what it answers at every place of words twice as long."""

    parameters: int
    trained: Trained
    accuracy: list[float]

    def shares(self, length: int) -> list[float]:
        """Answers to words of the trained length, to their last token, to what lies beyond."""
        known, beyond = self.accuracy[:length], self.accuracy[length:]
        return [sum(known) / len(known), known[-1], sum(beyond) / len(beyond)]


def tables(results: Mapping[str, Result], length: int) -> None:
    """Prints how the models were trained, and what they answer."""
    trained = {
        name: (
            f"{one.parameters:,}",
            f"{one.trained.steps:,}",
            f"{one.trained.seconds:.1f} s",
            f"{one.trained.losses[-1]:.4f}",
        )
        for name, one in results.items()
    }
    print()
    table("trained", ("parameters", "steps", "processor", "last loss"), trained)
    answered = {name: [*map(percent, one.shares(length))] for name, one in results.items()}
    columns = (f"{length} tokens", "the last of them", f"tokens {length + 1} to {2 * length}")
    table("right", columns, answered)


def plot(results: Mapping[str, Result], length: int, path: Path) -> None:
    """Draws the loss over the time of training, and the right answers over the places."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    for name, one in results.items():
        steps = range(1, len(one.trained.losses) + 1)
        seconds = [one.trained.seconds * step / len(steps) for step in steps]
        left.plot(seconds, one.trained.losses, lw=1, label=name)
        places = range(1, len(one.accuracy) + 1)
        right.plot(places, [100 * x for x in one.accuracy], marker=".", label=name)
    left.set(xlabel="time of a processor, s", ylabel="loss", yscale="log")
    right.axvline(length + 0.5, color="0.4", lw=1, ls=":", label="trained length")
    right.axhline(100 / len(PERMUTATIONS), color="0.4", lw=1, ls="--", label="chance")
    right.set(xlabel="place in the word", ylabel="right answers, %", ylim=(0, 105))
    for axes in (left, right):
        axes.legend(loc="best")
    save_figure(figure, path)
