"""Files and folders that are not what they should be are refused, and left as they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import CAPACITY, DIM, contents, filled, new_store

from htm_pytorch import MemoryStore
from shared_core.testing import Randn


def change(file: Path, **changes: Any) -> None:
    """Puts other things into a file of ours; "version" beside its content, others in it."""
    found = torch.load(file, weights_only=True)
    if "version" in changes:
        found["version"] = changes.pop("version")
    settings = changes.pop("settings", {})
    found["content"] = found["content"] | changes
    if isinstance(settings, dict):
        found["content"]["settings"] = found["content"]["settings"] | settings
    else:
        del found["content"]["settings"]
    torch.save(found, file)


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, "is of version 2, and what is read here is of version 1"),
    ({"version": None}, "is of version None, and what is read here is of version 1"),
    ({"settings": {"new": 3}}, "is damaged: settings must be dim, .*, got .*new"),
    ({"settings": None}, "is damaged: settings must be dim, .*, got None"),
    ({"settings": {"dim": "6"}}, "is damaged: dim must be an integer, got '6'"),
    ({"settings": {"capacity": 4}}, "is damaged: capacity must be a multiple of 3, got 4"),
    ({"settings": {"dtype": "int8"}}, "is damaged: dtype must be one of .*, got 'int8'"),
    ({"settings": {"dtype": 5}}, "is damaged: dtype must be one of .*, got 5"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *DAMAGE,
        ({"used": None}, "is damaged: its table does not fit its settings"),
        ({"used": 3}, "is damaged: its table"),
        ({"seen": torch.zeros(4)}, "is damaged: its table"),
        ({"seen": torch.tensor([17, 4, 11])}, "is damaged: its table"),
        ({"seen": torch.tensor([17, 4, -1])}, "is damaged: its table"),
        ({"seen": torch.tensor([17, 4, 100])}, "is damaged: its table"),
        ({"table": torch.zeros(3, 6, dtype=torch.int64)}, "is damaged: its table"),
        ({"table": [1]}, "is damaged: its table"),
        ({"settings": {"environments": 2}}, "is damaged: its table"),
        ({"settings": {"chunk_size": 5}}, "is damaged: its table"),
    ],
)
def test_a_damaged_folder(
    tmp_path: Path, randn: Randn, changes: dict[str, Any], message: str
) -> None:
    store, _ = filled(randn, path=tmp_path / "x")
    store.append(randn(1, 3, DIM), [2])
    store.append(randn(1, 2, DIM), [2])
    store.reset([2])
    store.append(randn(1, 9, DIM), [2])
    store.close()
    change(tmp_path / "x" / "manifest", **dict(changes))
    for read_only in (False, True):
        with pytest.raises(ValueError, match=f"manifest' {message}"):
            MemoryStore.open(tmp_path / "x", read_only=read_only)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *DAMAGE,
        ({"tokens": None}, "is damaged: it must hold tokens of 3 environments"),
        ({"settings": {"environments": 4}}, "is damaged: it must hold tokens of 4 environments"),
        ({"settings": {"dim": 5}}, r"is damaged: tokens must be \(length, 5\) torch.float64"),
        ({"settings": {"dtype": "float32"}}, r"is damaged: tokens must be .* torch.float32"),
        ({"settings": {"capacity": 15}}, "is damaged: tokens must be .* at most 15"),
    ],
)
def test_a_damaged_file(
    tmp_path: Path, randn: Randn, changes: dict[str, Any], message: str
) -> None:
    filled(randn)[0].save(tmp_path / "x")
    change(tmp_path / "x", **dict(changes))
    with pytest.raises(ValueError, match=f"x' {message}"):
        MemoryStore.load(tmp_path / "x")


def test_a_file_without_content(tmp_path: Path) -> None:
    torch.save({"kind": "htm_pytorch memory store", "version": 1}, tmp_path / "x")
    with pytest.raises(ValueError, match="x' is damaged: it has no content"):
        MemoryStore.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 5}, "is a store of dim 6, not 5"),
        ({"chunk_size": 5}, "is a store of chunk_size 3, not 5"),
        ({"environments": 2}, "is a store of environments 3, not 2"),
        ({"capacity": 30}, "is a store of capacity 15, not 30"),
        ({"dtype": torch.float32}, "is a store of dtype float64, not float32"),
    ],
)
def test_a_folder_of_other_settings(
    tmp_path: Path, randn: Randn, changes: dict[str, Any], message: str
) -> None:
    store, expected = filled(randn, path=tmp_path / "store", capacity=CAPACITY)
    store.close()
    before = contents(tmp_path)
    settings = {"dim": 6, "environments": 3, "chunk_size": 3, "capacity": CAPACITY}
    with pytest.raises(ValueError, match=message):
        MemoryStore(**({"path": tmp_path / "store", "dtype": torch.float64} | settings | changes))
    assert contents(tmp_path) == before
    # The one that failed does not hold the lock.
    with MemoryStore.open(tmp_path / "store") as again:
        assert expected.same(again)


def _foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "letters.txt").write_text("dear")


def _file(folder: Path) -> None:
    folder.write_text("dear")


def _other_manifest(folder: Path) -> None:
    folder.mkdir()
    torch.save({"kind": "something", "content": {}}, folder / "manifest")


def _no_manifest(folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest").write_bytes(b"")


def _cut_manifest(folder: Path) -> None:
    new_store(path=folder).close()
    (folder / "manifest").write_bytes((folder / "manifest").read_bytes()[:-100])


@pytest.mark.parametrize("make", [_foreign, _file, _other_manifest, _no_manifest, _cut_manifest])
def test_foreign_folders(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Refused, and left as they are."""
    make(tmp_path / "x")
    before = contents(tmp_path)
    for use in (MemoryStore.open, lambda path: new_store(path=path)):
        with pytest.raises(ValueError, match=r"x(/manifest)?' is no (file|folder) of .*memory st"):
            use(tmp_path / "x")
    assert contents(tmp_path) == before


def test_a_cut_folder(tmp_path: Path, randn: Randn) -> None:
    store, _ = filled(randn, path=tmp_path / "x")
    store.close()
    for name in ("means.bin", "tokens.bin"):
        os.truncate(tmp_path / "x" / name, 100)
        with pytest.raises(ValueError, match=rf"{name}' is cut: 100 of \d+ bytes"):
            MemoryStore.open(tmp_path / "x")
        (tmp_path / "x" / name).unlink()
        with pytest.raises(ValueError, match=rf"{name}' is cut: 0 of \d+ bytes"):
            MemoryStore.open(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"dear", b"PK\x03\x04", None])
def test_foreign_files(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        torch.save({"weight": torch.zeros(2)}, tmp_path / "x")
    else:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x' is no file of htm_pytorch memory store"):
        MemoryStore.load(tmp_path / "x")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MemoryStore.load(tmp_path / "x")
    with pytest.raises(ValueError, match="x' holds no memory store"):
        MemoryStore.open(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_empty_folder_of_a_path_that_is_not_there(tmp_path: Path) -> None:
    with new_store(path=tmp_path / "a" / "b") as store:
        assert store.lengths.tolist() == [0, 0, 0]
        with pytest.raises(ValueError, match="with a path is on the CPU, got device meta"):
            store.to("meta")
    with MemoryStore.open(tmp_path / "a" / "b") as store:
        assert store.lengths.tolist() == [0, 0, 0]
