"""A pool of chunks in the files of a folder.

Shapes: p chunks that there is room for, c tokens a chunk, d width, e environments, j columns.
"""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from htm_pytorch.files import (
    load_file,
    lock_folder,
    make_folder,
    save_file,
    sync_file,
    unlock,
)
from htm_pytorch.settings import Settings
from htm_pytorch.storage import Pool, Room, resized

_KIND = "htm_pytorch memory store, folder"
_MANIFEST = "manifest"


class Manifest(NamedTuple):
    """What a folder holds.

    Attributes:
        seen: (e,) tokens of each environment since its last reset.
        table: (e, j) place of each chunk, -1 for none.
        used: places that have been handed out.
    """

    settings: Settings
    seen: Tensor
    table: Tensor
    used: int


class MappedPool(Pool):
    """Chunks in files, and a manifest of which of them hold what.

    What the manifest names is never overwritten: such a chunk, given back, is handed out again only
    after the next one. So a process may end at any time, and the folder is as the manifest says.

    Args:
        settings: what a folder must agree in.
        read_only: with others, nothing is written; else as the only one.

    Attributes:
        means: (p, d) or more, of chunks. Of those that are not full, what an interrupted process
            left.
        manifest: as it was found.

    Raises:
        ValueError: the folder is another one, or of other settings, or open.
        OSError: the system has no locks.
    """

    def __init__(self, path: Path, settings: Settings, *, read_only: bool = False) -> None:
        c, d, dtype = settings.chunk_size, settings.dim, settings.dtype
        super().__init__(c, d, dtype, torch.device("cpu"), None)
        self.means: Tensor = torch.empty(0, d, dtype=torch.promote_types(dtype, torch.float32))
        self.read_only: bool = read_only
        self._settings: Settings = settings
        self._path: Path = path
        self._process: int = os.getpid()
        # Places that a manifest names, the last or one that may have come to the disk since: (p,)
        # or more.
        self._pinned: Tensor = torch.zeros(0, dtype=torch.bool)
        read_manifest(path)
        if not read_only:
            make_folder(path)
        self._lock = lock_folder(path, shared=read_only)
        # Without the lock others may write to what was lent.
        finalize(self, self.leases.close)
        try:
            # Once more, now that nobody else writes.
            found = read_manifest(path)
            if found is None:
                seen = torch.zeros(settings.environments, dtype=torch.int64)
                found = Manifest(settings, seen, seen.new_empty(len(seen), 0), 0)
                self.flush(found.seen, found.table)
            self.manifest: Manifest = found
            self._resume(found)
        except BaseException:
            self._lock.close()
            raise

    @property
    def is_foreign(self) -> bool:
        return not self.read_only and os.getpid() != self._process

    def write_means(self, places: Tensor, means: Tensor) -> None:
        self.means.index_copy_(0, places, means)

    def flush(self, seen: Tensor, table: Tensor) -> None:
        """Returns when all that was written is on the disk, and so is the manifest that says so."""
        used = self.room.used
        for file in self._files() if used else {}:
            sync_file(file)
        content = {
            "settings": self._settings.written(),
            "seen": seen.clone(),
            "table": table.clone(),
            "used": used,
        }
        pinned = torch.zeros_like(self._pinned)
        pinned[table[table >= 0]] = True
        # Should it fail, either manifest may be the one on the disk.
        self._pinned = self._pinned | pinned
        save_file(_KIND, content, self._path / _MANIFEST)
        self._pinned = pinned
        free = torch.cat((self.room.free, self.room.pending))
        self.room = Room(used, free, self.room.pending[:0])

    def close(self) -> None:
        try:
            super().close()
            self.means = self.means[:0].clone()
            # Another store may write to what was lent.
            self.leases.close()
        finally:
            if not self.is_foreign:
                unlock(self._lock)
            self._lock.close()

    def _freed(self, places: Tensor) -> Room:
        pinned = self._pinned[places]
        pending = torch.cat((self.room.pending, places[pinned]))
        return super()._freed(places[~pinned])._replace(pending=pending)

    def _resume(self, found: Manifest) -> None:
        pairs = zip(
            self._settings.written().items(), found.settings.written().values(), strict=True
        )
        for (name, ours), value in pairs:
            if value != ours:
                raise ValueError(f"{str(self._path)!r} is a store of {name} {value}, not {ours}")
        if found.used:
            for file, part in self._files().items():
                size = file.stat().st_size if file.exists() else 0
                least = found.used * _chunk_bytes(part)
                if size < least:
                    raise ValueError(f"{str(file)!r} is cut: {size} of {least} bytes")
            self._grow(found.used)
        self._pinned[found.table[found.table >= 0]] = True
        free = (~self._pinned[: found.used]).nonzero()[:, 0]
        self.room: Room = Room(found.used, free, free[:0])

    def _files(self) -> dict[Path, Tensor]:
        return {self._path / "tokens.bin": self.tokens, self._path / "means.bin": self.means}

    def _grow(self, least: int) -> None:
        # Nothing is copied, so there is no need to claim twice as much of the disk.
        room = max(least, len(self.tokens) + len(self.tokens) // 4)
        pinned, begun = resized(self._pinned, room), resized(self._begun, room)
        tokens, means = (
            _map(file, part, room, self.read_only) for file, part in self._files().items()
        )
        self._pinned, self._begun, self.means = pinned, begun, means
        # Last: an interrupt before it leaves the others longer, never shorter than the tokens.
        self.tokens: Tensor = tokens


def make_pool(
    settings: Settings, device: torch.device, path: Path | None, *, read_only: bool
) -> Pool:
    """Room for chunks in a folder, or in memory if none is given."""
    if path is not None:
        check_on_cpu(device)
        return MappedPool(path, settings, read_only=read_only)
    # One more, which is taken before the oldest is given back.
    limit = None if settings.kept is None else settings.environments * (settings.kept + 1)
    return Pool(settings.chunk_size, settings.dim, settings.dtype, device, limit)


def check_on_cpu(device: torch.device) -> None:
    """Raises ValueError for another device, where files cannot be."""
    if device.type != "cpu":
        raise ValueError(f"a store with a path is on the CPU, got device {device}")


def read_manifest(path: Path) -> Manifest | None:
    """What a folder says of itself; None where it is not there, or empty.

    Raises:
        ValueError: it holds something else, or of another version, or damaged.
    """
    file = path / _MANIFEST
    if file.is_file():
        return _checked(load_file(_KIND, file), file)
    # A process may have ended while it wrote the first one.
    ours = ("lock", f".{_MANIFEST}.")
    foreign = path.exists() and not path.is_dir()
    if foreign or (path.exists() and not all(x.name.startswith(ours) for x in path.iterdir())):
        raise ValueError(f"{str(path)!r} is no folder of a memory store")
    return None


def _checked(content: dict[str, Any], file: Path) -> Manifest:
    seen, table, used = (content.get(name) for name in ("seen", "table", "used"))
    try:
        settings = Settings.read(content.get("settings"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    whole = (
        isinstance(used, int)
        and isinstance(seen, Tensor)
        and isinstance(table, Tensor)
        and seen.dtype == table.dtype == torch.int64
        and (seen.shape, table.shape[:1], table.ndim) == ((settings.environments,),) * 2 + (2,)
        and _agree(settings, seen, table, used)
    )
    if not whole:
        raise ValueError(f"{str(file)!r} is damaged: its table does not fit its settings")
    return Manifest(settings, seen, table, used)  # type: ignore[arg-type]


def _agree(settings: Settings, seen: Tensor, table: Tensor, used: int) -> bool:
    """Whether each environment has a place of its own for each chunk of what it has seen."""
    held = (seen + settings.chunk_size - 1) // settings.chunk_size
    if settings.kept is not None:
        held = held.clamp(max=settings.kept)
    there = torch.arange(table.shape[1]) < held[:, None]
    places = table[there]
    return (
        bool((seen >= 0).all() and (held <= table.shape[1]).all())
        and torch.equal(table >= 0, there)
        and len(places.unique()) == len(places)
        and bool((places < used).all())
    )


def _chunk_bytes(part: Tensor) -> int:
    return math.prod(part.shape[1:]) * part.element_size()


def _map(file: Path, like: Tensor, room: int, read_only: bool) -> Tensor:
    """Room for chunks in a file, which is made longer where it must be."""
    size = room * _chunk_bytes(like)
    if not read_only:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _claim(descriptor, size)
        finally:
            os.close(descriptor)
    numbers = size // like.element_size()
    # A mapping that is not shared is of a file that is only read.
    mapped = torch.from_file(str(file), shared=not read_only, size=numbers, dtype=like.dtype)
    return mapped.view(room, *like.shape[1:])


def _claim(descriptor: int, size: int) -> None:
    """Makes a file at least that long, and the disk keep room for all of it where it can.

    On a full disk it raises then. Where it cannot, writing to a mapping would end the process.
    """
    found = os.fstat(descriptor)
    # Claimed already: not to be noted as changed.
    if found.st_size >= size and 512 * found.st_blocks >= size:
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        else:
            return
    if found.st_size < size:
        os.ftruncate(descriptor, size)
