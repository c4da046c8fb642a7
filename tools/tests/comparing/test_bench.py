"""bench.py measures both environments, keeps what it measured, and says what went wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from results_tables import row

import bench
from bench_case import Case, Subject, Target
from bench_worker import Measurer
from files import write_whole

if TYPE_CHECKING:
    from conftest import Compared

CASES = """
    import importlib, os, time
    from dataclasses import replace
    from bench_case import Case, Subject, Target

    def spin(*, device, package, size=1, seconds=0.004):
        module = importlib.import_module(package)  # each is in its own environment only
        def run():
            end = time.process_time() + seconds * size
            while time.process_time() < end:
                pass
        return run

    def allocate(*, device, package, mib):
        importlib.import_module(package)
        return lambda: b"x" * (mib * 2**20)

    def stamp(*, device, package):
        importlib.import_module(package)
        # Few digits are shown; every run has processes of its own.
        return lambda: os.getpid() % 997

    def ours(prepare, warm={}, **arguments):
        return Subject("ours", prepare, {"package": "new_thing", **arguments}, warm)

    def theirs(prepare, warm={}, **arguments):
        arguments = {"package": "old_thing", **arguments}
        return Subject("reference", prepare, arguments, warm, "reference")

    def cases(device):
        return [
            Case(
                "speed",
                "time",
                [replace(ours(spin), units=2), theirs(spin)],
                [Target("reference", per="ours", at_least=1.5)],
            ),
            Case(
                "from where on",
                "crossover",
                [ours(spin), theirs(spin)],
                [Target("ours", at_most=2)],
                sizes=(1, 2),
            ),
            Case(
                "memory",
                "memory",
                [ours(allocate, {"mib": 1}, mib=32), theirs(allocate, {"mib": 1}, mib=96)],
                [Target("reference", per="ours", at_least=2.9)],
            ),
            Case("stamp", "value", [ours(stamp), theirs(stamp)]),
        ]
"""
ONE = """
    from bench_case import Case, Subject

    def value(*, device):
        import new_thing
        return new_thing.value

    def cases(device):
        return [
            Case("first", "value", [Subject("ours", value)]),
            Case("second", "value", [Subject("ours", value)]),
        ]
