"""Compare a package with its reference: same weights, same inputs, same numbers.

    python tools/parity.py DIST --reference-python PATH [--verbose]

packages/<dist>/benchmarks/parity_cases.py says what is compared (see parity_case.py), reference.txt
beside it pins the reference, packages/<dist>/tests/defect_checks.py holds CHECKS, functions that
must fail on the reference and pass on ours. Each side runs in a worker process of its own
environment (parity_worker.py); ours is the one that runs this script. Compared are:

- outputs and gradients of ours with legacy=True, within 1e-5 of the largest number of each tensor;
- that the reference's state dict loads, with legacy=True and without;
- constructors and methods: the reference's arguments keep names, order, kinds and defaults;
- the distributions of initial parameters;
- the known defects.

Prints a table; exits with 1 if anything differs, 2 if nothing could be compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import command
from reference import ROOT, Package
from workers import Worker, WorkerError

TOOLS = Path(__file__).resolve().parent
TOLERANCE = 1e-5
# Of the scaled Kolmogorov-Smirnov distance; see `compare_initial`.
FARTHEST = 2.5
LIMIT = 120.0
_NAMED = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")


@dataclass
class Line:
    """One comparison in the table."""

    what: str
    shown: str
    fault: str = ""
    details: str = ""


class Parity:
    """Runs the comparisons of one package; every method returns a line."""

    def __init__(self, package: Package, reference: Worker, ours: Worker, folder: Path) -> None:
        self._package = package
        self._reference = reference
        self._ours = ours
        self._folder = folder

    def describe(self) -> dict[str, Any]:
        """What both sides have. Raises ValueError for another reference than the pinned one."""
        return self._package.describe(self._ours, self._reference)

    def numbers(self, number: int, case: dict[str, Any]) -> Line:
        """Outputs and gradients of a comparison; leaves the reference's files behind."""
        arguments = {"name": case["name"], "folder": self._subfolder(f"comparison-{number}")}
        self._reference.call("record", limit=LIMIT, **arguments)
        found = self._ours.call("compare", limit=LIMIT, **arguments)
        errors = [f"{kind} {found[kind]['error']:.1e}" for kind in ("outputs", "gradients")
                  if kind in found]  # fmt: skip
        faults = [
            f"{kind} differ by {result['error']:.1e} in {result['where']}"
            for kind, result in found.items()
            if not result["error"] <= TOLERANCE
        ]
        return Line(case["name"], "  ".join(errors), "; ".join(faults))

    def default_load(self, number: int, case: dict[str, Any]) -> Line:
        """The state dict that `numbers` left loads into a module without legacy=True."""
        self._ours.call(
            "load_by_default",
            limit=LIMIT,
            name=case["name"],
            folder=self._subfolder(f"comparison-{number}"),
        )
        return Line(case["name"], "loaded")

    def signature(self, pair: dict[str, Any]) -> Line:
        theirs = self._reference.call("signature", limit=LIMIT, name=pair["reference"])
        ours = self._ours.call("signature", limit=LIMIT, name=pair["ours"])
        faults = signature_faults(theirs, ours, pair["any_keyword"])
        return Line(pair["ours"].partition(":")[2], f"{len(theirs)} arguments", "; ".join(faults))

    def initial(self, number: int, name: str) -> Line:
        arguments = {"name": name, "folder": self._subfolder(f"initial-{number}")}
        self._reference.call("record_initial", limit=LIMIT, **arguments)
        found = self._ours.call("compare_initial", limit=LIMIT, **arguments)
        faults = [
            f"{key} has deviation {result['ours']:.3g}, the reference {result['reference']:.3g} "
            f"(distance {result['distance']:.1f})"
            for key, result in found.items()
            if not result["distance"] <= FARTHEST
        ]
        largest = max(result["distance"] for result in found.values())
        return Line(name, f"{len(found)} parameters, distance {largest:.2f}", "; ".join(faults))

    def defect(self, name: str) -> Line:
        theirs = self._reference.call("defect", limit=LIMIT, name=name)
        ours = self._ours.call("defect", limit=LIMIT, name=name)
        faults = []
        if ours is not None:
            faults.append(f"ours has it: {ours}")
        if theirs is None:
            faults.append("the reference passes this check")
        return Line(
            name.replace("_", " "), "in the reference only", "; ".join(faults), theirs or ""
        )

    def _subfolder(self, name: str) -> str:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        return str(folder)


