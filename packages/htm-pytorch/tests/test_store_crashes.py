"""What a crash leaves on the disk, at whatever time it comes."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import CAPACITY, DIM, Memories, carry_out, filled, make_module, new_store, steps

from htm_pytorch import HTMAttention, MemoryStore, files
from shared_core.testing import Randn


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn, name: str
) -> None:
    store, expected = filled(randn)
    store.save(tmp_path / "file")
    store.append(randn(3, 2, DIM))

    def crash(*_: object) -> None:
        raise OSError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "replace") if name == "replace" else (os, "fsync")), crash)
        with pytest.raises(OSError, match="crash"):
            store.save(tmp_path / "file")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    assert expected.same(MemoryStore.load(tmp_path / "file"))


@pytest.mark.parametrize("capacity", [None, CAPACITY])
def test_a_folder_is_as_of_its_last_flush_at_any_time(tmp_path: Path, capacity: int | None) -> None:
    """Whatever has been written since: a copy of its files is what a crash would leave."""
    module, differed = make_module(HTMAttention, torch.device("cpu")), False
    queries = torch.ones(3, 2, DIM, dtype=torch.float64)
    for seed in range(2):
        folder = tmp_path / str(seed)
        with new_store(path=folder, capacity=capacity) as store:
            now = Memories(capacity)
            flushed = now.copy()
            for step, _ in zip(steps(seed), range(30), strict=False):
                carry_out(step, store)
                carry_out(step, now)
                if step[0] == "flush":
                    store.flush()
                    flushed = now.copy()
                assert now.same(store)
                differed |= not flushed.same(store)
                shutil.copytree(folder, tmp_path / "copy")
                with MemoryStore.open(tmp_path / "copy") as copy:
                    assert flushed.same(copy)
                    found = copy.attend(module, queries)
                    expected = flushed.attend(module, queries, [0, 1, 2])[0]
                    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)
                shutil.rmtree(tmp_path / "copy")
    assert differed


def test_flush_writes_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn
) -> None:
    """When what it names is on the disk, which no test can cut the power of."""
    store, _ = filled(randn, path=tmp_path / "store")
    written = []
    replace, fsync = Path.replace, os.fsync

    def noted_replace(self: Path, target: Path) -> Path:
        written.append(target.name)
        return replace(self, target)

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        paths = [tmp_path / "store", *(tmp_path / "store").iterdir()]
        name = next(x.name for x in paths if os.path.samestat(x.stat(), found))
        written.append("new manifest" if name.startswith(".") else name)

    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    store.flush()
    assert written == ["tokens.bin", "means.bin", "new manifest", "manifest", "store"]
    store.close()


def test_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn
) -> None:
    """It is an error, not the end of the process."""
    store, expected = filled(randn, path=tmp_path / "store")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(OSError, match="No space left"):
                store.append(randn(3, 100, DIM))
        assert expected.same(store)
        store.append(randn(3, 100, DIM))
        expected.append(randn(3, 100, DIM), [0, 1, 2])
    with MemoryStore.open(tmp_path / "store") as store:
        assert expected.same(store)


def test_claiming_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn) -> None:
    """Where the system emulates it, it reads and writes in place; where it cannot, files grow."""

    def cannot(descriptor: int, *_: int) -> None:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        assert flags & os.O_APPEND == 0
        assert flags & os.O_ACCMODE == os.O_RDWR
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", cannot)
        store, expected = filled(randn, path=tmp_path / "x")
        assert expected.same(store)
        store.close()
        monkeypatch.delattr(os, "posix_fallocate")
        with MemoryStore.open(tmp_path / "x") as store:
            store.append(randn(3, 40, DIM))
            expected.append(randn(3, 40, DIM), [0, 1, 2])
            assert expected.same(store)


def test_a_manifest_that_may_be_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn
) -> None:
    """`flush` failed after it had the new name: what either manifest names is not overwritten."""
    folder = tmp_path / "x"
    store, held = filled(randn, path=folder, capacity=CAPACITY)
    store.flush()
    old = (folder / "manifest").read_bytes()
    for on in (store, held):
        on.append(randn(3, 7, DIM, seed=3), [0, 1, 2])
    flushed, before = held.copy(), filled(randn, capacity=CAPACITY)[1]
    with monkeypatch.context() as patch:

        def crash(_: Path) -> None:
            raise OSError("crash")

        patch.setattr(files, "_sync_folder", crash)
        with pytest.raises(OSError, match="crash"):
            store.flush()
    for turn in range(8):
        store.reset([turn % 3])
        store.append(randn(3, CAPACITY, DIM, seed=turn))
    for manifest, expected in ((old, before), (None, flushed)):
        shutil.copytree(folder, tmp_path / "copy")
        if manifest is not None:
            (tmp_path / "copy" / "manifest").write_bytes(manifest)
        with MemoryStore.open(tmp_path / "copy") as copy:
            assert expected.same(copy)
        shutil.rmtree(tmp_path / "copy")
    # The next one that returns sets the places free.
    store.flush()
    size = len(store._layout.pool.tokens)
    for turn in range(4):
        store.flush()
        store.append(randn(3, CAPACITY, DIM, seed=turn))
    assert len(store._layout.pool.tokens) == size
    store.close()


def test_a_new_folder_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are the names of those that were made for it."""
    synced, sync = [], files._sync_folder

    def noted(folder: Path) -> None:
        synced.append(folder)
        sync(folder)

    monkeypatch.setattr(files, "_sync_folder", noted)
    new_store(path=tmp_path / "a" / "b").close()
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} == set(synced)


