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
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import needle
import needle_display as display
from needle import ANSWERS, NOISE, QUESTIONS, TOKENS, DemoError
from needle_display import INDENT, Result, progress

KINDS = {"HTM": "htm", "full attention": "full"}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = parse(arguments)
    try:
        run(options)
    except (DemoError, OSError) as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    usage, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        "demo", description=usage, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of events and weights (0)")
    add(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="for the results (demo-output)",
    )
    add(
        "--events",
        type=number(int, 2, 1000),
        default=16,
        help="in a memory of the training; tests have 10 and 100 times more, too (16)",
    )
    add("--steps", type=number(int, 1, 10**6), default=4000, help="of training, at most (4000)")
    add("--memories", type=number(int, 1, 10**6), default=256, help="of each test (256)")
    add(
        "--noise",
        type=number(float, 0, 100),
        default=NOISE,
        help=f"standard deviation of a key in a token; keys have 1 ({NOISE})",
    )
    return parser.parse_args(arguments)


def number(kind: type[int] | type[float], least: int, most: int) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError
        return value

    convert.__name__ = f"number from {least} to {most}"
    return convert


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
    display.write(options.out / "figures.json", json.dumps(figures, indent=2).encode())
    print(f"plot      {path}")
    print(f"figures   {options.out / 'figures.json'}")
    print(f"time      {time.perf_counter() - start:.0f} s", flush=True)


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise DemoError(f"cannot write to {folder}: {problem.strerror}") from problem


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
