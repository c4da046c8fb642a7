"""Measure a package beside its reference and write packages/<dist>/benchmarks/RESULTS.md.

    python tools/bench.py DIST [--reference-python PATH] [--device DEVICE] [--resume] [options]

What is measured, and what is to be reached, lies in packages/<dist>/benchmarks/bench_cases.py (see
bench_case.py); reference.txt beside it pins the reference. Our environment is the one that runs
this script. Each environment has a worker process (bench_worker.py); the subjects of a case are run
in turn, A B A B ..., first with one thread as CPU time, then with all threads as wall time. Peak
memory is measured in a fresh process each time.

The samples of every case are kept in a cache as soon as it is done; `--resume` takes them from
there, as long as code, cases, versions and machine are the same. Exits with 1 if a case failed, 2
if nothing could be measured. Targets that are not reached are results, not faults.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import command
from bench_case import Case, Subject
from bench_report import report
from bench_worker import load_cases
from files import write_whole
from reference import ROOT, Package
from workers import Worker, WorkerError

TOOLS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Effort:
    """How often a case is measured.

    Rounds go on until `seconds` have passed, but at least `least` and at most `most` of them; a
    sample repeats its run until it lasts about `sample` seconds.
    """

    least: int
    most: int
    seconds: float
    sample: float
    processes: int
    limit: float = 900.0


FULL = Effort(least=5, most=25, seconds=12.0, sample=0.05, processes=3)
QUICK = Effort(least=1, most=3, seconds=0.5, sample=0.005, processes=1)

Open = Callable[[str], Worker]
Say = Callable[[str], None]


class Sides:
    """Starts workers in the environments that there are."""

    def __init__(self, package: Package, device: str, reference_python: str | None) -> None:
        self._arguments = (TOOLS / "bench_worker.py", str(package.cases), device)
        self._pythons = {"ours": sys.executable}
        if reference_python is not None:
            self._pythons["reference"] = reference_python

    def __contains__(self, environment: str) -> bool:
        return environment in self._pythons

    def start(self, environment: str, variables: Mapping[str, str]) -> Worker:
        # Ours may be run from the source tree; the reference must not see that.
        path = os.environ.get("PYTHONPATH", "") if environment == "ours" else ""
        return Worker(
            environment,
            self._pythons[environment],
            *self._arguments,
            variables={"PYTHONPATH": path, **variables},
        )

    @contextlib.contextmanager
    def opened(self, variables: Mapping[str, str]) -> Iterator[Open]:
        """A function that returns the one worker of an environment; all end with the context."""
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}

            def get(environment: str) -> Worker:
                if environment not in workers:
                    workers[environment] = stack.enter_context(self.start(environment, variables))
                return workers[environment]

            yield get


def measure(case: Case, sides: Sides, device: str, effort: Effort, say: Say) -> dict[str, Any]:
    """The samples of a case: by mode, subject, and for "crossover" by size."""
    subjects = [subject for subject in case.subjects if subject.environment in sides]
    if case.measure == "memory":
        return {"memory": _peaks(case, subjects, sides, effort, say)}
    if case.measure == "value":
        return {"value": _values(case, subjects, sides, effort, say)}
    if case.measure == "time":
        return _times(case, subjects, None, sides, device, effort, say)
    by_size = {
        size: _times(case, subjects, size, sides, device, effort, say) for size in case.sizes
    }
    return {
        mode: {
            subject.name: {str(size): by_size[size][mode][subject.name] for size in case.sizes}
            for subject in subjects
        }
        for mode in by_size[case.sizes[0]]
    }


def _values(
    case: Case, subjects: list[Subject], sides: Sides, effort: Effort, say: Say
) -> dict[str, list[float]]:
    values = {}
    with sides.opened(case.variables) as worker:
        for subject in subjects:
            say(subject.name)
            value = worker(subject.environment).call(
                "value",
                limit=case.limit or effort.limit,
                title=case.title,
                name=subject.name,
            )
            values[subject.name] = [value]
    return values


def _peaks(
    case: Case, subjects: list[Subject], sides: Sides, effort: Effort, say: Say
) -> dict[str, list[float]]:
    peaks: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for _ in range(1 if case.once else effort.processes):
        for subject in subjects:
            say(subject.name)
            with sides.start(subject.environment, case.variables) as worker:
                peak = worker.call("peak", limit=effort.limit, title=case.title, name=subject.name)
            peaks[subject.name].append(peak)
    return peaks


def _times(
    case: Case,
    subjects: list[Subject],
    size: int | None,
    sides: Sides,
    device: str,
    effort: Effort,
    say: Say,
) -> dict[str, dict[str, list[float]]]:
    # CPU time of one thread comes first, in processes that are new for every size: threads that
    # exist already would be counted with it.
    modes = {"device": 1} if device == "cuda" else {"cpu": 1, "wall": 0}
    with sides.opened(case.variables) as worker:
        for subject in subjects:
            say(f"{subject.name}, first run")
            worker(subject.environment).call(
                "prepare",
                limit=effort.limit,
                title=case.title,
                name=subject.name,
                size=size,
                threads=1,
            )
        return {
            mode: _rounds(subjects, mode, threads, worker, effort, say)
            for mode, threads in modes.items()
        }


def _rounds(
    subjects: list[Subject], mode: str, threads: int, worker: Open, effort: Effort, say: Say
) -> dict[str, list[float]]:
    """Seconds for one unit of each subject, measured in turn; 0 threads are all."""
    runs = {}
    for subject in subjects:
        seconds = worker(subject.environment).call(
            "warm", limit=effort.limit, name=subject.name, threads=threads
        )
        runs[subject.name] = max(1, round(effort.sample / max(seconds, 1e-9)))
    samples: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    start = time.monotonic()
    for number in range(effort.most):
        if number >= effort.least and time.monotonic() - start > effort.seconds:
            break
        say(f"{mode} time, round {number + 1}")
        for subject in subjects:
            found = worker(subject.environment).call(
                "sample",
                limit=effort.limit,
                name=subject.name,
                runs=runs[subject.name],
                threads=threads,
            )
            samples[subject.name].append(found[mode] / subject.units)
    return samples


class Cache:
    """Measured samples in a JSON file that is replaced whole after every case."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self.records: dict[str, Any] = {}

    def load(self) -> bool:
        """Takes what an earlier run left; False where that does not belong to what is here now."""
        if not self._path.exists():
            return True
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            fingerprint, records = found["fingerprint"], dict(found["records"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} is damaged ({error!r}); remove it") from None
        if fingerprint != self._fingerprint:
            return False
        self.records = records
        return True

    def add(self, title: str, record: dict[str, Any]) -> None:
        self.records[title] = record
        content = {"fingerprint": self._fingerprint, "records": self.records}
        write_whole(self._path, json.dumps(content, indent=1))


def fingerprint(package: Package, about: dict[str, Any], device: str, quick: bool) -> str:
    """Changes with everything that samples depend on."""
    digest = hashlib.sha256(json.dumps([about, device, quick], sort_keys=True).encode())
    for folder in (package.cases.parent, package.folder / "examples", TOOLS):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=True)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device")
        package = Package.find(options.root, options.dist, "bench_cases.py")
        cases = load_cases(package.cases, options.device)
        chosen = [case for case in cases if options.only.lower() in case.title.lower()]
        if not chosen:
            raise ValueError(f"no case of {package.name} has {options.only!r} in its title")
        sides = Sides(package, options.device, options.reference_python)
        with sides.opened({}) as worker:
            theirs = worker("reference") if "reference" in sides else None
            about = package.describe(worker("ours"), theirs)
        name = f"{package.name}-{options.device}{'-quick' if options.quick else ''}.json"
        cache = Cache(
            options.cache / name,
            fingerprint(package, about, options.device, options.quick),
        )
        # Part of the cases is only a table together with what is known of the others.
        if (options.resume or options.only) and not cache.load():
            console.print("code, versions or machine have changed: everything is measured anew")
        if options.device == "cuda":
            with sides.opened({}) as worker:
                about["ceilings"] = worker("ours").call("ceilings", limit=300)
    except (ValueError, WorkerError) as error:
        return fail(console, error)

    failed = measure_all(chosen, cache, sides, options, console)
    text = report(package.name, cases, cache.records, about, options.device, options.quick)
    if options.output is not None:
        write_whole(options.output, text)
        console.print(f"written: {options.output}", highlight=False)
    else:
        print(text)
    return 1 if failed else 0


