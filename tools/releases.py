"""What was released: the tags <dist>-vX.Y.Z of the repository."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from distributions import Distribution, discover

_TAG = re.compile(r"-v(\d+\.\d+\.\d+)")


@dataclass(frozen=True, order=True)
class Release:
    """A version of a distribution that has a tag."""

    version: Version
    name: str
    root: Path

    @property
    def tag(self) -> str:
        return f"{self.name}-v{self.version}"

    def unpack(self, folder: Path) -> Distribution:
        """The distribution as it was, with the whole repository around it in `folder`.

        Raises ValueError where the tag does not hold it.
        """
        archive = git(self.root, "archive", "--format=tar", self.tag)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
            tree.extractall(folder, filter="data")
        for found in discover(folder):
            if found.name == self.name:
                return found
        raise ValueError(f"{self.tag} holds no {self.name}")


def released(root: Path, name: str) -> list[Release]:
    """Every release of a distribution, the newest last; none where there is no git checkout."""
    if not (root / ".git").exists():
        return []
    tags = git(root, "tag", "--list", f"{name}-v*").decode().split()
    found = [_TAG.fullmatch(tag.removeprefix(name)) for tag in tags]
    return sorted(Release(Version(match[1]), name, root) for match in found if match)


def find(root: Path, name: str, version: str) -> Release:
    """The release of a version, however it is written; raises ValueError where there is none."""
    for release in released(root, name):
        if release.version == Version(version):
            return release
    raise ValueError(f"{name} {version} was never released")


def newest(root: Path, name: str) -> Release | None:
    return max(released(root, name), default=None)


def git(root: Path, *arguments: str) -> bytes:
    """What a git command prints; raises CalledProcessError where it fails."""
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, timeout=120, check=False)
    if result.returncode:
        error = result.stderr.decode(errors="replace")
        raise subprocess.CalledProcessError(result.returncode, command, stderr=error)
    return result.stdout
