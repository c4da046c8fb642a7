"""What the demonstrations of all packages share: options, what a person sees, files they leave."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import Parser
from files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INDENT = " " * 10
# A share of the work that is done.
Tick = Callable[[float], None]


class DemoError(Exception):
    """What the user can mend, in one line."""


def new_parser(page: str | None) -> Parser:
    """A parser with --out; the first paragraph of `page` stands before the options."""
    usage, _, rest = (page or "").partition("\n\n")
    parser = Parser(
        "demo", description=usage, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=some_path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="for the results (demo-output)",
    )
    return parser


def some_path(text: str) -> Path:
    """Reads a path, which may not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def number(
    least: float | None = None, most: float = 2**31 - 1, kind: type[int] | type[float] = int
) -> Callable[[str], float]:
    """Reads a number from `least` to `most`, a positive one without `least`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not ((value > 0 if least is None else value >= least) and value <= most):
            raise argparse.ArgumentTypeError(f"{text} is not {meant}")
        return value

    meant = f"from {least} to {most}" if least is not None else f"above 0 and at most {most}"
    convert.__name__ = kind.__name__
    return convert


def status_of(run: Callable[[], None]) -> int:
    """Runs a demonstration; returns the exit status."""
    try:
        run()
    except (DemoError, OSError) as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


def check_writable(folder: Path) -> None:
    """Raises DemoError, before any work, where a file could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise DemoError(f"cannot write to {folder}: {problem.strerror}") from problem


def silent(_: float) -> None:
    """A `Tick` that shows nothing."""


@contextlib.contextmanager
def progress(what: str) -> Iterator[Tick]:
    """A bar while something goes on; without a terminal, a line at its start."""
    # Only here, so that a benchmark can do without it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console()
    if not console.is_terminal:
        print(f"{INDENT}{what} ...", flush=True)
        yield silent
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
    return text if share == 1.0 or not text.startswith("100") else "<100 %"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, of so many inches."""
    # Only now: it takes a second, and the plot is the last thing to be made.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    write_whole(path, image.getvalue())


def finish(plot: Path, out: Path, figures: Mapping[str, Any], start: float) -> None:
    """Writes the figures, and says where everything is; `start` is of `time.perf_counter`."""
    path = out / "figures.json"
    write_whole(path, json.dumps(figures, indent=2))
    print(f"plot      {plot}")
    print(f"figures   {path}")
    print(f"time      {time.perf_counter() - start:.0f} s", flush=True)
