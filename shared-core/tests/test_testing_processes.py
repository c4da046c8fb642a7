"""`run_ranks`: results, failures, the time limit; functions that live in test files."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shared_core
from shared_core.testing import run_ranks


@dataclass
class Job:
    """A class of this file, which is on no import path, as argument and as result."""

    number: int


def report(job: Job, x: torch.Tensor) -> dict[str, object]:
    total = x * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return {
        "job": Job(job.number + dist.get_rank()),
        "total": total,
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "poisoned": torch.empty(3),
        "core": shared_core.__file__,
        "folder": str(Path.cwd()),
        "path": sys.path,
    }


def test_results_by_rank() -> None:
    first, second = run_ranks(report, 2, Job(5), torch.ones(2))
    assert (first["job"], second["job"]) == (Job(5), Job(6))
    for result in (first, second):
        assert torch.equal(result["total"], torch.full((2,), 3.0))
        assert result["backend"] == "gloo"
        assert result["threads"] == 1
        assert result["poisoned"].isnan().all()
        assert result["core"] == shared_core.__file__
        # Not where the parent is, and nothing of it is left.
        assert not Path(result["folder"]).exists()
        assert str(Path.cwd()) not in result["path"] or str(Path.cwd()) in sys.path


def fail_on(rank: int, pids: str) -> None:
    Path(pids, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == rank:
        # The others have written theirs, and wait.
        while len(list(Path(pids).iterdir())) < dist.get_world_size():
            time.sleep(0.01)
        raise KeyError("planted fault")
    time.sleep(60)


def assert_gone(folder: Path, count: int) -> None:
    pids = [int(path.read_text()) for path in folder.iterdir()]
    assert len(pids) == count
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_failing_rank_is_reported_and_the_others_are_killed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as error:
        run_ranks(fail_on, 2, 1, str(tmp_path))
    message = str(error.value)
    assert message.startswith("1 of 2 ranks failed\nrank 1, exit status 1:\n")
    assert "in fail_on" in message
    assert "KeyError: 'planted fault'" in message
    assert "rank 0" not in message
    assert_gone(tmp_path, 2)


def hang_here(pids: str) -> None:
    Path(pids, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        time.sleep(60)


def test_the_time_limit_tells_where_each_rank_was(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError) as error:
        run_ranks(hang_here, 2, str(tmp_path), timeout=1.5)
    message = str(error.value)
    assert message.startswith("2 ranks not done within 1.5 seconds\nrank 0, exit status 1:\n")
    assert message.count("in hang_here") == 2
    assert "barrier" in message
    assert_gone(tmp_path, 2)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed() -> None:
    with pytest.raises(RuntimeError, match="1 of 1 ranks failed\nrank 0, exit status -9:"):
        run_ranks(die, 1)


def test_only_functions_that_can_be_found_again() -> None:
    def local() -> None:
        pass

    for function in (local, lambda: None, Job(1).__init__, test_results_by_rank.__call__):
        with pytest.raises(TypeError, match="must stand at the top level of an imported file"):
            run_ranks(function, 1)
