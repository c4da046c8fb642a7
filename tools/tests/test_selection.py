"""A change runs the tests that it can break, and no more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from distributions import ROOT, discover
from graph import needed_by
from selection import changes, selected, sessions

if TYPE_CHECKING:
    from conftest import Repository

EVERYTHING = {"shared-core", "a-one", "b-two", "c-three", "tools"}


@pytest.fixture(scope="module")
def four(shared_repository: Repository) -> Repository:
    """A core, two packages on it, and one that needs another."""
    shared_repository.add("shared-core", under=".")
    shared_repository.add("a-one", dependencies='["shared-core>=1.0.0"]')
    shared_repository.add("b-two", dependencies='["shared-core", "torch"]')
    shared_repository.add("c-three", dependencies="[\"b-two>=1; python_version >= '3'\"]")
    return shared_repository


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], set()),
        (["packages/a-one/src/a_one/model.py"], {"a-one", "tools"}),
        (["packages/a-one/pyproject.toml"], {"a-one", "tools"}),
        (["packages/a-one/tests/test_model.py"], {"a-one"}),
        (["packages/b-two/src/b_two/model.py"], {"b-two", "c-three", "tools"}),
        (["shared-core/src/shared_core/layers.py"], EVERYTHING),
        (["shared-core/tests/test_layers.py"], EVERYTHING),
        (["tools/building.py"], EVERYTHING),
        (["tools/README.md"], EVERYTHING),
        (["noxfile.py"], EVERYTHING),
        ([".pytest.ini"], EVERYTHING),
        ([".github/workflows/ci.yml"], EVERYTHING),
        # A package that is gone.
        (["packages/d-four/pyproject.toml"], EVERYTHING),
        (["packages/a-one/CHANGELOG.md"], set()),
        (["README.md"], {"tools"}),
        ([".github/CONTRIBUTING.md"], {"tools"}),
        (["shared-core/CHANGELOG.md"], {"shared-core"}),
        # Its tests run the examples in it.
        (["packages/b-two/README.md"], {"b-two"}),
        (["packages/b-two/CHANGELOG.md", "packages/a-one/tests/test_x.py"], {"a-one"}),
        (["packages/a-one/src/a_one/model.py", "LICENSE"], EVERYTHING),
    ],
)
def test_what_a_change_selects(four: Repository, paths: list[str], names: set[str]) -> None:
    assert selected(paths, discover(four.root)) == names


def test_what_needs_the_core_is_found_through_others(four: Repository) -> None:
    distributions = discover(four.root)
    assert needed_by(distributions, {"shared-core"}) == EVERYTHING - {"tools"}
    assert needed_by(distributions, {"c-three"}) == {"c-three"}
    assert needed_by(distributions, set()) == set()


def test_ours_all_need_the_core() -> None:
    names = {found.name for found in discover()}
    assert selected(["shared-core/pyproject.toml"], discover()) == {*names, "tools"}
    for name in names - {"shared-core"}:
        assert selected([f"packages/{name}/src/x.py"], discover()) == {name, "tools"}


def test_changes_are_those_of_the_branch_alone(repository: Repository) -> None:
    repository.add("a-one")
    start = repository.commit()
    repository.git("checkout", "--quiet", "-b", "branch")
    folder = repository.root / "packages"
    (folder / "a-one").rename(folder / "b-two")
    (folder / "b-two" / "ä.txt").touch()
    repository.commit()
    repository.git("checkout", "--quiet", "main")
    (repository.root / "later.txt").touch()
    main = repository.commit()
    repository.git("checkout", "--quiet", "branch")
    found = changes(repository.root, main)
    assert found == changes(repository.root, start)
    assert {"packages/a-one/LICENSE", "packages/b-two/LICENSE", "packages/b-two/ä.txt"} < set(found)
    assert "later.txt" not in found


def test_sessions_are_those_that_nox_lists() -> None:
    listed = sessions(ROOT, "cpu", {"memformer", "tools"})
    assert {session["call_spec"]["package"] for session in listed} == {"memformer", "tools"}
    assert {session["call_spec"]["device"] for session in listed} == {"cpu"}
    # What belongs to no package always runs.
    assert "lint" in {session["session"] for session in sessions(ROOT, "static", set())}


def test_command_from_a_commit_on(repository: Repository) -> None:
    shutil.copy(ROOT / "noxfile.py", repository.root)
    shutil.copytree(
        ROOT / "tools", repository.root / "tools", ignore=shutil.ignore_patterns("tests")
    )
    folder = repository.add("a-one")
    repository.add("b-two")
    start = repository.commit()
    (folder / "src" / "a_one" / "more.py").touch()
    repository.commit()
    command = [sys.executable, str(repository.root / "tools" / "selection.py"), "--tag", "cpu"]

    def packages(*arguments: str) -> list[str]:
        result = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=60, check=True
        )
        return [session["call_spec"]["package"] for session in json.loads(result.stdout)]

    assert packages("--since", start) == ["a-one", "tools"]
    assert packages("--since", "") == ["a-one", "b-two", "tools"]
    result = subprocess.run(
        [*command, "--since", "0" * 40], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("selection: git -C ")
