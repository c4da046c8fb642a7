"""Throw-away repositories and packages for the checks to be run on."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from shared_core.testing import load_beside

TOOLS = Path(__file__).resolve().parents[1]
ROOT = TOOLS.parent
# The tools are scripts: they import each other from the folder they lie in.
sys.path.insert(0, str(TOOLS))
# What the tests of demonstrations import. They are imported by path, so it would not be found.
load_beside(__file__, "demos")


class Repository:
    """A repository with packages of a few lines each, and tags of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)
        shutil.copy(ROOT / "LICENSE", root)
        shutil.copy(ROOT / ".gitignore", root)

    def add(self, name: str, *, dependencies: str = "[]", under: str = "packages") -> Path:
        """A package made like the ones we have; returns its folder."""
        from distributions import discover
        from sbom import FILE_NAME, bill_of_materials

        folder = self.root / under / name
        import_name = name.replace("-", "_")
        source = folder / "src" / import_name
        (folder / "tests").mkdir(parents=True)
        source.mkdir(parents=True)
        text = (ROOT / "packages" / "h-transformer-1d" / "pyproject.toml").read_text()
        text = text.replace("h-transformer-1d", name).replace("h_transformer_1d", import_name)
        text = re.sub(r"(?m)^dependencies = \[[^]]*\]", f"dependencies = {dependencies}", text)
        (folder / "pyproject.toml").write_text(text)
        (folder / "README.md").write_text(f"# {name}\n")
        (folder / "CHANGELOG.md").write_text("# Changelog\n")
        (source / "__init__.py").write_text('__all__ = ["one"]\n__version__ = "1.2.3"\n\none = 1\n')
        (source / "py.typed").touch()
        shutil.copy(ROOT / "LICENSE", folder)
        found = next(found for found in discover(self.root) if found.name == name)
        (folder / FILE_NAME).write_text(bill_of_materials(found))
        return folder

    def git(self, *arguments: str) -> str:
        """Run git as somebody, whatever the machine's settings are."""
        settings = {"user.name": "A", "user.email": "a@example.org", "commit.gpgsign": "false"}
        options = [word for pair in settings.items() for word in ("-c", "=".join(pair))]
        return subprocess.run(
            ["git", *options, "-c", "tag.gpgsign=false", *arguments],
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()

    def commit(self, *tags: str) -> str:
        """Commit all there is under these tags; returns the commit."""
        if not (self.root / ".git").exists():
            self.git("init", "--quiet", "--initial-branch", "main")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "Change")
        for tag in tags:
            self.git("tag", tag)
        return self.git("rev-parse", "HEAD")

    def write_source(self, name: str, text: str, version: str = "1.2.3") -> None:
        """What a package's __init__.py says, after its version."""
        under = "." if name == "shared-core" else "packages"
        path = self.root / under / name / "src" / name.replace("-", "_") / "__init__.py"
        path.write_text(f'__version__ = "{version}"\n\n{text}')


# The plugin that every suite is run with, as far as it is needed.
PLUGIN = """def pytest_addoption(parser):
    parser.addoption("--device")
"""


@pytest.fixture
def released(repository: Repository) -> Repository:
    """A core and two packages on it, released as 1.0.0."""
    names = ("shared-core", "a-one", "b-two")
    repository.add("shared-core", under=".", dependencies='["torch>=2.5"]')
    text = "__all__ = ['one']\n\nfrom .numbers import one\n"
    repository.write_source("shared-core", text, "1.0.0")
    source = repository.root / "shared-core" / "src" / "shared_core"
    (source / "numbers.py").write_text("def one(plus=0):\n    return 1 + plus\n")
    (source / "testing").mkdir()
    (source / "testing" / "__init__.py").touch()
    (source / "testing" / "plugin.py").write_text(PLUGIN)
    for name in names[1:]:
        folder = repository.add(name, dependencies='["shared-core>=1.0.0", "torch>=2.5"]')
        module = name.replace("-", "_")
        text = "from shared_core import one\n\n\ndef two():\n    return one() + 1\n"
        repository.write_source(name, text, "1.0.0")
        test = f"import {module}\n\n\ndef test_two():\n    assert {module}.two() == 2\n"
        (folder / "tests" / "test_two.py").write_text(test)
    shutil.copy(ROOT / ".pytest.ini", repository.root)
    repository.commit(*(f"{name}-v1.0.0" for name in names))
    return repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


@pytest.fixture(scope="module")
def shared_repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("shared") / "repository")


@pytest.fixture
def demo(request: pytest.FixtureRequest) -> ModuleType:
    """The demonstration that the test's module has loaded."""
    found: ModuleType = request.module.demo
    return found


@pytest.fixture
def run(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the demonstration; returns status, output and errors."""

    def call(*options: object) -> tuple[int, str, str]:
        arguments = [*map(str, ("--out", tmp_path / "out")), *map(str, options)]
        try:
            status = demo.main(arguments)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call