def signature_faults(
    theirs: list[dict[str, str]], ours: list[dict[str, str]], any_keyword: bool = False
) -> list[str]:
    """What ours does not keep: names, order, kinds and defaults; and new arguments in the way."""
    faults = []
    swallowing = any(p["kind"] == "VAR_KEYWORD" for p in theirs)
    named = [p for p in theirs if p["kind"] in _NAMED]
    known = {p["name"]: p for p in ours}
    refused = (
        {"VAR_POSITIONAL"} if any_keyword and swallowing else {"VAR_POSITIONAL", "VAR_KEYWORD"}
    )
    faults += [f"takes any {p['name']}" for p in ours if p["kind"] in refused]
    for p in named:
        own = known.get(p["name"])
        if own is None:
            faults.append(f"{p['name']} is missing")
            continue
        for part in ("kind", "default"):
            if own[part] != p[part]:
                faults.append(f"the {part} of {p['name']} is {own[part]}, was {p[part]}")
    kept = [p["name"] for p in ours if p["name"] in {p["name"] for p in named}]
    order = [p["name"] for p in named if p["name"] in known]
    if kept != order:
        faults.append(f"the order is {', '.join(kept)}, was {', '.join(order)}")
    names = {p["name"] for p in named}
    for p in ours:
        if p["name"] in names or p["kind"] not in _NAMED:
            continue
        if p["default"].startswith("none, it is required"):
            faults.append(f"the new {p['name']} is required")
        # Any keyword was taken before, and there is nothing that a position could have meant.
        if p["kind"] != "KEYWORD_ONLY" and not swallowing:
            faults.append(f"the new {p['name']} can be given by position")
    return faults


def attempt(what: str, check: Callable[[], Line]) -> Line:
    """The line of a check, with an error of a worker as its fault."""
    try:
        return check()
    except WorkerError as error:
        return Line(what, "failed", str(error), error.details)


def compare(parity: Parity, say: Callable[[str, list[Line]], None]) -> int:
    """Runs everything and returns the number of faults."""
    about = parity.describe()
    ours, theirs = about["ours"], about["reference"]
    if not ours["comparisons"]:
        raise ValueError("there is nothing to compare")
    print(
        f"ours {ours['version']} (torch {ours['torch']}), "
        f"reference {theirs['version']} (torch {theirs['torch']})"
    )
    comparisons = list(enumerate(ours["comparisons"]))
    groups: list[tuple[str, list[tuple[str, Callable[[], Line]]]]] = [
        (
            f"outputs and gradients with legacy=True, within {TOLERANCE:g}",
            [(case["name"], partial(parity.numbers, n, case)) for n, case in comparisons],
        ),
        (
            "the reference's checkpoint in a module without legacy=True",
            [
                (case["name"], partial(parity.default_load, n, case))
                for n, case in comparisons
                if case["loads"]
            ],
        ),
        (
            "arguments",
            [(pair["ours"], partial(parity.signature, pair)) for pair in ours["signatures"]],
        ),
        (
            "distributions of initial parameters",
            [(name, partial(parity.initial, n, name)) for n, name in enumerate(ours["initial"])],
        ),
        (
            "defects of the reference",
            [(name, partial(parity.defect, name)) for name in ours["defects"]],
        ),
    ]
    faults = 0
    for title, checks in groups:
        if checks:
            lines = [attempt(what, check) for what, check in checks]
            faults += sum(bool(line.fault) for line in lines)
            say(title, lines)
    return faults


def show(title: str, lines: list[Line], verbose: bool) -> None:
    print(f"\n{title}")
    width = max(len(line.what) for line in lines)
    middle = max(len(line.shown) for line in lines)
    for line in lines:
        outcome = f"DIFFERS: {' '.join(line.fault.split())}" if line.fault else "ok"
        print(f"  {line.what:{width}}  {line.shown:{middle}}  {outcome}")
        if line.details and (verbose or line.fault):
            details = line.details.strip().splitlines()
            print(*("      " + part for part in details[0 if verbose else -4 :]), sep="\n")


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, root=ROOT)
    parser.add_argument("dist", help="the distribution, a folder under packages/")
    parser.add_argument(
        "--reference-python",
        metavar="PATH",
        required=True,
        help="the Python of an environment with the reference",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="whole tracebacks, and how the reference fails"
    )
    options = parser.parse_args(arguments)
    try:
        package = Package.find(options.root, options.dist, "parity_cases.py")
        files = (str(package.cases), str(package.folder / "tests" / "defect_checks.py"))
        script = TOOLS / "parity_worker.py"
        # Ours may be run from the source tree; the reference must not see that.
        path = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        with (
            tempfile.TemporaryDirectory() as folder,
            Worker("reference", options.reference_python, script, "reference", *files) as theirs,
            Worker("ours", sys.executable, script, "ours", *files, variables=path) as ours,
        ):
            parity = Parity(package, theirs, ours, Path(folder))
            faults = compare(parity, lambda title, lines: show(title, lines, options.verbose))
    except (ValueError, WorkerError) as error:
        print(f"parity: {error}", file=sys.stderr)
        if details := getattr(error, "details", ""):
            print(details, file=sys.stderr)
        return 2
    print(f"\n{package.name}: {faults or 'no'} mismatch{'' if faults == 1 else 'es'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
