"""Worker processes: functions that run in another environment, called with lines of JSON.

The caller writes {"call": name, "arguments": {...}} and reads {"value": ...} or {"error": ...,
"traceback": ...}, from a pipe that nothing else is written to. A worker is a script that hands its
functions to `serve`. What is printed there goes to the log of the worker, whose last lines are part
of the message if it dies or hangs. Only the standard library is used here, since one of the two
environments holds nothing but the reference.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any

# Set for the Python that calls, these would change what the other Python imports or measures.
_NOT_INHERITED = (
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "PYTHONWARNINGS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)
_LOG_LINES = 20
# Names the pipe for the answers.
_ANSWERS = "WORKER_ANSWERS"


class WorkerError(RuntimeError):
    """The function raised, or the worker died or took too long; `details` has the traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Worker:
    """A script in a process of its own, started at the first call and again after it died."""

    def __init__(
        self,
        name: str,
        python: str | Path,
        script: Path,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`variables` are set in its environment; `name` is how messages call the worker."""
        self.name = name
        self._command = [str(python), str(script), *arguments]
        self._environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        self._environment |= variables or {}
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader: threading.Thread | None = None
        self._log: IO[bytes] | None = None

    def call(self, function: str, *, limit: float, **arguments: Any) -> Any:
        """Runs a function of the worker and returns its value.

        Raises:
            WorkerError: the function raised, the process ended, or `limit` seconds went by. In
                the last two cases the process is gone, with all that it held.
        """
        process = self._running()
        try:
            _pipe(process.stdin).write(
                json.dumps({"call": function, "arguments": arguments}) + "\n"
            )
            _pipe(process.stdin).flush()
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            # The log is read when nothing is written to it any more.
            process.kill()
            process.wait()
            log = self._last_lines()
            self.close()
            raise WorkerError(
                f"{self.name}: {function} took longer than {limit:g} s and was ended", log
            ) from None
        except BrokenPipeError:
            line = None
        if line is None:
            code, log = process.wait(), self._last_lines()
            self.close()
            raise WorkerError(f"{self.name}: ended with code {code} during {function}", log)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}", answer["traceback"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._reader is not None:
            self._reader.join()
        for pipe in (self._process.stdin, self._log):
            if pipe is not None:
                # What could not be written to a process that died is lost with it.
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._process = self._log = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        answers, written = os.pipe()
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(written,),
                encoding="utf-8",
                env={**self._environment, _ANSWERS: str(written)},
                # Nothing lies there that an import could find.
                cwd=tempfile.gettempdir(),
            )
        except OSError as error:
            self._log.close()
            os.close(answers)
            raise WorkerError(f"{self.name}: {self._command[0]} does not start: {error}") from None
        finally:
            os.close(written)
        self._process = process
        self._answers = queue.Queue()
        self._reader = threading.Thread(target=_read, args=(answers, self._answers), daemon=True)
        self._reader.start()
        return process

    def _last_lines(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-_LOG_LINES:])


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the process was started without a pipe")
    return pipe


def _read(pipe: int, answers: queue.Queue[str | None]) -> None:
    """Passes on the lines of a worker, and None at the end."""
    with os.fdopen(pipe, encoding="utf-8") as lines:
        for line in lines:
            answers.put(line)
    answers.put(None)


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answers calls of these functions until the caller closes the pipe."""
    answers = os.fdopen(int(os.environ[_ANSWERS]), "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"value": functions[request["call"]](**request["arguments"])}
        except Exception as error:
            answer = {
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load_module(path: Path) -> ModuleType:
    """A file as a module, which others can then import by its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
