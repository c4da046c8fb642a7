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
folder receives the checkpoint, the loss of every step and a plot of it. The model is a plain
`HTransformer1D`; training runs on Lightning.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import corpus
import report
import torch
from checkpoints import Checkpoints
from corpus import Corpus, DemoError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from progress import LiveProgress, LossRecord, read_losses
from settings import SIZES, Settings
from training import Training


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = parse(arguments)
    quiet_libraries()
    try:
        run(options)
    except (DemoError, OSError) as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    usage, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "demo", description=usage, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=positive(float), help="time to train, without set-up (2)")
    add("--steps", type=positive(int), help="steps to train, instead of a time")
    add("--corpus", type=Path, metavar="PATH", help="folder or file to learn instead")
    add(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="for the results (demo-output)",
    )
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from the last one, or from this",
    )
    add("--size", choices=tuple(SIZES), help="of the model (large from 5 minutes on)")
    add("--seed", type=int, help="of the weights, the order of the text and the sample (0)")
    add("--prompt", default="", help="what the sample begins with")
    add("--length", type=positive(int), default=800, help="longest sample, in bytes (800)")
    add("--devices", type=positive(int), default=1, help="processes on this machine (1)")
    add("--num-nodes", type=positive(int), default=1, help="machines (1)")
    add("--accelerator", default="cpu", help="in Lightning's words: cpu (default), gpu, ...")
    return parser.parse_args(arguments)


def positive(kind: type[int] | type[float]) -> Any:
    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def run(options: argparse.Namespace) -> None:
    """Trains, measures and shows. Raises DemoError for what the user can mend."""
    check_writable(options.out)
    source, saved = None, None
    if options.resume is not None:
        source = Path(options.resume) if options.resume else checkpoints.to_resume(options.out)
        saved = checkpoints.read(source)
    text = corpus.load(options.corpus)
    wanted = {name: getattr(options, name) for name in ("minutes", "steps", "seed", "size")}
    if saved is None:
        settings = Settings.new(text.name, **wanted, accelerator=options.accelerator)
    else:
        settings = Settings(**saved["demo"]["settings"]).resumed(text.name, **wanted)
    processes = options.devices * options.num_nodes
    if settings.rows % processes:
        raise DemoError(
            f"{settings.rows} windows a step cannot be shared evenly by {processes} processes"
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


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise DemoError(f"cannot write to {folder}: {problem.strerror}") from problem


def make_trainer(options: argparse.Namespace, training: Training, source: Path | None) -> Trainer:
    # After a damaged checkpoint the one before it stays until there is a new one.
    keep_previous = source is not None and source.name == checkpoints.PREVIOUS
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
                LossRecord(training, options.out / "loss.csv"),
                Checkpoints(training, options.out, keep_previous=keep_previous),
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
    processes = options.devices * options.num_nodes
    say(f"corpus    {text.name}")
    say(f"          {text.files} files, {megabytes[0]:.1f} MB to learn from;", end=" ")
    say(f"{text.held_out_files} of them, {megabytes[1]:.2f} MB, held out")
    say(f"model     HTransformer1D: {parameters / 1e6:.2f} million parameters, dim {settings.dim},")
    say(f"          depth {settings.depth}, block size {settings.block_size}")
    say(f"training  {budget}, {settings.rows} windows of {settings.context} bytes a step,", end=" ")
    say(settings.precision + (f", {processes} processes" if processes > 1 else ""))


def show(text: Corpus, training: Training, options: argparse.Namespace) -> None:
    training.eval()
    context = training.settings.context
    bits = report.bits_per_byte(training, text.held_out, context)
    others = corpus.compressors(text)
    say("\nheld out  bits per byte")
    for name, value in (("this model", bits), *others.items()):
        say(f"          {value:.3f}  {name}")
    say(f"          every byte counts, predicted from {context // 2} to {context} bytes before it")

    path = options.out / "loss.png"
    report.plot(read_losses(options.out / "loss.csv"), bits, others, path)
    say(f"\nsample    {options.prompt}", end="")
    for piece in report.sample(
        training.model, options.prompt, options.length, training.settings.seed
    ):
        say(piece, end="")
    say(f"\n\nplot      {path}")
    say(f"weights   {options.out / checkpoints.LAST}")


@rank_zero_only
def say(text: str, end: str = "\n") -> None:
    """Prints, in the first process only."""
    print(text, end=end, flush=True)


def quiet_libraries() -> None:
    """Leaves out what the libraries say about themselves; their errors stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


if __name__ == "__main__":
    sys.exit(main())
