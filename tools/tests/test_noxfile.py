"""The sessions: packages are found by themselves, and a GPU is never needed by default."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distributions import ROOT, discover

if TYPE_CHECKING:
    from conftest import Repository


@pytest.fixture
def copy(repository: Repository) -> Path:
    """The noxfile and the tools, over the projects that we have and one more."""
    root = repository.root
    shutil.copy(ROOT / "noxfile.py", root)
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("tests"))
    for found in discover():
        folder = root / found.folder.relative_to(ROOT)
        folder.mkdir(parents=True)
        shutil.copy(found.folder / "pyproject.toml", folder)
    repository.add("throw-away")
    return root


def nox(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "NOXSESSION"}
    return subprocess.run(
        [sys.executable, "-m", "nox", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sessions(root: Path, *arguments: str) -> list[dict[str, Any]]:
    listing: list[dict[str, Any]] = json.loads(nox(root, "--list", "--json", *arguments).stdout)
    return listing


def test_a_package_is_a_folder_and_nothing_else(copy: Path) -> None:
    listed = sessions(copy, "-s", "tests", "bench", "parity")
    calls = [(session["name"], session["call_spec"]) for session in listed]
    for call in (
        ("tests", {"package": "throw-away", "device": "cpu"}),
        ("tests", {"package": "throw-away", "device": "gpu"}),
        ("bench", {"package": "throw-away"}),
        ("parity", {"package": "throw-away"}),
    ):
        assert call in calls


def test_the_default_sessions(copy: Path) -> None:
    names = [found.name for found in discover(copy)]
    assert [session["session"] for session in sessions(copy)] == [
        "lint",
        *(f"tests(package='{name}', device='cpu')" for name in [*names, "tools"]),
        "typing",
        "dist",
    ]


def test_tags_select_by_device(copy: Path) -> None:
    for tag, more in (("cpu", {"tools"}), ("gpu", set())):
        calls = [session["call_spec"] for session in sessions(copy, "-t", tag)]
        assert {call["device"] for call in calls} == {tag}
        assert {call["package"] for call in calls} == {f.name for f in discover(copy)} | more


def test_demo_names_the_packages_there_are(copy: Path) -> None:
    result = nox(copy, "-s", "demo", "--", "nothing", "--option")
    assert result.returncode == 1
    assert "no package named nothing; there are h-transformer-1d, throw-away" in result.stderr
