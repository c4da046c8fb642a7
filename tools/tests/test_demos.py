"""What every demonstration does alike: it helps, refuses in one line and stops when asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from demos import assert_one_line, load

from distributions import ROOT

PACKAGES = sorted(path.parents[1].name for path in ROOT.glob("packages/*/examples/demo.py"))
# The one that `nox -s demo` runs.
FIRST = "h-transformer-1d"


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def demo(package: str) -> ModuleType:
    (found,) = load(package, "demo")
    return found


def test_help_is_read_by_people(run: Callable[..., Any], package: str) -> None:
    status, output, errors = run("--help")
    assert (status, errors) == (0, "")
    assert ("nox -s demo" if package == FIRST else f"nox -s demo -- {package}") in output
    assert "--out FOLDER" in output


@pytest.mark.parametrize(
    ("option", "words"),
    [("--nonsense", "unrecognized arguments: --nonsense"), ("--out=", "--out: an empty path")],
)
def test_bad_options_take_one_line(run: Callable[..., Any], option: str, words: str) -> None:
    assert_one_line(run(option), words, status=2)


def test_an_unwritable_folder_takes_one_line(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert_one_line(run("--steps", 1, "--out", out), f"cannot write to {out}")


def test_it_stops_when_asked(
    run: Callable[..., Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # All of them train, and make a model for that.
    monkeypatch.setattr(torch.nn.Module, "__init__", stop)
    status, _, errors = run("--steps", 1)
    # A line that shows progress is ended before.
    assert (status, errors) == (130, "\n" * (package == FIRST) + "demo: stopped\n")
