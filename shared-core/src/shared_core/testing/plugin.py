"""Pytest plugin of the suites: `-p shared_core.testing.plugin`.

Options `--device` and `--slow`, the fixtures `device` and `randn`, the marker `slow`. Every test
starts from the same seed, with uninitialised memory full of NaN, on one thread; hypothesis draws
the same examples in every run.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from .numbers import Randn, normal
from .poison import NONDETERMINISTIC, poison_uninitialised_memory

TORCH_ON_ITSELF = r".*`torch\.jit\.\w+` is deprecated"
"""What torch warns of while it imports its own compiler."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--device` and `--slow`."""
    group = parser.getgroup("shared_core")
    group.addoption(
        "--device", default="cpu", help="device of the tests; a missing one is an error"
    )
    group.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """Checks the device, before any test runs, and makes runs repeatable."""
    config.addinivalue_line("markers", "slow: long; deselected without --slow")
    # Read when the first handle of cuBLAS is made; without it matrix products differ between runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    name = config.getoption("--device")
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:
        raise pytest.UsageError(f"--device {name} cannot be used: {error}") from error
    # The tensors of tests are tiny. A second thread has nothing to do, and where other processes
    # keep the machine busy threads wait for each other many times longer than they work.
    torch.set_num_threads(1)
    if not os.environ.get("TORCH_TRACE"):
        # pytest would add its handler to this logger otherwise, and by that start torch's trace:
        # slower compilation, and thousands of lines without content behind every failure.
        trace = logging.getLogger("torch.__trace")
        trace.propagate = True
        trace.handlers.clear()
    if not config.getoption("--hypothesis-profile", None):
        _settle_hypothesis()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the slow tests out, unless `--slow` is given."""
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of `--device`."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def randn(device: torch.device) -> Randn:
    """Normal numbers on that device that depend on the seed alone."""
    return partial(normal, device=device)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Poisons memory and seeds, before the fixtures of every scope."""
    _seed()
    poison_uninitialised_memory()
    # In front of every other filter, a plain `-W error` included. Pytest undoes it after the test.
    for message in (*NONDETERMINISTIC, TORCH_ON_ITSELF):
        warnings.filterwarnings("ignore", message=message)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Once more: fixtures of a wider scope draw only before the first test that uses them.
    _seed()


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


class _TorchRandom:
    """torch's global generator, as hypothesis wants it: seeded alike before each example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> Any:
        return torch.get_rng_state()

    def setstate(self, state: Any) -> None:
        torch.set_rng_state(state)


_torch_random = _TorchRandom()


def _settle_hypothesis() -> None:
    try:
        from hypothesis import HealthCheck, register_random, settings
    except ImportError:
        return
    settings.register_profile(
        "shared_core",
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("shared_core")
    register_random(_torch_random)
