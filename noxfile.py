"""Every check that a person or a runner executes. `nox --list` shows the sessions.

Environments are made by uv from what the wheels declare and tools/constraints.txt pins. On a
machine that is prepared already, `nox --no-venv --no-install` uses what is installed there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

import distributions
import graph
import releases
from environments import (
    CONSTRAINTS,
    DEMOS,
    DISTRIBUTIONS,
    ROOT,
    TOOLS,
    everything,
    group,
    install,
    python,
    run_suite,
    uv,
    wheel,
    wheels,
)

PACKAGES = [name for name in DISTRIBUTIONS if name != distributions.CORE]
REFERENCE = Path("benchmarks", "reference.txt")
COMPARED = [name for name in PACKAGES if (DISTRIBUTIONS[name].folder / REFERENCE).is_file()]
SUITES = [(name, device) for name in DISTRIBUTIONS for device in ("cpu", "gpu")]
SUITES.append(("tools", "cpu"))

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = [
    "lint",
    *(f"tests(package='{name}', device='cpu')" for name, device in SUITES if device == "cpu"),
    "typing",
    "dist",
    "api",
    "compat",
    "upgrade",
    "workflows",
]


@nox.session(tags=["static"])
def lint(session: nox.Session) -> None:
    """Check style and format; `nox -s lint -- --fix` mends what can be mended."""
    install(session, *group("lint"))
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".", log=False)
    session.run("ruff", "format", *([] if fix else ["--check"]), ".", log=False)


@nox.session
@nox.parametrize(
    "package, device", [nox.param(name, device, tags=[device]) for name, device in SUITES]
)
def tests(session: nox.Session, package: str, device: str) -> None:
    """Test an installed wheel, away from its source (what follows -- goes to pytest)."""
    run_tests(session, package, device)


@nox.session(tags=["nightly"])
@nox.parametrize("package", [name for name, device in SUITES if device == "cpu"])
def slow(session: nox.Session, package: str) -> None:
    """Run the same tests, and the long ones too."""
    run_tests(session, package, "cpu", "--slow")


@nox.session(tags=["static"])
def typing(session: nox.Session) -> None:
    """Check types strictly, and that the public names of every wheel are typed."""
    install(session, *everything(session), *group("typing"))
    sources = [str(found.source) for found in DISTRIBUTIONS.values()]
    session.run("mypy", *sources, "noxfile.py", *map(str, TOOLS.glob("*.py")), log=False)
    for kind in ("examples", "benchmarks"):
        for folder in ROOT.glob(f"packages/*/{kind}"):
            # Apart, since every package has a demo.py and a bench_cases.py.
            path = os.pathsep.join(map(str, (TOOLS, folder.with_name("examples"))))
            session.run("mypy", str(folder), env={"MYPYPATH": path}, log=False)
    for found in DISTRIBUTIONS.values():
        verify = ("pyright", "--ignoreexternal", "--verifytypes", found.import_name)
        # Long, and shown only where it fails.
        session.run(*verify, silent=True, log=False)
        session.log(f"{found.import_name}: every public name is typed")


@nox.session(tags=["static"])
def dist(session: nox.Session) -> None:
    """Build every wheel and sdist twice, compare the bytes, and check metadata and contents."""
    install(session, *group("dist"))
    session.run(python(session), str(TOOLS / "check_dist.py"), log=False)
    session.run(python(session), str(TOOLS / "check_core.py"), log=False)


@nox.session(tags=["static"])
def api(session: nox.Session) -> None:
    """Compare the public names of every distribution with its last release."""
    install(session, *group("release"))
    session.run(python(session), str(TOOLS / "check_api.py"), log=False)


@nox.session(tags=["static"])
def compat(session: nox.Session) -> None:
    """Run the tests of every released package on the shared-core that is here."""
    needed = wheels(session, *DISTRIBUTIONS, testing=True)
    extras = [text for found in DISTRIBUTIONS.values() for text in found.optional]
    install(session, *needed, *(extras if needed else ()), *group("release"))
    session.run(python(session), str(TOOLS / "check_compat.py"), log=False)


@nox.session(tags=["static"])
def upgrade(session: nox.Session) -> None:
    """Prove that each wheel upgrades alone and that every mix of versions resolves."""
    install(session, *group("release"))
    session.run(python(session), str(TOOLS / "check_upgrade.py"), log=False)


@nox.session(tags=["static"])
def workflows(session: nox.Session) -> None:
    """Check the workflows, and that they run what a bare nox does."""
    install(session, *group("workflows"))
    session.run(python(session), str(TOOLS / "check_workflows.py"), *session.posargs, log=False)


@nox.session(tags=["nightly"])
@nox.parametrize("package", PACKAGES)
def lowest(session: nox.Session, package: str) -> None:
    """Test a wheel with the lowest versions that it declares, except torch's."""
    run_at_bounds(session, package, except_for={"torch"})


