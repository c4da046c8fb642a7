"""Follows a permutation through a sequence, beside a plain transformer as deep and as wide.

    nox -s demo -- feedback-transformer                a minute on 2 cores
    nox -s demo -- feedback-transformer --seed 1       other words and weights
    nox -s demo -- feedback-transformer --length 24    longer words
    nox -s demo -- feedback-transformer --out FOLDER   where the plot and the figures go

A word is a sequence of permutations of three things; the answer at every place is their product so
far. The plain transformer is trained for as many steps, and another for as much time. All are asked
about words twice as long as those they were trained on. The output folder receives a plot of losses
and answers, and the figures in full precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import torch
import words
import words_display as display
from words_display import Result

from demonstration import (
    INDENT,
    Tick,
    check_writable,
    finish,
    new_parser,
    number,
    progress,
    status_of,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = parse(arguments)
    return status_of(lambda: run(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=number(0), default=0, help="of words and weights (0)")
    add("--length", type=number(2, 1000), default=16, help="of the words to train on (16)")
    add("--steps", type=number(1), default=500, help="to train for (500)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains, asks and shows. Raises DemoError for what the user can mend."""
    start = time.perf_counter()
    check_writable(options.out)
    # The tensors are small: threads would wait for each other longer than they work.
    torch.set_num_threads(1)
    print(f"words     {options.length} permutations of three things, {words.ROWS} words a step;")
    print(f"{INDENT}{words.DEPTH} layers of width {words.DIM}", flush=True)
    results = {}
    trained = None
    for name, kind, steps in (
        ("feedback", "feedback", options.steps),
        ("plain, as many steps", "plain", options.steps),
        ("plain, as much time", "plain", None),
    ):
        seconds = 0.0 if trained is None else trained.seconds
        with progress(f"training: {name}") as tick:
            results[name] = learn(kind, steps, seconds, options, tick)
        trained = trained or results[name].trained
    display.tables(results, options.length)
    figures = {
        "seed": options.seed,
        "length": options.length,
        "results": {
            name: dataclasses.asdict(one) | {"trained": one.trained._asdict()}
            for name, one in results.items()
        },
    }
    path = options.out / "words.png"
    display.plot(results, options.length, path)
    finish(path, options.out, figures, start)


def learn(
    kind: str, steps: int | None, seconds: float, options: argparse.Namespace, tick: Tick
) -> Result:
    """Trains a model for so many steps or so much time, and asks it about words twice as long."""
    model = words.build(kind, options.seed)
    trained = words.train(
        model, options.length, options.seed, steps=steps, seconds=seconds, tick=tick
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    return Result(size, trained, words.accuracy(model, 2 * options.length, options.seed))


if __name__ == "__main__":
    sys.exit(main())
