"""Check the workflows in .github, dependabot.yml and the issue forms.

    python tools/check_workflows.py [--online] [--root FOLDER]

Every file fits its schema, zizmor finds nothing, every action is pinned to a commit with its
version beside it, and the jobs of ci.yml are the sessions that a bare `nox` runs: the step that
plans them is run as it stands there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from command import parser, run, status, tell
from distributions import ROOT, discover
from selection import nox_list

# Schemas that check-jsonschema brings along, and the files under .github that must fit.
SCHEMAS = {
    "vendor.github-workflows": "workflows/*.y*ml",
    "custom.github-workflows-require-timeout": "workflows/*.y*ml",
    "vendor.dependabot": "dependabot.yml",
    "vendor.github-issue-forms": "ISSUE_TEMPLATE/[!c]*.yml",
    "vendor.github-issue-config": "ISSUE_TEMPLATE/config.yml",
}
# What the gates of a release run, and on what the jobs after them depend.
GATES = (
    'git tag --delete "$TAG"',
    "nox",
    "nox -s \"lowest(package='${TAG%-v*}')\"",
)
RELEASED = {
    "gates": None,
    "attest": None,
    "publish": "contains(fromJSON(vars.PUBLISH || '[]'), needs.build.outputs.name)",
}
# Of a package alone: the core has no lower bound of ours, and needs no released core.
CONDITIONAL = (GATES[2],)
_USES = re.compile(r"^\s*(?:- )?uses:\s*(\S+)(.*)$", re.MULTILINE)
_PINNED = re.compile(r"[\w./-]+@[0-9a-f]{40}")
_VERSION = re.compile(r" # v\d+\.\d+\.\d+")
_MATRIX = re.compile(r"\$\{\{ fromJSON\(needs\.plan\.outputs\.(\w+)\) \}\}")


def tool_faults(command: list[str]) -> Iterator[str]:
    """What a tool writes where it finds something."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        yield f"{command[0]}: {(result.stdout + result.stderr).strip()}"


def schema_faults(folder: Path) -> Iterator[str]:
    for schema, pattern in SCHEMAS.items():
        if files := sorted(map(str, folder.glob(pattern))):
            yield from tool_faults(["check-jsonschema", "--builtin-schema", schema, *files])


def pin_faults(folder: Path) -> Iterator[str]:
    """A line for every action that is not pinned, or pinned in two ways."""
    pins: dict[str, str] = {}
    for path in sorted(folder.glob("workflows/*.y*ml")):
        for action, comment in _USES.findall(path.read_text(encoding="utf-8")):
            if action.startswith("./"):
                continue
            name, _, _ = action.partition("@")
            if not _PINNED.fullmatch(action) or not _VERSION.fullmatch(comment):
                yield f"{path.name}: {action}{comment} is not pinned as {name}@COMMIT # vX.Y.Z"
            elif pins.setdefault(name, action + comment) != action + comment:
                yield f"{path.name}: {action}{comment} is pinned elsewhere as {pins[name]}"


