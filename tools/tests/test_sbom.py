"""The bill of materials names the distribution and what it depends on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from distributions import discover
from sbom import bill_of_materials

if TYPE_CHECKING:
    from conftest import Repository


def test_names_the_distribution_and_its_dependencies(repository: Repository) -> None:
    repository.add("throw-away", dependencies='["torch>=2.5", "einops>=0.8"]')
    (found,) = discover(repository.root)
    bill = json.loads(bill_of_materials(found))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["purl"] == "pkg:pypi/throw-away@1.2.3"
    assert [component["name"] for component in bill["components"]] == ["einops", "torch"]
    assert bill["components"][0]["properties"][0]["value"] == ">=0.8"
    assert bill["dependencies"] == [
        {"ref": "pkg:pypi/throw-away@1.2.3", "dependsOn": ["pkg:pypi/einops", "pkg:pypi/torch"]}
    ]


def test_is_the_same_every_time(repository: Repository) -> None:
    repository.add("throw-away", dependencies='["torch>=2.5"]')
    (found,) = discover(repository.root)
    assert bill_of_materials(found) == bill_of_materials(found)
    assert str(repository.root) not in bill_of_materials(found)
