"""The demonstration of h-transformer-1d: what it reads, resumes, measures and refuses."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demos import assert_one_line, load
from torch import Tensor

from demonstration import DemoError
from distributions import ROOT

TOOLS = ROOT / "tools"
EXAMPLES = ROOT / "packages" / "h-transformer-1d" / "examples"
NAMES = "checkpoints", "corpus", "demo", "processes", "progress", "report", "settings", "training"
checkpoints, corpus, demo, processes, progress, report, settings, training = load(
    "h-transformer-1d", *NAMES
)

# The demonstration, with a plan (and so a checkpoint) every few steps.
EAGER = f"""
import sys
sys.path[:0] = {[str(EXAMPLES), str(TOOLS)]!r}
import demo, training
training.PLAN_SECONDS = 0.05
sys.exit(demo.main())
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of a few small files."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = ["def", "return", "self", "import", "(x)", "= 0", ":\n    ", "\n"]
    for number in range(40):
        text = " ".join(draw.choices(words, k=200))
        (folder / f"file{number}.py").write_text(text)
    return folder


@pytest.fixture
def run(run: Callable[..., Any], texts: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs the demonstration here; returns its exit status, output and errors."""
    return partial(run, "--corpus", texts, "--out", tmp_path, "--length", 20)


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(texts: Path) -> Iterator[Start]:
    """Starts runs of their own, which save a checkpoint every few steps."""
    started = []

    def call(
        out: Path, *options: object, code: str = EAGER, **environment: str
    ) -> subprocess.Popen[bytes]:
        arguments = ("--corpus", texts, "--out", out, "--size", "tiny", "--length", 1, *options)
        script = out.with_suffix(".py")
        script.write_text(code)
        with out.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                # Two threads of several processes at once would mostly wait for each other.
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=log,
                stderr=log,
                # So that the processes which it starts end with it.
                start_new_session=True,
            )
        started.append(process)
        return process

    yield call
    for process in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    assert process.wait(timeout=120) == 0, out.with_suffix(".log").read_text()


def kill_after(process: subprocess.Popen[bytes], out: Path, step: int) -> list[float]:
    """Kills a run once it has done so many steps; returns the losses it has seen."""
    deadline = time.monotonic() + 120
    while (rows := progress.read_losses(out / "loss.csv")) == [] or rows[-1][0] < step:
        assert process.poll() is None, out.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    return bits(out)


def bits(out: Path) -> list[float]:
    rows = progress.read_losses(out / "loss.csv")
    assert [step for step, _, _ in rows] == list(range(1, len(rows) + 1))
    return [loss for _, _, loss in rows]


def weights(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = checkpoints.read(path)["state_dict"]
    return found


# The corpus


def test_standard_library_without_its_tests() -> None:
    found = corpus.load(None)
    assert "standard library" in found.name
    root = Path(sysconfig.get_path("stdlib"))
    both = found.training + found.held_out
    assert corpus.FILE_START + (root / "abc.py").read_bytes() in both
    assert found.training.count(b"\0") == found.files - found.held_out_files
    assert found.held_out.count(b"\0") == found.held_out_files
    assert 0.02 < len(found.held_out) / len(both) < 0.12


def test_tests_and_foreign_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(corpus, "STDLIB_LEAST", 1)
    names = ["a.py", "json/b.py", "test/c.py", "json/tests/d.py", "idlelib/idle_test/e.py"]
    for name in [*names, "site-packages/f.py", "g.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}")
    assert whole(corpus.load(None)) == b"\0# a.py\0# json/b.py"


def whole(found: Any) -> bytes:
    """The text of a corpus whose last part is held out."""
    assert found.held_out_files == 0
    text: bytes = found.training + found.held_out[1:]
    return text


def test_split_depends_on_each_path_alone(tmp_path: Path) -> None:
    paths = [f"folder/{number}.txt" for number in range(400)]
    alone = {path: corpus._hash(path) % 100 < corpus.HELD_OUT_PERCENT for path in paths}
    assert 5 < sum(alone.values()) < 40
    (tmp_path / "folder").mkdir()
    for path in paths:
        (tmp_path / path).write_text(path)
    found = corpus.load(tmp_path)
    held_out = {text.decode() for text in found.held_out.split(b"\0")[1:]}
    assert held_out == {path for path in paths if alone[path]}
    training = {text.decode() for text in found.training.split(b"\0")[1:]}
    assert training == set(paths) - held_out


def test_a_name_that_is_no_text() -> None:
    assert corpus._hash(os.fsdecode(b"\xff")) != corpus._hash("")


def test_few_files_or_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name * 50)
    found = corpus.load(tmp_path)
    assert (found.files, found.held_out_files) == (2, 0)
    assert found.training == b"\0" + b"one" * 50 + b"\0" + (b"two" * 50)[:-15]
    assert found.held_out == b"\0" + (b"two" * 50)[-15:]
    found = corpus.load(tmp_path / "one")
    assert found.training == b"\0" + (b"one" * 50)[:-7]
    assert found.held_out == b"\0" + (b"one" * 50)[-7:]


@pytest.mark.parametrize("held_out", [True, False])
def test_one_large_file_among_small_ones(held_out: bool, tmp_path: Path) -> None:
    # Held out by its hash or not, the large one would leave nothing to learn or to measure on.
    for number in range(60):
        (tmp_path / f"file{number}").write_text("small")
    by_hash = (
        path
        for path in map("large{}".format, itertools.count())
        if (corpus._hash(path) % 100 < corpus.HELD_OUT_PERCENT) == held_out
    )
    (tmp_path / next(by_hash)).write_text("x" * 100_000)
    found = corpus.load(tmp_path)
    assert len(found.held_out) == pytest.approx(0.05 * len(whole(found)), rel=0.01)


def test_hidden_and_binary_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "image").write_bytes(b"\x89\0")
    (tmp_path / "empty").touch()
    for name in ("one", "two"):
        (tmp_path / name).write_text(name * 10)
    assert whole(corpus.load(tmp_path)) == b"\0" + b"one" * 10 + b"\0" + b"two" * 10


def test_held_out_part_of_a_huge_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "HELD_OUT_LIMIT", 1000)
    for number in range(200):
        (tmp_path / str(number)).write_text("x" * 300)
    found = corpus.load(tmp_path)
    assert len(found.held_out) == 1000 + found.held_out_files
    assert found.held_out_files == 4
    (tmp_path / "single").write_text("y" * 100_000)
    found = corpus.load(tmp_path / "single")
    assert (len(found.training), len(found.held_out)) == (99_001, 1001)


@pytest.mark.parametrize("state", ["zipped", "stripped"])
def test_standard_library_without_source(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "lib"
    if state == "stripped":
        root.mkdir()
        (root / "os.pyc").write_bytes(b"\0")
        (root / "site.py").write_text("pass")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(root))
    with pytest.raises(DemoError, match=r"standard library's source is not in .*--corpus"):
        corpus.load(None)


# The order of the text


def test_order_is_a_function_of_seed_and_step() -> None:
    text = bytes(random.Random(1).choices(range(1, 256), k=5000))
    first, second = (corpus.Windows(text, 32, 4, seed=7) for _ in range(2))
    steps = [0, 1, 5, 37, 38, 39, 200, 3]
    forward = {step: first(step) for step in sorted(steps)}
    for step in steps:
        assert torch.equal(second(step), forward[step])
    assert not torch.equal(corpus.Windows(text, 32, 4, seed=8)(0), forward[0])


def test_a_pass_takes_every_window_once() -> None:
    text = bytes(range(1, 256)) * 2
    windows = corpus.Windows(text, 10, 2, seed=0)
    steps = (len(text) - 1) // 10 - 1
    steps //= 2
    for number in range(3):
        rows = torch.cat([windows(number * steps + step) for step in range(steps)])
        assert torch.equal((rows[:, 1:] - rows[:, :-1]) % 255, torch.ones(2 * steps, 10).long())
        # Two windows share no byte to predict.
        targets = [tuple(row) for row in rows[:, 1:].tolist()]
        assert len(set(targets)) == len(targets)
    assert not torch.equal(windows(0), windows(steps))


def test_too_small_a_corpus() -> None:
    with pytest.raises(DemoError, match=r"100 bytes to learn from, at least 129 are needed"):
        corpus.Windows(b"x" * 100, 32, 3, seed=0)


# The plan


TWO_MINUTES = settings.Settings.new(
    corpus.Corpus("texts", "/texts", b"learned", b"held out", 2, 1),
    minutes=2.0,
    steps=None,
    seed=0,
    size="tiny",
    precision="fp32",
    accelerator="cpu",
)


def walk(budget: Any, seconds: Callable[[int], float]) -> tuple[list[float], float]:
    """Runs through a plan with a clock of its own: the share used at each step, and the time."""
    plan, step, elapsed, before = training.Plan.first(budget), 0, 0.0, (0, 0.0)
    shares = []
    while plan.at(step) < 1.0:
        shares.append(plan.at(step))
        elapsed += seconds(step)
        step += 1
        if step >= plan.renewal:
            pace = (elapsed - before[1]) / (step - before[0])
            plan, before = plan.renew(step, elapsed, pace, budget), (step, elapsed)
    return shares, elapsed


@pytest.mark.parametrize(
    "seconds",
    [
        lambda _: 0.1,
        lambda step: 0.1 if step < 500 else 0.3,
        lambda step: 0.3 if step < 200 else 0.05,
        lambda step: 2.0 if step == 0 else 0.1,
        lambda step: random.Random(step).uniform(0.05, 0.2),
    ],
)
def test_a_budget_of_time_is_met(seconds: Callable[[int], float]) -> None:
    shares, elapsed = walk(TWO_MINUTES, seconds)
    assert elapsed == pytest.approx(120.0, rel=0.02)
    assert shares == sorted(shares)
    # No jump: the learning rate, which falls with the share, falls evenly to the end.
    assert max(later - now for now, later in itertools.pairwise(shares)) < 0.02
    assert 1.0 - shares[-1] < 0.02


@pytest.mark.parametrize(("minutes", "steps"), [(0.01, 1), (0.1, 2)])
def test_steps_nearly_as_long_as_the_budget(minutes: float, steps: int) -> None:
    shares, elapsed = walk(replace(TWO_MINUTES, minutes=minutes), lambda _: 5.0)
    assert len(shares) == steps
    assert elapsed == 5.0 * steps


def test_a_budget_that_one_step_uses_up(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("--size", "tiny", "--minutes", 1e-6)[0] == 0
    assert len(bits(tmp_path)) == 1
    assert "done before" in run("--resume")[1]


@pytest.mark.parametrize("steps", [1, 49, 1000])
def test_a_budget_of_steps_ignores_the_clock(steps: int) -> None:
    budget = replace(TWO_MINUTES, steps=steps)
    shares, _ = walk(budget, lambda step: random.Random(step).uniform(1.0, 9.0))
    assert shares == [step * (1.0 / steps) for step in range(steps)]


# Killed and resumed


def test_killed_at_any_step_it_resumes_with_the_identical_loss(
    start: Start, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, "--steps", 120)
    seen = [
        kill_after(start(killed, *options), killed, step)
        for step, options in ((3, ("--steps", 120)), (60, ("--resume",)))
    ]
    finish(start(killed, "--resume"), killed)
    finish(undisturbed, whole)
    expected = bits(whole)
    assert len(expected) == 120
    for losses in [*seen, bits(killed)]:
        assert losses == expected[: len(losses)]
    expected_weights = weights(whole / "last.ckpt")
    for name, weight in weights(killed / "last.ckpt").items():
        assert torch.equal(weight, expected_weights[name])


def test_with_a_budget_of_time_lost_steps_are_repeated(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen = kill_after(start(out, "--minutes", 0.2), out, 6)
    saved = checkpoints.read(out / "last.ckpt")["demo"]
    assert saved["step"] <= len(seen)
    finish(start(out, "--resume"), out)
    assert bits(out)[: len(seen)] == seen
    saved = checkpoints.read(out / "last.ckpt")["demo"]
    assert training.Plan(**saved["plan"]).at(saved["step"]) == 1.0
    assert saved["elapsed"] > 6.0


def test_damage_is_told_in_one_line_and_the_checkpoint_before_is_kept(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    assert run("--size", "tiny", "--steps", 12)[0] == 0
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    whole, before = last.read_bytes(), previous.read_bytes()
    assert whole != before
    for damaged in (whole[:-1000], whole[:100], b"", b"something else", _flipped(whole)):
        last.write_bytes(damaged)
        assert_one_line(run("--resume"), str(last), "damaged", f"--resume {previous}")
        assert previous.read_bytes() == before

    # The good one is not lost while the run that goes on from it is killed at its start.
    status, output, _ = run("--resume", previous)
    assert status == 0
    assert checkpoints.read(last)["demo"]["step"] == 12
    assert len(bits(tmp_path)) == 12
    assert "12 steps" in output
    previous.write_bytes(b"")
    last.write_bytes(b"")
    assert "--resume" not in run("--resume")[2]


def _flipped(content: bytes) -> bytes:
    """One bit of a tensor changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--size", "tiny", "--steps", 12)[0] == 0
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    before = previous.read_bytes()
    last.write_bytes(b"damaged")
    monkeypatch.setattr(checkpoints.Checkpoints, "on_train_batch_end", _stop)
    assert run("--resume", previous)[0] == 1
    assert previous.read_bytes() == before
    assert checkpoints.read(last)["demo"]["step"] == checkpoints.read(previous)["demo"]["step"]


def _stop(*_: object) -> None:
    raise DemoError("stopped")


def test_killed_between_two_renames(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("--size", "tiny", "--steps", 12)[0] == 0
    losses = bits(tmp_path)
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "new.ckpt").write_bytes(b"half of a check")
    assert run("--resume")[0] == 0
    assert bits(tmp_path) == losses
    assert not (tmp_path / "new.ckpt").exists()


def test_a_finished_run_is_measured_again_or_trained_on(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    first = run("--size", "tiny", "--steps", 8)[1]
    again = run("--resume")[1]
    assert "done before" in again
    measured = "held out  bits per byte"
    assert again[again.index(measured) :] == first[first.index(measured) :]
    losses = bits(tmp_path)
    assert run("--resume", "--steps", 20)[0] == 0
    assert len(bits(tmp_path)) == 20
    assert bits(tmp_path)[:8] == losses
    seconds = checkpoints.read(tmp_path / "last.ckpt")["demo"]["elapsed"] + 2
    assert run("--resume", "--minutes", seconds / 60)[0] == 0
    assert len(bits(tmp_path)) > 20


def test_a_new_run_keeps_the_one_before(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("--size", "tiny", "--steps", 12)[0] == 0
    losses, trained = bits(tmp_path), (tmp_path / "last.ckpt").read_bytes()
    status, output, _ = run("--size", "tiny", "--steps", 3, "--seed", 5)
    kept = tmp_path / "run-1"
    assert status == 0
    assert f"the run that was in {tmp_path} is now in {kept}\n" in output
    assert (kept / "last.ckpt").read_bytes() == trained
    assert (kept / "loss.png").exists()
    assert bits(kept) == losses
    assert len(bits(tmp_path)) == 3

    # It is gone on from there, or here, where the other run is kept in its turn.
    assert run("--resume", kept / "last.ckpt", "--steps", 14)[0] == 0
    assert bits(tmp_path)[:12] == losses
    assert len(bits(tmp_path)) == 14
    assert len(bits(tmp_path / "run-2")) == 3
    assert (kept / "last.ckpt").read_bytes() == trained
    assert run("--resume", "--steps", 15)[0] == 0
    assert not (tmp_path / "run-3").exists()


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_killed_while_a_run_is_kept(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("last.ckpt", "previous.ckpt", "loss.csv", "loss.png")
    for name in names:
        (tmp_path / name).write_text(name)
    replace_file, left = Path.replace, iter(range(moves))

    def fail(path: Path, target: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace_file(path, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "replace", fail)
        checkpoints.keep(tmp_path)
    assert moves > 1 or checkpoints.to_resume(tmp_path).exists()
    checkpoints.keep(tmp_path)
    for name in names:
        (found,) = tmp_path.rglob(name)
        assert found.read_text() == name
        assert found.parent != tmp_path


def test_the_text_is_found_again_and_known_by_its_content(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*options: object) -> tuple[int, str, str]:
        status = demo.main(["--out", str(tmp_path / "out"), "--length", "1", *map(str, options)])
        return status, *capsys.readouterr()

    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(texts, here)
    monkeypatch.chdir(tmp_path)
    assert call("--corpus", "here", "--size", "tiny", "--steps", 4)[0] == 0
    monkeypatch.chdir("/")
    assert call("--resume")[0] == 0
    here.rename(there)
    assert_one_line(call("--resume"), f"{here} does not exist")
    # Elsewhere, and from then on there.
    assert call("--resume", "--corpus", there, "--steps", 6)[0] == 0
    assert call("--resume")[0] == 0
    assert call("--resume", "--corpus", texts)[0] == 0
    changed = there / "file7.py"
    changed.write_text(changed.read_text().swapcase())
    assert_one_line(call("--resume"), f"learned {there}, which has changed")
    assert_one_line(call("--resume", "--corpus", EXAMPLES), f"learned {there}, not {EXAMPLES}")


def test_the_results_are_no_part_of_the_corpus(
    texts: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    where = ("--corpus", tmp_path / "texts", "--out", tmp_path / "texts" / "results")
    assert run(*where, "--size", "tiny", "--steps", 2)[0] == 0
    assert run(*where, "--resume", "--steps", 3)[0] == 0
    where = ("--corpus", tmp_path / "texts", "--out", tmp_path / "texts")
    assert_one_line(run(*where), "which is the corpus", "--out")


def test_the_loss_survives_a_kill_at_the_start(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--size", "tiny", "--steps", 4)[0] == 0
    losses = bits(tmp_path)
    monkeypatch.setattr(Path, "replace", _stop)
    assert run("--resume", "--steps", 8)[0] == 1
    assert bits(tmp_path) == losses


def test_precision_is_part_of_a_run(run: Callable[..., Any]) -> None:
    assert "fp32" in run("--size", "tiny", "--steps", 1, "--precision", "fp32")[1]
    assert run("--resume", "--precision", "fp32")[0] == 0
    assert_one_line(run("--resume", "--precision", "bf16"), "precision is fp32, not bf16")


# The report


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 12, 13, 16, 17, 100, 257])
def test_every_byte_counts_once(length: int) -> None:
    text = bytes(torch.randint(256, (length,)).tolist())
    table = torch.randn(256, 256)
    shortest = []

    def predict(tokens: Tensor) -> Tensor:
        shortest.append(tokens.shape[1])
        return table[tokens]

    costs = -table.double().log_softmax(-1) / math.log(2.0)
    pairs = itertools.pairwise(text)
    expected = (8.0 + sum(costs[a, b].item() for a, b in pairs)) / length
    found = report.bits_per_byte(predict, text, context=8)
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(shortest) == min(8, length - 1)


def test_bytes_are_predicted_from_half_a_context_at_least() -> None:
    # A model that knows each byte but the ones near the start of what it is given.
    text = bytes(range(256)) * 2

    def predict(tokens: Tensor) -> Tensor:
        logits = 100.0 * torch.nn.functional.one_hot((tokens + 1) % 256, 256).float()
        logits[:, :16] = 0.0
        return logits

    # The first byte, and the first 16 after it, have no more before them.
    assert report.bits_per_byte(predict, text, context=32) == pytest.approx(17 * 8 / 512)


def test_compressors_get_the_same_bytes(texts: Path) -> None:
    import bz2
    import gzip
    import lzma

    found = corpus.load(texts)
    text = found.held_out
    sizes = corpus.compressors(found)
    best = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    for name, packed in (("gzip", gzip.compress(text)), ("bz2", bz2.compress(text)), ("xz", best)):
        assert sizes[name] == pytest.approx(8 * len(packed) / len(text), rel=0.02)
    assert sizes["xz after the training text"] < sizes["xz"]


def test_what_a_person_sees(run: Callable[..., Any], tmp_path: Path) -> None:
    status, output, errors = run("--size", "tiny", "--steps", 20, "--prompt", "def ")
    assert (status, errors) == (0, "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = output.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert [line.split()[0] for line in lines if line[:1].strip()][:4] == [
        *("corpus", "model", "training", "held")
    ]
    for name in ("this model", "gzip", "bz2", "xz", "xz after the training text"):
        assert any(line.endswith(f"  {name}") for line in lines)
    assert "bits per byte, step 20 of 20" in output
    assert "sample    def " in output
    for word in ("Lightning", "GPU", "TPU", "Warning", "rank"):
        assert word not in output


def test_interrupted_while_it_measures(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "bits_per_byte", interrupt)
    status, output, errors = run("--size", "tiny", "--steps", 1)
    assert status == 130
    assert output.endswith("measuring it and the compressors, which may take a minute\n")
    weights = tmp_path / "last.ckpt"
    assert errors == f"\ndemo: stopped; the weights are in {weights}, --resume goes on\n"
    monkeypatch.setattr(corpus, "load", interrupt)
    assert run("--out", tmp_path / "new")[2] == "\ndemo: stopped\n"


def test_interrupted_while_xz_is_busy(start: Start, tmp_path: Path) -> None:
    # Whatever a shell starts in the background ignores interrupts, and what it starts does, too.
    busy = """
import corpus, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
corpus._xz = lambda _: (print("busy", flush=True), time.sleep(999))
"""
    before, last_line = EAGER.split("sys.exit")
    out, log = tmp_path / "out", tmp_path / "out.log"
    process = start(out, "--steps", 1, code=f"{before}{busy}sys.exit{last_line}")
    deadline = time.monotonic() + 120
    while "busy" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert log.read_text().splitlines()[-1].startswith("demo: stopped; the weights are in ")


def test_a_failing_compressor(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: bytes) -> bytes:
        raise MemoryError

    monkeypatch.setattr(corpus, "_xz", fail)
    with pytest.raises(MemoryError):
        corpus.compressors(corpus.load(texts))


def test_a_single_file_is_described_as_one(run: Callable[..., Any], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some text " * 2000)
    output = run("--corpus", text, "--size", "tiny", "--steps", 1)[1]
    assert "          1 file, 0.0 MB to learn from; the last 0.00 MB held out\n" in output


def test_a_prompt_that_is_no_text(run: Callable[..., Any]) -> None:
    prompt = os.fsdecode(b"a\xffb")
    status, output, _ = run("--size", "tiny", "--steps", 1, "--prompt", prompt)
    assert status == 0
    assert "sample    a\N{REPLACEMENT CHARACTER}b" in output


def test_a_terminal_that_knows_few_characters(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert run("--size", "tiny", "--steps", 1, "--prompt", "caf\xe9 ")[0] == 0
    assert b"sample    caf? " in shown.getvalue()
    assert b"\nweights   " in shown.getvalue()


def test_control_characters_are_not_shown() -> None:
    model = SimpleNamespace(stream=lambda *_, **__: torch.tensor([[27], [7], [9], [10], [65]]))
    pieces = report.sample(model, b"\x1b[2J\xc2\x9b", 5, 0)
    unknown = "\N{REPLACEMENT CHARACTER}"
    assert "".join(pieces) == f"{unknown}[2J{unknown}{unknown}{unknown}\t\nA"


# Bad input


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_missing_corpus(run: Callable[..., Any], tmp_path: Path, resume: tuple[str, ...]) -> None:
    if resume:
        assert run("--size", "tiny", "--steps", 1)[0] == 0
    missing = tmp_path / "nothing here"
    assert_one_line(run("--corpus", missing, *resume), str(missing), "does not exist")


def test_corpus_without_text(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(run("--corpus", tmp_path / "empty"), "too little text")
    wide = "wide".encode("utf-16") * 1000
    (tmp_path / "empty" / "wide").write_bytes(wide)
    assert_one_line(run("--corpus", tmp_path / "empty"), "a zero byte are no text: 1")
    (tmp_path / "one").write_bytes(wide)
    assert_one_line(run("--corpus", tmp_path / "one"), "a zero byte are no text: 1")
    (tmp_path / "one").write_text("x")
    assert_one_line(run("--corpus", tmp_path / "one"), "too little text")
    (tmp_path / "one").write_text("x" * 1000)
    assert_one_line(run("--corpus", tmp_path / "one"), "too small", "951", "are needed")


def test_output_folder_that_fills_up(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    status, _, errors = run("--size", "tiny", "--steps", 3)
    assert status == 1
    assert errors == "demo: [Errno 28] No space left on device\n"


def test_nothing_to_resume(run: Callable[..., Any], tmp_path: Path) -> None:
    assert_one_line(run("--resume"), "nothing to resume", str(tmp_path / "last.ckpt"))
    missing = tmp_path / "missing"
    assert_one_line(run("--resume", missing), "nothing to resume", str(missing))


def test_a_checkpoint_of_something_else(run: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    assert_one_line(run("--resume"), "damaged or no checkpoint of this demo")


def test_resuming_as_another_run(run: Callable[..., Any]) -> None:
    assert run("--size", "tiny", "--steps", 1)[0] == 0
    assert_one_line(run("--resume", "--seed", 1), "seed is 0, not 1")
    assert_one_line(run("--resume", "--size", "large"), "model is not large")
    assert_one_line(run("--resume", "--corpus", EXAMPLES), "learned", str(EXAMPLES))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--minutes=0", "argument --minutes: 0 is not above 0 and at most 525600"),
        ("--minutes=nan", "argument --minutes: nan is not above 0 and at most 525600"),
        ("--minutes=1e308", "argument --minutes: 1e308 is not above 0 and at most 525600"),
        ("--steps=-1", "argument --steps: -1 is not above 0 and at most 1000000000"),
        ("--seed=-1", "argument --seed: -1 is not from 0 to 4294967295"),
        ("--seed=4294967296", "argument --seed: 4294967296 is not from 0 to 4294967295"),
        ("--devices=x", "argument --devices: invalid int value: 'x'"),
        ("--corpus=", "argument --corpus: an empty path"),
    ],
)
def test_options_that_make_no_sense(option: str, message: str, run: Callable[..., Any]) -> None:
    assert_one_line(run(option), message, status=2)


def test_the_largest_seed(run: Callable[..., Any]) -> None:
    assert run("--size", "tiny", "--steps", 1, "--seed", 2**32 - 1)[0] == 0


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, ("needs MASTER_PORT, NODE_RANK in the environment",)),
        ({"MASTER_PORT": "abc"}, ("needs MASTER_ADDR, NODE_RANK",)),
        ({"MASTER_PORT": "abc", "NODE_RANK": "0", "MASTER_ADDR": "x"}, ("MASTER_PORT is abc",)),
        ({"MASTER_PORT": "80", "NODE_RANK": "x", "MASTER_ADDR": "x"}, ("NODE_RANK is x",)),
        ({"MASTER_PORT": "80", "NODE_RANK": "2", "MASTER_ADDR": "x"}, ("from 0 to 1",)),
    ],
)
def test_machines_that_cannot_meet(
    variables: dict[str, str],
    words: tuple[str, ...],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", *processes.STARTED_BY_OTHERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_one_line(run("--num-nodes", 2), *words)


def test_rows_that_processes_cannot_share(run: Callable[..., Any]) -> None:
    assert_one_line(run("--size", "tiny", "--devices", 3), "4 windows", "3 processes")


def test_a_loss_that_is_no_number(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Training, "forward", lambda self, x: self.model(x) * math.nan)
    status, _, errors = run("--size", "tiny", "--steps", 3)
    assert status == 1
    assert errors == "demo: the loss is nan after step 1\n"


# Several processes


def test_two_processes_learn_what_one_learns(start: Start, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runs = [start(one, "--steps", 30), start(two, "--steps", 30, "--devices", 2)]
    for process, out in zip(runs, (one, two), strict=True):
        finish(process, out)
    assert bits(two) == pytest.approx(bits(one), rel=1e-2)
    assert two.with_suffix(".log").read_text().count("held out  bits per byte") == 1


def on_two_machines(
    start: Start, folders: list[Path], *options: tuple[object, ...]
) -> list[tuple[int, str]]:
    """Exit statuses and logs of two machines, each with its own options."""
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        logs = [out.with_suffix(".log") for out in folders]
        nodes = [
            start(out, *own, "--num-nodes", 2, NODE_RANK=str(rank), **places)
            for rank, (out, own) in enumerate(zip(folders, options, strict=True))
        ]
        first = nodes[0].wait(timeout=120)
        # Another process may have taken the port meanwhile; the second machine waits in vain then.
        if first and "EADDRINUSE" in logs[0].read_text():
            nodes[1].kill()
            nodes[1].wait(timeout=60)
            continue
        second = nodes[1].wait(timeout=120)
        return [(first, logs[0].read_text()), (second, logs[1].read_text())]
    raise AssertionError("no port stays free")


def test_two_machines(start: Start, tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    results = on_two_machines(start, folders, ("--steps", 10), ("--steps", 10))
    assert [status for status, _ in results] == [0, 0], results
    assert len(bits(tmp_path / "node0")) == 10
    assert "held out" not in results[1][1]


def test_machines_that_mean_different_runs(start: Start, tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    precisions = (("--precision", "bf16"), ("--precision", "fp32"))
    message = "demo: process 1 differs from the first one in precision: fp32, not bf16"
    for status, log in on_two_machines(start, folders, *precisions):
        assert status == 1
        assert log.splitlines()[-1] == message
        assert "Traceback" not in log


@pytest.mark.parametrize("measured", [True, False])
def test_the_first_process_chooses_the_precision(
    measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the second of two processes; the first one found bf16 faster.
    model = SimpleNamespace(settings=TWO_MINUTES, step=0, elapsed=0.0)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(broadcast=lambda _: "bf16"))

    def gather(everyone: list[Any], own: dict[str, Any]) -> None:
        everyone[:] = own | {"precision": "bf16"}, own

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    agreement = processes.Agreement(model, measured=measured)
    if measured:
        agreement.on_fit_start(trainer, model)
        assert model.settings.precision == "bf16"
    else:
        with pytest.raises(DemoError, match="in precision: fp32, not bf16"):
            agreement.on_fit_start(trainer, model)


def test_texts_are_compared_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(everyone: list[Any], own: dict[str, Any]) -> None:
        assert own["text_sha256"] == TWO_MINUTES.text_sha256
        assert "/texts" not in own.values()
        everyone[:] = own, own | {"text_sha256": "another"}

    model = SimpleNamespace(settings=TWO_MINUTES, step=0, elapsed=0.0)
    trainer = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(broadcast=lambda precision: precision)
    )
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(DemoError, match=r"process 1 differs .* in text_sha256"):
        processes.Agreement(model, measured=False).on_fit_start(trainer, model)
