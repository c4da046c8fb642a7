"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from facts import Tick
from miniatures import LESSON, Taught, Used
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

INDENT = " " * 10


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


def percent(share: float, digits: int = 1) -> str:
    """Never rounded up to a whole 100 %."""
    text = f"{100 * share:.{digits}f} %"
    return text if share == 1.0 or not text.startswith("100") else f"{'<100':>{digits + 3}} %"


def plot(used: dict[str, Used], taught: dict[str, Taught], path: Path) -> None:
    """Draws what each slot is used, and what is kept lesson by lesson."""
    # Only now: it takes a second, and the plot is the last thing to be made.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, use in used.items():
        share = use.mass * len(use.mass) / use.mass.sum()
        label = f"{name}: {percent(use.usage)} used, KL {use.kl:.2f}"
        left.plot(range(1, len(share) + 1), share.clamp(min=1e-3).tolist(), label=label)
    left.axhline(1.0, color="0.4", lw=1, ls="--", label="all slots alike")
    left.set(
        xlabel="slots, the most used first",
        ylabel="weight, mean = 1",
        yscale="log",
    )
    left.legend(loc="upper right")
    for name, result in taught.items():
        right.plot([100.0, *(100 * kept for kept in result.kept)], marker=".", label=name)
    right.set(xlabel=f"lessons of {LESSON} facts", ylabel="old facts kept, %", ylim=(0, 105))
    right.legend(loc="lower left")
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
