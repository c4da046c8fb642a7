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
from types import ModuleType
from typing import Any

import torch

from .modules import load_file

STARTUP: float = 30.0
"""Seconds that processes may take to start, on top of the time limit."""


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
        timeout: seconds that the function may take. A process that is still running then tells
            where it is, and ends; if it cannot, it is killed 30 seconds later.

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
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world_size):
                numbers = [str(rank), str(world_size), str(timeout)]
                processes.append(_start(folder, [*target, *numbers], rank))
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
    # pytest names test files after their folders, which unpickling asks for as packages.
    parts = module.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        sys.modules.setdefault(parent, ModuleType(parent))
    # In its place before its code runs, so that arguments of its own classes unpickle.
    load_file(file, module)


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
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        # A rank that fails because its time is up has reported where it was; so will the others.
        if now > end + STARTUP or (now < end and any(process.poll() for process in processes)):
            break
        time.sleep(0.02)
    late = time.monotonic() > end
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    failed = [rank for rank, code in codes.items() if code or (late and code is None)]
    if not failed:
        return
    logs = "".join(
        f"\nrank {rank}, exit status {codes[rank]}:\n"
        + (folder / f"log{rank}").read_text(encoding="utf-8", errors="replace")
        for rank in failed
    )
    if late:
        raise TimeoutError(f"{len(failed)} ranks not done within {timeout} seconds{logs}")
    raise RuntimeError(f"{len(failed)} of {len(processes)} ranks failed{logs}")
