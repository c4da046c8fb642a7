"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from needle import ANSWERS, Tick, Trained
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

INDENT = " " * 10


@dataclass(frozen=True)
class Result:
    """Of a reader: its training, and by the number of events what it answers and costs."""

    trained: Trained
    parameters: int
    accuracy: dict[int, float]
    seconds: dict[int, float]
    bytes: dict[int, int]


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


def plot(results: Mapping[str, Result], path: Path) -> None:
    """Draws what readers answer, and how long they take, over the number of events."""
    # Only now: it takes a second, and the plot is the last thing to be made.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
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
