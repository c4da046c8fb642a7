"""What `lint` and `typing` run finds the faults that they are there for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from distributions import ROOT

CLEAN = '"""A module."""\n\nfrom __future__ import annotations\n\n\ndef one(x: int) -> int:\n'
CLEAN += '    """x and 1."""\n    return x + 1\n'


def run(*command: str, cwd: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("x + 1", "x  + 1", "would be reformatted"),
        ("import annotations\n", "import annotations\n\nimport os\n", "F401"),
        ("    return", "    print(x)\n    return", "T201"),
        ("    return", "    assert x\n    return", "S101"),
        ("x: int", "input: int", "A002"),
    ],
)
def test_lint(tmp_path: Path, old: str, new: str, rule: str) -> None:
    shutil.copy(ROOT / ".ruff.toml", tmp_path)

    def found() -> str:
        results = [
            run("ruff", *command, ".", cwd=tmp_path)
            for command in (("check",), ("format", "--check"))
        ]
        return "".join(output for status, output in results if status)

    path = tmp_path / "module.py"
    path.write_text(CLEAN)
    assert found() == ""
    assert old in CLEAN
    path.write_text(CLEAN.replace(old, new))
    assert rule in found()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("x: int", "x", "missing a type annotation"),
        ("-> int", "-> str", "Incompatible return value type"),
        ("x: int", "x: list", "Missing type arguments"),
    ],
)
def test_typing(tmp_path: Path, old: str, new: str, fault: str) -> None:
    shutil.copy(ROOT / ".mypy.ini", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(CLEAN)
    assert run("mypy", str(path), cwd=tmp_path)[0] == 0
    # Another file: within a second, mypy takes one of the same size for what it has seen.
    path = tmp_path / "faulty.py"
    path.write_text(CLEAN.replace(old, new))
    status, output = run("mypy", str(path), cwd=tmp_path)
    assert status == 1
    assert fault in output


def test_public_names_without_types(tmp_path: Path) -> None:
    package = tmp_path / "site" / "wheel_of_ours"
    package.mkdir(parents=True)
    (package / "py.typed").touch()
    verify = (str(Path(sysconfig.get_path("scripts"), "pyright")), "--ignoreexternal")
    statuses, shown = [], ""
    for text in (CLEAN, CLEAN.replace("x: int", "x")):
        (package / "__init__.py").write_text(text)
        done = subprocess.run(
            [*verify, "--verifytypes", package.name],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(package.parent)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        statuses.append(done.returncode)
        shown += done.stdout + done.stderr
    assert statuses == [0, 1], shown
