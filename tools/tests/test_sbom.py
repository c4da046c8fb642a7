"""The bill of materials names the distribution and what it depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sbom
from distributions import ROOT, discover
from sbom import bill_of_materials

if TYPE_CHECKING:
    from conftest import Repository


def test_names_the_distribution_and_its_dependencies(repository: Repository) -> None:
    repository.add("throw-away", dependencies='["torch>=2.5", "einops>=0.8"]')
    (found,) = discover(repository.root)
    bill = json.loads(bill_of_materials(found))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["purl"] == "pkg:pypi/throw-away@1.2.3"
    assert bill["metadata"]["component"]["licenses"] == [{"license": {"id": "MIT"}}]
    assert [component["name"] for component in bill["components"]] == ["einops", "torch"]
    assert bill["components"][0]["properties"][0]["value"] == ">=0.8"
    assert bill["dependencies"] == [
        {"ref": "pkg:pypi/throw-away@1.2.3", "dependsOn": ["pkg:pypi/einops", "pkg:pypi/torch"]}
    ]


def test_names_what_the_extras_need(repository: Repository) -> None:
    project = repository.add("throw-away", dependencies='["torch>=2.5"]') / "pyproject.toml"
    extras = '\n[project.optional-dependencies]\nmore = ["torch", "numpy>=2"]\nall = ["numpy"]\n'
    text = project.read_text().replace('license = "MIT"', 'license = "0BSD"')
    project.write_text(text + extras)
    (found,) = discover(repository.root)
    bill = json.loads(bill_of_materials(found))
    assert bill["metadata"]["component"]["licenses"] == [{"license": {"id": "0BSD"}}]
    scopes = [(component["name"], component["scope"]) for component in bill["components"]]
    assert scopes == [("torch", "required"), ("numpy", "optional")]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from distributions import discover
from sbom import bill_of_materials
print(bill_of_materials(discover(Path(sys.argv[2]))[0]))
"""


def test_is_the_same_every_time(repository: Repository) -> None:
    repository.add("throw-away", dependencies='["torch>=2.5", "einops", "numpy", "scipy"]')
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "tools"), str(repository.root)]
    first, second = (
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
    assert str(repository.root) not in first


def test_a_bill_is_replaced_whole(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repository.add("throw-away")
    before = (folder / sbom.FILE_NAME).read_text()
    (folder / "pyproject.toml").write_text((folder / "pyproject.toml").read_text() + "\n")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["sbom.py", "--root", str(repository.root)])
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        sbom.main()
    assert (folder / sbom.FILE_NAME).read_text() == before
