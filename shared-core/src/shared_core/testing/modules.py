"""Modules that lie beside a test, where nothing is found by its name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_beside(file: str, name: str) -> ModuleType:
    """The module `name`.py from the folder of `file`; `import name` finds it afterwards.

    Raises ImportError where it is not there.
    """
    return load_file(str(Path(file).with_name(f"{name}.py")), name)


def load_file(file: str, name: str) -> ModuleType:
    """A file as the module `name`, in its place before its code runs."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ImportError(f"{file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
