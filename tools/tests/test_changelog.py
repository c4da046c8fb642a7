"""Sections of a changelog are found and dated, and an empty one is refused."""

from __future__ import annotations

import pytest

from changelog import release, section

TEXT = """# Changelog

Words.

## [Unreleased]

### Added

- A thing.

## [1.0.0] - 2026-01-01

The first.
"""


def test_a_section_is_what_lies_below_its_heading() -> None:
    assert section(TEXT, "Unreleased") == "### Added\n\n- A thing."
    assert section(TEXT, "1.0.0") == "The first."
    assert section(TEXT, "1.0") is None
    assert section("# Changelog\n", "1.0.0") is None


def test_the_unreleased_section_becomes_the_version() -> None:
    dated = release(TEXT, "1.1.0", "2026-02-03")
    assert dated == TEXT.replace("[Unreleased]", "[1.1.0] - 2026-02-03")


def test_a_section_of_the_version_is_dated_anew() -> None:
    dated = release(TEXT, "1.0.0", "2026-02-03")
    assert dated == TEXT.replace("2026-01-01", "2026-02-03")


def test_a_section_that_says_nothing() -> None:
    empty = TEXT.replace("- A thing.\n", "")
    with pytest.raises(ValueError, match=r"^the section \[Unreleased\] of the changelog is empty$"):
        release(empty, "1.1.0", "2026-02-03")
    with pytest.raises(ValueError, match=r"no section \[Unreleased\] or \[1.1.0\]"):
        release("# Changelog\n", "1.1.0", "2026-02-03")