@nox.session(tags=["nightly"])
@nox.parametrize("package", PACKAGES)
def lowest_torch(session: nox.Session, package: str) -> None:
    """Test a wheel with the lowest torch that it declares."""
    others = {Requirement(text).name for text in DISTRIBUTIONS[package].dependencies} - {"torch"}
    run_at_bounds(session, package, except_for=others)


@nox.session(tags=["nightly"])
@nox.parametrize("package", list(DISTRIBUTIONS))
def newest(session: nox.Session, package: str) -> None:
    """Test a wheel with the newest torch and the newest of everything else."""
    needed = wheels(session, package, testing=True)
    needed += DISTRIBUTIONS[package].optional if needed else ()
    install(session, *needed, constraints=None)
    run_suite(session, DISTRIBUTIONS[package].folder / "tests")


@nox.session
def audit(session: nox.Session) -> None:
    """Look for known vulnerabilities in what tools/constraints.txt pins (asks PyPI)."""
    install(session, *group("audit"))
    # Strict: what cannot be looked up is a fault, too.
    options = ("--strict", "--disable-pip", "--no-deps", "-r", str(CONSTRAINTS))
    session.run("pip-audit", *options, log=False)


@nox.session
def release(session: nox.Session) -> None:
    """Prepare a release: nox -s release -- DIST BUMP [--write]; a dry run by default."""
    install(session, *group("release"))
    session.run(python(session), str(TOOLS / "release.py"), *session.posargs, log=False)


@nox.session
def assets(session: nox.Session) -> None:
    """Make the files of a release: nox -s assets -- TAG --url URL --out FOLDER."""
    install(session, *group("release"))
    with session.chdir(session.invoked_from):
        session.run(python(session), str(TOOLS / "assets.py"), *session.posargs, log=False)


# With its environment kept, a package's name that is wrong costs nothing.
@nox.session(reuse_venv=True)
def demo(session: nox.Session) -> None:
    """Run a package's demonstration: nox -s demo -- [package] [options]."""
    package, options = "h-transformer-1d", list(session.posargs)
    if options and not options[0].startswith("-"):
        package = options.pop(0)
    if package not in PACKAGES:
        session.error(f"no package named {package}; there are {', '.join(PACKAGES)}")
    examples = DISTRIBUTIONS[package].folder / "examples"
    install(session, *wheels(session, package), "-r", str(examples / "requirements.txt"))
    # A path among the options is meant from where the command was typed.
    with session.chdir(session.invoked_from):
        command = (python(session), str(examples / "demo.py"), *options)
        session.run(*command, env={"PYTHONPATH": str(TOOLS)}, log=False)


@nox.session
@nox.parametrize("package", COMPARED)
def bench(session: nox.Session, package: str) -> None:
    """Measure a package against its reference and write benchmarks/RESULTS.md."""
    against_reference(session, package, "bench.py")


@nox.session(tags=["nightly"])
@nox.parametrize("package", COMPARED)
def parity(session: nox.Session, package: str) -> None:
    """Compare a package with its reference on the same weights and inputs."""
    against_reference(session, package, "parity.py")


