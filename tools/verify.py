"""Check what an environment holds against the manifest of a release.

    python tools/verify.py MANIFEST [--python PATH]

MANIFEST is a release's lock file or its SHA256SUMS. For every wheel in it the environment of that
Python must have the version, installed from those bytes, and every file as the installer wrote it
down. That finds what was mixed up or damaged, not what somebody hides who rewrites that, too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from command import parser, run, status, tell

_LOCKED = re.compile(r"^\S+ @ (\S+/(\S+\.whl))#sha256=([0-9a-f]{64})$")
_SUMMED = re.compile(r"^([0-9a-f]{64}) [ *](\S+\.whl)$")


@dataclass(frozen=True)
class Wheel:
    """A wheel that a manifest names."""

    name: str
    version: str
    digest: str
    url: str | None
    """Only a lock file names it."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def site_hashes(site: Path) -> dict[str, dict[str, str]]:
    """For every distribution in a folder, the hash of each file that it installed."""
    return {
        normal(found.metadata["Name"]): {
            str(file): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
            for file in found.files or ()
            for path in [Path(str(found.locate_file(file)))]
        }
        for found in distributions(path=[str(site)])
    }


def wheels(manifest: Path) -> list[Wheel]:
    """The wheels of a lock file or SHA256SUMS; raises ValueError where there is none."""
    found = []
    for line in manifest.read_text(encoding="utf-8").splitlines():
        if locked := _LOCKED.match(line):
            url, file, digest = locked.groups()
        elif summed := _SUMMED.match(line):
            url, (digest, file) = None, summed.groups()
        else:
            continue
        name, version, *_ = file.split("-")
        found.append(Wheel(normal(name), version, digest, url))
    if not found:
        raise ValueError(f"{manifest} names no wheel with its SHA-256")
    return found


def check(manifest: Path, site: Path) -> Iterator[str]:
    """A line for everything in a folder of packages that is not as the manifest says."""
    installed = {normal(found.metadata["Name"]): found for found in distributions(path=[str(site)])}
    for wheel in wheels(manifest):
        if wheel.name not in installed:
            yield f"{wheel.name} is not installed"
            continue
        found = installed[wheel.name]
        if found.version != wheel.version:
            yield f"{wheel.name} is {found.version}, not {wheel.version}"
            continue
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        recorded = origin.get("archive_info", {}).get("hashes", {}).get("sha256")
        source = origin.get("url", "an index")
        # Uv compares the hash and does not write it down.
        if recorded != wheel.digest and (recorded is not None or source != wheel.url):
            yield f"{wheel.name} {wheel.version} came from {source}, not from the wheel named"
        yield from changed_files(wheel.name, found)


def changed_files(name: str, installed: Distribution) -> Iterator[str]:
    """A line for every file that is not what RECORD says of it."""
    for file in installed.files or ():
        path = Path(str(installed.locate_file(file)))
        if not path.is_file():
            # Bytecode comes and goes.
            if path.suffix != ".pyc":
                yield f"{name}: {file} is missing"
        elif file.hash is not None:
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                yield f"{name}: {file} has been changed"


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("manifest", type=Path, help="*.lock.txt or SHA256SUMS of a release")
    arguments.add_argument("--python", default=sys.executable, help="of the environment")
    options = arguments.parse_args()
    find = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    command = [options.python, "-c", find]
    site = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    faults = list(check(options.manifest, Path(site)))
    if not faults:
        tell(f"as released: {', '.join(f'{w.name} {w.version}' for w in wheels(options.manifest))}")
    return status(faults)


if __name__ == "__main__":
    run(main)
