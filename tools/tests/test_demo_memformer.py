"""The demonstration of memformer: what it asks, trains, weighs, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demos import assert_one_line, load

recall, peak, demo = load("memformer", "recall", "peak", "demo")

SMALL = ("--steps", 3, "--batch", 2, "--asked", 3, "--no-peak")


def test_a_small_run_shows_a_table_and_a_plot(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.peak, "measure", lambda way, count: 3.0 * count * len(way))
    status, output, errors = run(*SMALL[:-1])
    assert (status, errors) == (0, "")
    for words in ("recalled", "64 segments", "by chance", "peak, MiB", "plot", "figures"):
        assert words in output
    assert max(map(len, output.splitlines())) <= 100
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert len(figures["losses"]) == figures["steps"] == 3
    assert set(figures["recalled"]) == {"with memory", "without"}
    shares = [x for found in figures["recalled"].values() for x in found.values()]
    assert len(shares) == 2 * len(recall.ASKED)
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert figures["peaks"]["bptt"]["16"] == 3.0 * 16 * 4


def test_the_seed_says_all(run: Callable[..., Any], tmp_path: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        assert run(*SMALL, "--seed", seed)[0] == 0
        found.append(json.loads((tmp_path / "out" / "figures.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["losses"] != found[2]["losses"]


def test_the_plot_goes_where_it_is_wanted(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(*SMALL, "--plot", tmp_path / "elsewhere" / "it.png")[0] == 0
    assert (tmp_path / "elsewhere" / "it.png").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["figures.json"]


def test_minutes_end_it_sooner(run: Callable[..., Any], tmp_path: Path) -> None:
    status, _, errors = run(
        *("--steps", 100000, "--batch", 2, "--asked", 3, "--no-peak", "--minutes", 0.005)
    )
    assert (status, errors) == (0, "")
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["steps"] < 1000
    status, _, errors = run(*SMALL, "--minutes", 1e-12)
    assert (status, errors.count("\n")) == (1, 1)
    assert "--minutes 1e-12" in errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "0"), "--steps"),
        (("--steps", "ten"), "ten"),
        (("--batch", "0"), "--batch"),
        (("--asked", "0"), "--asked"),
        (("--seed", "-1"), "--seed"),
        (("--minutes", "0"), "--minutes"),
    ],
)
def test_bad_options_take_one_line(
    run: Callable[..., Any], options: tuple[str, ...], words: str
) -> None:
    assert_one_line(run(*options), words, status=2)


def test_an_unwritable_plot_takes_one_line(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line(run(*SMALL, "--plot", tmp_path / "file" / "x.png"), str(tmp_path))


def test_where_memory_cannot_be_told_the_rest_is_shown(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak, "TOKENS", 8)
    monkeypatch.setattr(demo.peak.sys, "executable", "/bin/false")
    status, output, _ = run(*SMALL[:-1])
    assert status == 0
    assert "cannot measure replay over 2 segments" in output


def test_questions_are_about_the_pairs_of_the_first_segment() -> None:
    generator = torch.Generator().manual_seed(0)
    facts = recall.Facts.draw(50, generator)
    src = facts.segments(3, generator)
    asked = facts.questions(generator)
    known, questions = (x[:, : 2 * recall.PAIRS].unflatten(1, (-1, 2)) for x in (src[:, 0], asked))
    for row, said in zip(known.tolist(), questions.tolist(), strict=True):
        assert sorted(row) == sorted(said)
        assert len({key for key, _ in row}) == recall.PAIRS
    assert (src[:, 0, 2 * recall.PAIRS :] >= recall.KEYS + recall.VALUES).all()
    assert (src[:, 1:] >= recall.KEYS + recall.VALUES).all()
    # In an order of their own, so that it tells nothing.
    assert not torch.equal(known, questions)


def test_without_its_memory_a_model_is_asked_in_vain() -> None:
    """What is asked in the first segment is seen; afterwards only the memory knows it."""
    pupil = recall.model(0)
    seen: list[Any] = []
    pupil.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    recall.examine(pupil, 0, batch=2, remember=False)
    assert seen == [None] * max(recall.ASKED)
    seen.clear()
    recall.examine(pupil, 0, batch=2)
    assert seen[0] is None
    assert all(mem is not None for mem in seen[1:])


def test_training_begins_with_one_segment_and_learns() -> None:
    found = recall.train(0, 60, batch=16)
    assert sum(found.losses[-10:]) < 0.8 * sum(found.losses[:10])
    assert not found.model.memory_slots.requires_grad


def test_both_ways_of_training_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "WIDTH", 16)
    monkeypatch.setattr(peak, "BATCH", 2)
    found = []
    for way in peak.WAYS:
        run = peak.prepare(way, 3, tokens=5)
        run()
        model = run.__closure__[
            next(i for i, x in enumerate(run.__code__.co_freevars) if x == "model")
        ]
        found.append([p.grad for p in model.cell_contents.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_memory_of_replay_does_not_grow() -> None:
    assert peak.measure("replay", 12) < 0.5 * peak.measure("bptt", 12)


@pytest.mark.slow
def test_what_is_learned_on_eight_segments_lasts_for_many() -> None:
    found = recall.train(0, 1500)
    shares = recall.examine(found.model, 0)
    assert shares[8] > 0.99
    assert shares[64] > 0.95
