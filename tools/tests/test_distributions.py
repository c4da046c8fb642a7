"""Distributions are found by their folders, and their content has a key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distributions import ROOT, content_key, discover

if TYPE_CHECKING:
    from conftest import Repository


def test_finds_the_core_first_and_then_packages_by_name(repository: Repository) -> None:
    for name in ("b-two", "a-one"):
        repository.add(name)
    repository.add("shared-core", under=".")
    (repository.root / "packages" / "no-project").mkdir()
    assert [found.name for found in discover(repository.root)] == ["shared-core", "a-one", "b-two"]


def test_finds_what_this_repository_holds() -> None:
    found = {distribution.name: distribution for distribution in discover()}
    assert {"shared-core", "h-transformer-1d"} <= set(found)
    assert found["h-transformer-1d"].import_name == "h_transformer_1d"
    assert found["h-transformer-1d"].folder == ROOT / "packages" / "h-transformer-1d"


def test_refuses_a_folder_with_another_name(repository: Repository) -> None:
    repository.add("right").rename(repository.root / "packages" / "wrong")
    with pytest.raises(ValueError, match="folder wrong holds a distribution named right"):
        discover(repository.root)


@pytest.mark.parametrize("name", ["shared_core", "Shared-Core", "shared.core", ">=1"])
def test_a_dependency_is_written_in_one_way(repository: Repository, name: str) -> None:
    project = repository.add("one") / "pyproject.toml"
    text = project.read_text()
    project.write_text(text.replace("dependencies = []", f'dependencies = ["{name}>=1.0"]'))
    with pytest.raises(ValueError, match="in lower case and with hyphens"):
        discover(repository.root)


def test_a_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there is no distribution in .*"):
        discover(tmp_path)


@pytest.mark.parametrize("text", ["[project", "", "[project]\nname = 'throw-away'\n"])
def test_names_a_project_that_cannot_be_read(repository: Repository, text: str) -> None:
    path = repository.add("throw-away") / "pyproject.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        discover(repository.root)


def test_reads_the_version(repository: Repository) -> None:
    folder = repository.add("throw-away")
    (found,) = discover(repository.root)
    assert found.version == "1.2.3"
    (folder / "src" / "throw_away" / "__init__.py").write_text("")
    with pytest.raises(ValueError, match="has no line __version__"):
        _ = found.version


@pytest.mark.parametrize("changed", ["pyproject.toml", "README.md", "src/throw_away/__init__.py"])
def test_key_follows_content(repository: Repository, changed: str) -> None:
    path = repository.add("throw-away") / changed
    (found,) = discover(repository.root)
    before = content_key(found)
    path.touch()
    assert content_key(found) == before
    path.write_text(path.read_text() + "\n")
    assert content_key(found) != before


def test_key_follows_names_and_ignores_bytecode(repository: Repository, tmp_path: Path) -> None:
    source = repository.add("throw-away") / "src" / "throw_away"
    (found,) = discover(repository.root)
    before = content_key(found)
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "__init__.pyc").write_bytes(b"x")
    assert content_key(found) == before
    (source / "py.typed").rename(source / "py.untyped")
    assert content_key(found) != before
    other = tmp_path / "constraints.txt"
    other.write_text("hatchling==1")
    assert content_key(found, other) != content_key(found)