"""


@pytest.fixture(autouse=True)
def stand_in(compared: Compared) -> None:
    compared.stand_in_for_torch()


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    effort = bench.Effort(least=2, most=2, seconds=0, sample=0.001, processes=1, limit=60)
    monkeypatch.setattr(bench, "FULL", effort)
    monkeypatch.setattr(bench, "QUICK", effort)


def run(compared: Compared, *more: str, reference: bool = True) -> int:
    cache = ["--cache", str(compared.root / "cache")]
    return bench.main(compared.arguments(*cache, *more, reference=reference))


def test_all_measures_in_both_environments(compared: Compared) -> None:
    compared.write("bench_cases.py", CASES)
    assert run(compared) == 0
    text = (compared.benchmarks / "RESULTS.md").read_text()
    assert "Ours: 1.0.0, torch 9.9, Python" in text
    assert "Reference: old-thing 0.1, torch 9.9" in text
    # A run is 4 ms of CPU time on both sides, and ours is worth two units.
    reached = row(text, "speed: reference / ours")
    assert float(reached[1]) == pytest.approx(2, rel=0.45)
    assert reached[3] == "yes"
    assert "## Wall time, 4 threads" in text
    assert row(text, "from where on")[2] == "<= 2"
    assert "## from where on: CPU time, 1 thread" in text
    memory = row(text, "memory: reference / ours")
    assert float(memory[1]) == pytest.approx(3, rel=0.05)
    assert float(memory[4].removesuffix(" MiB")) == pytest.approx(32, rel=0.05)


def test_what_takes_minutes_is_weighed_once(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "FULL", replace(bench.FULL, processes=2))
    counts = []
    bound = 'per="ours", at_least=2.9)],'
    for text in (CASES, CASES.replace(bound, bound + " once=True,")):
        compared.write("bench_cases.py", text)
        assert run(compared, "--only", "memory") == 0
        (cache,) = (compared.root / "cache").iterdir()
        samples = json.loads(cache.read_text())["records"]["memory"]["samples"]
        counts.append({len(one) for kind in samples.values() for one in kind.values()})
    assert counts == [{2}, {1}]


@pytest.mark.parametrize("kind", ["value", "memory", "time"])
def test_variables_of_a_case_reach_its_processes(compared: Compared, kind: str) -> None:
    compared.write(
        "bench_cases.py",
        f"""
        import os
        from bench_case import Case, Subject

        def prepare(*, device, expected):
            def run():
                if os.environ.get("PLANTED") != expected:
                    raise ValueError(f"not {{expected}}")
                return 1
            return run

        def cases(device):
            def subjects(expected):
                arguments = {{"expected": expected}}
                theirs = Subject("reference", prepare, arguments, environment="reference")
                return [Subject("ours", prepare, arguments), theirs]

            return [
                Case("with", {kind!r}, subjects("yes"), variables={{"PLANTED": "yes"}}),
                Case("without", {kind!r}, subjects(None)),
            ]
        """,
    )
    assert run(compared) == 0


def test_a_subject_imports_what_the_demonstration_is_made_of(compared: Compared) -> None:
    (compared.benchmarks.parent / "examples").mkdir()
    compared.write(
        "bench_cases.py",
        """
        from bench_case import Case, Subject

        def value(*, device):
            import shown
            return lambda: shown.VALUE

        def cases(device):
            return [Case("shown", "value", [Subject("ours", value)])]
        """,
    )
    # Of other lengths: Python takes two files of one length and one second for the same.
    for number in (7, 12):
        compared.write("../examples/shown.py", f"VALUE = {number}\n")
        # Other code, other numbers.
        assert run(compared, "--resume", reference=False) == 0
        found = row((compared.benchmarks / "RESULTS.md").read_text(), "shown")
        assert found[4] == str(number)


def test_without_bounds_quotients_remain() -> None:
    subjects = [Subject("ours", print), Subject("other", print)]
    targets = [Target("ours", at_most=1.0), Target("ours", per="other", at_least=2.0)]
    case = Case("one", "value", subjects, targets, unit="MiB")
    shown = case.without_bounds()
    assert shown == replace(case, targets=[Target("ours"), Target("ours", per="other")])


def test_resuming_keeps_what_was_measured(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    compared.write("bench_cases.py", CASES)

    def stamps(*more: str) -> list[str]:
        assert run(compared, "--only", "stamp", *more) == 0
        return row(capsys.readouterr().out, "stamp")[4:]

    first = stamps()
    assert stamps("--resume") == first
    assert stamps() != first
    second = stamps("--resume")
    # Other code, other numbers.
    compared.write_ours("changed = True\n")
    assert stamps("--resume") != second
    assert not (compared.benchmarks / "RESULTS.md").exists()


def test_a_failing_case_does_not_stop_the_others(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    compared.write("bench_cases.py", ONE)
    compared.write_ours(
        """
        def value():
            raise ArithmeticError("planted")
        """
    )
    assert run(compared, reference=False) == 1
    shown = capsys.readouterr().err
    assert "first (" in shown
    assert "FAILED: ours: ArithmeticError: planted" in shown
    assert 'raise ArithmeticError("planted")' in shown
    text = (compared.benchmarks / "RESULTS.md").read_text()
    assert "- second: **not measured**: ours: ArithmeticError: planted" in text
    assert "The reference was not measured." in text
    # What failed is tried again, also when resuming. The cache belongs to code that is the same.
    cache = next((compared.root / "cache").iterdir())
    content = json.loads(cache.read_text())
    content["records"]["first"] = {"samples": {"value": {"ours": [7.0]}}}
    cache.write_text(json.dumps(content))
    assert run(compared, "--resume", reference=False) == 1
    text = (compared.benchmarks / "RESULTS.md").read_text()
    assert row(text, "first")[4] == "7"
    assert "- second: **not measured**" in text


def test_a_worker_that_dies_or_hangs(
    compared: Compared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared.write("bench_cases.py", ONE)
    compared.write_ours(
        "import os, sys\ndef value():\n    sys.stderr.write('my end'); os._exit(5)\n"
    )
    assert run(compared, "--only", "first", reference=False) == 1
    shown = capsys.readouterr().err
    assert "FAILED: ours: ended with code 5 during value" in shown
    assert "my end" in shown
    compared.write_ours("import time\ndef value():\n    time.sleep(1000)\n")
    # However long the worker takes to start, it never answers.
    monkeypatch.setattr(bench, "FULL", replace(bench.FULL, limit=0.5))
    assert run(compared, "--only", "first", reference=False) == 1
    assert "FAILED: ours: value took longer than 0.5 s" in capsys.readouterr().err
    # A case may have a limit of its own.
    compared.write("bench_cases.py", ONE.replace(")])", ")], limit=0.25)"))
    assert run(compared, "--only", "first", reference=False) == 1
    assert "FAILED: ours: value took longer than 0.25 s" in capsys.readouterr().err


def test_another_reference_than_the_pinned_one(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    compared.write("bench_cases.py", CASES)
    compared.install_reference("0.2", "")
    assert run(compared) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "the reference must be old-thing 0.1, its environment has 0.2" in shown
    assert not (compared.benchmarks / "RESULTS.md").exists()


def test_what_cannot_be_measured_ends_with_one_line(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert bench.main([*arguments, "--cache", str(compared.root / "cache")]) == 2
        return " ".join(capsys.readouterr().err.split())

    root = ("--root", str(compared.root))
    assert "there is no package no-thing" in error("no-thing", *root)
    assert "new-thing has no" in error("new-thing", *root)
    compared.write("bench_cases.py", CASES)
    assert "no case of new-thing has 'nosuch' in its title" in error(
        "new-thing", "--only", "nosuch", *root
    )
    missing = ("--reference-python", "/no/such/python")
    assert "/no/such/python does not start" in error("new-thing", *missing, *root)
    (compared.benchmarks / "reference.txt").write_text("old-thing>=0.1\n")
    assert "a line name==version is needed" in error("new-thing", *root)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def cases(device):\n    return 1 / 0", "ZeroDivisionError"),
        ("cases = None", "TypeError"),
    ],
)
def test_cases_that_do_not_load(
    compared: Compared, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    (compared.benchmarks / "bench_cases.py").write_text(text)
    assert run(compared, reference=False) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert f"bench_cases.py: {why}" in " ".join(shown.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    compared.write("bench_cases.py", ONE)
    assert run(compared, "--device", "cuda", reference=False) == 2
    assert capsys.readouterr().err == "bench: there is no CUDA device\n"


def test_one_thread_is_measured_where_there_never_were_more(compared: Compared) -> None:
    compared.write(
        "bench_cases.py",
        """
        import torch
        from bench_case import Case, Subject

        most = []

        def prepare(*, device, size):
            def run():
                if torch.get_num_threads() == 1 and most:
                    raise RuntimeError("there are more threads")
                if torch.get_num_threads() > 1:
                    most.append(size)
            return run

        def cases(device):
            subjects = [Subject("ours", prepare), Subject("other", prepare)]
            return [Case("from where on", "crossover", subjects, sizes=(1, 2))]
        """,
    )
    assert run(compared, reference=False) == 0


@pytest.mark.parametrize(
    "content",
    [b'{"fingerprint": ', b"{}", b"[]", b"null", b"\xff", b'{"fingerprint": "", "records": 1}'],
)
def test_a_damaged_cache_is_named(
    compared: Compared, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    compared.write("bench_cases.py", ONE)
    path = compared.root / "cache" / "new-thing-cpu.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert run(compared, "--resume", reference=False) == 2
    assert "is damaged" in " ".join(capsys.readouterr().err.split())


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deeper" / "file.json"
    write_whole(path, "first")

    def fail(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "second, cut off")
    assert path.read_text() == "first"
    assert [found.name for found in path.parent.iterdir()] == ["file.json"]


def test_two_cases_of_one_title(tmp_path: Path) -> None:
    path = tmp_path / "bench_cases.py"
    path.write_text(
        "from bench_case import Case, Subject\n"
        "def cases(device):\n"
        "    return [Case('a', 'value', [Subject('ours', None)])] * 2\n"
    )
    with pytest.raises(ValueError, match="two cases of the same title"):
        bench.load_cases(path, "cpu")


def test_cpu_time_is_not_wall_time(tmp_path: Path) -> None:
    path = tmp_path / "bench_cases.py"
    path.write_text(
        "import time\n"
        "from bench_case import Case, Subject\n"
        "def sleep(*, device, size):\n"
        "    return lambda: time.sleep(size / 100)\n"
        "def cases(device):\n"
        "    return [Case('a', 'value', [Subject('ours', sleep)])]\n"
    )
    torch.set_num_threads(2)
    try:
        measurer = Measurer(path, "cpu")
        measurer.prepare("a", "ours", 5, 1)
        found = measurer.sample("ours", 2, 1)
        assert torch.get_num_threads() == 1
        measurer.sample("ours", 1, 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert found["wall"] >= 0.05
    assert found["cpu"] < found["wall"] / 2
