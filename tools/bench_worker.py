"""The measuring process of bench.py: python bench_worker.py CASES DEVICE.

It runs in our environment and in the reference's: nothing but torch is imported.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import peak_memory
from bench_case import Case, Subject
from workers import load_module, serve


def load_cases(path: Path, device: str) -> list[Case]:
    """The cases of a bench_cases.py for a device."""
    # For what lies beside it, and behind all else for what the demonstration is made of.
    sys.path.insert(0, str(path.parent))
    sys.path.append(str(path.parent.parent / "examples"))
    try:
        cases: list[Case] = load_module(path).cases(device)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    titles = [case.title for case in cases]
    if len(set(titles)) != len(titles):
        raise ValueError(f"{path} has two cases of the same title: {titles}")
    return cases


class Measurer:
    """The functions that the caller can use."""

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._device = device
        self._cases: list[Case] | None = None
        self._prepared: dict[str, Callable[[], Any]] = {}
        self._all_threads = torch.get_num_threads()

    def describe(self, distribution: str, import_name: str | None) -> dict[str, Any]:
        """What is installed here, and on what machine; `code` is a hash of the package's files."""
        if self._device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device")
        version, code = None, ""
        if import_name is not None:
            module = importlib.import_module(import_name)
            version = getattr(module, "__version__", None)
            code = _content_key(Path(module.__path__[0]))
        cuda = self._device == "cuda"
        return {
            "version": version or importlib.metadata.version(distribution),
            "code": code,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hardware": torch.cuda.get_device_name() if cuda else _cpu_model(),
            "threads": self._all_threads,
            "system": platform.system(),
        }

    def prepare(self, title: str, name: str, size: int | None, threads: int) -> None:
        """Makes a subject ready for `sample`."""
        torch.set_num_threads(threads)
        subject = self._subject(title, name)
        arguments = dict(subject.arguments) if size is None else {**subject.arguments, "size": size}
        self._prepared[name] = subject.prepare(device=self._device, **arguments)

    def warm(self, name: str, threads: int) -> float:
        """Runs twice, and returns the seconds of the second time.

        The first may compile, and again for another number of threads. Only what takes a minute is
        not run again.
        """
        first = max(self.sample(name, 1, threads).values())
        return first if first > 60 else max(self.sample(name, 1, threads).values())

    def sample(self, name: str, runs: int, threads: int) -> dict[str, float]:
        """Seconds of one run, the mean over `runs` of them.

        "cpu" is the processor time of the whole process, "wall" what a clock shows, "device" (on
        an accelerator) the time between two events in its queue. 0 threads are all.
        """
        torch.set_num_threads(threads or self._all_threads)
        run = self._prepared[name]
        gc.collect()
        gc.disable()
        try:
            if self._device == "cuda":
                return {"device": _device_seconds(run, runs)}
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(runs):
                run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            return {"cpu": cpu / runs, "wall": wall / runs}
        finally:
            gc.enable()

    def value(self, title: str, name: str) -> float:
        """What the subject returns."""
        subject = self._subject(title, name)
        return float(subject.prepare(device=self._device, **subject.arguments)())

    def peak(self, title: str, name: str) -> int:
        """Bytes that one run needs at its peak beyond what is there before; for a fresh process.

        What is there before: inputs and parameters, and code, which a small run has loaded.
        """
        torch.set_num_threads(1)
        subject = self._subject(title, name)
        if subject.warm:
            subject.prepare(device=self._device, **{**subject.arguments, **subject.warm})()
        run = subject.prepare(device=self._device, **subject.arguments)
        if self._device == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            torch.cuda.synchronize()
            del result
            return torch.cuda.max_memory_allocated() - before
        return peak_memory.peak(run)

    def ceilings(self) -> dict[str, float]:
        """What the device reaches: operations a second by type, and bytes a second."""
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            size = 8192
            a, b = (torch.randn(size, size, device=self._device, dtype=dtype) for _ in range(2))
            seconds = min(_device_seconds(partial(torch.matmul, a, b), 10) for _ in range(5))
            found[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
        source = torch.empty(2**30, dtype=torch.uint8, device=self._device)
        into = torch.empty_like(source)
        seconds = min(_device_seconds(lambda: into.copy_(source), 10) for _ in range(5))
        found["bytes"] = 2 * source.numel() / seconds
        return found

    def _subject(self, title: str, name: str) -> Subject:
        if self._cases is None:
            self._cases = load_cases(self._path, self._device)
        for case in self._cases:
            if case.title == title:
                return next(subject for subject in case.subjects if subject.name == name)
        raise ValueError(f"{self._path} has no case {title!r}")


def _content_key(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _device_seconds(run: Callable[[], Any], runs: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / runs


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


if __name__ == "__main__":
    measurer = Measurer(Path(sys.argv[1]), sys.argv[2])
    serve(
        {
            name: getattr(measurer, name)
            for name in (
                "describe",
                "prepare",
                "warm",
                "sample",
                "value",
                "peak",
                "ceilings",
            )
        }
    )
