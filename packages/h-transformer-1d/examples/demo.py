"""Trains a byte-level language model on the source of Python's standard library, in minutes.

    nox -s demo                                  2 minutes of training
    nox -s demo -- --minutes 10                  a larger model, for longer
    nox -s demo -- --resume                      after an interruption, with the identical loss
    nox -s demo -- --resume --minutes 20         train a finished model on
    nox -s demo -- --corpus ~/texts              learn any other text
    nox -s demo -- --devices 2                   two processes on this machine
    nox -s demo -- --devices 2 --num-nodes 2     two machines: the same on each, with MASTER_ADDR,
                                                 MASTER_PORT and NODE_RANK in the environment

Files that the model has not seen measure it, in bits per byte, beside gzip, bz2 and xz. The output
folder receives the checkpoint, the loss of every step and a plot of it; what an earlier run left
there moves to run-1, run-2, ... in it. The model is a plain `HTransformer1D`; training runs on
Lightning.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import checkpoints
import corpus
import processes
import report
import torch
from checkpoints import Checkpoints
from corpus import Corpus
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from processes import Agreement
from progress import LOSSES, PLOT, LiveProgress, LossRecord, read_losses, say
from settings import SIZES, Settings
from training import Training

from demonstration import DemoError, check_writable, new_parser, number, some_path

YEAR = 525_600  # minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = parse(arguments)
    quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample may hold any character, and not every terminal knows them all.
        sys.stdout.reconfigure(errors="replace")
    try:
        run(options)
    except (DemoError, OSError) as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        last = options.out / checkpoints.LAST
        way_on = f"; the weights are in {last}, --resume goes on" if last.exists() else ""
        print(f"\ndemo: stopped{way_on}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=number(most=YEAR, kind=float), help="time to train, without set-up (2)")
    add("--steps", type=number(most=10**9), help="steps to train, instead of a time")
    add("--corpus", type=some_path, metavar="PATH", help="folder or file to learn instead")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from the last one, or from this; on several machines all of\n"
        "them must see --out, since only the first one writes",
    )
    add("--size", choices=tuple(SIZES), help="of the model (large from 5 minutes on)")
    add(
        "--seed",
        type=number(0, 2**32 - 1),
        help="of the weights, the order of the text and the sample (0)",
    )
    add("--precision", choices=("bf16", "fp32"), help="of the arithmetic (the faster one here)")
    # The bytes that were typed, whether or not they are text.
    add("--prompt", type=os.fsencode, default=b"", help="what the sample begins with")
    add("--length", type=number(most=10**9), default=800, help="longest sample, in bytes (800)")
    add("--devices", type=number(most=10**9), default=1, help="processes on this machine (1)")
    add("--num-nodes", type=number(most=10**9), default=1, help="machines (1)")
    add("--accelerator", default="cpu", help="in Lightning's words: cpu (default), gpu, ...")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains, measures and shows. Raises DemoError for what the user can mend."""
    processes.check_environment(options.num_nodes)
    check_writable(options.out)
    source, saved, before, where = None, None, None, options.corpus
    if options.resume is not None:
        source = Path(options.resume) if options.resume else checkpoints.to_resume(options.out)
        saved = checkpoints.read(source)
        before = Settings(**saved["demo"]["settings"])
        if where is None and before.corpus_path is not None:
            where = Path(before.corpus_path)
    text = corpus.load(where, options.out)
    names = ("minutes", "steps", "seed", "size", "precision")
    wanted = {name: getattr(options, name) for name in names}
    if before is None:
        settings = Settings.new(text, **wanted, accelerator=options.accelerator)
    else:
        settings = before.resumed(text, **wanted)
    count = options.devices * options.num_nodes
    if settings.rows % count:
        raise DemoError(
            f"{settings.rows} windows a step cannot be shared evenly by {count} processes"
        )
    torch.manual_seed(settings.seed)
    windows = corpus.Windows(text.training, settings.context, settings.rows, settings.seed)
    training = Training(settings, windows)
    if saved is not None:
        training.on_load_checkpoint(saved)
    trainer = make_trainer(options, training, source)
    describe(text, training, options)
    if saved is not None and training.done:
        say("          done before; a larger budget trains on")
        training.load_state_dict(saved["state_dict"])
    else:
        trainer.fit(training, ckpt_path=source, weights_only=True)
        say(f"          {training.step:,} steps in {training.elapsed:.0f} s")
    if trainer.is_global_zero:
        show(text, training, options)


def make_trainer(options: argparse.Namespace, training: Training, source: Path | None) -> Trainer:
    losses = [] if source is None else read_losses(source.parent / LOSSES)
    measured = source is None and options.precision is None
    one = options.devices == options.num_nodes == 1
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy="auto" if one else "ddp",
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[
                Agreement(training, measured=measured),
                LossRecord(training, options.out, losses),
                Checkpoints(training, options.out, source),
                LiveProgress(training),
            ],
        )
    except (MisconfigurationException, ValueError) as problem:
        raise DemoError(str(problem).splitlines()[0]) from problem


def describe(text: Corpus, training: Training, options: argparse.Namespace) -> None:
    settings = training.settings
    parameters = sum(parameter.numel() for parameter in training.parameters())
    megabytes = len(text.training) / 1e6, len(text.held_out) / 1e6
    budget = (
        f"{settings.minutes:g} minutes" if settings.steps is None else f"{settings.steps} steps"
    )
    count = options.devices * options.num_nodes
    files = "1 file" if text.files == 1 else f"{text.files} files"
    held_out = f"{text.held_out_files} of them, {megabytes[1]:.2f} MB, held out"
    if not text.held_out_files:
        held_out = f"the last {megabytes[1]:.2f} MB held out"
    say(f"corpus    {text.name}")
    say(f"          {files}, {megabytes[0]:.1f} MB to learn from;", end=" ")
    say(held_out)
    say(f"model     HTransformer1D: {parameters / 1e6:.2f} million parameters, dim {settings.dim},")
    say(f"          depth {settings.depth}, block size {settings.block_size}")
    say(f"training  {budget}, {settings.rows} windows of {settings.context} bytes a step,", end=" ")
    say(settings.precision + (f", {count} processes" if count > 1 else ""))


def show(text: Corpus, training: Training, options: argparse.Namespace) -> None:
    training.eval()
    context = training.settings.context
    say("          measuring it and the compressors, which may take a minute")
    bits = report.bits_per_byte(training, text.held_out, context)
    others = corpus.compressors(text)
    say("\nheld out  bits per byte")
    for name, value in (("this model", bits), *others.items()):
        say(f"          {value:.3f}  {name}")
    say(f"          every byte counts, predicted from {context // 2} to {context} bytes before it")

    plot = options.out / PLOT
    report.plot(read_losses(options.out / LOSSES), bits, others, plot)
    say("\nsample    ", end="")
    for piece in report.sample(
        training.model, options.prompt, options.length, training.settings.seed
    ):
        say(piece, end="")
    say(f"\n\nplot      {plot}")
    say(f"weights   {options.out / checkpoints.LAST}")


def quiet_libraries() -> None:
    """Leaves out what the libraries say about themselves; their errors stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


if __name__ == "__main__":
    sys.exit(main())
