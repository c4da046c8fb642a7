"""Peak memory: of the run alone, whatever was there before."""

from __future__ import annotations

from pathlib import Path

import pytest

import peak_memory

MIB = 2**20


def allocate(mib: int) -> int:
    return len(b"x" * (mib * MIB))


def many_small(mib: int) -> list[bytes]:
    """Of a size that the C library keeps when it is freed."""
    return [bytes([i % 256]) * 2**10 for i in range(mib * 2**10)]


def test_freed_memory_counts_and_what_was_there_does_not() -> None:
    held = b"x" * (100 * MIB)
    for mib in (64, 32):
        assert peak_memory.peak(lambda mib=mib: allocate(mib)) / MIB == pytest.approx(mib, rel=0.05)
    assert len(held) == 100 * MIB


def test_what_is_returned_counts() -> None:
    assert peak_memory.peak(lambda: b"x" * (32 * MIB)) / MIB == pytest.approx(32, rel=0.05)


def test_memory_that_is_kept_free_is_not_used_unseen() -> None:
    blocks = many_small(64)
    # The last ones stay, so that the heap does not shrink by itself.
    del blocks[:-8]
    assert peak_memory.peak(lambda: many_small(32)) / MIB > 28


def test_where_the_mark_cannot_be_set_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peak_memory, "_CLEAR_REFS", tmp_path / "absent")
    with pytest.raises(RuntimeError, match="on Linux only"):
        peak_memory.peak(lambda: None)
    # How much depends on what the process has had before.
    assert 0 <= peak_memory.peak(lambda: allocate(16), exact=False) / MIB < 17
