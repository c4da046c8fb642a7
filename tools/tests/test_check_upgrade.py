"""The proof of independence holds for a sound repository, and finds every fault planted."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement

from building import stub_wheel
from check_upgrade import Environment, bound_faults, check, mix_faults, pairs
from distributions import ROOT, discover
from graph import Offer, clashes, lower_bound

if TYPE_CHECKING:
    from conftest import Repository


@pytest.fixture
def three(released: Repository) -> Repository:
    """A core and two packages, changed since they were released as 1.0.0."""
    for name in ("shared-core", "a-one", "b-two"):
        released.write_source(name, "one = 2\n", "1.0.1")
    released.commit()
    return released


def edit(repository: Repository, name: str, old: str, new: str) -> None:
    under = "." if name == "shared-core" else "packages"
    path = repository.root / under / name / "pyproject.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def static_faults(repository: Repository, folder: Path) -> list[str]:
    """What can be found without pip."""
    both, _ = pairs(repository.root, folder)
    return mix_faults(both)[1] + list(bound_faults(repository.root, folder, both))


def test_sound_versions_upgrade_alone(
    three: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(three.root) == []
    out = capsys.readouterr().out
    assert "4 mixes of versions resolve" in out
    for name in ("shared-core", "a-one", "b-two"):
        assert f"{name} 1.0.0 -> 1.1.0 changes {name}\n" in out
    assert "pip installs shared-core 1.1.0, a-one 1.0.0, b-two 1.1.0" in out


def test_an_upgrade_that_writes_into_another_package(three: Repository) -> None:
    project = three.root / "packages" / "a-one" / "pyproject.toml"
    into = '\n[tool.hatch.build.targets.wheel.force-include]\n"LICENSE" = "b_two/__init__.py"\n'
    project.write_text(project.read_text() + into)
    # Whichever of the two comes later wins.
    assert check(three.root) == ["upgrading a-one changes b-two", "upgrading b-two changes a-one"]


def test_an_upgrade_that_needs_another(three: Repository, tmp_path: Path) -> None:
    edit(three, "a-one", '"torch>=2.5"', '"torch>=2.5", "b-two>=1.1"')
    mix, *_ = static_faults(three, tmp_path / "x")
    assert mix == "1 of 4 mixes: a-one 1.1.0 needs b-two>=1.1, which b-two 1.0.0 is not"


def test_a_released_cap_on_the_core(three: Repository, tmp_path: Path) -> None:
    three.git("checkout", "--quiet", "a-one-v1.0.0")
    edit(three, "a-one", "shared-core>=1.0.0", "shared-core>=1.0.0,<1.1")
    three.git("tag", "--delete", "a-one-v1.0.0")
    three.commit("a-one-v1.0.0")
    three.git("checkout", "--quiet", "main")
    reason = "a-one 1.0.0 needs shared-core<1.1,>=1.0.0, which shared-core 1.1.0 is not"
    assert static_faults(three, tmp_path / "x") == [f"2 of 4 mixes: {reason}"]


def test_two_packages_that_exclude_each_other(three: Repository, tmp_path: Path) -> None:
    edit(three, "a-one", "torch>=2.5", "torch>=2.5,<2.7")
    edit(three, "b-two", "torch>=2.5", "torch>=2.7")
    (fault,) = static_faults(three, tmp_path / "x")
    assert fault.startswith("1 of 4 mixes: b-two 1.1.0 needs torch>=2.7, which nothing left")


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        (
            "a-one",
            "shared-core>=1.0.0",
            "shared-core>=1.0.5",
            "a-one 1.1.0 needs shared-core 1.0.5, which is neither released nor here",
        ),
        ("a-one", "torch>=2.5", "torch", "a-one 1.1.0 declares no lower bound for torch"),
        (
            "a-one",
            '"torch>=2.5"',
            '"torch>=2.4"',
            "lower bounds of a-one 1.1.0: shared-core 1.0.0 needs torch>=2.5, "
            "which nothing left for the others is",
        ),
    ],
)
def test_a_lower_bound_that_does_not_resolve(
    three: Repository, tmp_path: Path, name: str, old: str, new: str, fault: str
) -> None:
    edit(three, name, old, new)
    assert static_faults(three, tmp_path / "x") == [fault]


def test_a_lower_bound_may_be_what_is_here(three: Repository, tmp_path: Path) -> None:
    edit(three, "a-one", "shared-core>=1.0.0", "shared-core>=1.0.1")
    assert static_faults(three, tmp_path / "x") == []


def test_without_releases_what_is_here_is_the_older(repository: Repository, tmp_path: Path) -> None:
    repository.add("a-one", dependencies='["torch>=2.5"]')
    both, sources = pairs(repository.root, tmp_path / "x")
    assert [str(offer) for offer in sources] == ["a-one 1.2.3", "a-one 1.3.0"]
    assert mix_faults(both) == (2, [])


def test_ours_resolve(tmp_path: Path) -> None:
    both, _ = pairs(ROOT, tmp_path)
    assert mix_faults(both) == (2 ** (len(both) - 1), [])
    assert list(bound_faults(ROOT, tmp_path, both)) == []


def test_pip_and_the_graph_agree(three: Repository, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    stub_wheel(wheels, "shared-core", "1.0.0")
    stub_wheel(wheels, "shared-core", "2.0.0")
    stub_wheel(wheels, "a-one", "1.0.1", ["shared-core<2"])
    edit(three, "a-one", "shared-core>=1.0.0", "shared-core<2")
    offers = {found.name: Offer.of(found) for found in discover(three.root)}
    environment = Environment(tmp_path / "environment", wheels)
    environment.install("a-one")
    assert environment.hashes()["shared-core"].keys() >= {"shared_core.py"}
    newer = Offer.of(discover(three.root)[0], "2.0.0")
    assert clashes([offers["shared-core"], offers["a-one"]], {}) == []
    assert len(clashes([newer, offers["a-one"]], {})) == 1
    with pytest.raises(subprocess.CalledProcessError):
        environment.install("a-one", "shared-core==2.0.0")


@pytest.mark.parametrize(
    ("text", "bound"), [("a>=1,<2", "1"), ("a==3.0", "3.0"), ("a<2", "None"), ("a>=1,>=1.5", "1.5")]
)
def test_lower_bounds(text: str, bound: str) -> None:
    assert str(lower_bound(Requirement(text))) == bound
