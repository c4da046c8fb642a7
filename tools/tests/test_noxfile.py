"""The sessions: packages are found by themselves, and a GPU is never needed by default."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from uv import find_uv_bin

import environments
from distributions import CORE, ROOT, content_key, discover
from workers import load_module

if TYPE_CHECKING:
    from conftest import Repository


@pytest.fixture
def copy(repository: Repository) -> Path:
    """The noxfile and the tools, over the projects that we have and one more."""
    root = repository.root
    shutil.copy(ROOT / "noxfile.py", root)
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("tests"))
    for found in discover():
        folder = root / found.folder.relative_to(ROOT)
        folder.mkdir(parents=True)
        shutil.copy(found.folder / "pyproject.toml", folder)
    repository.add("throw-away")
    return root


def nox(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "NOXSESSION"}
    return subprocess.run(
        [sys.executable, "-m", "nox", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sessions(root: Path, *arguments: str) -> list[dict[str, Any]]:
    listing: list[dict[str, Any]] = json.loads(nox(root, "--list", "--json", *arguments).stdout)
    return listing


def test_a_package_is_a_folder_and_nothing_else(copy: Path) -> None:
    (copy / "packages" / "throw-away" / "benchmarks").mkdir()
    (copy / "packages" / "throw-away" / "benchmarks" / "reference.txt").touch()
    listed = sessions(copy, "-s", "tests", "bench", "parity")
    calls = [(session["name"], session["call_spec"]) for session in listed]
    for call in (
        ("tests", {"package": "throw-away", "device": "cpu"}),
        ("tests", {"package": "throw-away", "device": "gpu"}),
        ("bench", {"package": "throw-away"}),
        ("parity", {"package": "throw-away"}),
    ):
        assert call in calls


def test_a_package_without_a_reference_is_compared_with_none(copy: Path) -> None:
    listed = sessions(copy, "-s", "tests", "lowest", "bench", "parity")
    names = {s["name"] for s in listed if s["call_spec"].get("package") == "throw-away"}
    assert names == {"tests", "lowest"}


def test_the_default_sessions(copy: Path) -> None:
    names = [found.name for found in discover(copy)]
    assert [session["session"] for session in sessions(copy)] == [
        "lint",
        *(f"tests(package='{name}', device='cpu')" for name in [*names, "tools"]),
        "typing",
        "dist",
        "api",
        "compat",
        "upgrade",
        "workflows",
    ]


def test_tags_select_by_device(copy: Path) -> None:
    for tag, more in (("cpu", {"tools"}), ("gpu", set())):
        calls = [session["call_spec"] for session in sessions(copy, "-t", tag)]
        assert {call["device"] for call in calls} == {tag}
        assert {call["package"] for call in calls} == {f.name for f in discover(copy)} | more


def test_demo_names_the_packages_there_are(copy: Path) -> None:
    result = nox(copy, "-s", "demo", "--", "nothing", "--option")
    assert result.returncode == 1
    names = ", ".join(f.name for f in discover(copy) if f.name != CORE)
    assert "throw-away" in names
    assert f"no package named nothing; there are {names}" in result.stderr


def test_a_wrong_name_keeps_the_environment_of_the_demo(copy: Path) -> None:
    nox(copy, "-s", "demo", "--", "nothing")
    installed = copy / ".nox" / "demo" / "installed"
    installed.touch()
    nox(copy, "-s", "demo", "--", "nothing")
    assert installed.exists()


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    """Our noxfile as a module, of which there can be one only."""
    return load_module(ROOT / "noxfile.py")


@pytest.fixture(autouse=True)
def _wheels_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels are kept in a folder of the test's own, and are empty."""
    monkeypatch.setattr(environments, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(environments, "uv", build_empty)


def build_empty(_: StandIn, *arguments: str) -> None:
    out = Path(arguments[arguments.index("-o") + 1])
    out.mkdir()
    (out / "empty.whl").touch()


class StandIn:
    """What the noxfile uses of a session."""

    def __init__(self, folder: Path, *posargs: str) -> None:
        self.posargs = posargs
        self.invoked_from = str(folder)
        self.virtualenv = SimpleNamespace(is_sandboxed=True, location=str(folder))
        self.logged: list[str] = []
        self.log = self.logged.append

    def chdir(self, _: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def install(self, *_: str, **__: object) -> None: ...

    def run(self, *_: str, **__: object) -> str:
        return self.virtualenv.location

    def run_install(self, *arguments: str, **_: object) -> None:
        command = [find_uv_bin(), *arguments[1:]]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(message)


def test_a_second_run_takes_the_environment_of_the_reference_again(
    noxfile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = StandIn(tmp_path)
    monkeypatch.setattr(noxfile, "wheels", lambda *_: [])
    for _ in range(2):
        noxfile.against_reference(session, "h-transformer-1d", "bench.py")
        assert (tmp_path / "reference" / "bin" / "python").exists()


def test_a_wheel_that_another_run_builds_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (core, *_) = discover()
    key = content_key(core, environments.CONSTRAINTS)
    folder = environments.WHEELS / f"{core.name}-{key}"

    def build_late(session: StandIn, *arguments: str) -> None:
        build_empty(session, *arguments)
        build_empty(session, "-o", str(folder))

    monkeypatch.setattr(environments, "uv", build_late)
    assert environments.wheel(StandIn(tmp_path), core) == folder / "empty.whl"
    assert list(environments.WHEELS.iterdir()) == [folder]


def test_a_wheel_that_may_not_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So does nox -R.
    monkeypatch.setattr(environments, "uv", lambda *_: None)
    with pytest.raises(SystemExit, match="shared-core has changed and is not built"):
        environments.wheel(StandIn(tmp_path), discover()[0])


def test_wheels_that_are_not_used_go(tmp_path: Path) -> None:
    core, other, *_ = discover()
    first = environments.wheel(StandIn(tmp_path), core)
    for name, age in ((first.parent.name, 2), ("old", 2), ("new", 0.5)):
        (environments.WHEELS / name).mkdir(exist_ok=True)
        os.utime(environments.WHEELS / name, (time.time() - age * 24 * 3600,) * 2)
    assert environments.wheel(StandIn(tmp_path), core) == first
    second = environments.wheel(StandIn(tmp_path), other)
    left = {path.name for path in environments.WHEELS.iterdir()}
    assert left == {first.parent.name, second.parent.name, "new"}


def test_an_install_of_our_wheels_says_that_it_takes_a_while(tmp_path: Path) -> None:
    for requirement, own_torch, lines in (
        ("ruff", True, 0),
        ("a @ b", True, 1),
        ("a @ b", False, 0),
    ):
        session = StandIn(tmp_path)
        environments.install(session, requirement, own_torch=own_torch)
        assert len(session.logged) == lines


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ([], "cpu"),
        (["--device", "cuda"], "cuda"),
        (["--only", "x", "--device=cuda", "--quick"], "cuda"),
        (["--only", "cuda"], "cpu"),
    ],
)
def test_the_device_of_a_comparison(noxfile: ModuleType, options: list[str], device: str) -> None:
    assert noxfile.device(options) == device


def test_a_file_takes_the_place_of_the_suite(tmp_path: Path) -> None:
    def selected(*arguments: str) -> list[str]:
        found: list[str] = environments.selected(StandIn(tmp_path, *arguments), Path("/suite"))
        return found

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").touch()
    file = f"{tmp_path}/tests/test_x.py"
    assert selected("-x", "tests/test_x.py") == ["-x", file]
    assert selected("tests/test_x.py::test_one[a::b]") == [f"{file}::test_one[a::b]"]
    # A word that also names a folder is none.
    assert selected("-k", "tests") == ["-k", "tests", "/suite"]
    assert selected() == ["/suite"]


def test_sources_that_are_not_known_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise ValueError("pip failed")

    monkeypatch.setattr(environments, "read_pip_settings", fail)
    with pytest.raises(SystemExit, match=r"^pip failed$"):
        environments.package_sources(StandIn(tmp_path))


def bounds(
    noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, except_for: set[str]
) -> tuple[list[str], str]:
    """The requirements and the constraints that a session at the lower bounds installs."""
    seen: list[tuple[list[str], str]] = []

    def install(_: StandIn, *requirements: str, constraints: Path) -> None:
        seen.append((list(requirements), constraints.read_text()))

    monkeypatch.setattr(noxfile, "install", install)
    monkeypatch.setattr(noxfile, "run_suite", lambda *_: None)
    noxfile.run_at_bounds(StandIn(tmp_path), "h-transformer-1d", except_for=except_for)
    return seen[0]


def test_lower_bounds_are_installed_and_not_constrained(
    noxfile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, constraints = bounds(noxfile, monkeypatch, tmp_path, {"torch"})
    assert found[0].startswith("shared-core[testing] @ file:")
    assert found[2:] == ["einops==0.8", "rotary-embedding-torch==0.7"]
    names = {line.partition("==")[0] for line in constraints.splitlines()}
    assert "torch" in names
    assert not names & {"einops", "rotary-embedding-torch"}


@pytest.mark.parametrize(("bound", "asked"), [("1.0", []), ("1.0.0", []), ("0.9", ["0.9"])])
def test_the_lower_bound_of_the_core_is_a_release(
    noxfile: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bound: str,
    asked: list[str],
) -> None:
    """A package that uses what came later than its bound must not be tested with what is here."""
    core, found = noxfile.DISTRIBUTIONS[CORE], []

    def find(root: Path, name: str, version: str) -> Any:
        found.append(version)
        assert (root, name) == (ROOT, CORE)
        return SimpleNamespace(unpack=lambda _: core)

    monkeypatch.setattr(noxfile.graph, "lowest", lambda _: [f"{CORE}=={bound}", "torch==2.5"])
    monkeypatch.setattr(noxfile.releases, "find", find)
    monkeypatch.setattr(type(core), "version", "1.0.0")
    bounds(noxfile, monkeypatch, tmp_path, {"torch"})
    assert found == asked


def test_the_lower_bound_of_torch_alone(
    noxfile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"einops", "rotary-embedding-torch", CORE}
    found, constraints = bounds(noxfile, monkeypatch, tmp_path, others)
    assert found[2:] == ["torch==2.5"]
    # Torch pins what it needs, and old ones need other versions.
    assert constraints == ""


def test_what_runs_by_night(copy: Path) -> None:
    names = {session["name"] for session in sessions(copy, "-t", "nightly")}
    assert names == {"lowest", "lowest_torch", "newest", "slow"}
    assert "parity" in {session["name"] for session in sessions(ROOT, "-t", "nightly")}


def test_the_long_tests_are_asked_for(noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(noxfile, "run_tests", lambda *arguments: asked.append(arguments))
    noxfile.slow.func("session", "memformer")
    assert asked == [("session", "memformer", "cpu", "--slow")]
