"""Releases are the tags of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import releases

if TYPE_CHECKING:
    from conftest import Repository


def test_the_newest_is_the_highest_version(released: Repository) -> None:
    released.commit("a-one-v1.10.0", "a-one-v1.9.0", "a-one-v2.0.0rc1", "a-one-vnext")
    newest = releases.newest(released.root, "a-one")
    assert newest is not None
    assert newest.tag == "a-one-v1.10.0"
    assert releases.newest(released.root, "c-three") is None


@pytest.mark.parametrize("version", ["1.0.0", "1.0", "1"])
def test_a_version_is_found_however_it_is_written(released: Repository, version: str) -> None:
    assert releases.find(released.root, "a-one", version).tag == "a-one-v1.0.0"


def test_a_version_that_was_never_released(released: Repository) -> None:
    with pytest.raises(ValueError, match=r"^a-one 1.1 was never released$"):
        releases.find(released.root, "a-one", "1.1")


def test_a_release_is_what_it_was(released: Repository, tmp_path: Path) -> None:
    released.write_source("a-one", "changed = 1\n", "1.1.0")
    released.commit()
    found = releases.find(released.root, "a-one", "1.0.0").unpack(tmp_path / "old")
    assert found.version == "1.0.0"
