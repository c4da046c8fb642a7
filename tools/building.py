"""Build distributions, and wheels that stand in for those of others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from distributions import VERSION, Distribution


def wheel(folder: Path, out: Path) -> Path:
    """Build the wheel of `folder` in this process; returns its path."""
    return Path(next(WheelBuilder(str(folder)).build(directory=str(out))))


def hatchling(folder: Path, out: Path, target: str, hash_seed: str = "0") -> Path:
    """Build the "wheel" or the "sdist" of `folder` in a process of its own; returns its path."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    )
    # Hatchling names what it built from the folder it ran in.
    return (folder / last_line(result.stdout)).resolve()


def last_line(output: str) -> str:
    return output.rstrip().rpartition("\n")[2]


def copy_tree(root: Path, target: Path) -> Path:
    """Copy the distributions in `root` as a clone would hold them."""
    target.mkdir(parents=True)
    # Hatchling looks for .gitignore up to the folder that has .git.
    (target / ".git").mkdir()
    for name in (".gitignore", "LICENSE"):
        shutil.copy(root / name, target)
    ignored = (root / ".gitignore").read_text(encoding="utf-8").splitlines()
    untracked = shutil.ignore_patterns(".git", *(line.rstrip("/") for line in ignored))
    for name in ("shared-core", "packages"):
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=untracked)
    return target


def write_version(distribution: Distribution, version: str) -> None:
    """Give a distribution another version, in its __init__.py."""
    path = distribution.source / "__init__.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(VERSION.sub(f'__version__ = "{version}"', text), encoding="utf-8")


def stub_wheel(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> Path:
    """A wheel with one empty module, to install in place of a large one."""
    normal = name.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{normal}-{version}-py3-none-any.whl"
    information = f"{normal}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    members = {
        f"{normal}.py": f'__version__ = "{version}"\n',
        f"{information}/METADATA": "\n".join(metadata) + "\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{information}/RECORD"
    members[record] = "".join(f"{member},,\n" for member in (*members, record))
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return path
