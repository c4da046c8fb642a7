"""Files of tensors, which are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch


def save_file(kind: str, content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes tensors by name into a file, which at no time is there in part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            torch.save({"kind": kind, "content": content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_file(kind: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_file` wrote, on the CPU; ValueError for a file of another kind."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise ValueError(f"{os.fspath(path)!r} is no file of {kind}")
    content: dict[str, Any] = found["content"]
    return content
