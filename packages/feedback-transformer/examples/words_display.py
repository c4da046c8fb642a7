"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from words import PERMUTATIONS, Tick, Trained

INDENT = " " * 10


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


@contextlib.contextmanager
def progress(what: str) -> Iterator[Tick]:
    """A bar while something goes on; without a terminal, a line at its start."""
    console = Console()
    if not console.is_terminal:
        print(f"{INDENT}{what} ...", flush=True)
        yield lambda _: None
        return
    columns = BarColumn(32), TextColumn("{task.percentage:3.0f}%  {task.description}")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


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


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Prints rows under a title, their cells right-aligned."""
    cells = [columns, *rows.values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    names = [title, *(INDENT + name for name in rows)]
    longest = max(map(len, names))
    for name, row in zip(names, cells, strict=True):
        aligned = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print("   ".join((f"{name:<{longest}}", *aligned)))
    print(flush=True)


def percent(share: float) -> str:
    """Never rounded up to a whole 100 %."""
    text = f"{100 * share:.1f} %"
    return text if share == 1.0 or not text.startswith("100") else " <100 %"


def plot(results: Mapping[str, Result], length: int, path: Path) -> None:
    """Draws the loss over the time of training, and the right answers over the places."""
    # Only now: it takes a second, and the plot is the last thing to be made.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
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
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    write(path, image.getvalue())


def write(path: Path, content: bytes) -> None:
    """Writes a file that is whole or, if that fails, as it was before."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
