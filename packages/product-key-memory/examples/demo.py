"""Stores thousands of facts in a product-key memory, then teaches it a few hundred others.

    nox -s demo -- product-key-memory                 a minute on 2 cores
    nox -s demo -- product-key-memory --seed 1        other facts and weights
    nox -s demo -- product-key-memory --facts 32768   more facts in as many slots
    nox -s demo -- product-key-memory --out FOLDER    where the plot and the figures go

Shows what a memory stores beside a feed-forward layer of as many multiplications, how many of its
slots tokens use that resemble each other, and what it forgets when taught by all its weights or by
some of its slots. The output folder receives a plot of the slots' use and the figures in full
precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import display
import miniatures
from facts import ANSWERS, WIDTH, FactModel, Facts
from miniatures import LESSON, Stored, Taught, Used

from demonstration import (
    INDENT,
    check_writable,
    finish,
    new_parser,
    number,
    percent,
    progress,
    status_of,
    table,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = parse(arguments)
    return status_of(lambda: run(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=number(0), default=0, help="of facts, tokens and weights (0)")
    add("--facts", type=number(2), default=16384, help="to store (16384)")
    add("--steps", type=number(1), default=1000, help="to store them in (1000)")
    add("--edits", type=number(1), default=320, help="facts taught afterwards (320)")
    add("--tokens", type=number(1), default=32768, help="whose slots are counted (32768)")
    options = parser.parse_args(arguments)
    if options.edits // 2 >= options.facts:
        parser.error(f"--edits {options.edits} would change all of --facts {options.facts}")
    return options


def run(options: argparse.Namespace) -> None:
    """Trains, measures and shows. Raises DemoError for what the user can mend."""
    start = time.perf_counter()
    check_writable(options.out)
    print(f"facts     {options.facts:,} random vectors of width {WIDTH}, each with one of")
    print(f"{INDENT}{ANSWERS} random answers; {options.steps:,} steps to store them", flush=True)
    stored, model, known = store(options)
    used = count(options)
    taught = teach(options, model, known)
    figures = {
        "seed": options.seed,
        "stored": {name: dataclasses.asdict(one) for name, one in stored.items()},
        "used": {name: {"usage": one.usage, "kl": one.kl} for name, one in used.items()},
        "taught": {name: dataclasses.asdict(one) for name, one in taught.items()},
    }
    path = options.out / "slots.png"
    display.plot(used, taught, path)
    finish(path, options.out, figures, start)


def store(options: argparse.Namespace) -> tuple[dict[str, Stored], FactModel, Facts]:
    results = {}
    # The memory last, since it is what the lessons go on with.
    for name, kind in (("feed-forward layer", "feed-forward"), ("product-key memory", "memory")):
        with progress(f"a {name} stores them") as tick:
            results[name], model, known = miniatures.store(
                options.seed, kind, facts=options.facts, steps=options.steps, tick=tick
            )
    rows = {
        name: (
            f"{one.macs:,}",
            f"{one.parameters:,}",
            percent(one.recalled),
            f"{1000 * one.recalled * options.facts / one.macs:,.0f}",
        )
        for name, one in results.items()
    }
    print()
    table("stored", ("MACs", "parameters", "recalled", "facts per 1000 MACs"), rows)
    return results, model, known


def count(options: argparse.Namespace) -> dict[str, Used]:
    results = {}
    for name, norm in (("batch norm", "batch"), ("layer norm", "layer")):
        with progress(f"tokens of a narrow cone look up slots, queries by {name}") as tick:
            results[name] = miniatures.usage(options.seed, norm, tokens=options.tokens, tick=tick)
    rows = {name: (percent(one.usage), f"{one.kl:.2f}") for name, one in results.items()}
    print()
    table("use", ("slots used", "KL to uniform"), rows)
    return results


def teach(options: argparse.Namespace, model: FactModel, known: Facts) -> dict[str, Taught]:
    lessons, background, old = miniatures.lessons(known, options.edits, options.seed)
    print(f"lessons   {options.edits} facts in {len(lessons)} lessons of up to {LESSON}, half of")
    print(f"{INDENT}them other answers to what was stored", flush=True)
    teachers = {
        "chosen slots": miniatures.slot_teacher(model, background),
        "all slots it reads": miniatures.fine_tune_read_slots,
        "all weights, rates as before": miniatures.fine_tune_all,
        "all weights, Adam at 3e-4": miniatures.fine_tune_by_adam,
    }
    results = {}
    for name, teacher in teachers.items():
        with progress(f"taught by {name}") as tick:
            results[name] = miniatures.forgetting(model, old, lessons, teacher, tick)
    rows = {
        name: (percent(one.kept[-1], 2), percent(one.learned, 2)) for name, one in results.items()
    }
    print()
    table("taught", ("old facts kept", "new facts recalled"), rows)
    return results


if __name__ == "__main__":
    sys.exit(main())
