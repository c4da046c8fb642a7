"""Keep shared-core small: few names, few lines of code, no dependency but torch and einops.

    python tools/check_core.py [--root FOLDER]

A public module, as `checks`, counts as one name. Exits with 1 and one line a bound that is passed.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

from packaging.requirements import Requirement

from command import parser, run, status, tell
from distributions import CORE, ROOT, Distribution, discover

MOST_NAMES = 14
MOST_LINES = 500
DEPENDENCIES = frozenset({"torch", "einops"})
_NO_CODE = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)


def public_names(source: Path) -> list[str]:
    """The names in __all__ of a package's __init__.py."""
    tree = ast.parse((source / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{source / '__init__.py'} has no __all__")


def line_count(source: Path) -> int:
    """Lines of code of a package's modules, without its subpackage `testing`."""
    return sum(
        len(code_lines(path.read_text(encoding="utf-8")))
        for path in source.rglob("*.py")
        if path.relative_to(source).parts[0] != "testing"
    )


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold more than blanks, a comment or a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {
        line
        for token in tokens
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def check(core: Distribution) -> tuple[str, list[str]]:
    """Returns one line on the size, and a line for every bound that is passed."""
    names, lines = len(public_names(core.source)), line_count(core.source)
    faults = []
    if names > MOST_NAMES:
        faults.append(f"{core.name} has {names} public names, more than {MOST_NAMES}")
    if lines > MOST_LINES:
        faults.append(f"{core.name} has {lines} lines of code, more than {MOST_LINES}")
    if more := {Requirement(text).name for text in core.dependencies} - DEPENDENCIES:
        faults.append(f"{core.name} depends on {', '.join(sorted(more))}")
    return f"{core.name}: {names} public names, {lines} lines of code", faults


def main() -> int:
    root = parser(__doc__, root=ROOT).parse_args().root
    core = next((item for item in discover(root) if item.name == CORE), None)
    if core is None:
        raise ValueError(f"there is no {CORE} in {root}")
    line, faults = check(core)
    tell(line)
    return status(faults)


if __name__ == "__main__":
    run(main)
