"""Who may use a folder or a file at the same time, and what others have left there."""

from __future__ import annotations

import copy
import fcntl
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import CAPACITY, DIM, contents, filled, make_module, new_store

from htm_pytorch import HTMAttention, MemoryStore
from shared_core.testing import Randn


def test_read_only(tmp_path: Path, randn: Randn) -> None:
    """Several may read, of files that they may not write; nobody writes meanwhile."""
    store, expected = filled(randn, path=tmp_path / "x", capacity=CAPACITY)
    with pytest.raises(ValueError, match="x' is open in another store"):
        MemoryStore.open(tmp_path / "x", read_only=True)
    store.close()
    before = contents(tmp_path)
    for file in (tmp_path / "x").iterdir():
        file.chmod(0o444)
    readers = [MemoryStore.open(tmp_path / "x", read_only=True) for _ in range(2)]
    module = make_module(HTMAttention, torch.device("cpu"))
    queries = randn(3, 2, DIM).cpu().requires_grad_()
    for reader in readers:
        assert reader.read_only
        assert expected.same(reader)
        out = reader.attend(module, queries)
        torch.testing.assert_close(out, expected.attend(module, queries, [0, 1, 2])[0])
        out.sum().backward()
        reader.save(tmp_path / "saved")
        for change in (
            lambda reader=reader: reader.append(randn(3, 1, DIM)),
            reader.reset,
            reader.flush,
        ):
            with pytest.raises(ValueError, match="the store is read-only"):
                change()
        assert expected.same(reader)
        # What it maps is its own.
        reader._layout.pool.tokens.zero_()
    for reader in readers:
        with pytest.raises(ValueError, match="x' is open in another store"):
            MemoryStore.open(tmp_path / "x")
        reader.close()
    assert expected.same(MemoryStore.load(tmp_path / "saved"))
    (tmp_path / "saved").unlink()
    assert contents(tmp_path) == before
    with MemoryStore.open(tmp_path / "x") as store:
        assert not store.read_only


def test_a_fork_leaves_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn
) -> None:
    """It has the lock of its parent, and neither knows what the other writes."""
    store, expected = filled(randn, path=tmp_path / "x")
    store.flush()
    store.append(randn(3, 1, DIM))
    before, process = contents(tmp_path), os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process + 1)
        for use in (store.flush, store.reset, lambda: store.lengths, lambda: store.tokens(0)):
            with pytest.raises(ValueError, match="is for the process that made it, not for a fork"):
                use()
        store.close()
        # In memory each has its own.
        filled(randn)[0].close()
    assert contents(tmp_path) == before
    store.append(randn(3, 1, DIM))
    store.close()
    with MemoryStore.open(tmp_path / "x") as store:
        assert store.lengths.tolist() == [len(x) + 2 for x in expected.tokens]
    # Of readers there may be more.
    with MemoryStore.open(tmp_path / "x", read_only=True) as store, monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process + 1)
        assert store.lengths.tolist() == [len(x) + 2 for x in expected.tokens]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_closed_for_forks_as_well(tmp_path: Path, randn: Randn) -> None:
    """One that lives on has the file of the lock open, and not the lock."""
    store, expected = filled(randn, path=tmp_path / "x")
    ends, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ends, 1)
        os._exit(0)
    try:
        store.close()
        with MemoryStore.open(tmp_path / "x") as again:
            assert expected.same(again)
    finally:
        os.write(tells, b".")
        os.waitpid(child, 0)
        os.close(ends)
        os.close(tells)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_a_folder_is_not_copied(tmp_path: Path, randn: Randn, duplicate: Any) -> None:
    store, _ = filled(randn, path=tmp_path / "x")
    with pytest.raises(TypeError, match="a store with a path cannot be copied or pickled"):
        duplicate(store)
    store.close()


def test_a_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn
) -> None:
    """No folder, and none made; files are saved, and leave nothing behind."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OSError, match="a folder of a store needs locks, which this system has not"):
        new_store(path=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    store, expected = filled(randn)
    left = tmp_path / f".file.{'0' * 32}"
    left.write_bytes(b"half of it")
    store.save(tmp_path / "file")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    assert expected.same(MemoryStore.load(tmp_path / "file"))


def test_what_a_killed_process_left_is_removed(tmp_path: Path, randn: Randn) -> None:
    """And nothing else: neither what another one is writing nor what is not ours."""
    store, _ = filled(randn)
    names = [f".file.{'0' * 32}", f".file.{'1' * 32}", f".other.{'0' * 32}", ".file.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"half of it")
    with (tmp_path / names[1]).open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        store.save(tmp_path / "file")
    assert {x.name for x in tmp_path.iterdir()} == {"file", *names[1:]}


def test_one_writer(tmp_path: Path, randn: Randn) -> None:
    store, expected = filled(randn, path=tmp_path / "store")
    for make in (MemoryStore.open, lambda path: new_store(path=path)):
        with pytest.raises(ValueError, match="store' is open in another store"):
            make(tmp_path / "store")
    assert expected.same(store)
    store.close()
    MemoryStore.open(tmp_path / "store").close()
