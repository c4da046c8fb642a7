"""What holds for the repository as a whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distributions import ROOT, discover

COMMAND = 'pip install "nox[uv]" && nox'
WORKFLOWS = ROOT / ".github" / "workflows"
# Folders that exist on one machine only.
FOLDERS = ("work", "workspace", "root", "opt", "home", "Users", "mnt", "srv", "tmp")
MACHINE_PATH = re.compile(rf"(?<![\w.~])/(?:{'|'.join(FOLDERS)})/\w")
# Hosts of one network.
MACHINE_HOST = re.compile(
    r"https?://(?:\d+(?:\.\d+){3}|[\w.-]+\.(?:corp|internal|lan|local)(?![\w.-]))"
)


def tracked_files(root: Path = ROOT) -> list[Path]:
    if not (root / ".git").exists():
        pytest.skip("only a git checkout says which files belong to it")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    paths = (root / name for name in listing.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_path_or_host_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in (MACHINE_PATH, MACHINE_HOST):
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def test_the_patterns_of_machine_paths_and_hosts() -> None:
    for folder in FOLDERS:
        assert MACHINE_PATH.search(f"see /{folder}/x")
    assert not MACHINE_PATH.search("https://example.org/work/x and ~/work/x and src/root/x")
    for host in ("10.0.0.1", "packages.internal", "index.corp:8080"):
        assert MACHINE_HOST.search(f"index-url = https:{'//'}{host}/simple")
    assert not MACHINE_HOST.search("https://example.org/simple and https://my.local.example.org/x")


def test_an_unpacked_archive_has_no_list_of_files(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="git checkout"):
        tracked_files(tmp_path)


def test_the_test_command_is_the_readmes() -> None:
    assert f"\n{COMMAND}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    # On a runner with the versions that are pinned.
    line = f"\nPIP_CONSTRAINT=tools/constraints.txt {COMMAND}\n"
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").endswith(line)


def test_the_readme_has_a_row_for_every_distribution() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for found in discover():
        row = f"\n| [{found.name}]({found.folder.relative_to(ROOT)}) | `{found.import_name}` |"
        assert row in text


def test_the_workflow_runs_the_pythons_that_we_name() -> None:
    pythons = load("ci")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    for found in discover():
        text = (found.folder / "pyproject.toml").read_text(encoding="utf-8")
        assert re.findall(r":: (3\.\d+)\"", text) == pythons


def load(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = yaml.safe_load((WORKFLOWS / f"{name}.yml").read_text("utf-8"))
    return workflow


def test_nobody_elses_code_runs_on_our_machines() -> None:
    for path in WORKFLOWS.glob("*.yml"):
        # The parser of YAML takes the key "on" for true.
        triggers = set(load(path.stem)[True])
        if "self-hosted" in path.read_text(encoding="utf-8"):
            assert triggers <= {"push", "schedule", "workflow_dispatch"}
        assert "pull_request_target" not in triggers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_runner_without_a_gpu_fails() -> None:
    steps = load("gpu")["jobs"]["tests"]["steps"]
    (script,) = (step["run"] for step in steps if step.get("name") == "See the GPU")
    # The PyTorch of these tests, and no GPU that it might see.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    result = subprocess.run(
        ["bash", "-e", "-c", script],
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode != 0
    assert "CUDA" in result.stderr


def test_only_a_release_may_write() -> None:
    for path in WORKFLOWS.glob("*.yml"):
        workflow = load(path.stem)
        assert workflow["permissions"] == {}
        rights = [set(job["permissions"].items()) for job in workflow["jobs"].values()]
        writing = any(right == "write" for job in rights for _, right in job)
        assert writing == (path.stem == "release")
    # What is built is built without them.
    assert load("release")["jobs"]["build"]["permissions"] == {"contents": "read"}
    for job in ("attest", "publish", "release"):
        assert "actions/checkout" not in str(load("release")["jobs"][job])
