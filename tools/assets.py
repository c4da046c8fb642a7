"""Make the files of a release from what is checked out at its tag.

    python tools/assets.py TAG --url URL --out FOLDER [--core FOLDER] [--root FOLDER]

FOLDER/files gets wheel, sdist, bill of materials, SHA256SUMS and a lock file; FOLDER/notes.md what
the changelog says. The lock file is a requirements file with the exact address, below URL, and hash
of the wheel and of its shared-core, whose released wheel lies in the folder of --core: what else a
package needs comes from wherever its user takes it.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from packaging.utils import parse_wheel_filename

import changelog
from building import hatchling
from command import parser, run, tell
from distributions import CORE, ROOT, Distribution, discover
from files import write_whole
from graph import Offer, clashes
from sbom import FILE_NAME


def find(root: Path, tag: str) -> Distribution:
    """The distribution of a tag; raises ValueError unless it is in the version that is tagged."""
    name, _, version = tag.rpartition("-v")
    for found in discover(root):
        if found.name == name:
            if found.version != version:
                raise ValueError(f"{tag} is a tag of {name} {found.version}")
            return found
    raise ValueError(f"{tag} is no tag <dist>-vX.Y.Z of a distribution here")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def locked(wheel: Path, url: str) -> str:
    """A line of a requirements file that takes this wheel and no other."""
    name, version, _, _ = parse_wheel_filename(wheel.name)
    return f"{name} @ {url}/{name}-v{version}/{wheel.name}#sha256={sha256(wheel)}"


def core_wheel(distribution: Distribution, folder: Path | None) -> Path:
    """The wheel of shared-core in a folder; raises ValueError unless the package goes with it."""
    wheels = sorted(folder.glob("shared_core-*.whl")) if folder is not None else []
    if len(wheels) != 1:
        raise ValueError(f"{distribution.name} needs one wheel of {CORE} in the folder of --core")
    version = parse_wheel_filename(wheels[0].name)[1]
    if faults := clashes([Offer.of(distribution), Offer(CORE, version, ())], {}):
        raise ValueError(faults[0])
    return wheels[0]


def make(root: Path, tag: str, url: str, out: Path, core: Path | None) -> list[Path]:
    """The files of a release; returns their paths."""
    distribution = find(root, tag)
    log = (distribution.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    notes = changelog.section(log, distribution.version)
    if not notes:
        raise ValueError(f"the changelog of {distribution.name} says nothing of this version")
    files = (out / "files").resolve()
    sdist, wheel = (hatchling(distribution.folder, files, kind) for kind in ("sdist", "wheel"))
    lines = [locked(wheel, url)]
    if distribution.name != CORE:
        lines.append(locked(core_wheel(distribution, core), url))
    stem = f"{distribution.name}-{distribution.version}"
    bill, lock = files / f"{stem}.cdx.json", files / f"{stem}.lock.txt"
    shutil.copyfile(distribution.folder / FILE_NAME, bill)
    head = f"# pip install -r {lock.name}\n"
    write_whole(lock, head + "\n".join(lines) + "\n")
    paths = [wheel, sdist, bill, lock]
    write_whole(files / "SHA256SUMS", "".join(f"{sha256(path)}  {path.name}\n" for path in paths))
    write_whole(out / "notes.md", f"{notes}\n")
    return [*paths, files / "SHA256SUMS"]


def main() -> int:
    arguments = parser(__doc__, root=ROOT)
    arguments.add_argument("tag", help="<dist>-vX.Y.Z")
    arguments.add_argument("--url", required=True, help="where the releases are, each by its tag")
    arguments.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write to")
    arguments.add_argument("--core", type=Path, metavar="FOLDER", help="with shared-core's wheel")
    options = arguments.parse_args()
    for path in make(options.root, options.tag, options.url, options.out, options.core):
        tell(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    run(main)
