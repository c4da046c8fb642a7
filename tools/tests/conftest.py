"""Throw-away repositories and packages for the checks to be run on."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1]
ROOT = TOOLS.parent
# The tools are scripts: they import each other from the folder they lie in.
sys.path.insert(0, str(TOOLS))


class Repository:
    """A repository with packages of a few lines each."""

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


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


@pytest.fixture(scope="module")
def shared_repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("shared") / "repository")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the demonstration `demo` of the test's module; returns status, output and errors."""

    def call(*options: object) -> tuple[int, str, str]:
        arguments = [*map(str, ("--out", tmp_path / "out")), *map(str, options)]
        try:
            status = request.module.demo.main(arguments)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call
