"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from recall import ASKED, CHANCE, TRAINED, Tick
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


def plot(
    shares: Mapping[str, Mapping[int, float]],
    losses: Sequence[float],
    peaks: Mapping[str, Mapping[int, float]],
    path: Path,
) -> None:
    """Draws what is recalled by the number of segments, the loss, and what a step takes."""
    # Only now: it takes a second, and the plot is the last thing to be made.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for name, found in shares.items():
        values = [100 * share for share in found.values()]
        left.plot(list(found), values, marker=".", label=name)
    left.axvline(TRAINED, color="0.4", lw=1, ls="--", label="trained up to here")
    left.axhline(100 * CHANCE, color="0.4", lw=1, ls=":", label="by chance")
    left.set(xlabel="segments", ylabel="values recalled, %", xscale="log", ylim=(0, 105))
    left.set_xticks(list(ASKED), [str(count) for count in ASKED])
    left.legend(loc="center left")
    middle.plot(range(1, len(losses) + 1), losses, lw=0.7)
    middle.set(xlabel="steps", ylabel="loss after the last segment, nats", ylim=(0, None))
    for way, label in (("bptt", "all segments at once"), ("replay", "replay")):
        if way in peaks:
            right.plot(list(peaks[way]), list(peaks[way].values()), marker=".", label=label)
    right.set(xlabel="segments", ylabel="memory of a training step, MiB", ylim=(0, None))
    if peaks:
        right.legend(loc="upper left")
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
