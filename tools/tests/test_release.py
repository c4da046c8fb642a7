"""A release is prepared whole or not at all, and refuses what should not be released."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import release
from distributions import ROOT

if TYPE_CHECKING:
    from conftest import Repository

CHANGED = "# Changelog\n\n## [Unreleased]\n\n- A thing.\n\n## [1.0.0] - 2026-01-01\n\n- First.\n"


@pytest.fixture
def ready(released: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository in which a-one has something to release."""
    for name, value in (("NAME", "A"), ("EMAIL", "a@example.org")):
        for role in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{role}_{name}", value)
    (released.root / "packages" / "a-one" / "CHANGELOG.md").write_text(CHANGED)
    released.commit()
    return released


class Gates:
    """Gates that remember the versions they saw."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.seen: list[str] = []

    def __call__(self, root: Path) -> None:
        self.seen.append(release.find(root, "a-one").version)
        if self.fault:
            raise ValueError(self.fault)


def state(repository: Repository) -> tuple[str, str, str]:
    return (
        repository.git("rev-parse", "HEAD"),
        repository.git("tag"),
        repository.git("status", "--porcelain"),
    )


@pytest.mark.parametrize(
    ("bump", "version"), [("patch", "1.0.1"), ("minor", "1.1.0"), ("major", "2.0.0")]
)
def test_a_dry_run_changes_nothing(
    ready: Repository, capsys: pytest.CaptureFixture[str], bump: str, version: str
) -> None:
    before = state(ready)
    found = release.release(ready.root, "a-one", bump, write=False, gates=lambda _: None)
    assert found == f"a-one-v{version}"
    assert state(ready) == before
    out = capsys.readouterr().out
    assert f'+__version__ = "{version}"' in out
    assert f"+## [{version}] - {datetime.date.today()}" in out
    assert f"a-one@{version}" in out
    assert "nothing was written, --write does it" in out


def test_a_release_is_one_commit_and_a_tag(ready: Repository) -> None:
    start = ready.git("rev-parse", "HEAD")
    gates = Gates()
    release.release(ready.root, "a-one", "minor", write=True, gates=gates)
    assert gates.seen == ["1.1.0"]
    assert ready.git("rev-parse", "HEAD~") == start
    assert ready.git("rev-parse", "a-one-v1.1.0^{commit}") == ready.git("rev-parse", "HEAD")
    assert ready.git("log", "-1", "--format=%s") == "Release a-one 1.1.0"
    assert ready.git("diff", "--name-only", start).split() == [
        "packages/a-one/CHANGELOG.md",
        "packages/a-one/sbom.cdx.json",
        "packages/a-one/src/a_one/__init__.py",
    ]
    assert ready.git("status", "--porcelain") == ""
    # The next one has nothing to say.
    with pytest.raises(ValueError, match=r"no section \[Unreleased\] or \[1.2.0\]"):
        release.release(ready.root, "a-one", "minor", write=True, gates=gates)


def test_the_version_that_is_here_can_be_the_first(ready: Repository) -> None:
    ready.git("tag", "--delete", "a-one-v1.0.0")
    release.release(ready.root, "a-one", "1.0.0", write=True, gates=Gates())
    assert "a-one-v1.0.0" in ready.git("tag")
    # Everything is as it will be published already.
    head = ready.git("rev-parse", "HEAD")
    ready.git("tag", "--delete", "a-one-v1.0.0")
    release.release(ready.root, "a-one", "1.0.0", write=True, gates=Gates())
    assert ready.git("rev-parse", "HEAD") == head


def refused(ready: Repository, message: str, name: str = "a-one", bump: str = "minor") -> None:
    before = state(ready)
    gates = Gates()
    with pytest.raises(ValueError, match=message):
        release.release(ready.root, name, bump, write=True, gates=gates)
    assert gates.seen == []
    assert state(ready) == before


def test_a_tree_with_changes_is_refused(ready: Repository) -> None:
    (ready.root / "more.txt").touch()
    refused(ready, r"^there are changes that are not committed: \?\? more.txt$")


def test_an_empty_section_is_refused(ready: Repository) -> None:
    log = ready.root / "packages" / "a-one" / "CHANGELOG.md"
    log.write_text(CHANGED.replace("- A thing.", "### Added"))
    ready.commit()
    refused(ready, r"section \[Unreleased\] of the changelog is empty")


def test_a_tag_that_exists_is_refused(ready: Repository) -> None:
    ready.git("tag", "a-one-v1.1.0")
    refused(ready, r"^the tag a-one-v1.1.0 exists already$")


def test_a_name_that_is_none_is_refused(ready: Repository) -> None:
    refused(ready, "there is no distribution c-three; there are shared-core, a-one", "c-three")


@pytest.mark.parametrize("bump", ["rc", "dev", "1.1", "2.0.0rc1", "huge"])
def test_a_version_without_a_tag_of_its_own_is_refused(ready: Repository, bump: str) -> None:
    refused(ready, f"^{bump} is neither major, minor, patch nor a version", bump=bump)


def test_a_version_that_is_lower_is_refused(ready: Repository) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        release.release(ready.root, "a-one", "0.9.0", write=True, gates=Gates())


def test_a_gate_that_fails_keeps_it_all(ready: Repository) -> None:
    before = state(ready)
    with pytest.raises(ValueError, match="it broke"):
        release.release(ready.root, "a-one", "minor", write=True, gates=Gates("it broke"))
    assert state(ready) == before


def test_what_changed_while_the_gates_ran_is_refused(ready: Repository) -> None:
    with pytest.raises(ValueError, match="another commit was checked out"):
        release.release(
            ready.root, "a-one", "minor", write=True, gates=lambda _: ready.commit() and None
        )
    assert "v1.1.0" not in ready.git("tag")


def test_the_gates_are_a_bare_nox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOXSESSION", "nothing")
    text = "import nox\n\nnox.options.default_venv_backend = 'none'\n\n\n@nox.session\n"
    (tmp_path / "noxfile.py").write_text(f"{text}def one(session):\n    pass\n")
    release.run_gates(tmp_path, "shared-core")
    (tmp_path / "noxfile.py").write_text(f"{text}def one(session):\n    session.error('no')\n")
    with pytest.raises(ValueError, match=r"^a gate has failed$"):
        release.run_gates(tmp_path, "shared-core")
    # A package must also work with the lowest versions that it declares.
    lowest = f"""{text}def one(session):
    pass


nox.options.sessions = ["one"]


@nox.session
@nox.parametrize("package", ["a-one"])
def lowest(session, package):
"""
    (tmp_path / "noxfile.py").write_text(f"{lowest}    pass\n")
    release.run_gates(tmp_path, "a-one")
    (tmp_path / "noxfile.py").write_text(f"{lowest}    session.error('no')\n")
    release.run_gates(tmp_path, "shared-core")
    with pytest.raises(ValueError, match=r"^a gate has failed$"):
        release.run_gates(tmp_path, "a-one")


def test_the_command_line(ready: Repository) -> None:
    command = [sys.executable, str(ROOT / "tools" / "release.py"), "--root", str(ready.root)]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            env={**os.environ, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    dry = call("a-one", "minor", "--no-gates")
    assert dry.returncode == 0
    assert "a-one-v1.1.0 can be released" in dry.stdout
    both = call("a-one", "minor", "--no-gates", "--write")
    assert both.returncode == 2
    assert both.stderr.startswith("release: nothing is released without its gates")
