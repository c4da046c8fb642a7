"""Build every distribution twice and check what comes out.

    python tools/check_dist.py [--root FOLDER]

The two builds start from copies at other paths, with other times and modes, and the second wheel
is built from the second sdist; the bytes must be the same. Exits with 1 and one line a fault.
"""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

from building import copy_tree, hatchling, last_line
from command import parser, run, status, tell
from distributions import ROOT, Distribution, discover
from sbom import FILE_NAME, bill_of_materials

LARGEST = 100_000
METADATA_VERSION = "2.4"


def check(root: Path) -> list[str]:
    """Shows a line for every distribution, and returns one for every fault."""
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        first_copy = copy_tree(root, Path(name, "first"))
        make_different(first_copy, modified=1_000_000_000, mode=0o600)
        second_copy = copy_tree(root, Path(name, "second", "deeper"))
        make_different(second_copy, modified=1.7e9, mode=0o644)
        for first, second in zip(discover(first_copy), discover(second_copy), strict=True):
            faults += source_faults(first, first_copy / "LICENSE")
            building = first.name
            try:
                sdist, wheel = build_both(first.folder, Path(name, "one"), hash_seed="1")
                faults += archive_faults(first, sdist, wheel)
                building = sdist.name
                again = build_through_sdist(second.folder, Path(name, "two"), hash_seed="2")
            except subprocess.CalledProcessError as error:
                faults.append(f"{building} does not build: {last_line(error.stdout)}")
                continue
            different = [*differences(sdist, again[0]), *differences(wheel, again[1])]
            faults += [f"built twice, {member} differs" for member in different]
            sizes = ", ".join(f"{path.stat().st_size / 1000:.1f} kB" for path in (wheel, sdist))
            tell(f"{wheel.name}: wheel and sdist {sizes}")
    return faults


def build_both(folder: Path, out: Path, *, hash_seed: str) -> tuple[Path, Path]:
    """Build the sdist and the wheel, both from `folder`."""
    return hatchling(folder, out, "sdist", hash_seed), hatchling(folder, out, "wheel", hash_seed)


def build_through_sdist(folder: Path, out: Path, *, hash_seed: str) -> tuple[Path, Path]:
    """Build the sdist from `folder`, and the wheel from that sdist alone."""
    sdist = hatchling(folder, out, "sdist", hash_seed)
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    unpacked = out / sdist.name.removesuffix(".tar.gz")
    return sdist, hatchling(unpacked, out, "wheel", hash_seed)


def make_different(tree: Path, *, modified: float, mode: int) -> None:
    """Give every file of a copy these times and modes."""
    for path in tree.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        os.utime(path, (modified, modified))


def differences(first: Path, second: Path) -> list[str]:
    """What differs between two archives: names of members, or the archive's own name."""
    if filecmp.cmp(first, second, shallow=False):
        return []
    ours, theirs = _members(first), _members(second)
    names = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    return [f"{name} in {first.name}" for name in names] or [first.name]


def _members(archive: Path) -> dict[str, bytes]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as sdist:
        files = ((member.name, sdist.extractfile(member)) for member in sdist.getmembers())
        return {name: file.read() for name, file in files if file is not None}


def archive_faults(distribution: Distribution, sdist: Path, wheel: Path) -> Iterator[str]:
    """Faults of what was built."""
    members = _members(wheel)
    information = f"{distribution.import_name}-{distribution.version}.dist-info"
    tops = {name.partition("/")[0] for name in members} - {information}
    if tops != {distribution.import_name}:
        yield f"{wheel.name} holds {sorted(tops)}, not {distribution.import_name} alone"
    for name in (
        f"{distribution.import_name}/py.typed",
        f"{information}/licenses/LICENSE",
        f"{information}/sboms/{FILE_NAME}",
    ):
        if name not in members:
            yield f"{wheel.name} has no {name}"
    metadata = message_from_bytes(members.get(f"{information}/METADATA", b""))
    if metadata["Metadata-Version"] != METADATA_VERSION:
        yield f"{wheel.name} has metadata {metadata['Metadata-Version']}, not {METADATA_VERSION}"
    for path in (sdist, wheel):
        if (size := path.stat().st_size) > LARGEST:
            yield f"{path.name} has {size:,} bytes, more than {LARGEST:,}"
    yield from _tool_faults("twine", "check", "--strict", str(sdist), str(wheel))
    yield from _tool_faults(
        "check_wheel_contents", "--toplevel", distribution.import_name, str(wheel)
    )


def source_faults(distribution: Distribution, licence: Path) -> Iterator[str]:
    """Faults of what was built from."""
    own, bill = (distribution.folder / name for name in ("LICENSE", FILE_NAME))
    if not own.is_file() or own.read_bytes() != licence.read_bytes():
        yield f"LICENSE of {distribution.name} is not a copy of the one at the top"
    try:
        expected = bill_of_materials(distribution)
    except ValueError as error:
        # There is no version.
        yield str(error)
    else:
        if not bill.is_file() or bill.read_text(encoding="utf-8") != expected:
            yield f"{FILE_NAME} of {distribution.name} is out of date: run python tools/sbom.py"
    yield from _tool_faults("validate_pyproject", str(distribution.folder / "pyproject.toml"))
    # Every import belongs to a declared dependency, and every dependency is imported.
    yield from _tool_faults(
        "deptry",
        str(distribution.folder / "src"),
        "--config",
        str(distribution.folder / "pyproject.toml"),
        "--known-first-party",
        distribution.import_name,
        "--no-ansi",
    )


def _tool_faults(module: str, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        lines = (result.stdout + result.stderr).splitlines()
        # Deptry tells which module names it guesses, and guesses ours right.
        told = [line for line in lines if line and not line.startswith("Assuming the")]
        yield f"{module}: " + "\n  ".join(told)


def main() -> int:
    return status(check(parser(__doc__, root=ROOT).parse_args().root))


if __name__ == "__main__":
    run(main)
