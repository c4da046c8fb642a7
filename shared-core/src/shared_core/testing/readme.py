"""The examples of a README, as tests."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any


def python_blocks(markdown_path: str | Path) -> list[str]:
    """The Python blocks of a Markdown file, fenced by three backquotes and `python`.

    Returns:
        One source text a block. Each starts with as many empty lines as the file has before it, so
        `exec(compile(block, markdown_path, "exec"), {})` reports the file's own line numbers.

    Raises:
        ValueError: there is no such block, or the last one is not closed.
    """
    blocks: list[str] = []
    block: list[str] | None = None
    lines = Path(markdown_path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        fence = line.strip()
        if block is None and fence == "```python":
            block = [""] * (number + 1)
        elif block is not None and fence == "```":
            blocks.append(textwrap.dedent("\n".join(block)) + "\n")
            block = None
        elif block is not None:
            block.append(line)
    if block is not None:
        raise ValueError(f"a python block of {markdown_path} is not closed")
    if not blocks:
        raise ValueError(f"{markdown_path} has no python block")
    return blocks


def run_blocks(markdown_path: str | Path, at_least: int = 1) -> dict[str, Any]:
    """Runs the Python blocks of a Markdown file in order, as one module.

    Returns:
        The names that they have defined.

    Raises:
        ValueError: as `python_blocks`, or there are fewer than `at_least`.
    """
    blocks = python_blocks(markdown_path)
    if len(blocks) < at_least:
        raise ValueError(f"{markdown_path} has {len(blocks)} python blocks, not {at_least}")
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, markdown_path, "exec"), namespace)
    return namespace