def measure_all(
    cases: list[Case],
    cache: Cache,
    sides: Sides,
    options: argparse.Namespace,
    console: Console,
) -> int:
    """Measures what the cache does not have, and returns how many cases failed."""
    failed = 0
    columns = (
        TextColumn("{task.fields[case]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        task = progress.add_task("", total=len(cases), case="", now="")
        for case in cases:
            known = cache.records.get(case.title)
            if options.resume and known is not None and "error" not in known:
                progress.advance(task)
                continue
            progress.update(task, case=case.title)
            start = time.monotonic()
            try:
                samples = measure(
                    case,
                    sides,
                    options.device,
                    QUICK if options.quick else FULL,
                    lambda now: progress.update(task, now=now),
                )
                cache.add(case.title, {"samples": samples})
                outcome = "done"
            except WorkerError as error:
                failed += 1
                cache.add(case.title, {"error": str(error)})
                outcome = f"FAILED: {error}\n{error.details}".rstrip()
            progress.console.print(
                f"{case.title} ({time.monotonic() - start:.0f} s): {outcome}",
                markup=False,
                highlight=False,
            )
            progress.advance(task)
    return failed


def fail(console: Console, error: Exception) -> int:
    details = getattr(error, "details", "")
    console.print(f"bench: {error}", markup=False, highlight=False)
    if details:
        console.print(details, markup=False, highlight=False)
    return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__, root=ROOT)
    parser.add_argument("dist", help="the distribution, a folder under packages/")
    parser.add_argument(
        "--reference-python",
        metavar="PATH",
        help="the Python of an environment with the reference; without it only ours is measured",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--output",
        type=Path,
        help="default: RESULTS.md (cuda: RESULTS-cuda.md) beside the cases; "
        "with --only or --quick what is found is printed",
    )
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of a case's title")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that all runs")
    parser.add_argument("--resume", action="store_true", help="keep what was measured already")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench_cache", metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.output is None and not options.only and not options.quick:
        name = "RESULTS.md" if options.device == "cpu" else f"RESULTS-{options.device}.md"
        options.output = options.root / "packages" / options.dist / "benchmarks" / name
    return options


if __name__ == "__main__":
    sys.exit(main())
