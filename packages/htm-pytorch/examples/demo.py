"""Finds the one event of a memory that a question asks for, among 100 times more than it knows.

    nox -s demo -- htm-pytorch                a minute on 2 cores
    nox -s demo -- htm-pytorch --seed 1       other events and weights
    nox -s demo -- htm-pytorch --noise 0      tokens show the key of their event exactly
    nox -s demo -- htm-pytorch --out FOLDER   where the plot and the figures go

Two layers read a memory, attention to its few relevant events and attention to all of its tokens.
Both are trained on small memories until they answer equally many questions, and then asked about
larger ones. Every token shows the key of its event with noise, of which the mean of an event has
less; without noise both layers answer nearly everything. The output folder receives a plot and the
figures in full precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import needle
import needle_display as display
from needle import ANSWERS, NOISE, QUESTIONS, TOKENS
from needle_display import Result

from demonstration import INDENT, check_writable, finish, new_parser, number, progress, status_of

KINDS = {"HTM": "htm", "full attention": "full"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = parse(arguments)
    return status_of(lambda: run(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=number(0, 2**32 - 1), default=0, help="of events and weights (0)")
    add(
        "--events",
        type=number(2, 1000),
        default=16,
        help="in a memory of the training; tests have 10 and 100 times more, too (16)",
    )
    add("--steps", type=number(1, 10**6), default=4000, help="of training, at most (4000)")
    add("--memories", type=number(1, 10**6), default=256, help="of each test (256)")
    add(
        "--noise",
        type=number(0, 100, float),
        default=NOISE,
        help=f"standard deviation of a key in a token; keys have 1 ({NOISE})",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains, measures and shows. Raises DemoError for what the user can mend."""
    start = time.perf_counter()
    check_writable(options.out)
    print(f"needle    which of {ANSWERS} answers is in the event with this key?")
    print(
        f"{INDENT}{min(QUESTIONS, options.events)} questions to each memory, chance 1 / {ANSWERS}"
    )
    print(f"{INDENT}events of {TOKENS} tokens, in each the key with a noise of {options.noise:g}")
    print(flush=True)
    results = {name: read(options, name, kind) for name, kind in KINDS.items()}
    display.tables(results)
    figures = {
        "seed": options.seed,
        "noise": options.noise,
        "results": {name: dataclasses.asdict(one) for name, one in results.items()},
    }
    path = options.out / "needle.png"
    display.plot(results, path)
    finish(path, options.out, figures, start)


def read(options: argparse.Namespace, name: str, kind: str) -> Result:
    """Trains a reader and asks it."""
    shared = {"noise": options.noise}
    with progress(f"{name} learns to read memories of {options.events} events") as tick:
        reader, trained = needle.train(
            options.seed, kind, events=options.events, steps=options.steps, tick=tick, **shared
        )
    parameters = sum(parameter.numel() for parameter in reader.parameters())
    result = Result(trained, parameters, {}, {}, {})
    for events in (options.events, 10 * options.events, 100 * options.events):
        with progress(f"{name} reads {options.memories} memories of {events:,} events") as tick:
            result.accuracy[events] = needle.accuracy(
                reader, options.seed, events, memories=options.memories, tick=tick, **shared
            )
        result.seconds[events], result.bytes[events] = needle.cost(reader, events)
    return result


if __name__ == "__main__":
    sys.exit(main())
