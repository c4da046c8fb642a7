"""Files that are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import files
from files import write_whole


def test_text_and_bytes_are_written_where_no_folder_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, "\u00e9\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_whole(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("owner", "name"), [(files.os, "fsync"), (Path, "replace")])
def test_a_file_is_whole_or_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    path = tmp_path / "figures.json"
    write_whole(path, b"first")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
