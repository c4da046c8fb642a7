"""The demonstration of htm-pytorch: what it finds, writes and refuses; and its transformer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demos import assert_one_line, load

from distributions import ROOT
from workers import load_module

PACKAGE = "htm-pytorch"
needle, causal_transformer, demo = load(PACKAGE, "needle", "causal_transformer", "demo")
bench = load_module(ROOT / "packages" / PACKAGE / "benchmarks" / "bench_needle.py")

SMALL = ("--events", 4, "--steps", 3, "--memories", 2)


def test_a_small_run_shows_what_is_found_and_costs(run: Callable[..., Any], tmp_path: Path) -> None:
    status, output, errors = run(*SMALL)
    assert (status, errors) == (0, "")
    for words in ("answered", " 400 events", " ms", " MB", "parameters", "plot", "figures"):
        assert words in output
    assert max(map(len, output.splitlines())) <= 100
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["figures.json", "needle.png"]
    assert (out / "needle.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "figures.json").read_text())["results"]
    assert list(results) == ["HTM", "full attention"]
    for one in results.values():
        assert one["trained"]["steps"] == 3
        for what in ("accuracy", "seconds", "bytes"):
            assert list(one[what]) == ["4", "40", "400"]
        assert all(0.0 <= share <= 1.0 for share in one["accuracy"].values())
        assert min(one["seconds"].values()) > 0.0
    # A projected memory is larger than what a search keeps of it.
    assert 4 * results["HTM"]["bytes"]["400"] < results["full attention"]["bytes"]["400"]


def test_the_seed_says_all(run: Callable[..., Any], tmp_path: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        assert run(*SMALL, "--seed", seed)[0] == 0
        results = json.loads((tmp_path / "out" / "figures.json").read_text())["results"]
        found.append([(one["trained"], one["accuracy"]) for one in results.values()])
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--events", "1"), "--events"),
        (("--events", "1001"), "not from 2 to 1000"),
        (("--steps", "0"), "--steps"),
        (("--memories", "ten"), "ten"),
        (("--seed", "-1"), "--seed"),
        (("--noise", "nan"), "not from 0 to 100"),
    ],
)
def test_bad_options_take_one_line(
    run: Callable[..., Any], options: tuple[str, ...], words: str
) -> None:
    assert_one_line(run(*options), words, status=2)


def test_events_have_one_answer_and_their_key_in_every_token() -> None:
    drawn = needle.Events.draw(3, 40, 0.0, torch.Generator().manual_seed(0))
    tokens = drawn.memories.unflatten(1, (40, needle.TOKENS))
    keys, symbols = tokens.split((needle.KEY, 2 * needle.ANSWERS), -1)
    assert (keys == keys[:, :, :1]).all()
    torch.testing.assert_close(keys.square().mean(-1), torch.ones(3, 40, needle.TOKENS))
    assert (symbols.sum(-1) == 1).all()
    answers = symbols[..., : needle.ANSWERS].sum(2)
    assert (answers.sum(-1) == 1).all()
    assert drawn.answers.shape == (3, needle.QUESTIONS)
    assert (answers.argmax(-1)[:, : needle.QUESTIONS] == drawn.answers).all()
    assert (drawn.questions[..., : needle.KEY] == keys[:, : needle.QUESTIONS, 0]).all()
    assert not drawn.questions[..., needle.KEY :].any()
    noisy = needle.Events.draw(3, 40, 0.5, torch.Generator().manual_seed(0)).memories
    off = (noisy - drawn.memories)[..., : needle.KEY]
    assert off.std().item() == pytest.approx(0.5, rel=0.05)


def test_htm_finds_the_needle_in_a_hundred_times_more() -> None:
    reader, trained = needle.train(0, "htm")
    assert trained.accuracy >= needle.LEARNED
    assert trained.steps < 500
    assert needle.accuracy(reader, 0, 1600, memories=16) >= 0.98


@pytest.mark.slow
def test_full_attention_learns_as_much_and_does_not_find_it() -> None:
    reader, trained = needle.train(0, "full")
    assert trained.accuracy >= needle.LEARNED
    assert trained.steps < 4000
    assert needle.accuracy(reader, 0, 16, memories=64) >= 0.99
    assert needle.accuracy(reader, 0, 1600, memories=16) < 0.9


def test_both_have_equally_many_parameters() -> None:
    htm, full = (
        sum(parameter.numel() for parameter in needle.Reader(needle.layer(kind)).parameters())
        for kind in ("htm", "full")
    )
    assert full == pytest.approx(htm, rel=0.01)


def test_full_attention_is_one_softmax_over_all_tokens() -> None:
    torch.manual_seed(0)
    module = needle.layer("full").double()
    queries = torch.randn(2, 3, needle.WIDTH, dtype=torch.float64)
    memories = torch.randn(2, 20, needle.WIDTH, dtype=torch.float64)
    keys, values = module.to_kv(memories).chunk(2, -1)
    scores = module.to_q(queries) @ keys.mT * keys.shape[-1] ** -0.5
    expected = module.to_out(scores.softmax(-1) @ values)
    torch.testing.assert_close(module(queries, memories), expected)


def test_most_bytes_are_those_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            x = torch.zeros(1000)
            x = x.repeat(4)
            del x

    # Operators hold a few bytes of their own.
    assert 4 * 5000 <= needle.most_bytes(run) < 4 * 5100
    assert needle.most_bytes(lambda: None) == 0


def test_the_benchmark_takes_the_worst_of_ours_and_the_best_of_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def accuracy(seed: int, kind: str, events: int) -> float:
        asked.append((seed, kind, events))
        return 0.5 + seed / 10

    monkeypatch.setattr(bench, "_accuracy", accuracy)
    assert bench.answered(device="cpu", kind="htm")() == 50.0
    assert bench.answered(device="cpu", kind="full")() == pytest.approx(90.0)
    assert asked == [(seed, kind, 1600) for kind in ("htm", "full") for seed in range(5)]


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    module = causal_transformer.CausalTransformer
    return module(causal_transformer.VOCABULARY, 32, depth=2, segment=6, chunk_size=4).double()


def test_the_transformer_sees_no_future_and_all_of_its_past(transformer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(causal_transformer.VOCABULARY, (2, 21), generator=generator)
    losses = transformer.losses(text)
    assert losses.shape == (2, 20)
    for place in range(21):
        changed = text.clone()
        changed[:, place] = (changed[:, place] + 1) % causal_transformer.VOCABULARY
        differ = (transformer.losses(changed) != losses).any(0)
        # Its own prediction is the first to change, and the last segment sees it, too.
        assert differ.nonzero()[0].item() == max(0, place - 1)
        assert differ[-1]
    forgotten = transformer.losses(text, forget=True)
    assert (forgotten[:, :6] == losses[:, :6]).all()
    assert (forgotten[:, 6:] != losses[:, 6:]).all()


@pytest.mark.parametrize("given", [1, 6, 7, 13])
def test_the_transformer_writes_what_it_thinks_most_likely(transformer: Any, given: int) -> None:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(causal_transformer.VOCABULARY, (2, given), generator=generator)
    written = transformer.generate(text, 9)
    assert written.shape == (2, 9)
    for place in range(9):
        past, logits = None, None
        for segment in torch.cat((text, written[:, :place]), 1).split(6, 1):
            logits, past = transformer(segment, past)
        assert (logits[:, -1].argmax(-1) == written[:, place]).all()


def test_the_transformer_learns_by_what_it_remembers() -> None:
    torch.manual_seed(0)
    model = causal_transformer.CausalTransformer(
        causal_transformer.VOCABULARY, depth=1, segment=8, chunk_size=8
    )
    history = causal_transformer.train(model, steps=110, rows=16, segments=2)
    assert sum(history[:10]) / 10 > 2.5
    assert sum(history[-10:]) / 10 < 0.5
    # Not seen in training.
    text = causal_transformer.texts(16, 2, 8, torch.Generator().manual_seed(1))
    word = slice(-causal_transformer.WORD, None)
    with torch.no_grad():
        kept, forgotten = (
            model.losses(text, forget=forget)[:, word].mean() for forget in (False, True)
        )
    assert kept < 0.5
    assert forgotten > 2.0
