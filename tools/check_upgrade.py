"""Prove that one model can be upgraded without touching the others.

    python tools/check_upgrade.py [--root FOLDER]

There are two versions of every distribution: the last release, or what is here where there is none,
and what is here as a next version. Everything else is a stub, and nothing comes from a network.

1. Every mix of the packages' versions goes together with the newest shared-core.
2. Every lower bound that a package declares can be installed: the version exists, and what
   shared-core itself needs allows the rest.
3. pip installs all the older versions and one mix, then upgrades one distribution after the other:
   each upgrade changes the files of that distribution alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from packaging.version import Version

from building import copy_tree, stub_wheel, wheel, write_version
from command import parser, run, status, tell
from distributions import CORE, ROOT, Distribution, discover
from graph import Offer, clashes, lower_bound
from releases import newest, released
from verify import site_hashes

# Higher than any version there is.
HIGHEST = Version("9999")


@dataclass(frozen=True)
class Pair:
    """Two versions of a distribution."""

    older: Offer
    newer: Offer


def pairs(root: Path, folder: Path) -> tuple[dict[str, Pair], dict[Offer, Distribution]]:
    """Two versions of every distribution, and the sources of both, in folders under `folder`."""
    found: dict[str, Pair] = {}
    sources: dict[Offer, Distribution] = {}
    now = discover(copy_tree(root, folder / "now"))
    for here, ahead in zip(now, discover(copy_tree(root, folder / "next")), strict=True):
        release = newest(root, here.name)
        source = here if release is None else release.unpack(folder / release.tag)
        older = Offer.of(source)
        highest = max(older.version, Version(here.version))
        write_version(ahead, f"{highest.major}.{highest.minor + 1}.0")
        found[here.name] = Pair(older, Offer.of(ahead))
        sources |= {older: source, found[here.name].newer: ahead}
    return found, sources


def stubs(offers: Collection[Offer]) -> dict[str, set[Version]]:
    """The versions to have of what is not ours: every lower bound, and one above them all."""
    versions: dict[str, set[Version]] = {}
    ours = {offer.name for offer in offers}
    for need in (need for offer in offers for need in offer.needs if need.name not in ours):
        bound = lower_bound(need)
        versions.setdefault(need.name, {HIGHEST}).update([bound] if bound else [])
    return versions


def mix_faults(both: Mapping[str, Pair]) -> tuple[int, list[str]]:
    """How many mixes of versions there are with the newest core, and why some do not resolve."""
    others = stubs([offer for pair in both.values() for offer in (pair.older, pair.newer)])
    core = [both[CORE].newer] if CORE in both else []
    choices = [(pair.older, pair.newer) for name, pair in both.items() if name != CORE]
    reasons = Counter(
        reason for mix in product(*choices) for reason in clashes([*core, *mix], others)
    )
    count = 2 ** len(choices)
    return count, [f"{times} of {count} mixes: {reason}" for reason, times in reasons.items()]


def bound_faults(root: Path, folder: Path, both: Mapping[str, Pair]) -> Iterator[str]:
    """Why the lower bounds of a package do not resolve."""
    if CORE not in both:
        return
    cores = {Version(found.version): found for found in discover(root) if found.name == CORE}
    versions = {release.version: release for release in released(root, CORE)}
    offers = dict.fromkeys(
        offer for name, pair in both.items() for offer in (pair.older, pair.newer) if name != CORE
    )
    for offer in offers:
        bounds = {need.name: lower_bound(need) for need in offer.needs}
        for name, bound in bounds.items():
            if bound is None:
                yield f"{offer} declares no lower bound for {name}"
        chosen = [offer]
        if wanted := bounds.pop(CORE, None):
            if wanted not in cores:
                if wanted not in versions:
                    yield f"{offer} needs {CORE} {wanted}, which is neither released nor here"
                    continue
                cores[wanted] = versions[wanted].unpack(folder / versions[wanted].tag)
            chosen.append(Offer.of(cores[wanted]))
        lowest = {name: {bound} for name, bound in bounds.items() if bound}
        for fault in clashes(chosen, lowest):
            yield f"lower bounds of {offer}: {fault}"


class Environment:
    """A virtual environment that pip fills from one folder of wheels."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self._python = folder / "bin" / "python"
        (self._site,) = folder.glob("lib/python*/site-packages")
        self._wheels = wheels

    def install(self, *requirements: str) -> None:
        """Install or upgrade; raises CalledProcessError where it does not resolve."""
        # No setting of the machine may bring in other packages.
        outside = {name: text for name, text in os.environ.items() if not name.startswith("PIP_")}
        command = [sys.executable, "-m", "pip", "--python", str(self._python), "install"]
        command += ["--no-index", "--find-links", str(self._wheels), "--no-compile", "--quiet"]
        subprocess.run(
            [*command, "--disable-pip-version-check", *requirements],
            env=outside | {"PIP_CONFIG_FILE": os.devnull},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    def hashes(self) -> dict[str, dict[str, str]]:
        return site_hashes(self._site)


def upgrade_faults(
    folder: Path, both: Mapping[str, Pair], sources: Mapping[Offer, Distribution]
) -> Iterator[str]:
    """What an upgrade by pip changes that it should not."""
    wheels = folder / "wheels"
    for name, versions in stubs(list(sources)).items():
        for version in versions:
            stub_wheel(wheels, name, str(version))
    for source in sources.values():
        wheel(source.folder, wheels)
    environment = Environment(folder / "environment", wheels)
    environment.install(*(f"{pair.older.name}=={pair.older.version}" for pair in both.values()))
    # The core first: any mix is promised to work with the newest one.
    for name in sorted(both, key=lambda name: (name != CORE, name)):
        before = environment.hashes()
        environment.install(f"{name}=={both[name].newer.version}")
        after = environment.hashes()
        changed = sorted(other for other in before | after if before.get(other) != after.get(other))
        yield from different(name, changed)
        tell(f"{both[name].older} -> {both[name].newer.version} changes {', '.join(changed)}")
    mix = [pair.older if number % 2 else pair.newer for number, pair in enumerate(both.values())]
    environment.install(*(f"{offer.name}=={offer.version}" for offer in mix))
    tell(f"pip installs {', '.join(map(str, mix))}")


def different(name: str, changed: Sequence[str]) -> Iterator[str]:
    if name not in changed:
        yield f"upgrading {name} does not change {name}"
    if others := [other for other in changed if other != name]:
        yield f"upgrading {name} changes {', '.join(others)}"


def check(root: Path) -> list[str]:
    """A line for every fault, and what was done on the standard output."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both, sources = pairs(root, folder)
        mixes, faults = mix_faults(both)
        faults += bound_faults(root, folder, both)
        if faults:
            return faults
        tell(f"{mixes} mixes of versions resolve, and every lower bound")
        return list(upgrade_faults(folder, both, sources))


def main() -> int:
    return status(check(parser(__doc__, root=ROOT).parse_args().root))


if __name__ == "__main__":
    run(main)
