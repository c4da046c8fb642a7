"""Which test sessions a change needs, as the JSON that a workflow makes its matrix of.

    python tools/selection.py --tag TAG [--since COMMIT] [--root FOLDER]

A change in a package needs its tests, those of what depends on it, and those of the tools, which
run its demonstration. A change of a package's own tests or README needs its tests, which run the
README's examples; of its changelog none. What is written at the top and in .github for people to
read needs the tests of the tools, which read it. Every other change needs them all, as everything
is needed where no commit is named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from command import parser, run, tell
from distributions import CORE, ROOT, Distribution, discover
from graph import needed_by
from releases import git

TOOLS = "tools"


def selected(paths: Iterable[str], distributions: list[Distribution]) -> set[str]:
    """Names of the distributions to test after a change of these paths, and perhaps "tools"."""
    everything = {TOOLS, *(found.name for found in distributions)}
    alone: set[str] = set()
    changed: set[str] = set()
    for path in map(PurePosixPath, paths):
        within = path.parts[1:] if path.parts[0] == "packages" else path.parts
        if within[0] in everything - {TOOLS}:
            if (
                within[1:] == ("README.md",)
                or within == (CORE, "CHANGELOG.md")
                or (within[0] != CORE and within[1:2] == ("tests",))
            ):
                alone.add(within[0])
            elif within[1:] != ("CHANGELOG.md",):
                changed |= {TOOLS, within[0]}
        elif path.suffix == ".md" and path.parts[0] in (path.name, ".github"):
            alone.add(TOOLS)
        else:
            return everything
    return alone | needed_by(distributions, changed)


def sessions(root: Path, tag: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """What nox lists under a tag, without the sessions of packages that are not named."""
    wanted = {None, *names}
    listed = nox_list(root, "-t", tag)
    return [session for session in listed if session["call_spec"].get("package") in wanted]


def nox_list(root: Path, *options: str) -> list[dict[str, Any]]:
    """The sessions that nox would run."""
    # Within a session of nox this would name the one to list.
    environment = {name: value for name, value in os.environ.items() if name != "NOXSESSION"}
    command = [sys.executable, "-m", "nox", "--list", "--json", *options]
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    listed: list[dict[str, Any]] = json.loads(result.stdout)
    return listed


def changes(root: Path, since: str) -> list[str]:
    """The paths that differ from where this branch left `since`, both names of what was moved."""
    listing = git(root, "diff", "--name-only", "--no-renames", "-z", f"{since}...HEAD")
    return [path for path in listing.decode().split("\0") if path]


def main() -> int:
    arguments = parser(__doc__, root=ROOT)
    arguments.add_argument("--tag", required=True, help="of the sessions, such as cpu")
    arguments.add_argument("--since", default="", metavar="COMMIT", help="the change starts here")
    options = arguments.parse_args()
    found = discover(options.root)
    names = {TOOLS, *(item.name for item in found)}
    if options.since:
        names = selected(changes(options.root, options.since), found)
    tell(json.dumps(sessions(options.root, options.tag, names)))
    return 0


if __name__ == "__main__":
    run(main)
