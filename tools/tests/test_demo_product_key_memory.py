"""The demonstration of product-key-memory: what it stores, teaches, counts, writes and refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demos import assert_one_line, load
from torch.utils.flop_counter import FlopCounterMode

from demonstration import DemoError

facts, miniatures, demo = load("product-key-memory", "facts", "miniatures", "demo")

SMALL = ("--facts", 200, "--steps", 30, "--edits", 40, "--tokens", 300)


def test_a_small_run_shows_three_tables(run: Callable[..., Any], tmp_path: Path) -> None:
    status, output, errors = run(*SMALL)
    assert (status, errors) == (0, "")
    for words in ("facts per 1000 MACs", "KL to uniform", "old facts kept", "plot", "figures"):
        assert words in output
    assert max(map(len, output.splitlines())) <= 100
    assert (tmp_path / "out" / "slots.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    shares = [one["recalled"] for one in figures["stored"].values()]
    shares += [one["usage"] for one in figures["used"].values()]
    shares += [share for one in figures["taught"].values() for share in one["kept"]]
    assert len(shares) == 2 + 2 + 4 * 2
    assert all(0.0 < share <= 1.0 for share in shares)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figures.json",
        "slots.png",
    ]


def test_the_seed_says_all(run: Callable[..., Any], tmp_path: Path) -> None:
    figures = tmp_path / "out" / "figures.json"
    found = []
    for seed in (3, 3, 4):
        assert run(*SMALL, "--seed", seed)[0] == 0
        found.append(json.loads(figures.read_text()))
    assert found[0] == found[1]
    assert found[0]["used"] != found[2]["used"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--facts", "1"), "--facts"),
        (("--facts", "ten"), "ten"),
        (("--steps", "0"), "--steps"),
        (("--seed", "-1"), "--seed"),
        (("--facts", "100", "--edits", "200"), "would change all"),
    ],
)
def test_bad_options_take_one_line(
    run: Callable[..., Any], options: tuple[str, ...], words: str
) -> None:
    assert_one_line(run(*options), words, status=2)


def test_a_model_that_stored_nothing_is_refused() -> None:
    known = facts.Facts.draw(20, torch.Generator().manual_seed(0))
    model = facts.FactModel(facts.memory())
    # No question has this answer.
    known = known._replace(answers=torch.full((20,), -1))
    with pytest.raises(DemoError, match="none of 20 facts"):
        miniatures.forgetting(model, known, [], miniatures.fine_tune_all)


def test_multiplications_are_those_that_are_made() -> None:
    memory = facts.memory()
    macs = facts.multiply_adds(memory)
    layer = facts.feed_forward(macs)
    questions = torch.randn(8, facts.WIDTH)
    counted = []
    for module in (memory, layer):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module.eval()(questions)
        counted.append(counter.get_total_flops() // (2 * 8))
    # The counter does not see the sum of the values.
    assert macs == counted[0] + memory.heads * memory.topk * facts.WIDTH
    assert facts.multiply_adds(layer) == counted[1]
    assert 0 <= counted[1] - macs < 2 * facts.WIDTH


def test_lessons_change_half_and_keep_the_rest_apart() -> None:
    known = facts.Facts.draw(300, torch.Generator().manual_seed(1))
    lessons, background, examined = miniatures.lessons(known, 80, seed=2)
    assert [len(lesson.answers) for lesson in lessons] == [32, 32, 16]
    taught = torch.cat([lesson.questions for lesson in lessons])
    answers = torch.cat([lesson.answers for lesson in lessons])
    same = (taught[:, None] == known.questions).all(-1)
    assert same.sum() == 40
    at, which = same.nonzero(as_tuple=True)
    assert (answers[at] != known.answers[which]).all()
    rest = torch.cat((background.questions, examined.questions))
    assert not (rest[:, None] == taught).all(-1).any()
    assert len(background.answers) == len(examined.answers) == 130
    assert len(rest.unique(dim=0)) == 260


def test_chosen_slots_change_no_more_than_they_may() -> None:
    _, model, known = miniatures.store(0, "memory", facts=300, steps=40, rows=100)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    lessons, background, old = miniatures.lessons(known, 64, seed=0)
    pupil = copy.deepcopy(model)
    miniatures.slot_teacher(pupil, background)(pupil, lessons[0])
    changed = {name for name, x in pupil.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"layer.values.weight"}
    rows = (pupil.layer.values.weight != before["layer.values.weight"]).any(1).sum()
    assert 0 < rows <= miniatures.CHOSEN
    # What is measured is a copy.
    miniatures.forgetting(model, old, lessons, miniatures.fine_tune_all)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
