"""Where the chunks of a store lie: a pool in memory, or in the files of a folder.

Shapes: p chunks that there is room for, c tokens a chunk, d width.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.files import load_file, lock_folder, save_file, sync_file

_KIND = "htm_pytorch memory store, folder"
_MANIFEST = "manifest"


class Pool:
    """Room for chunks, handed out by number and taken back.

    Args:
        limit: chunks beyond which room is made only as needed.

    Attributes:
        tokens: (p, c, d). counts: (p,) int64, tokens of each chunk.
        used: chunks that have been handed out at some time.
    """

    def __init__(
        self, c: int, d: int, dtype: torch.dtype, device: torch.device, limit: int | None
    ) -> None:
        self.tokens: Tensor = torch.empty(0, c, d, dtype=dtype, device=device)
        self.counts: Tensor = torch.zeros(0, dtype=torch.int64, device=device)
        self.used: int = 0
        self.limit: int | None = limit
        self._free: Tensor = torch.empty(0, dtype=torch.int64)
        # Empty, but what autograd takes for `tokens` of before, whose memory is still in use.
        self._earlier: list[Tensor] = []

    def take(self, n: int) -> Tensor:
        """Numbers of n chunks, on the CPU. On an error nothing has been taken."""
        again = min(n, len(self._free))
        used = self.used + n - again
        if used > len(self.tokens):
            self._grow(used)
        kept = len(self._free) - again
        taken = torch.cat((self._free[kept:], torch.arange(self.used, used)))
        self._free = self._free[:kept]
        self.used = used
        if again:
            # Whoever has attended to what lay there and wants gradients gets an error by this.
            for tokens in (self.tokens[:0], *self._earlier):
                tokens.zero_()
        return taken

    def release(self, chunks: Tensor) -> None:
        """Takes chunks back."""
        self._free = torch.cat((self._free, chunks.cpu()))

    def write(self, chunks: Tensor, places: Tensor, tokens: Tensor) -> None:
        """Writes tokens (x, d) to places (x,) of chunks (x,)."""
        c, d = self.tokens.shape[1:]
        # By `data`, so that autograd does not take all that it has kept for overwritten: more
        # tokens in a chunk change nothing for those who saw it with fewer.
        self.tokens.data.view(-1, d).index_copy_(0, chunks * c + places, tokens)

    def write_means(self, chunks: Tensor, means: Tensor, counts: Tensor) -> None:
        """Notes how many tokens chunks hold, and where means are kept, too, their means."""
        del means
        self.counts[chunks] = counts

    def to(self, device: torch.device) -> None:
        """Moves the chunks."""
        self.tokens = self.tokens.to(device)
        self.counts = self.counts.to(device)

    def close(self) -> None:
        """Lets go of everything."""
        self.tokens = self.tokens[:0].clone()
        self.counts = self.counts[:0].clone()

    def _grow(self, least: int) -> None:
        twice = 2 * len(self.tokens)
        room = max(least, twice if self.limit is None else min(twice, self.limit))
        counts = self._longer(self.counts, room)
        tokens = self.tokens.new_empty(room, *self.tokens.shape[1:])
        tokens[: self.used] = self.tokens[: self.used]
        self.tokens = tokens
        self.counts = counts

    def _longer(self, x: Tensor, room: int) -> Tensor:
        longer = x.new_zeros(room)
        longer[: self.used] = x[: self.used]
        return longer


class MappedPool(Pool):
    """Chunks in files, and a manifest of which of them hold what.

    What the manifest names is never overwritten: such a chunk, given back, is handed out again only
    after the next one. So a process may end at any time, and the folder is as the manifest says.

    Args:
        settings: what a folder must agree in.

    Attributes:
        means: (p, d) of chunks. Of those that are not full, what an interrupted process left.
        manifest: what was written last: "seen" and "table" of `flush`, and more.

    Raises:
        ValueError: the folder is another one, or of other settings, or open.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        c, d, dtype = settings["chunk_size"], settings["dim"], getattr(torch, settings["dtype"])
        super().__init__(c, d, dtype, torch.device("cpu"), None)
        self.means: Tensor = torch.empty(0, d, dtype=torch.promote_types(dtype, torch.float32))
        self.manifest: dict[str, Any] = {}
        self._settings: dict[str, Any] = settings
        self._path: Path = path
        self._pending: Tensor = self._free
        self._pinned: Tensor = torch.zeros(0, dtype=torch.bool)
        read_manifest(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path)
        try:
            # What a process that ended had not finished.
            for unfinished in path.glob(f".{_MANIFEST}.*"):
                unfinished.unlink()
            # Once more, now that nobody else writes.
            found = read_manifest(path)
            if found is not None:
                self._resume(found)
            else:
                table = torch.empty(settings["environments"], 0, dtype=torch.int64)
                self.flush(torch.zeros(len(table), dtype=torch.int64), table)
        except BaseException:
            self._lock.close()
            raise

    def release(self, chunks: Tensor) -> None:
        chunks = chunks.cpu()
        pinned = self._pinned[chunks]
        super().release(chunks[~pinned])
        self._pending = torch.cat((self._pending, chunks[pinned]))

    def write_means(self, chunks: Tensor, means: Tensor, counts: Tensor) -> None:
        super().write_means(chunks, means, counts)
        self.means[chunks] = means

    def flush(self, seen: Tensor, table: Tensor) -> None:
        """Returns when all that was written is on the disk, and so is the manifest that says so."""
        for file in self._files() if self.used else {}:
            sync_file(file)
        content = {
            "settings": self._settings,
            "seen": seen.clone(),
            "table": table.clone(),
            "used": self.used,
        }
        save_file(_KIND, content, self._path / _MANIFEST)
        self._hold(content)
        super().release(self._pending)
        self._pending = self._pending[:0]

    def close(self) -> None:
        super().close()
        self.means = self.means[:0].clone()
        self._lock.close()

    def _resume(self, found: dict[str, Any]) -> None:
        for name, value in found["settings"].items():
            if self._settings[name] != value:
                raise ValueError(
                    f"{str(self._path)!r} is a store of {name} {value}, not {self._settings[name]}"
                )
        used: int = found["used"]
        if used:
            for file, part in self._files().items():
                size, least = file.stat().st_size if file.exists() else 0, used * _chunk_bytes(part)
                if size < least:
                    raise ValueError(f"{str(file)!r} is cut: {size} of {least} bytes")
            self._grow(used)
        self.used = used
        self._hold(found)
        self._free = (~self._pinned[:used]).nonzero()[:, 0]

    def _hold(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._pinned = torch.zeros(len(self.tokens), dtype=torch.bool)
        table = manifest["table"]
        self._pinned[table[table >= 0]] = True

    def _files(self) -> dict[Path, Tensor]:
        return {self._path / "tokens.bin": self.tokens, self._path / "means.bin": self.means}

    def _grow(self, least: int) -> None:
        # Nothing is copied, so there is no need to claim twice as much of the disk.
        room = max(least, len(self.tokens) + len(self.tokens) // 4)
        counts = self._longer(self.counts, room)
        pinned = self._longer(self._pinned, room)
        tokens, means = (_map(file, part, room) for file, part in self._files().items())
        version = self.tokens[:0]
        # Keeps the version counter, lets go of the mapping.
        version.data = torch.empty_like(version)
        self._earlier.append(version)
        self.tokens = tokens
        self.means = means
        self.counts = counts
        self._pinned = pinned


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a folder says of itself; None where it is not there, or empty.

    Raises:
        ValueError: it holds something else.
    """
    if (path / _MANIFEST).is_file():
        return load_file(_KIND, path / _MANIFEST)
    # A process may have ended while it wrote the first one.
    ours = ("lock", f".{_MANIFEST}.")
    foreign = path.exists() and not path.is_dir()
    if foreign or (path.exists() and not all(x.name.startswith(ours) for x in path.iterdir())):
        raise ValueError(f"{str(path)!r} is no folder of a memory store")
    return None


def _chunk_bytes(part: Tensor) -> int:
    return math.prod(part.shape[1:]) * part.element_size()


def _map(file: Path, like: Tensor, room: int) -> Tensor:
    """Room for chunks in a file, which is made longer where it must be."""
    size = room * _chunk_bytes(like)
    with file.open("ab") as opened:
        if hasattr(os, "posix_fallocate"):
            # On a full disk this raises; writing to a mapping would end the process.
            os.posix_fallocate(opened.fileno(), 0, size)
        elif opened.tell() < size:
            opened.truncate(size)
    numbers = size // like.element_size()
    mapped = torch.from_file(str(file), shared=True, size=numbers, dtype=like.dtype)
    return mapped.view(room, *like.shape[1:])
