"""Prepare a release: version, changelog, bill of materials, every gate, commit and tag.

    python tools/release.py DIST BUMP [--write] [--no-gates] [--root FOLDER]

BUMP is major, minor, patch, or a version such as 1.0.0. Everything is done in a clone, where the
gates are those of a bare `nox`, and for a package the lowest versions that it declares. Nothing
changes here unless `--write` is given and they all pass: then the three files are committed and
tagged <dist>-vX.Y.Z, and nothing is pushed. Refuses a tree with changes, an empty changelog
section, and a tag that exists.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import changelog
from command import parser, run, tell
from distributions import CORE, ROOT, Distribution, discover
from files import write_whole
from releases import git
from sbom import FILE_NAME, bill_of_materials


def find(root: Path, name: str) -> Distribution:
    found = {distribution.name: distribution for distribution in discover(root)}
    if name not in found:
        raise ValueError(f"there is no distribution {name}; there are {', '.join(found)}")
    return found[name]


def prepare(distribution: Distribution, bump: str, date: str) -> list[Path]:
    """Write version, changelog and bill of materials; returns their paths."""
    if not re.fullmatch(r"major|minor|patch|\d+\.\d+\.\d+", bump):
        raise ValueError(f"{bump} is neither major, minor, patch nor a version X.Y.Z")
    if bump != distribution.version:
        command = [sys.executable, "-m", "hatchling", "version", bump]
        subprocess.run(
            command,
            cwd=distribution.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    log, bill = (distribution.folder / name for name in ("CHANGELOG.md", FILE_NAME))
    text = log.read_text(encoding="utf-8")
    write_whole(log, changelog.release(text, distribution.version, date))
    write_whole(bill, bill_of_materials(distribution))
    return [distribution.source / "__init__.py", log, bill]


def require_clean(root: Path) -> str:
    """The commit that is checked out; raises ValueError where something has changed since."""
    if changed := git(root, "status", "--porcelain").decode().splitlines():
        raise ValueError(f"there are changes that are not committed: {', '.join(changed)}")
    return git(root, "rev-parse", "HEAD").decode().strip()


def release(root: Path, name: str, bump: str, *, write: bool, gates: Callable[[Path], None]) -> str:
    """Release a distribution, or show what a release would be; returns the tag."""
    find(root, name)
    start = require_clean(root)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        git(root, "clone", "--quiet", str(root), str(clone))
        there = find(clone, name)
        paths = prepare(there, bump, datetime.date.today().isoformat())
        version = there.version
        tag = f"{name}-v{version}"
        if git(root, "tag", "--list", tag):
            raise ValueError(f"the tag {tag} exists already")
        tell(git(clone, "diff").decode().rstrip() or "no file changes")
        gates(clone)
        if not write:
            tell(f"{tag} can be released; nothing was written, --write does it")
            return tag
        if require_clean(root) != start:
            raise ValueError("another commit was checked out in the meantime")
        here = [root / path.relative_to(clone) for path in paths]
        for source, target in zip(paths, here, strict=True):
            write_whole(target, source.read_text(encoding="utf-8"))
    message = f"Release {name} {version}"
    git(root, "add", *map(str, here))
    if git(root, "status", "--porcelain"):
        git(root, "commit", "--quiet", "--message", message)
    git(root, "tag", "--annotate", "--message", message, tag)
    tell(f"{tag} is committed and tagged; git push origin HEAD {tag} releases it")
    return tag


def run_gates(root: Path, name: str) -> None:
    """Run a bare nox, and a package with its lowest bounds; raises ValueError where one fails."""
    # What a session of nox hands down would change what this one does.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("NOX")}
    tell("running every gate: this takes a quarter of an hour")
    for session in ([], *([] if name == CORE else [["-s", f"lowest(package='{name}')"]])):
        command = [sys.executable, "-m", "nox", *session]
        if subprocess.run(command, cwd=root, env=environment, check=False).returncode:
            raise ValueError("a gate has failed")


def main() -> int:
    arguments = parser(__doc__, root=ROOT)
    arguments.add_argument("dist", help="the distribution")
    arguments.add_argument("bump", help="major, minor, patch or a version")
    arguments.add_argument("--write", action="store_true", help="commit and tag")
    arguments.add_argument("--no-gates", action="store_true", help="only show what would change")
    options = arguments.parse_args()
    if options.write and options.no_gates:
        raise ValueError("nothing is released without its gates: --write excludes --no-gates")

    def gates(clone: Path) -> None:
        if not options.no_gates:
            run_gates(clone, options.dist)

    release(options.root, options.dist, options.bump, write=options.write, gates=gates)
    return 0


if __name__ == "__main__":
    run(main)
