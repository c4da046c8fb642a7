"""The sections of a CHANGELOG.md, after Keep a Changelog."""

from __future__ import annotations

import re

UNRELEASED = "Unreleased"
_HEADING = re.compile(r"^## \[([^]]+)\].*\n", re.MULTILINE)


def section(text: str, name: str) -> str | None:
    """What a changelog says of a version; None where it has no such section."""
    if (found := _find(text, name)) is None:
        return None
    return text[found[1] : found[2]].strip()


def release(text: str, version: str, date: str) -> str:
    """The changelog with a version dated: its own section, or else the unreleased one.

    Raises ValueError where that section says nothing.
    """
    name = version if section(text, version) is not None else UNRELEASED
    found = _find(text, name)
    if found is None:
        raise ValueError(f"the changelog has no section [{UNRELEASED}] or [{version}]")
    # Headings alone say nothing.
    if not re.sub(r"(?m)^#.*$", "", text[found[1] : found[2]]).strip():
        raise ValueError(f"the section [{name}] of the changelog is empty")
    heading, start, _ = found
    return f"{text[:heading]}## [{version}] - {date}\n{text[start:]}"


def _find(text: str, name: str) -> tuple[int, int, int] | None:
    """Where the heading of a section begins, where its text begins, and where that ends."""
    headings = list(_HEADING.finditer(text))
    ends = [match.start() for match in headings[1:]] + [len(text)]
    for match, end in zip(headings, ends, strict=False):
        if match[1].lower() == name.lower():
            return match.start(), match.end(), end
    return None