@nox.session
def pin(session: nox.Session) -> None:
    """Resolve tools/constraints.txt anew; `-- --upgrade` takes the newest versions."""
    core = wheel(session, DISTRIBUTIONS[distributions.CORE])
    sources = [str(found.folder / "pyproject.toml") for found in DISTRIBUTIONS.values()]
    sources += map(str, ROOT.glob(DEMOS))
    groups = ("lint", "typing", "tools", "parallel", "audit", "torch")
    options = ["--universal", "--python-version", "3.10", "--all-extras", "--no-annotate"]
    # This find-links replaces the machine's, whose local versions would not exist elsewhere.
    options += ["--find-links", str(core.parent), "--no-emit-package", distributions.CORE]
    options += ["--custom-compile-command", "nox -s pin", "--output-file", str(CONSTRAINTS)]
    groups_of_tools = [argument for name in groups for argument in group(name)]
    uv(session, "pip", "compile", *options, *session.posargs, *sources, *groups_of_tools)


def run_tests(session: nox.Session, package: str, device: str, *options: str) -> None:
    """Test what is installed from a wheel, or the tools."""
    if package == "tools":
        suite = TOOLS / "tests"
        install(session, *everything(session), *group("tools"))
    else:
        suite = DISTRIBUTIONS[package].folder / "tests"
        needed = wheels(session, package, testing=True)
        # Extras, too: what they make possible is to be tested.
        needed += DISTRIBUTIONS[package].optional if needed else ()
        needed += group("parallel") if device == "cpu" else ()
        install(session, *needed, own_torch=device == "cpu")
    options += ("--device", "cuda" if device == "gpu" else "cpu")
    # Those of the tools start processes of their own, which have to keep time.
    if package != "tools" and device == "cpu" and session.virtualenv.is_sandboxed:
        # Each test uses one core; `-- -n0` runs them in one process, as a debugger needs it.
        options += ("-n", "auto", "--maxprocesses", "4")
    run_suite(session, suite, *options)


def run_at_bounds(session: nox.Session, package: str, *, except_for: set[str]) -> None:
    """Test a wheel with the lower bounds that it declares, except for some."""
    found = DISTRIBUTIONS[package]
    pins = [pin for pin in graph.lowest(found) if Requirement(pin).name not in except_for]
    bounds = {Requirement(pin).name: pin.partition("==")[2] for pin in pins}
    pins = [pin for pin in pins if Requirement(pin).name != distributions.CORE]
    with tempfile.TemporaryDirectory() as folder:
        core = DISTRIBUTIONS[distributions.CORE]
        if core.name in bounds and Version(core.version) != Version(bounds[core.name]):
            core = releases.find(ROOT, core.name, bounds[core.name]).unpack(Path(folder))
        needed = [f"{core.name}[testing] @ {wheel(session, core).as_uri()}"]
        needed += [f"{package} @ {wheel(session, found).as_uri()}", *found.optional]
        # What is pinned twice cannot be installed, and torch pins much of the rest itself.
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.partition("==")[0] not in bounds]
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("".join([] if "torch" in bounds else kept), encoding="utf-8")
        install(session, *needed, *pins, constraints=constraints)
    run_suite(session, found.folder / "tests")


def against_reference(session: nox.Session, package: str, script: str) -> None:
    """Run tools/<script> with our wheel; it calls the reference, which has an environment too."""
    own_torch = device(session.posargs) != "cuda"
    ours = wheels(session, package)
    ours += DISTRIBUTIONS[package].optional if ours else ()
    install(session, *ours, *group("compare"), own_torch=own_torch)
    command = [python(session), str(TOOLS / script), package]
    if session.virtualenv.is_sandboxed:
        theirs = Path(session.virtualenv.location, "reference")
        uv(session, "venv", "--clear", str(theirs))
        needed = ["-r", str(DISTRIBUTIONS[package].folder / REFERENCE)]
        interpreter = str(theirs / "bin" / "python")
        install(session, *needed, *group("compare"), into=interpreter, own_torch=own_torch)
        command += ["--reference-python", interpreter]
    with session.chdir(session.invoked_from):
        session.run(*command, *session.posargs, log=False)


def device(options: list[str]) -> str:
    """What --device says among the options of bench.py or parity.py."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cpu")
    return str(parser.parse_known_args(options)[0].device)
