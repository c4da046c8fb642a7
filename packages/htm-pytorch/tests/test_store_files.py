"""What is on the disk: files and folders of stores, and what a crash leaves of them."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from htm_pytorch import HTMAttention, MemoryStore

if TYPE_CHECKING:
    from conftest import Make, Randn

_SPEC = importlib.util.spec_from_file_location("memories", Path(__file__).with_name("memories.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
memories = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(memories)
CAPACITY, CHUNK, DIM = memories.CAPACITY, memories.CHUNK, memories.DIM
Memories = memories.Memories


def filled(randn: Randn, **settings: Any) -> tuple[MemoryStore, Any]:
    """17, 4 and 10 tokens."""
    store, expected = memories.new_store(**settings), Memories(settings.get("capacity"))
    for env_id, t in enumerate((17, 4, 10)):
        tokens = randn(1, t, DIM, seed=env_id + 10)
        store.append(tokens, [env_id])
        expected.append(tokens, [env_id])
    return store, expected


def contents(folder: Path) -> dict[str, bytes]:
    return {str(x): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


@pytest.mark.parametrize("capacity", [None, CAPACITY])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_save_and_load(
    device: torch.device,
    tmp_path: Path,
    make_attention: Make,
    randn: Randn,
    capacity: int | None,
    dtype: torch.dtype,
) -> None:
    """A loaded store answers as the one that was saved, and goes on as it does."""
    store, _ = filled(randn, capacity=capacity, dtype=dtype, device=device)
    store.save(tmp_path / "file")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    loaded = MemoryStore.load(tmp_path / "file", device=device)
    assert (loaded.dtype, loaded.capacity, loaded.device) == (dtype, capacity, device)
    queries = randn(3, 2, DIM)
    for _ in range(2):
        found, expected = (
            x.attend(make_attention(), queries, return_indices=True) for x in (loaded, store)
        )
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)
        for x in (loaded, store):
            x.append(randn(3, 8, DIM, seed=3))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_folder_is_resumed(tmp_path: Path, randn: Randn, dtype: torch.dtype) -> None:
    """By `open` or by the same settings; it answers as a store in memory."""
    settings: dict[str, Any] = {"dtype": dtype, "capacity": CAPACITY}
    in_memory, _ = filled(randn, **settings)
    store, _ = filled(randn, path=tmp_path / "store", **settings)
    module = memories.make_module(HTMAttention, torch.device("cpu"))
    queries = randn(3, 2, DIM).cpu()
    for turn in range(3):
        with store:
            found, expected = (
                x.attend(module, queries, return_indices=True) for x in (store, in_memory)
            )
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)
            assert torch.equal(store.lengths, in_memory.lengths)
            for x in (store, in_memory):
                x.append(randn(3, 4, DIM, seed=turn), [2, 0, 1])
        if turn == 1:
            store = memories.new_store(path=tmp_path / "store", **settings)
        else:
            store = MemoryStore.open(str(tmp_path / "store"))
    store.close()


@pytest.mark.parametrize("capacity", [None, CAPACITY])
def test_a_folder_is_as_of_its_last_flush_at_any_time(tmp_path: Path, capacity: int | None) -> None:
    """Whatever has been written since: a copy of its files is what a crash would leave."""
    module, differed = memories.make_module(HTMAttention, torch.device("cpu")), False
    queries = torch.ones(3, 2, DIM, dtype=torch.float64)
    for seed in range(2):
        folder = tmp_path / str(seed)
        with memories.new_store(path=folder, capacity=capacity) as store:
            now = Memories(capacity)
            flushed = now.copy()
            for step, _ in zip(memories.steps(seed), range(30), strict=False):
                memories.carry_out(step, store)
                memories.carry_out(step, now)
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


def test_another_working_directory(
    tmp_path: Path, randn: Randn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder is what it was when the store was made."""
    for name in ("here", "there"):
        (tmp_path / name / "memory").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    store = MemoryStore(DIM, chunk_size=CHUNK, path="memory")
    store.append(randn(1, 3, DIM))
    store.flush()
    monkeypatch.chdir(tmp_path / "there")
    store.append(randn(1, 500, DIM, seed=2))
    store.close()
    assert contents(tmp_path / "there") == {}
    with MemoryStore.open(tmp_path / "here" / "memory") as found:
        assert found.lengths.tolist() == [503]


def test_files_do_not_grow_where_nothing_is_kept(tmp_path: Path, randn: Randn) -> None:
    """Chunks are used again, those of the last flush after the next."""
    file = tmp_path / "store" / "tokens.bin"
    with memories.new_store(path=tmp_path / "store", capacity=CAPACITY) as store:
        sizes = []
        for turn in range(300):
            store.append(randn(3, 2, DIM))
            if turn % 100 == 50:
                store.flush()
            if turn % 100 == 75:
                store.reset()
            sizes.append(file.stat().st_size)
    assert max(sizes) <= 3 * 3 * CAPACITY * DIM * 8
    assert len(set(sizes[100:])) == 1


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


@pytest.mark.parametrize("overwritten", [False, True])
def test_gradients_wait_in_a_folder(tmp_path: Path, randn: Randn, overwritten: bool) -> None:
    """Through longer files, but not after what was seen has been overwritten."""
    module = memories.make_module(HTMAttention, torch.device("cpu"))
    results = []
    for settings in ({"path": tmp_path / "store"}, {}):
        with memories.new_store(**settings) as store:
            store.append(randn(3, 4, DIM))
            queries = randn(3, 2, DIM).cpu().requires_grad_()
            out = store.attend(module, queries)
            for seed in range(3):
                store.append(randn(3, 40, DIM, seed=seed))
            if overwritten:
                store.reset()
                store.append(randn(3, 4, DIM, seed=5))
        if overwritten and settings:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
            return
        out.sum().backward()
        results.append(queries.grad)
    torch.testing.assert_close(*results, atol=1e-12, rtol=0.0)


def test_one_writer(tmp_path: Path, randn: Randn) -> None:
    store, expected = filled(randn, path=tmp_path / "store")
    for make in (MemoryStore.open, lambda path: memories.new_store(path=path)):
        with pytest.raises(ValueError, match="store' is open in another store"):
            make(tmp_path / "store")
    assert expected.same(store)
    store.close()
    MemoryStore.open(tmp_path / "store").close()


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
    memories.new_store(path=folder).close()
    (folder / "manifest").write_bytes((folder / "manifest").read_bytes()[:-100])


@pytest.mark.parametrize("make", [_foreign, _file, _other_manifest, _no_manifest, _cut_manifest])
def test_foreign_folders(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Refused, and left as they are."""
    make(tmp_path / "x")
    before = contents(tmp_path)
    for use in (MemoryStore.open, lambda path: memories.new_store(path=path)):
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
    with memories.new_store(path=tmp_path / "a" / "b") as store:
        assert store.lengths.tolist() == [0, 0, 0]
        with pytest.raises(ValueError, match="with a path is on the CPU, got device meta"):
            store.to("meta")
    with MemoryStore.open(tmp_path / "a" / "b") as store:
        assert store.lengths.tolist() == [0, 0, 0]


def states_of(run: int, expected: Any) -> dict[str, list[Any]]:
    """What was held at each "flush" and "save" of a run, and at its beginning."""
    held = expected.copy()
    states: dict[str, list[Any]] = {"flush": [], "save": []}
    for step, _ in zip(memories.steps(run), range(3000), strict=False):
        memories.carry_out(step, held)
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
    return flushed, saved
