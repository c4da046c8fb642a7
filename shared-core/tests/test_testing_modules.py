"""Modules beside a test."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from shared_core.testing import load_beside


def test_a_module_beside_a_file_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "beside", None)
    (tmp_path / "beside.py").write_text("number = 3\n")
    module = load_beside(str(tmp_path / "test_it.py"), "beside")
    assert module.number == 3
    assert importlib.import_module("beside") is module


@pytest.mark.parametrize(("text", "error"), [(None, ImportError), ("1 / 0", ZeroDivisionError)])
def test_what_cannot_be_loaded_leaves_nothing(
    tmp_path: Path, text: str | None, error: type[Exception]
) -> None:
    if text is not None:
        (tmp_path / "absent.py").write_text(text)
    with pytest.raises(error):
        load_beside(str(tmp_path / "test_it.py"), "absent")
    assert "absent" not in sys.modules
