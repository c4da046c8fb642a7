"""The distributions of this repository, found by their folders."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CORE = "shared-core"
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Distribution:
    """One folder with a pyproject.toml: shared-core, or a package under packages/."""

    name: str
    folder: Path
    dependencies: tuple[str, ...]
    optional: tuple[str, ...]
    """What the extras depend on."""
    licence: str

    @property
    def import_name(self) -> str:
        """The one package that the wheel holds."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.import_name

    @property
    def version(self) -> str:
        """The version, which is written once, in the package's __init__.py."""
        text = (self.source / "__init__.py").read_text(encoding="utf-8")
        if found := VERSION.search(text):
            return found[1]
        raise ValueError(f'{self.source / "__init__.py"} has no line __version__ = "..."')


def discover(root: Path = ROOT) -> list[Distribution]:
    """shared-core and everything under packages/ that has a pyproject.toml, by name.

    Raises ValueError where there is none, for a pyproject.toml without name or license, where a
    folder and the distribution in it bear different names, and for the name of a dependency that is
    not written as everywhere else.
    """
    folders = [root / CORE, *sorted((root / "packages").glob("*"))]
    found = [_read(folder) for folder in folders if (folder / "pyproject.toml").is_file()]
    if not found:
        raise ValueError(f"there is no distribution in {root}")
    return found


def _read(folder: Path) -> Distribution:
    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        name, licence = project["name"], project["license"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    if name != folder.name:
        raise ValueError(f"the folder {folder.name} holds a distribution named {name}")
    for needed in project.get("dependencies", ()):
        written = re.match(r"[\w.-]+", needed)
        if written is None or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", written[0]):
            raise ValueError(f"{path}: write the name in {needed!r} in lower case and with hyphens")
    extras = project.get("optional-dependencies", {}).values()
    optional = tuple(needed for extra in extras for needed in extra)
    return Distribution(name, folder, tuple(project.get("dependencies", ())), optional, licence)


def content_key(distribution: Distribution, *also: Path) -> str:
    """A hash over every file that goes into the wheel, and over the files in `also`."""
    digest = hashlib.sha256()
    for path in (*_wheel_inputs(distribution), *also):
        content = path.read_bytes()
        digest.update(f"{os.path.relpath(path, distribution.folder)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _wheel_inputs(distribution: Distribution) -> Iterator[Path]:
    yield from sorted(path for path in distribution.folder.iterdir() if path.is_file())
    for path in sorted((distribution.folder / "src").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path
