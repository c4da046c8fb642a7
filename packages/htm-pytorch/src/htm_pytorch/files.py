"""Files of tensors that are written whole or not at all, and the lock of a folder."""

from __future__ import annotations

import os
import pickle
from io import BufferedRandom
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch


def save_file(kind: str, content: dict[str, Any], path: Path) -> None:
    """Writes tensors and numbers by name. What was at `path` stays until all is on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            torch.save({"kind": kind, "content": content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load_file(kind: str, path: Path) -> dict[str, Any]:
    """What `save_file` wrote, on the CPU.

    Raises:
        ValueError: the file is another one, or not whole.
        OSError: it cannot be read.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise ValueError(f"{str(path)!r} is no file of {kind}") from error
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise ValueError(f"{str(path)!r} is no file of {kind}")
    content: dict[str, Any] = found["content"]
    return content


def sync_file(path: Path) -> None:
    """Returns when all that was written to the file, by a mapping too, is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new name of a file is on the disk only when its folder is."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> BufferedRandom:
    """Makes this the one writer of a folder, until the file returned is closed.

    Raises:
        ValueError: there is a writer.
        ModuleNotFoundError: the system has no `fcntl`, such as Windows.
    """
    import fcntl

    file = (folder / "lock").open("ab+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{str(folder)!r} is open in another store") from None
    return file
