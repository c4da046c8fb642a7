"""Public names that break are found; what is added or internal is no break."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from check_api import check
from distributions import ROOT

if TYPE_CHECKING:
    from conftest import Repository

BEFORE = """
from .inside import Place as Place, Shape as Shape, area as area

__all__ = ["Place", "Shape", "area"]
"""
INSIDE = """
from typing import NamedTuple


class Place(NamedTuple):
    x: int
    y: int

    def far(self) -> int:
        return self.x + self.y


class Shape:
    def __init__(self, n: int, m: int = 1, *, k: int = 2) -> None:
        self.n = n

    def grow(self, by: int) -> None: ...

    def _inner(self) -> None: ...


def area(shape: Shape, scale: float = 1.0) -> float:
    return helper(shape) * scale


def helper(shape: Shape) -> float:
    return 1.0
"""


@pytest.fixture
def shapes(repository: Repository) -> Path:
    """A core and a package with the same names, released; returns the package's folder."""
    for name, under in (("shared-core", "."), ("a-one", "packages")):
        folder = repository.add(name, under=under)
        repository.write_source(name, BEFORE, "1.0.0")
        (folder / "src" / name.replace("-", "_") / "inside.py").write_text(INSIDE)
    repository.commit("shared-core-v1.0.0", "a-one-v1.0.0")
    return folder


def edit(folder: Path, old: str, new: str, file: str = "inside.py") -> None:
    path = folder / "src" / folder.name.replace("-", "_") / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def root(folder: Path) -> Path:
    return folder.parents[1]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (", scale: float = 1.0", "", "area: parameter was removed (scale)"),
        ("scale: float = 1.0", "scale: float", "area: parameter is now required (scale)"),
        ("scale: float = 1.0", "scale: float = 2", "area: parameter default was changed (scale)"),
        ("scale: float = 1.0", "*, scale: float = 1.0", "area: parameter kind was changed (scale)"),
        ("scale: float = 1.0", "size: float = 1.0", "area: parameter was removed (scale)"),
        ("n: int, m: int = 1", "m: int, n: int = 1", "positional parameter was moved (n)"),
        ("def grow", "def shrink", "Shape.grow: public object was removed"),
        ("by: int", "by: int, at: int", "Shape.grow: parameter was added as required (at)"),
        ("def area(", "def volume(", "area: leads nowhere"),
        ("    y: int\n", "    y: int\n    z: int = 0\n", "Place: its fields were x, y"),
        ("    x: int\n    y: int\n", "    y: int\n    x: int\n", "Place: its fields were x, y"),
        ("class Shape:", "def Shape(n: int):", "Shape: public object points to a different kind"),
    ],
)
def test_a_break_is_found(shapes: Path, old: str, new: str, fault: str) -> None:
    edit(shapes, old, new)
    found = list(check(root(shapes)))
    assert any(fault in line for line in found), found
    assert all(line.endswith(", in a-one 1.0.0 after 1.0.0") for line in found)


def test_a_name_that_is_no_longer_exported(shapes: Path) -> None:
    edit(shapes, '"Shape", ', "", "__init__.py")
    assert list(check(root(shapes))) == [
        "a_one.Shape: no longer exported, in a-one 1.0.0 after 1.0.0"
    ]
    edit(shapes, ", area as area", "", "__init__.py")
    edit(shapes, '"area"', "", "__init__.py")
    assert len(list(check(root(shapes)))) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("helper", "inner"),
        ("k: int = 2", "k: int = 2, more: int = 3"),
        ("def _inner(self) -> None: ...", "def more(self) -> None: ..."),
        ("return 1.0", "return 2.0"),
        ("by: int", "by: float"),
        ("def far(", "def near(self) -> int: ...\n\n    def far("),
    ],
)
def test_what_adds_or_is_internal_is_no_break(shapes: Path, old: str, new: str) -> None:
    edit(shapes, old, new)
    assert list(check(root(shapes))) == []


def test_a_new_version_alone_is_no_break(shapes: Path) -> None:
    edit(shapes, "1.0.0", "1.1.0", "__init__.py")
    assert list(check(root(shapes))) == []


def test_a_package_may_break_with_a_major_version_and_the_core_never(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = root(shapes) / "shared-core"
    for folder in (shapes, core):
        edit(folder, "def grow", "def shrink")
        edit(folder, "1.0.0", "2.0.0", "__init__.py")
    (fault,) = check(root(shapes))
    assert fault.startswith("shared_core.inside.Shape.grow: public object was removed, in shared")
    assert "  a_one.inside.Shape.grow: public object was removed" in capsys.readouterr().out


def test_a_module_with_names_of_its_own_is_public(shapes: Path, repository: Repository) -> None:
    edit(shapes, INSIDE, f'__all__ = ["helper"]\n{INSIDE}')
    repository.commit("a-one-v1.1.0")
    edit(shapes, "helper", "inner")
    (fault,) = check(root(shapes))
    assert fault.startswith("a_one.inside.helper: no longer exported, in a-one 1.0.0 after 1.1.0")


def test_compared_with_the_newest_release(shapes: Path, repository: Repository) -> None:
    edit(shapes, "def grow", "def shrink")
    repository.commit("a-one-v1.10.0", "a-one-v1.9.0-rc1", "a-one-v1.x")
    assert list(check(root(shapes))) == []
    repository.git("tag", "a-one-v1.9.0", "HEAD~")
    assert list(check(root(shapes))) == []


def test_without_a_release_it_says_so(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.add("a-one")
    for tags in ([], ["b-two-v1.0.0", "a-one-vx"]):
        repository.commit(*tags)
        assert list(check(repository.root)) == []
        assert capsys.readouterr().out == "a-one has no release to compare with\n"


def test_a_tag_of_something_else(repository: Repository) -> None:
    repository.add("b-two")
    repository.commit("a-one-v1.0.0")
    repository.add("a-one")
    with pytest.raises(ValueError, match=r"^a-one-v1.0.0 holds no a-one$"):
        list(check(repository.root))


def test_an_unpacked_archive_has_no_releases(repository: Repository) -> None:
    repository.add("a-one")
    assert list(check(repository.root)) == []


def test_ours_have_not_broken() -> None:
    assert list(check(ROOT)) == []
