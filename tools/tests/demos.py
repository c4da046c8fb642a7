"""Demonstrations as modules. Each is a script, whose modules import each other by their names."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from distributions import ROOT


def load(package: str, *names: str) -> list[ModuleType]:
    """Modules of a package's demonstration.

    Only these know them by their names: what others import stays as it is, since demonstrations of
    two packages have modules of the same names.
    """
    examples = ROOT / "packages" / package / "examples"
    own = {path.stem for path in examples.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    sys.path.insert(0, str(examples))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(examples))
        for name in own & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(others)


def assert_one_line(result: tuple[int, str, str], *words: str, status: int = 1) -> None:
    """That a run ended at once, with these words in one line."""
    found, output, errors = result
    assert (found, output) == (status, "")
    assert errors.startswith("demo: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors
