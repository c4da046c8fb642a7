"""A worker answers, says what went wrong in it, and can always be ended and started again."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from workers import Worker, WorkerError

TOOLS = Path(__file__).resolve().parents[2]
SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(TOOLS)!r})
from workers import serve

def noise():
    print("printed")
    os.write(1, b"written\\n")
    return "said"

def fail(text):
    raise LookupError(text)

def hang():
    print("still here", file=sys.stderr)
    time.sleep(1000)

def die():
    print("last words", file=sys.stderr)
    os._exit(3)

serve({{
    "add": lambda a, b: a + b,
    "noise": noise,
    "fail": fail,
    "die": die,
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "sleep": time.sleep,
    "hang": hang,
    "pid": os.getpid,
    "argument": lambda: sys.argv[1],
    "environment": lambda name: os.environ.get(name),
}})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_values_come_back_whatever_is_printed(script: Path) -> None:
    with Worker("one", sys.executable, script, "given") as worker:
        assert worker.call("add", limit=30, a=[1], b=["two"]) == [1, "two"]
        assert worker.call("noise", limit=30) == "said"
        assert worker.call("add", limit=30, a=0.1, b=float("inf")) == float("inf")
        assert worker.call("argument", limit=30) == "given"


def test_what_an_import_prints_is_no_answer(script: Path) -> None:
    script.write_text('import os\nos.write(1, b"hello")\nprint("hello")\n' + SCRIPT)
    with Worker("one", sys.executable, script) as worker:
        assert worker.call("add", limit=30, a=1, b=2) == 3


def test_an_error_has_its_traceback_and_the_worker_goes_on(script: Path) -> None:
    with Worker("one", sys.executable, script) as worker:
        pid = worker.call("pid", limit=30)
        with pytest.raises(WorkerError, match="one: LookupError: nothing there") as found:
            worker.call("fail", limit=30, text="nothing there")
        assert "raise LookupError(text)" in found.value.details
        with pytest.raises(WorkerError, match="KeyError: 'unknown'"):
            worker.call("unknown", limit=30)
        assert worker.call("pid", limit=30) == pid


@pytest.mark.parametrize(("how", "code"), [("die", 3), ("crash", -signal.SIGSEGV)])
def test_a_worker_that_dies_is_reported_and_replaced(script: Path, how: str, code: int) -> None:
    with Worker("two", sys.executable, script) as worker:
        pid = worker.call("pid", limit=30)
        with pytest.raises(
            WorkerError, match=f"^two: ended with code {code} during {how}$"
        ) as found:
            worker.call(how, limit=30)
        if how == "die":
            assert found.value.details == "last words"
        assert not is_running(pid)
        assert worker.call("pid", limit=30) != pid


def test_a_worker_that_hangs_is_ended(script: Path) -> None:
    with Worker("three", sys.executable, script) as worker:
        pid = worker.call("pid", limit=30)
        with pytest.raises(
            WorkerError, match=r"^three: hang took longer than 0\.5 s and was ended$"
        ) as found:
            worker.call("hang", limit=0.5)
        assert found.value.details == "still here"
        assert not is_running(pid)
        assert worker.call("add", limit=30, a=1, b=2) == 3


def test_no_process_is_left(script: Path) -> None:
    with Worker("four", sys.executable, script) as worker:
        pid = worker.call("pid", limit=30)
        assert is_running(pid)
    assert not is_running(pid)
    worker.close()


def test_a_script_that_cannot_start_shows_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with (
        Worker("five", sys.executable, tmp_path / "broken.py") as worker,
        pytest.raises(WorkerError, match="ended with code 1 during add") as found,
    ):
        worker.call("add", limit=30, a=1, b=1)
    assert "No module named 'no_such_module'" in found.value.details


def test_a_python_that_is_not_there(script: Path, tmp_path: Path) -> None:
    missing = tmp_path / "python"
    with (
        Worker("six", missing, script) as worker,
        pytest.raises(WorkerError, match=f"six: {missing} does not start"),
    ):
        worker.call("add", limit=30, a=1, b=1)


def test_the_search_path_is_not_inherited(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/not/this")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("KEPT", "yes")
    with Worker("seven", sys.executable, script) as worker:
        for name, value in (("PYTHONPATH", None), ("OMP_NUM_THREADS", None), ("KEPT", "yes")):
            assert worker.call("environment", limit=30, name=name) == value
    with Worker("eight", sys.executable, script, variables={"PYTHONPATH": "/this"}) as worker:
        assert worker.call("environment", limit=30, name="PYTHONPATH") == "/this"
