"""The environments of the sessions: what the wheels declare, in the versions that are pinned."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nox

import distributions
import pip_settings
from distributions import ROOT as ROOT

TOOLS = ROOT / "tools"
CONSTRAINTS = TOOLS / "constraints.txt"
WHEELS = ROOT / ".nox" / "wheels"
DEMOS = "packages/*/examples/requirements.txt"
DISTRIBUTIONS = {found.name: found for found in distributions.discover(ROOT)}


def install(
    session: nox.Session,
    *requirements: str,
    into: str = "python",
    own_torch: bool = True,
    constraints: Path | None = CONSTRAINTS,
) -> None:
    """Make an environment hold exactly the requirements, in the versions of the constraints.

    `into` is the environment's Python. With `own_torch` false the environment sees the packages
    of the machine, torch among them.
    """
    options = ["--exact"]
    if constraints is not None:
        options += ["--constraints", str(constraints)]
    if into != "python":
        options += ["--python", into]
    with tempfile.TemporaryDirectory() as folder:
        if not own_torch:
            excluded = Path(folder, "excluded.txt")
            excluded.write_text("torch\n", encoding="utf-8")
            options += ["--excludes", str(excluded)]
        elif any(" @ " in requirement for requirement in requirements):
            session.log("Installing; the first time torch is downloaded, up to some GB")
        session.install(*options, *requirements, env=package_sources(session), log=False)
    if not own_torch and session.virtualenv.is_sandboxed:
        show_machine(session, into)


def show_machine(session: nox.Session, interpreter: str) -> None:
    """Let an environment import what the Python that runs nox can import."""
    folders = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
    find = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    own = session.run(interpreter, "-c", find, silent=True, log=False, external=True)
    Path(str(own), "machine.pth").write_text("\n".join(lines), encoding="utf-8")


def wheels(session: nox.Session, *packages: str, testing: bool = False) -> list[str]:
    """Requirements for the wheels of the packages and of shared-core, built where they changed."""
    if not session.virtualenv.is_sandboxed:
        return []
    names = dict.fromkeys([distributions.CORE, *packages])
    found = {name: wheel(session, DISTRIBUTIONS[name]) for name in names}
    return [
        f"{name}[testing] @ {path.as_uri()}"
        if testing and name == distributions.CORE
        else f"{name} @ {path.as_uri()}"
        for name, path in found.items()
    ]


def everything(session: nox.Session) -> list[str]:
    """Requirements for every wheel, and for every package's demonstration."""
    needed = wheels(session, *DISTRIBUTIONS, testing=True)
    for requirements in ROOT.glob(DEMOS):
        needed += ["-r", str(requirements)]
    return needed


def wheel(session: nox.Session, distribution: distributions.Distribution) -> Path:
    """The wheel of a distribution, from the cache unless a file of it changed."""
    key = distributions.content_key(distribution, CONSTRAINTS)
    folder = WHEELS / f"{distribution.name}-{key}"
    if not folder.is_dir():
        WHEELS.mkdir(parents=True, exist_ok=True)
        remove_unused(WHEELS)
        # Built beside its place and moved there whole.
        with tempfile.TemporaryDirectory(dir=WHEELS) as beside:
            out = Path(beside, "out")
            source = str(distribution.folder)
            uv(session, "build", "--wheel", "-b", str(CONSTRAINTS), "-o", str(out), source)
            if not out.is_dir():
                session.error(f"{distribution.name} has changed and is not built: run without -R")
            try:
                out.rename(folder)
            except OSError:
                # Another run was first, with the same wheel.
                if not folder.is_dir():
                    raise
    os.utime(folder)
    return next(folder.glob("*.whl"))


def remove_unused(folder: Path) -> None:
    """Remove what lies in a folder and was not used for a day."""
    for path in folder.iterdir():
        # What is no folder any more was removed by another run.
        if path.is_dir() and time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def group(name: str) -> list[str]:
    """A group of tools/pyproject.toml, as arguments of an install."""
    return ["--group", f"{TOOLS / 'pyproject.toml'}:{name}"]


def uv(session: nox.Session, *arguments: str) -> None:
    session.run_install("uv", *arguments, env=package_sources(session), silent=True, log=False)


def python(session: nox.Session) -> str:
    """The session's Python, or the one that runs nox where there is no environment."""
    return "python" if session.virtualenv.is_sandboxed else sys.executable


def safe_path(session: nox.Session) -> list[str]:
    """The option that keeps the working folder off Python's path, which 3.10 does not have."""
    version = session.python or f"{sys.version_info[0]}.{sys.version_info[1]}"
    return [] if version == "3.10" else ["-P"]


def package_sources(session: nox.Session) -> dict[str, str]:
    """What uv has to be told of pip's settings."""
    try:
        return pip_settings.uv_variables(read_pip_settings(), os.environ)
    except ValueError as error:
        session.error(str(error))


read_pip_settings = functools.cache(pip_settings.read)


def run_suite(session: nox.Session, suite: Path, *more: str) -> None:
    """Run the tests in a folder on what is installed."""
    options = ["-c", str(ROOT / ".pytest.ini"), "-p", "shared_core.testing.plugin", *more]
    with tempfile.TemporaryDirectory(prefix="tests-") as folder, session.chdir(folder):
        session.run(
            *(python(session), *safe_path(session), "-m", "pytest"),
            *(*options, *selected(session, suite)),
            # Where it is set, every one of the many child processes would compile torch anew.
            env={"PYTHONDONTWRITEBYTECODE": ""},
            log=False,
        )


def selected(session: nox.Session, suite: Path) -> list[str]:
    """Pytest's arguments: those of the command, and the suite unless they name files."""
    arguments, named = [], False
    for argument in session.posargs:
        file, colons, test = argument.partition("::")
        # A file is meant from where the command was typed.
        path = Path(session.invoked_from, file)
        named = named or path.is_file()
        arguments.append(f"{path}{colons}{test}" if path.is_file() else argument)
    return arguments if named else [*arguments, str(suite)]
