"""Files of tensors that are written whole or not at all, and the lock of a folder."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch

_VERSION = 1


def save_file(kind: str, content: dict[str, Any], path: Path) -> None:
    """Writes tensors and numbers by name. What was at `path` stays until all is on the disk.

    What a process has left that ended while it wrote there is removed.
    """
    _sweep(path)
    with _temporary(path) as (name, file):
        torch.save({"kind": kind, "version": _VERSION, "content": content}, file)
        file.flush()
        os.fsync(file.fileno())
        if os.name == "nt":
            # Only there an open file cannot be renamed.
            file.close()
        name.replace(path)
    _sync_folder(path.parent)


def load_file(kind: str, path: Path) -> dict[str, Any]:
    """What `save_file` wrote, on the CPU.

    Raises:
        ValueError: the file is another one, or not whole, or of another version.
        OSError: it cannot be read.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise ValueError(f"{str(path)!r} is no file of {kind}") from error
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise ValueError(f"{str(path)!r} is no file of {kind}")
    if found.get("version") != _VERSION:
        raise ValueError(
            f"{str(path)!r} is of version {found.get('version')!r}, and what is read here is of "
            f"version {_VERSION}"
        )
    content = found.get("content")
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged: it has no content")
    return content


def sync_file(path: Path) -> None:
    """Returns when all that was written to the file, by a mapping too, is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Makes a folder, and those it is to be in, if there is none; on the disk, too.

    Raises:
        OSError: it cannot be made, or the system has no locks.
    """
    _fcntl()
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def lock_folder(folder: Path, *, shared: bool) -> IO[bytes]:
    """Makes this the one writer of a folder, or a reader, until the file returned is closed.

    Raises:
        ValueError: there is a writer, or a reader and this is not to be one.
        OSError: the system has no locks.
    """
    fcntl = _fcntl()
    # A reader may have no right to write.
    file: IO[bytes] = (folder / "lock").open("rb" if shared else "ab+")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{str(folder)!r} is open in another store") from None
    return file


def unlock(file: IO[bytes]) -> None:
    """Gives back the lock of `lock_folder`, also where a forked process has the file open, too."""
    fcntl = _fcntl()
    fcntl.flock(file, fcntl.LOCK_UN)


def _fcntl() -> Any:
    try:
        return import_module("fcntl")
    except ImportError as error:
        raise OSError("a folder of a store needs locks, which this system has not") from error


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file beside `path`, locked where there are locks, and removed at the end if still there."""
    while True:
        name = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            with name.open("xb") as file:
                with suppress(ImportError):
                    fcntl = import_module("fcntl")
                    fcntl.flock(file, fcntl.LOCK_EX)
                if name.exists():
                    yield name, file
                    return
                # Swept before it was locked.
        finally:
            name.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Removes temporaries of `path` that nobody writes to."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}")
    for found in path.parent.iterdir():
        if not ours.fullmatch(found.name):
            continue
        with suppress(OSError), found.open("rb") as file:
            try:
                fcntl = import_module("fcntl")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                # Without locks an open file cannot be removed by another process.
                file.close()
            found.unlink()


def _sync_folder(folder: Path) -> None:
    """A new name of a file is on the disk only when its folder is."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
