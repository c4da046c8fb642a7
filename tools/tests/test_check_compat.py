"""A core that breaks a released package is found before it is released."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from check_api import check as check_api
from check_compat import check

if TYPE_CHECKING:
    from conftest import Repository


def test_a_break_in_the_core_is_caught_by_both_gates(
    released: Repository, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = released.root / "shared-core" / "src" / "shared_core" / "numbers.py"
    numbers.write_text("def one(plus):\n    return 1 + plus\n")
    # A package that keeps up does not hide what happens to those who installed the last one.
    released.write_source("a-one", "__all__ = ['two']\n\n\ndef two():\n    return 2\n", "1.0.1")
    (released.root / "packages" / "a-one" / "tests" / "test_two.py").unlink()
    fault = "shared_core.numbers.one: parameter is now required (plus)"
    assert list(check_api(released.root)) == [f"{fault}, in shared-core 1.0.0 after 1.0.0"]
    assert list(check(released.root)) == [
        "a-one 1.0.0 fails its tests on this shared-core",
        "b-two 1.0.0 fails its tests on this shared-core",
    ]
    assert "missing 1 required positional argument: 'plus'" in capfd.readouterr().out


def test_a_change_that_only_tests_see(released: Repository) -> None:
    numbers = released.root / "shared-core" / "src" / "shared_core" / "numbers.py"
    numbers.write_text("def one(plus=0):\n    return 2 + plus\n")
    released.git("tag", "--delete", "b-two-v1.0.0")
    assert list(check_api(released.root)) == []
    assert list(check(released.root)) == ["a-one 1.0.0 fails its tests on this shared-core"]


def test_a_core_that_adds_passes(released: Repository, capfd: pytest.CaptureFixture[str]) -> None:
    numbers = released.root / "shared-core" / "src" / "shared_core" / "numbers.py"
    numbers.write_text(f"{numbers.read_text()}\n\ndef three():\n    return 3\n")
    released.git("tag", "--delete", "b-two-v1.0.0")
    assert list(check(released.root)) == []
    out = capfd.readouterr().out
    assert "1 passed" in out
    assert "b-two has no release to run on this shared-core" in out


def test_a_core_as_released_needs_no_run(
    released: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    (released.root / "shared-core" / "CHANGELOG.md").write_text("# Changed\n")
    assert list(check(released.root)) == []
    assert capsys.readouterr().out == "shared-core is as released in 1.0.0\n"


def test_a_repository_without_a_core(repository: Repository) -> None:
    repository.add("a-one")
    with pytest.raises(ValueError, match="there is no shared-core in "):
        list(check(repository.root))
