"""Write the software bill of materials (CycloneDX) of every distribution.

    python tools/sbom.py [--root FOLDER]

The file depends on pyproject.toml and the version alone, so a build of it can be repeated. Run
this after a change to either; the dist check says when it was forgotten.
"""

from __future__ import annotations

import json

from packaging.requirements import Requirement

from command import parser, run, tell
from distributions import ROOT, Distribution, discover
from files import write_whole

FILE_NAME = "sbom.cdx.json"


def bill_of_materials(distribution: Distribution) -> str:
    """The bill as JSON text: the distribution and its direct dependencies, those of extras too.

    A dependency has no version in it, because the wheel declares a range and bundles nothing.
    """
    purl = f"pkg:pypi/{distribution.name}@{distribution.version}"
    requirements = [(Requirement(text), "required") for text in sorted(distribution.dependencies)]
    names = {requirement.name for requirement, _ in requirements}
    for requirement in map(Requirement, sorted(distribution.optional)):
        if requirement.name not in names:
            names.add(requirement.name)
            requirements.append((requirement, "optional"))
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": purl,
                "name": distribution.name,
                "version": distribution.version,
                "licenses": [{"license": {"id": distribution.licence}}],
                "purl": purl,
            },
        },
        "components": [
            {
                "type": "library",
                "bom-ref": f"pkg:pypi/{requirement.name}",
                "name": requirement.name,
                "scope": scope,
                "purl": f"pkg:pypi/{requirement.name}",
                "properties": [{"name": "python:range", "value": str(requirement.specifier)}],
            }
            for requirement, scope in requirements
        ],
        "dependencies": [
            {
                "ref": purl,
                "dependsOn": [f"pkg:pypi/{requirement.name}" for requirement, _ in requirements],
            }
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def main() -> int:
    for distribution in discover(parser(__doc__, root=ROOT).parse_args().root):
        path = distribution.folder / FILE_NAME
        write_whole(path, bill_of_materials(distribution))
        tell(str(path.relative_to(distribution.folder.parent)))
    return 0


if __name__ == "__main__":
    run(main)