def states_of(run: int, expected: Any) -> dict[str, list[Any]]:
    """What was held at each "flush" and "save" of a run, and at its beginning."""
    held = expected.copy()
    states: dict[str, list[Any]] = {"flush": [], "save": []}
    for step, _ in zip(steps(run), range(3000), strict=False):
        carry_out(step, held)
        if step[0] in states:
            states[step[0]].append(held.copy())
    return states


@pytest.mark.parametrize(
    "kills", [10, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_at_any_point(tmp_path: Path, kills: int) -> None:
    """Everything appended before the last `flush` that returned is there, and the saved file whole.

    One more than has returned may be there: the process was killed before it could say so.
    """
    chance = random.Random(kills)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("memories.py"))]
    server = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    flushed, saved = Memories(CAPACITY), None
    returned = 0
    with server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            for run in range(kills):
                notes = tmp_path / "notes"
                notes.unlink(missing_ok=True)
                server.stdin.write(f"{tmp_path} {run}\n")
                server.stdin.flush()
                writer = int(server.stdout.readline())
                # The first may be killed while it makes the folder.
                end, least = time.monotonic() + 30.0, chance.randint(0, 5)
                while time.monotonic() < end:
                    if notes.exists() and notes.stat().st_size >= least:
                        break
                    time.sleep(0.001)
                time.sleep(chance.uniform(0.0, 0.02))
                os.kill(writer, signal.SIGKILL)
                assert int(server.stdout.readline()) == -signal.SIGKILL
                flushed, saved = check(tmp_path, run, flushed, saved)
                returned += len(notes.read_text())
        finally:
            server.stdin.close()
            server.kill()
    assert returned > kills


def check(folder: Path, run: int, flushed: Any, saved: Any) -> tuple[Any, Any]:
    """What a killed writer has left; returns what its folder and its file hold."""
    notes, states = (folder / "notes").read_text(), states_of(run, flushed)
    held = {}
    for name, before in (("flush", flushed), ("save", saved)):
        count = notes.count(name[0])
        held[name] = [before, *states[name]][count : count + 2]
    if (folder / "store" / "manifest").exists():
        shutil.copytree(folder / "store", folder / "copy")
        with MemoryStore.open(folder / "copy") as store:
            flushed = next(x for x in held["flush"] if x.same(store))
        shutil.rmtree(folder / "copy")
    else:
        # Killed before there was a store.
        assert notes == ""
        assert run == 0
    if (folder / "saved").exists():
        store = MemoryStore.load(folder / "saved")
        saved = next(x for x in held["save"] if x is not None and x.same(store))
    else:
        assert held["save"][0] is None
    # Of each file at most one is begun and not finished: the next `save` has removed the others.
    for place, name in ((folder, "saved"), (folder / "store", "manifest")):
        assert len(list(place.glob(f".{name}.*"))) <= 1
    return flushed, saved