def matrix_faults(root: Path) -> Iterator[str]:
    """Where the jobs of ci.yml are not what nox lists."""
    text = (root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    jobs: dict[str, Any] = yaml.safe_load(text)["jobs"]
    planned = plan(root, jobs["plan"])
    found: list[str] = []
    for name, job in jobs.items():
        matrix = str(job.get("strategy", {}).get("matrix", {}).get("session", ""))
        if matched := _MATRIX.fullmatch(matrix):
            found += [session["session"] for session in planned.get(matched[1], [])]
        elif matrix:
            yield f"ci.yml: the sessions of {name} are written by hand: {matrix}"
    listed = [session["session"] for session in nox_list(root)]
    yield from (f"ci.yml does not run {name}" for name in listed if name not in found)
    yield from (f"ci.yml runs {name}, a bare nox does not" for name in found if name not in listed)
    yield from (f"ci.yml runs {name} twice" for name in listed if found.count(name) > 1)
    if missing := set(jobs) - {"all-green"} - set(jobs["all-green"]["needs"]):
        yield f"ci.yml: all-green does not need {', '.join(sorted(missing))}"


def wiring_faults(root: Path) -> Iterator[str]:
    """Where a job does not do what its name and its place say."""
    files = {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        for path in sorted((root / ".github" / "workflows").glob("*.y*ml"))
    }
    for file, jobs in files.items():
        for name, job in jobs.items():
            where = f"{file}: {name}"
            if file != "gpu.yml" and job.get("runs-on") != "ubuntu-latest":
                yield f"{where} runs on {job.get('runs-on')}, not on ubuntu-latest"
            for step in (job, *job.get("steps", ())):
                if "continue-on-error" in step:
                    yield f"{where} goes on after an error"
                options = step.get("with", {})
                if "actions/checkout@" in step.get("uses", "") and options.get("fetch-depth") != 0:
                    # Without its tags nothing is released, and every gate passes.
                    yield f"{where} does not take the tags (fetch-depth: 0)"
            matrix = job.get("strategy", {}).get("matrix", {})
            last = job.get("steps", [{}])[-1].get("run", "")
            if "session" in matrix and not re.fullmatch(r'nox .*-s "\$SESSION"', last):
                yield f"{where} does not end with its session but with {last!r}"
            gate = file == "ci.yml" or (file, name) == ("release.yml", "gates")
            steps = job.get("steps", ()) if gate else ()
            if any("if" in step for step in steps if step.get("run") not in CONDITIONAL):
                yield f"{where} leaves out a step"
    yield from _conditions(files["ci.yml"], "ci.yml", {"plan": None, "static": None})
    jobs = files["release.yml"]
    yield from _conditions(jobs, "release.yml", RELEASED)
    for name in jobs.keys() - {"build", "gates"}:
        if "gates" not in needed(jobs, name):
            yield f"release.yml: {name} does not wait for the gates"
    runs = [step.get("run") for step in jobs["gates"]["steps"]]
    yield from (f"release.yml: the gates do not run {one}" for one in GATES if one not in runs)


def _conditions(jobs: dict[str, Any], file: str, wanted: dict[str, str | None]) -> Iterator[str]:
    for name, condition in wanted.items():
        if (found := jobs[name].get("if")) != condition:
            yield f"{file}: {name} runs if {found}, not if {condition}"


def needed(jobs: dict[str, Any], name: str) -> set[str]:
    """The jobs that a job waits for, directly or not."""
    direct = jobs[name].get("needs", [])
    names = {direct} if isinstance(direct, str) else set(direct)
    return names.union(*(needed(jobs, other) for other in names))


def plan(root: Path, job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the job's step "nox" puts out when everything is to be tested."""
    (script,) = (step["run"] for step in job["steps"] if step.get("id") == "nox")
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=root,
            env=os.environ | {"GITHUB_OUTPUT": output.name, "SINCE": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        lines = (line.partition("=") for line in output.read().splitlines())
        return {name: json.loads(value) for name, _, value in lines}


def form_faults(root: Path) -> Iterator[str]:
    """Where the form for bugs does not offer our distributions."""
    path = root / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
    for field in yaml.safe_load(path.read_text(encoding="utf-8"))["body"]:
        names = sorted(found.name for found in discover(root))
        if field.get("id") == "package" and field["attributes"]["options"] != names:
            yield f"{path.name} must offer {', '.join(names)}"


def check(root: Path, *, online: bool = False) -> Iterator[str]:
    """A line for every fault."""
    folder = root / ".github"
    if faults := list(schema_faults(folder)):
        # What does not fit cannot be read further.
        yield from faults
        return
    where = [] if online else ["--offline"]
    yield from tool_faults(["zizmor", *where, "--pedantic", "--no-progress", "-q", str(folder)])
    yield from pin_faults(folder)
    yield from matrix_faults(root)
    yield from wiring_faults(root)
    yield from form_faults(root)


def main() -> int:
    arguments = parser(__doc__, root=ROOT)
    arguments.add_argument("--online", action="store_true", help="let zizmor ask GitHub, too")
    options = arguments.parse_args()
    result = status(check(options.root, online=options.online))
    if result == 0:
        tell("workflows, dependabot.yml and issue forms are as they should be")
    return result


if __name__ == "__main__":
    run(main)
