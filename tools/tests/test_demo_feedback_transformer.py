"""The demonstration of feedback-transformer: what it learns, writes and refuses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demos import assert_one_line, load

from distributions import ROOT
from workers import load_module

PACKAGE = "feedback-transformer"
words, demo = load(PACKAGE, "words", "demo")
bench = load_module(ROOT / "packages" / PACKAGE / "benchmarks" / "bench_words.py")

SMALL = ("--length", 4, "--steps", 3)


def test_a_small_run_shows_what_is_learned(run: Callable[..., Any], tmp_path: Path) -> None:
    status, output, errors = run(*SMALL)
    assert (status, errors) == (0, "")
    for name in ("parameters", "last loss", "tokens 5 to 8", " %", "plot", "figures"):
        assert name in output
    assert max(map(len, output.splitlines())) <= 100
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["figures.json", "words.png"]
    assert (out / "words.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "figures.json").read_text())["results"]
    assert list(results) == ["feedback", "plain, as many steps", "plain, as much time"]
    for one in results.values():
        assert len(one["accuracy"]) == 8
        assert all(0.0 <= share <= 1.0 for share in one["accuracy"])
        assert len(one["trained"]["losses"]) == one["trained"]["steps"]
    steps = [one["trained"]["steps"] for one in results.values()]
    assert steps[:2] == [3, 3]
    seconds = [one["trained"]["seconds"] for one in results.values()]
    assert seconds[2] >= seconds[0]


def test_the_seed_says_all_but_the_time(run: Callable[..., Any], tmp_path: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        assert run(*SMALL, "--seed", seed)[0] == 0
        results = json.loads((tmp_path / "out" / "figures.json").read_text())["results"]
        names = ("feedback", "plain, as many steps")
        found.append([(results[n]["accuracy"], results[n]["trained"]["losses"]) for n in names])
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--length", "1"), "--length"),
        (("--length", "1001"), "not from 2 to 1000"),
        (("--steps", "0"), "--steps"),
        (("--steps", "many"), "many"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_bad_options_take_one_line(
    run: Callable[..., Any], options: tuple[str, ...], fragment: str
) -> None:
    assert_one_line(run(*options), fragment, status=2)


def test_products_are_those_of_a_group() -> None:
    table = words.products()
    assert table.shape == (6, 6)
    everything = torch.arange(6)
    for i in range(6):
        assert torch.equal(table[i].sort().values, everything)
        assert torch.equal(table[:, i].sort().values, everything)
    for a, b, c in itertools.product(range(6), repeat=3):
        assert table[table[a, b], c] == table[a, table[b, c]]
    assert not torch.equal(table, table.t())
    # Twice the exchange of two things is nothing.
    swap = words.PERMUTATIONS.index((1, 0, 2))
    assert words.PERMUTATIONS[table[swap, swap]] == (0, 1, 2)


def test_answers_are_products_of_all_that_came() -> None:
    drawn, answers = words.draw(5, 9, torch.Generator().manual_seed(0))
    for word, answer in zip(drawn.tolist(), answers.tolist(), strict=True):
        state = (0, 1, 2)
        for token, expected in zip(word, answer, strict=True):
            state = tuple(state[i] for i in words.PERMUTATIONS[token])
            assert words.PERMUTATIONS[expected] == state


@pytest.mark.parametrize("kind", ["feedback", "plain"])
def test_no_model_sees_the_future(kind: str) -> None:
    model = words.build(kind, 0).eval()
    drawn, _ = words.draw(2, 6, torch.Generator().manual_seed(0))
    changed = drawn.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 6
    before, after = model(drawn), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any()


def test_both_have_about_as_many_parameters() -> None:
    feedback, plain = (
        sum(parameter.numel() for parameter in words.build(kind, 0).parameters())
        for kind in ("feedback", "plain")
    )
    assert feedback == pytest.approx(plain, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_feedback_follows_and_plain_does_not(seed: int) -> None:
    model = words.build("feedback", seed)
    words.train(model, 16, seed, steps=500)
    shares = words.accuracy(model, 32, seed)
    assert sum(shares[:16]) / 16 == 1.0
    assert sum(shares[16:]) / 16 >= 0.95
    plain = words.build("plain", seed)
    words.train(plain, 16, seed, steps=500)
    assert sum(words.accuracy(plain, 16, seed)) / 16 < 0.6


def test_the_benchmark_takes_the_worst_of_ours_and_the_best_of_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shares(seed: int, kind: str) -> tuple[list[float], float]:
        assert kind in ("feedback", "plain")
        return [0.5 + seed / 10] * 16 + [0.1 * seed] * 16, float(seed)

    monkeypatch.setattr(bench, "_trained", shares)
    assert bench.answered(device="cpu", kind="feedback", beyond=False)() == pytest.approx(0.5)
    assert bench.answered(device="cpu", kind="feedback", beyond=True)() == 0.0
    assert bench.answered(device="cpu", kind="plain", beyond=False)() == pytest.approx(0.9)
    assert bench.answered(device="cpu", kind="plain", beyond=True)() == pytest.approx(0.4)
    assert bench.time_to_learn(device="cpu")() == 4.0
