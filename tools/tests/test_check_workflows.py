"""The workflows of this repository pass, and every fault planted in them is found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from check_workflows import (
    form_faults,
    matrix_faults,
    pin_faults,
    schema_faults,
    tool_faults,
    wiring_faults,
)
from distributions import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of .github, of the noxfile, and of what they read."""
    for name in (".github", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("tests"))
    shutil.copy(ROOT / "noxfile.py", tmp_path)
    for project in (*ROOT.glob("packages/*/pyproject.toml"), ROOT / "shared-core/pyproject.toml"):
        copy = tmp_path / project.relative_to(ROOT)
        copy.parent.mkdir(parents=True)
        shutil.copy(project, copy)
    return tmp_path


def edit(root: Path, file: str, old: str, new: str) -> None:
    path = root / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CI = ".github/workflows/ci.yml"


def test_ours_fit_their_schemas_and_pins_and_matrix() -> None:
    folder = ROOT / ".github"
    assert [*schema_faults(folder), *pin_faults(folder), *form_faults(ROOT)] == []
    assert [*matrix_faults(ROOT), *wiring_faults(ROOT)] == []


def test_files_that_do_not_fit_their_schemas(root: Path) -> None:
    edit(root, CI, "    timeout-minutes: 5\n", "")
    edit(root, ".github/workflows/gpu.yml", "runs-on:", "run-on:")
    edit(root, ".github/dependabot.yml", "interval: weekly", "interval: hourly")
    edit(root, ".github/ISSUE_TEMPLATE/bug.yml", "type: dropdown", "type: list")
    edit(root, ".github/ISSUE_TEMPLATE/config.yml", "true", "perhaps")
    found = list(schema_faults(root / ".github"))
    assert all(fault.startswith("check-jsonschema: ") for fault in found)
    files = ("gpu.yml", "'timeout-minutes' is", "dependabot.yml", "bug.yml", "config.yml")
    for fault, file in zip(found, files, strict=True):
        assert file in fault


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('run: nox -s "$SESSION"', "run: nox -s ${{ github.head_ref }}", "template-injection"),
        ("permissions: {}\n\nconcurrency", "permissions: write-all\n\nconcurrency", "permissions"),
        ("          persist-credentials: false\n", "", "artipacked"),
        ("  pull_request:\n", "  pull_request_target:\n", "dangerous-triggers"),
    ],
)
def test_what_zizmor_finds(root: Path, old: str, new: str, fault: str) -> None:
    edit(root, CI, old, new)
    command = ["zizmor", "--offline", "--pedantic", "--no-progress", "-q", str(root / CI)]
    (found,) = tool_faults(command)
    assert fault in found


@pytest.mark.parametrize(
    ("new", "fault"),
    [
        ("actions/checkout@v6", "ci.yml: actions/checkout@v6 is not pinned as actions/checkout@"),
        (f"actions/checkout@{COMMIT}", "is not pinned as actions/checkout@COMMIT # vX.Y.Z"),
        (f"actions/checkout@{COMMIT} # v6", "# v6 is not pinned"),
        (f"actions/checkout@{COMMIT[:12]} # v6.0.1", "is not pinned"),
        (f"actions/checkout@{COMMIT} # v6.0.1", "is pinned elsewhere as actions/checkout@"),
    ],
)
def test_an_action_that_is_not_pinned(root: Path, new: str, fault: str) -> None:
    old = "actions/checkout@8e8c483db84b4bee98b60c0593521ed34d9990e8 # v6.0.1"
    edit(root, CI, old, new)
    found = list(pin_faults(root / ".github"))
    assert found
    assert fault in found[0]


@pytest.mark.parametrize(
    ("file", "old", "new", "faults"),
    [
        (
            "noxfile.py",
            '@nox.session(tags=["static"])\ndef dist',
            "@nox.session\ndef dist",
            ["ci.yml does not run dist"],
        ),
        ("noxfile.py", '    "dist",\n', "", ["ci.yml runs dist, a bare nox does not"]),
        (
            CI,
            "${{ fromJSON(needs.plan.outputs.static) }}",
            "[lint]",
            ["ci.yml: the sessions of static are written by hand: ['lint']"],
        ),
        (CI, "needs: [plan, tests, static]", "needs: [plan, tests]", ["does not need static"]),
        (CI, "for tag in cpu static", "for tag in cpu", ["ci.yml does not run lint"]),
    ],
)
def test_a_matrix_that_is_not_what_nox_runs(
    root: Path, file: str, old: str, new: str, faults: list[str]
) -> None:
    edit(root, file, old, new)
    found = list(matrix_faults(root))
    for fault in faults:
        assert any(fault in line for line in found), found


RELEASE = ".github/workflows/release.yml"


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        (CI, "runs-on: ubuntu-latest", "runs-on: gpu", "ci.yml: plan runs on gpu"),
        (CI, "          fetch-depth: 0\n", "", "ci.yml: plan does not take the tags"),
        (CI, '-s "$SESSION"', '-s "$SESSION" || true', "ci.yml: tests does not end with its"),
        (
            CI,
            "    timeout-minutes: 30\n",
            "    timeout-minutes: 30\n    continue-on-error: true\n",
            "ci.yml: tests goes on after an error",
        ),
        (
            ".github/workflows/nightly.yml",
            'run: nox -s "$SESSION"',
            "run: nox -s lint",
            "nightly.yml: nightly does not end with its session",
        ),
        (CI, "  static:\n", "  static:\n    if: false\n", "ci.yml: static runs if False"),
        (
            CI,
            "      - run: nox -s",
            "      - if: false\n        run: nox -s",
            "static leaves out a",
        ),
        (RELEASE, "      - run: nox\n", "      - run: echo\n", "the gates do not run nox"),
        (RELEASE, '      - run: git tag --delete "$TAG"\n', "", "the gates do not run git tag"),
        (
            RELEASE,
            "    needs: [build, gates]\n",
            "    needs: [build, gates]\n    if: ${{ !cancelled() }}\n",
            "release.yml: attest runs if ${{ !cancelled() }}",
        ),
        (
            RELEASE,
            "if: contains(fromJSON(vars.PUBLISH || '[]'), needs.build.outputs.name)",
            "if: true",
            "publish runs if True",
        ),
        (RELEASE, "needs: [build, gates]", "needs: [build]", "attest does not wait for the gates"),
    ],
)
def test_a_job_that_does_not_do_what_it_should(
    root: Path, file: str, old: str, new: str, fault: str
) -> None:
    edit(root, file, old, new)
    found = list(wiring_faults(root))
    assert any(fault in line for line in found), found


def test_a_plan_that_fails(root: Path) -> None:
    edit(root, CI, 'selection.py --tag "$tag"', "selection.py --wrong")
    with pytest.raises(subprocess.CalledProcessError, match="bash"):
        list(matrix_faults(root))


def test_a_form_without_a_package(root: Path) -> None:
    edit(root, ".github/ISSUE_TEMPLATE/bug.yml", "        - memformer\n", "")
    (fault,) = form_faults(root)
    assert fault.startswith("bug.yml must offer ")
    assert "memformer" in fault
