"""Tables of RESULTS.md."""

from __future__ import annotations


def row(text: str, start: str) -> list[str]:
    """The cells of the first row of a table that begins so."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]
