"""The bounds of shared-core hold, and passing one is a fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from check_core import check, line_count
from distributions import CORE, ROOT, discover

if TYPE_CHECKING:
    from conftest import Repository


@pytest.fixture
def core(repository: Repository) -> Path:
    """The source folder of a core of three lines."""
    return repository.add(CORE, under=".") / "src" / "shared_core"


def faults(source: Path) -> list[str]:
    (found,) = discover(source.parents[2])
    return check(found)[1]


def write_names(source: Path, count: int) -> None:
    names = [f"name_{number}" for number in range(count)]
    (source / "__init__.py").write_text(f"__all__ = {names}\n")


def test_our_core_is_within_its_bounds() -> None:
    core = next(found for found in discover() if found.name == CORE)
    assert check(core)[1] == []


def test_fifteen_names_are_one_too_many(core: Path) -> None:
    write_names(core, 14)
    assert faults(core) == []
    write_names(core, 15)
    assert faults(core) == ["shared-core has 15 public names, more than 14"]


def test_501_lines_of_code_are_one_too_many_without_testing(core: Path) -> None:
    (core / "testing").mkdir()
    (core / "testing" / "plugin.py").write_text("x = 1\n" * 1000)
    (core / "deeper").mkdir()
    (core / "deeper" / "more.py").write_text("x = 1\n" * (500 - line_count(core)))
    assert faults(core) == []
    (core / "one.py").write_text("x = 1\n")
    assert faults(core) == ["shared-core has 501 lines of code, more than 500"]


def test_words_are_no_lines_of_code(core: Path) -> None:
    before = line_count(core)
    words = [
        '"""A module."""',
        "",
        "# Why.",
        "def f():",
        '    """Two',
        '    lines."""',
        "    return 1",
    ]
    (core / "words.py").write_text("\n".join(words))
    assert line_count(core) == before + 2
    (core / "text.py").write_text('x = """one\ntwo\n"""  # a value\n')
    assert line_count(core) == before + 5


def test_a_further_dependency_is_a_fault(repository: Repository) -> None:
    repository.add(CORE, under=".", dependencies='["torch", "einops", "scipy>=1", "numpy"]')
    (found,) = discover(repository.root)
    assert check(found)[1] == ["shared-core depends on numpy, scipy"]


def test_no_public_names_at_all(core: Path) -> None:
    (core / "__init__.py").write_text("")
    with pytest.raises(ValueError, match="has no __all__"):
        faults(core)


def test_command_exits_with_one_and_says_why(core: Path) -> None:
    write_names(core, 15)
    command = [sys.executable, str(ROOT / "tools" / "check_core.py"), "--root"]
    result = subprocess.run(
        [*command, str(core.parents[2])], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert result.stderr == "shared-core has 15 public names, more than 14\n"
