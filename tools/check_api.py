"""Compare the public names of every distribution with its last release.

    python tools/check_api.py [--root FOLDER]

Public is what a module lists in __all__, and what belongs to that. A removed name, a changed kind,
or a signature that refuses what it took is a break. A package may break with a new major version;
shared-core never may.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import griffe
from packaging.version import Version

from command import parser, run, status, tell
from distributions import CORE, ROOT, Distribution, discover
from releases import newest


def breaks(before: Distribution, now: Distribution) -> Iterator[str]:
    """A line for every public name that does not do what it did."""
    old, new = _public(before), _public(now)
    missing = dict(_missing(old, new))
    for path, what in missing.items():
        yield f"{path}: {what}"
    for fault in griffe.find_breaking_changes(old, new):
        # The version changes with every release.
        if fault.obj.path not in missing and fault.obj.name != "__version__":
            values = (getattr(value, "name", value) for value in (fault.old_value, fault.new_value))
            named = " -> ".join(dict.fromkeys(str(value) for value in values if value))
            details = f" ({named})" if named and fault.obj.name != named else ""
            yield f"{fault.obj.canonical_path}: {fault.kind.value.lower()}{details}"
    fields = _fields(new)
    for path, names in _fields(old).items():
        # They are unpacked, so that one more is a break, too.
        if names != fields.get(path, names):
            yield f"{path}: its fields were {', '.join(names)}"


def _fields(module: griffe.Module) -> dict[str, list[str]]:
    """The fields, in their order, of every public class that is a NamedTuple."""
    found: dict[str, list[str]] = {}
    for inner in _modules(module):
        for name in map(str, inner.exports or ()):
            if not _leads_somewhere(inner, name):
                continue
            member = inner.members[name]
            target = member.final_target if isinstance(member, griffe.Alias) else member
            if isinstance(target, griffe.Class) and "NamedTuple" in map(str, target.bases):
                found[f"{inner.path}.{name}"] = [
                    field
                    for field, value in target.members.items()
                    if isinstance(value, griffe.Attribute) and value.annotation is not None
                ]
    return found


def _missing(old: griffe.Module, new: griffe.Module) -> Iterator[tuple[str, str]]:
    """Exported names that are not exported any more, or lead nowhere, which griffe leaves out."""
    for name in map(str, old.exports or ()):
        if name not in map(str, new.exports or ()):
            yield f"{old.path}.{name}", "no longer exported"
        elif _leads_somewhere(old, name) and not _leads_somewhere(new, name):
            yield f"{old.path}.{name}", "leads nowhere"
    for name, inner in old.modules.items():
        if name in new.modules:
            yield from _missing(inner, new.modules[name])


def _leads_somewhere(module: griffe.Module, name: str) -> bool:
    member = module.members.get(name)
    if not isinstance(member, griffe.Alias):
        return member is not None
    try:
        return member.final_target is not None
    except griffe.GriffeError:
        return False


def _public(distribution: Distribution) -> griffe.Module:
    """What a distribution offers, read from its source without running it."""
    path = [str(distribution.folder / "src")]
    loaded = griffe.load(
        distribution.import_name, search_paths=path, allow_inspection=False, resolve_aliases=True
    )
    if not isinstance(loaded, griffe.Module):
        raise ValueError(f"{distribution.import_name} is no package")
    for module in _modules(loaded):
        # Griffe takes every module for public. Ours are where they say what they export.
        module.public = module.exports is not None or any(
            inner.public for inner in module.modules.values()
        )
    return loaded


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    """A module and all within it, the innermost first."""
    for inner in module.modules.values():
        yield from _modules(inner)
    yield module


def check(root: Path) -> Iterator[str]:
    """A line for every break that the version does not allow."""
    for now in discover(root):
        release = newest(root, now.name)
        if release is None:
            tell(f"{now.name} has no release to compare with")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = list(breaks(release.unpack(Path(folder)), now))
        allowed = now.name != CORE and Version(now.version).major > release.version.major
        tell(f"{now.name} {now.version} after {release.version}: {len(found)} breaks")
        for line in found:
            if allowed:
                tell(f"  {line}")
            else:
                yield f"{line}, in {now.name} {now.version} after {release.version}"


def main() -> int:
    return status(check(parser(__doc__, root=ROOT).parse_args().root))


if __name__ == "__main__":
    run(main)
