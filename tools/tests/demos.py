"""Demonstrations as modules. Each is a script, whose modules import each other by their names."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from distributions import ROOT


def load(package: str, *names: str) -> list[ModuleType]:
    """Modules of a package's demonstration.

    None can be imported afterwards: another package's demonstration has modules of the same names.
    """
    examples = ROOT / "packages" / package / "examples"
    sys.path.insert(0, str(examples))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(examples))
        for path in examples.glob("*.py"):
            sys.modules.pop(path.stem, None)
