"""The existing release that a package is compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers import Worker

ROOT = Path(__file__).resolve().parents[1]
# Seconds, in which torch is imported.
_LIMIT = 300.0
_PIN = re.compile(r"^\s*([A-Za-z0-9._-]+)==(\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """A package, its cases, and the release that benchmarks/reference.txt pins."""

    name: str
    folder: Path
    cases: Path
    reference: str
    reference_version: str

    @classmethod
    def find(cls, root: Path, name: str, cases: str) -> Package:
        """The package under `root`; raises ValueError where something is missing.

        reference.txt is a requirements file; its first line name==version is the reference.
        """
        folder = root / "packages" / name
        if not folder.is_dir():
            raise ValueError(f"there is no package {name} in {folder.parent}")
        pins, path = (folder / "benchmarks" / file for file in ("reference.txt", cases))
        for needed in (pins, path):
            if not needed.is_file():
                raise ValueError(f"{name} has no {needed}")
        if found := _PIN.search(pins.read_text(encoding="utf-8")):
            return cls(name, folder, path, found[1], found[2])
        raise ValueError(f"{pins} pins nothing: a line name==version is needed")

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    def describe(self, ours: Worker, theirs: Worker | None) -> dict[str, Any]:
        """What the environments hold.

        Raises ValueError where the other one has another release than the pinned one.
        """
        about = {
            "ours": ours.call(
                "describe", limit=_LIMIT, distribution=self.name, import_name=self.import_name
            )
        }
        if theirs is None:
            return about
        found = theirs.call("describe", limit=_LIMIT, distribution=self.reference, import_name=None)
        if found["version"] != self.reference_version:
            raise ValueError(
                f"the reference must be {self.reference} {self.reference_version}, "
                f"its environment has {found['version']}"
            )
        return {**about, "reference": {**found, "name": self.reference}}
