"""What every tool's command line has in common: its help, its errors and its exit status.

A tool exits with 1 and one line a fault where it found some, and with 2 and one line where it could
not do its work.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(description: str | None, *, root: Path | None = None) -> Parser:
    """A parser that shows a module's docstring as it is; `root` gives it the option --root."""
    made = Parser(
        Path(sys.argv[0]).stem,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if root is not None:
        made.add_argument(
            "--root", type=Path, default=root, metavar="FOLDER", help="the repository (this one)"
        )
    return made


def run(main: Callable[[], int]) -> None:
    """Run a tool; what keeps it from working is one line, not a traceback."""
    try:
        status = main()
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"{Path(sys.argv[0]).stem}: {explain(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


def explain(error: Exception) -> str:
    """One line on an error; of a command that failed, the last line that it wrote."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    written = error.stderr or error.stdout or ""
    text = written if isinstance(written, str) else written.decode(errors="replace")
    last = text.rstrip().rpartition("\n")[2] or f"status {error.returncode}"
    return " ".join(map(str, error.cmd)).partition("\n")[0] + f": {last}"


def tell(line: str) -> None:
    """Show at once what is done."""
    print(line, flush=True)


def status(faults: Iterable[str]) -> int:
    """Print a line for every fault; returns the exit status."""
    lines = list(faults)
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0
