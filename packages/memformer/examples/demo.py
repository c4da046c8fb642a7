"""Asks a memory for facts that it read 64 segments ago, after training on 8.

    nox -s demo -- memformer                 a few minutes on 2 cores
    nox -s demo -- memformer --seed 1        other facts and weights
    nox -s demo -- memformer --minutes 1     train for a minute at most
    nox -s demo -- memformer --plot FILE     where the plot goes
    nox -s demo -- memformer --out FOLDER    where plot and figures go

The first segment holds 4 keys with their values, all others hold noise. Shows how many values the
model recalls 8, 16, 32 and 64 segments later, with its memory and without, and what training by
replay takes in memory beside back-propagation through all segments at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import display
import peak
import recall
from recall import ASKED, CHANCE, LENGTH, PAIRS, TRAINED, VALUES, Trained

from demonstration import (
    INDENT,
    DemoError,
    check_writable,
    finish,
    new_parser,
    number,
    percent,
    progress,
    some_path,
    status_of,
    table,
)

WEIGHED = (2, 4, 8, 16)
Shares = dict[int, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = parse(arguments)
    return status_of(lambda: run(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=number(0), default=0, help="of facts and weights (0)")
    add("--steps", type=number(1), default=1500, help="to train for (1500)")
    add("--batch", type=number(1), default=32, help="sequences of a step (32)")
    add("--asked", type=number(1), default=512, help="sequences of the examination (512)")
    add("--minutes", type=number(kind=float), default=None, help="to train for at most")
    add("--plot", type=some_path, default=None, metavar="FILE", help="for the plot (in --out)")
    add("--no-peak", action="store_true", help="leave out what training takes in memory")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains, examines and shows. Raises DemoError for what the user can mend."""
    start = time.perf_counter()
    path = options.plot or options.out / "recall.png"
    for folder in (options.out, path.parent):
        check_writable(folder)
    print(f"task      {PAIRS} keys and values in the first of up to {TRAINED} segments of {LENGTH}")
    print(f"{INDENT}tokens, the rest is noise; asked after each segment", flush=True)
    trained = train(options)
    shares = {"with memory": examine(options, trained), "without": without(options, trained)}
    print()
    asked = [count for count in ASKED if count >= TRAINED]
    rows = {name: [percent(found[count]) for count in asked] for name, found in shares.items()}
    rows["by chance"] = [percent(CHANCE)] * len(asked)
    table("recalled", [f"{count} segments" for count in asked], rows)
    peaks = {} if options.no_peak else weigh()
    figures = {
        "seed": options.seed,
        "steps": len(trained.losses),
        "recalled": shares,
        "losses": trained.losses,
        "peaks": peaks,
    }
    display.plot(shares, trained.losses, peaks, path)
    finish(path, options.out, figures, start)


def train(options: argparse.Namespace) -> Trained:
    with progress(f"trains by replay, {options.steps} steps at most") as tick:
        trained = recall.train(
            options.seed,
            options.steps,
            batch=options.batch,
            minutes=options.minutes,
            tick=tick,
        )
    if not trained.losses:
        raise DemoError(f"--minutes {options.minutes} were over before the first step")
    last = trained.losses[-20:]
    print(f"trained   {len(trained.losses)} steps in {trained.seconds:.0f} s, ", end="")
    print(f"loss {sum(last) / len(last):.2f} nats; {VALUES} values, so 1 in {VALUES} by chance")
    return trained


def examine(options: argparse.Namespace, trained: Trained) -> Shares:
    with progress(f"reads {max(ASKED)} segments") as tick:
        return recall.examine(trained.model, options.seed, batch=options.asked, tick=tick)


def without(options: argparse.Namespace, trained: Trained) -> Shares:
    with progress("reads them without its memory") as tick:
        return recall.examine(
            trained.model, options.seed, batch=options.asked, remember=False, tick=tick
        )


def weigh() -> dict[str, Shares]:
    """MiB of a training step by way and number of segments; nothing where it cannot be told."""
    peaks: dict[str, Shares] = {way: {} for way in peak.WAYS}
    total = len(WEIGHED) * len(peak.WAYS)
    try:
        with progress("weighs training steps") as tick:
            for way in peak.WAYS:
                for count in WEIGHED:
                    peaks[way][count] = peak.measure(way, count)
                    tick(sum(map(len, peaks.values())) / total)
    except DemoError as problem:
        print(f"memory    {problem}")
        return {}
    print()
    names = {"replay": "replay", "bptt": "all segments at once"}
    table(
        "peak, MiB",
        [f"{count} segments" for count in WEIGHED],
        {names[way]: [f"{found[n]:.0f}" for n in WEIGHED] for way, found in peaks.items()},
    )
    return peaks


if __name__ == "__main__":
    sys.exit(main())
