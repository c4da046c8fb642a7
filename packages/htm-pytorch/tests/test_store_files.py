"""Stores in files and folders: saved, loaded, resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from memories import CAPACITY, CHUNK, DIM, contents, filled, make_module, new_store

from htm_pytorch import HTMAttention, MemoryStore
from shared_core.testing import Randn

if TYPE_CHECKING:
    from conftest import Make


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_folder_is_resumed(tmp_path: Path, randn: Randn, dtype: torch.dtype) -> None:
    """By `open` or by the same settings; it answers as a store in memory."""
    settings: dict[str, Any] = {"dtype": dtype, "capacity": CAPACITY}
    in_memory, _ = filled(randn, **settings)
    store, _ = filled(randn, path=tmp_path / "store", **settings)
    module = make_module(HTMAttention, torch.device("cpu"))
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
            store = new_store(path=tmp_path / "store", **settings)
        else:
            store = MemoryStore.open(str(tmp_path / "store"))
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
    with new_store(path=tmp_path / "store", capacity=CAPACITY) as store:
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


def test_opening_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randn: Randn
) -> None:
    """To the files of the chunks: of millions of them, none is to go to the disk again."""
    store, _ = filled(randn, path=tmp_path / "x")
    store.close()
    files = [tmp_path / "x" / name for name in ("means.bin", "tokens.bin")]
    for file in files:
        os.utime(file, (1.0, 1.0))
    if all(512 * file.stat().st_blocks >= file.stat().st_size for file in files):
        # Room that is claimed already is not claimed again, by which some systems note a change.
        for name in ("posix_fallocate", "ftruncate"):
            monkeypatch.setattr(os, name, None, raising=False)
    with MemoryStore.open(tmp_path / "x") as store:
        store.attend(make_module(HTMAttention, torch.device("cpu")), randn(3, 2, DIM).cpu())
    assert [file.stat().st_mtime for file in files] == [1.0, 1.0]
