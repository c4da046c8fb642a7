"""Run the tests of every released package on the shared-core that is here.

    python tools/check_compat.py [--root FOLDER]

The wheel and its tests are those of the package's last release. What both need beside shared-core
is taken from the environment that runs this. Where shared-core is as it was released there is
nothing to run: it was tried with what was released before it, and by what was released after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from building import copy_tree, wheel
from command import parser, run, status, tell
from distributions import CORE, ROOT, Distribution, discover
from releases import Release, newest


def changed(core: Distribution, release: Release) -> bool:
    """Whether what the wheel of the core is built from has changed since a release."""
    paths = [core.folder / "src", core.folder / "pyproject.toml"]
    command = ["git", "diff", "--quiet", release.tag, "--", *map(str, paths)]
    result = subprocess.run(command, cwd=release.root, timeout=60, check=False)
    if result.returncode not in (0, 1):
        raise subprocess.CalledProcessError(result.returncode, command)
    return result.returncode == 1


def passes(release: Release, core: Path, folder: Path) -> bool:
    """Whether a released package passes its own tests on the wheel of a core."""
    package = release.unpack(folder / "tree")
    site, working = folder / "site", folder / "working"
    for built in (core, wheel(package.folder, folder)):
        with zipfile.ZipFile(built) as archive:
            archive.extractall(site)
    working.mkdir()
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "tree" / ".pytest.ini")]
    command += ["-p", "shared_core.testing.plugin", "-p", "no:cacheprovider", "--device", "cpu"]
    # What is unpacked comes before what is installed.
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [*command, str(package.folder / "tests")], cwd=working, env=environment, check=False
    )
    return result.returncode == 0


def check(root: Path) -> Iterator[str]:
    """A line for every release that fails its tests."""
    core, *packages = discover(root)
    if core.name != CORE:
        raise ValueError(f"there is no {CORE} in {root}")
    released = newest(root, CORE)
    if released is not None and not changed(core, released):
        tell(f"{CORE} is as released in {released.version}")
        return
    for package in packages:
        release = newest(root, package.name)
        if release is None:
            tell(f"{package.name} has no release to run on this {CORE}")
            continue
        tell(f"{package.name} {release.version} on this {CORE}:")
        with tempfile.TemporaryDirectory() as name:
            copy = copy_tree(root, Path(name, "now")) / CORE
            if not passes(release, wheel(copy, Path(name, "core")), Path(name)):
                yield f"{package.name} {release.version} fails its tests on this {CORE}"


def main() -> int:
    return status(check(parser(__doc__, root=ROOT).parse_args().root))


if __name__ == "__main__":
    run(main)
