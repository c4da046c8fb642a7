"""Which distribution needs which, and which of their versions go together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import Version

from distributions import Distribution


@dataclass(frozen=True)
class Offer:
    """A version of a distribution, and what it needs on this interpreter."""

    name: str
    version: Version
    needs: tuple[Requirement, ...]

    @classmethod
    def of(cls, distribution: Distribution, version: str = "") -> Offer:
        needs = [Requirement(text) for text in distribution.dependencies]
        applying = tuple(need for need in needs if need.marker is None or need.marker.evaluate())
        return cls(distribution.name, Version(version or distribution.version), applying)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def needed_by(distributions: Iterable[Distribution], changed: Collection[str]) -> set[str]:
    """The names in `changed`, and of every distribution that needs one of them."""
    needs = {
        item.name: {Requirement(text).name for text in item.dependencies} for item in distributions
    }
    found: set[str] = set()
    more = set(changed)
    while more:
        found |= more
        more = {name for name, needed in needs.items() if needed & found} - found
    return found


def lower_bound(need: Requirement) -> Version | None:
    """The lowest version that a requirement names with >= or ==."""
    bounds = [Version(one.version) for one in need.specifier if one.operator in (">=", "==", "~=")]
    return max(bounds, default=None)


def clashes(chosen: Iterable[Offer], others: Mapping[str, Collection[Version]]) -> list[str]:
    """Why versions do not go together; nothing where they do.

    `others` gives the versions there are of what is not among the chosen.
    """
    offers = {offer.name: offer for offer in chosen}
    left = {name: set(versions) for name, versions in others.items()}
    faults = []
    for offer in offers.values():
        for need in offer.needs:
            name = need.name
            if name in offers:
                version = offers[name].version
                if not need.specifier.contains(version, prereleases=True):
                    faults.append(f"{offer} needs {need}, which {name} {version} is not")
            elif before := left.get(name, set()):
                left[name] = set(need.specifier.filter(before, prereleases=True))
                if not left[name]:
                    faults.append(f"{offer} needs {need}, which nothing left for the others is")
    return faults


def lowest(distribution: Distribution) -> list[str]:
    """The lowest version of everything that a distribution and its extras declare.

    Raises ValueError for a requirement without a lower bound.
    """
    pins = []
    for need in map(Requirement, (*distribution.dependencies, *distribution.optional)):
        if (bound := lower_bound(need)) is None:
            raise ValueError(f"{distribution.name} declares no lower bound for {need.name}")
        pins.append(f"{need.name}=={bound}")
    return pins
