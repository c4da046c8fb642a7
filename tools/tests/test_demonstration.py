"""What the demonstrations share: how a run ends, what is shown, files that are whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import demonstration
from demonstration import DemoError


@pytest.mark.parametrize(
    ("problem", "status", "errors"),
    [
        (DemoError("no facts"), 1, "demo: no facts\n"),
        (OSError("no space"), 1, "demo: no space\n"),
        (KeyboardInterrupt(), 130, "demo: stopped\n"),
    ],
)
def test_a_problem_takes_one_line(
    capsys: pytest.CaptureFixture[str], problem: BaseException, status: int, errors: str
) -> None:
    def run() -> None:
        raise problem

    assert demonstration.status_of(run) == status
    assert tuple(capsys.readouterr()) == ("", errors)


def test_an_end_without_problems_is_0() -> None:
    assert demonstration.status_of(lambda: None) == 0


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        demonstration.status_of(lambda: print(1 // 0))


@pytest.mark.parametrize(
    ("limits", "good", "bad"),
    [
        ((2, 5), ("2", "5"), ("1", "6")),
        ((None, 5, float), ("0.001", "5"), ("0", "-1", "nan", "inf")),
    ],
)
def test_numbers_are_in_range(limits: Any, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    convert = demonstration.number(*limits)
    assert [convert(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not "):
            convert(text)


def test_a_bad_option_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demonstration.new_parser("About.").parse_args(["--nonsense"])
    assert tuple(capsys.readouterr()) == ("", "demo: unrecognized arguments: --nonsense\n")


def test_no_share_is_rounded_up_to_all() -> None:
    assert demonstration.percent(0.9999) == "<100 %"
    assert demonstration.percent(0.99999, 2) == "<100 %"
    assert demonstration.percent(1.0) == "100.0 %"


def test_cells_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    demonstration.table("title", ("a", "longer"), {"one": ("1,000", "2"), "two": ("3", "4")})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == ""
    assert len({len(line) for line in lines[:-1]}) == 1


def test_without_a_terminal_progress_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with demonstration.progress("learns") as tick:
        tick(0.5)
    assert capsys.readouterr().out == f"{demonstration.INDENT}learns ...\n"


def test_the_end_says_where_everything_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    figure = demonstration.new_figure(2, 1)
    figure.subplots().plot([1, 2])
    demonstration.save_figure(figure, plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    demonstration.finish(plot, tmp_path, {"seed": 3}, 0.0)
    assert json.loads((tmp_path / "figures.json").read_text()) == {"seed": 3}
    output = capsys.readouterr().out
    assert str(plot) in output
    assert "figures.json" in output
