"""The dist check passes a sound package, and finds every fault that is planted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from check_dist import LARGEST, check, differences
from distributions import ROOT
from sbom import FILE_NAME

if TYPE_CHECKING:
    from conftest import Repository

# A build hook that puts the folder it ran in into the wheel.
HOOK = """
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

class Hook(BuildHookInterface):
    def initialize(self, version, build_data):
        with open("where.txt", "w") as file:
            file.write(self.root)
        build_data["force_include"]["where.txt"] = "throw_away/where.txt"
"""


def test_a_sound_package_has_no_fault(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository.add("throw-away", dependencies='["torch>=2.5"]')
    (folder / "src" / "throw_away" / "maths.py").write_text("import math\n\nimport torch\n")
    # What lies about in a working tree changes nothing.
    (folder / "src" / "throw_away" / "__pycache__").mkdir()
    (folder / "src" / "throw_away" / "__pycache__" / "maths.pyc").write_bytes(b"x")
    assert check(repository.root) == []
    assert capsys.readouterr().out.startswith("throw_away-1.2.3-py3-none-any.whl")


@pytest.fixture(scope="module")
def planted(shared_repository: Repository) -> str:
    """The faults of one package that has them all."""
    folder = shared_repository.add("throw-away", dependencies='["torch>=2.5", "einops"]')
    source = folder / "src" / "throw_away"
    (source / "py.typed").unlink()
    (source / "maths.py").write_text("import scipy\nimport torch\n")
    (source / "large.bin").write_bytes(os.urandom(LARGEST))
    (folder / "src" / "second").mkdir()
    (folder / "src" / "second" / "__init__.py").write_text("")
    (folder / "LICENSE").write_text("Do what you like.\n")
    (folder / FILE_NAME).write_text("{}\n")
    (folder / "README.md").write_text("")
    (folder / "hook.py").write_text(HOOK)
    project = folder / "pyproject.toml"
    text = project.read_text()
    for old, new in (
        ('packages = ["src/throw_away"]', 'packages = ["src/throw_away", "src/second"]'),
        ('"2.4"', '"2.3"'),
        ('only-include = ["src",', 'only-include = ["src", "hook.py",'),
        ("keywords", "keyword"),
    ):
        assert old in text
        text = text.replace(old, new)
    text += '\n[tool.hatch.build.targets.wheel.hooks.custom]\npath = "hook.py"\n'
    project.write_text(text)
    return "\n".join(check(shared_repository.root))


@pytest.mark.parametrize(
    "fault",
    [
        "built twice, throw_away/where.txt in throw_away-1.2.3-py3-none-any.whl differs",
        "holds ['second', 'throw_away'], not throw_away alone",
        "has no throw_away/py.typed",
        "has metadata 2.3, not 2.4",
        "LICENSE of throw-away is not a copy",
        f"{FILE_NAME} of throw-away is out of date: run python tools/sbom.py",
        "'scipy' imported but missing from the dependency definitions",
        "'einops' defined as a dependency but not used in the codebase",
        "validate_pyproject: ",
        "twine: ",
        "check_wheel_contents: ",
    ],
)
def test_a_planted_fault_is_found(planted: str, fault: str) -> None:
    assert fault in planted


@pytest.mark.parametrize(
    "archive", ["throw_away-1.2.3.tar.gz", "throw_away-1.2.3-py3-none-any.whl"]
)
def test_large_archives_are_found(planted: str, archive: str) -> None:
    assert re.search(rf"(?m)^{archive} has 1\d\d,\d{{3}} bytes, more than {LARGEST:,}$", planted)


@pytest.mark.parametrize(
    ("file", "text", "faults"),
    [
        ("pyproject.toml", 'readme = "MISSING.md"', ["throw-away does not build: "]),
        (
            FILE_NAME,
            None,
            [f"{FILE_NAME} of throw-away is out of date", "throw-away does not build: "],
        ),
        ("LICENSE", None, ["LICENSE of throw-away is not a copy"]),
        (
            "src/throw_away/__init__.py",
            "",
            ["has no line __version__", "throw-away does not build: "],
        ),
    ],
)
def test_what_keeps_a_build_from_starting_is_a_line_each(
    repository: Repository,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str | None,
    faults: list[str],
) -> None:
    path = repository.add("throw-away") / file
    if text is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace('readme = "README.md"', text) if text else "")
    found = check(repository.root)
    for fault in faults:
        assert sum(fault in one for one in found) == 1, found
    if faults[-1].endswith("build: "):
        assert capsys.readouterr().out == ""


def test_an_sdist_that_does_not_build(repository: Repository) -> None:
    project = repository.add("throw-away") / "pyproject.toml"
    project.write_text(project.read_text().replace(f', "{FILE_NAME}"', ""))
    (fault,) = check(repository.root)
    assert fault.startswith("throw_away-1.2.3.tar.gz does not build: ")
    assert fault.endswith(f"SBOM file not found: {FILE_NAME}")


def test_archives_with_the_same_members_but_other_bytes_differ(tmp_path: Path) -> None:
    paths = tmp_path / "one.whl", tmp_path / "two.whl"
    for path, year in zip(paths, (2000, 2001), strict=True):
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(zipfile.ZipInfo("a", (year, 1, 1, 0, 0, 0)), "a")
    assert differences(*paths) == ["one.whl"]
    assert differences(paths[0], paths[0]) == []


def test_command_exits_with_one_and_says_why(repository: Repository) -> None:
    (repository.add("throw-away") / "LICENSE").write_text("")
    command = [sys.executable, str(ROOT / "tools" / "check_dist.py"), "--root"]
    result = subprocess.run(
        [*command, str(repository.root)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert result.stderr == "LICENSE of throw-away is not a copy of the one at the top\n"
