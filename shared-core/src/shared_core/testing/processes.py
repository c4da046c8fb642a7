"""Runs a function in several processes that form a gloo group."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GRACE = 10.0
"""Seconds in which a process that hangs reports where, before it is killed."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls `function(*args)` in `world_size` processes, one thread each, on the CPU.

    Each process has joined the default process group (gloo; rendezvous through a file), imports the
    function from its file, and has poisoned uninitialised memory as the plugin does.

    Args:
        function: at the top level of a module or test file.
        world_size: the number of processes.
        *args: what `torch.save` can store.
        timeout: seconds for all of it; processes still running then are killed.

    Returns:
        What the function returned, by rank.

    Raises:
        TypeError: the function is not at the top level of a file.
        RuntimeError: a rank failed; the message has its traceback.
        TimeoutError: the time is up; the message tells where each rank was.
    """
    target = address(function)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(args, folder / "args")
        processes = [
            _start(folder, [*target, str(rank), str(world_size), str(timeout)], rank)
            for rank in range(world_size)
        ]
        try:
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [
            torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world_size)
        ]


def address(function: Callable[..., Any]) -> tuple[str, str, str]:
    """File, module and name of a function or class, from which another process gets it.

    Raises:
        TypeError: it is not at the top level of an imported file.
    """
    module = getattr(function, "__module__", "")
    name = getattr(function, "__qualname__", repr(function))
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module == "__main__" or not name.isidentifier():
        raise TypeError(f"{name} must stand at the top level of an imported file")
    return str(Path(file).resolve()), module, name


def resolve(file: str, module: str, name: str) -> Any:
    """What `address` names."""
    if module not in sys.modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is not None and found.origin == file:
            importlib.import_module(module)
        else:
            _load_file(file, module)
    return getattr(sys.modules[module], name)


def _load_file(file: str, module: str) -> None:
    """Test files are on no import path."""
    spec = importlib.util.spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    # In its place before its code runs, so that arguments of its own classes unpickle.
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])


def _start(folder: Path, arguments: list[str], rank: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    # The children see the same packages, in the same order, and nothing of the current folder.
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    environment["PYTHONSAFEPATH"] = "1"
    environment["OMP_NUM_THREADS"] = "1"
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "shared_core.testing.ranks", *arguments]
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout + GRACE
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        late = time.monotonic() > end
        if failed or late:
            shown = failed or [rank for rank, code in enumerate(codes) if code is None]
            logs = "\n".join(f"rank {rank}:\n{_log(folder, rank)}" for rank in shown)
            if late or any((folder / f"late{rank}").exists() for rank in shown):
                raise TimeoutError(f"no result within {timeout} seconds\n{logs}")
            raise RuntimeError(f"rank {', '.join(map(str, shown))} failed\n{logs}")
        if all(code == 0 for code in codes):
            return
        time.sleep(0.02)


def _log(folder: Path, rank: int) -> str:
    return (folder / f"log{rank}").read_text(encoding="utf-8", errors="replace")
