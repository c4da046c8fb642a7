"""Every tool shows its help in the same way, and tells what is wrong in one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import command
from distributions import ROOT

TOOLS = ROOT / "tools"
SCRIPTS = sorted(path.stem for path in TOOLS.glob("*.py") if "__main__" in path.read_text())
# The other side of a comparison: bench.py and parity.py run it, nobody else does.
WORKERS = {"bench_worker", "parity_worker"}
# Arguments with which a tool cannot do its work.
WRONG = {
    "assets": ["x-v1", "--url", "u", "--out", "o", "--root", "/nowhere"],
    "bench": ["nothing"],
    "parity": ["nothing", "--reference-python", "python"],
    "release": ["nothing", "minor"],
    "selection": ["--tag", "cpu", "--root", "/nowhere"],
    "verify": ["/nowhere"],
}


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / f"{script}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in WORKERS])
def test_help_is_the_docstring_with_a_usage_that_works(script: str) -> None:
    text = ast.get_docstring(ast.parse((TOOLS / f"{script}.py").read_text()))
    assert text is not None
    assert f"\n\n    python tools/{script}.py" in text
    result = call(script, "--help")
    assert result.returncode == 0
    assert text in result.stdout
    # Every option in the docstring's usage is one.
    usage = next(line for line in text.splitlines() if line.startswith("    python tools/"))
    options = {word.strip("[].") for word in usage.split() if word.strip("[").startswith("--")}
    listed = result.stdout.partition("options:")[2]
    assert all(option in listed for option in options)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in WORKERS])
def test_what_is_wrong_is_one_line(script: str) -> None:
    result = call(script, *WRONG.get(script, ["--root", "/nowhere"]))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"{script}: ")
    assert result.stderr.count("\n") == 1


def test_a_command_that_failed_is_its_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path("folder", "tool.py"))])

    def fail() -> int:
        script = "import sys; sys.exit('first\\nlast')"
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        return 0

    with pytest.raises(SystemExit) as exit_status:
        command.run(fail)
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tool: ")
    assert error.endswith(": last\n"), error


def test_faults_are_lines_and_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.status([]) == 0
    assert command.status(["one", "two"]) == 1
    assert capsys.readouterr().err == "one\ntwo\n"
