"""The demonstration of h-transformer-1d: what it reads, resumes, measures and refuses."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributions import ROOT

EXAMPLES = ROOT / "packages" / "h-transformer-1d" / "examples"
# The demonstration is a script: its modules import each other from the folder they lie in.
sys.path.insert(0, str(EXAMPLES))

checkpoints, corpus, demo, progress, report, settings, training = map(
    importlib.import_module,
    ("checkpoints", "corpus", "demo", "progress", "report", "settings", "training"),
)

# The demonstration, with a plan (and so a checkpoint) every few steps.
EAGER = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import demo, training
training.PLAN_SECONDS = 0.05
sys.exit(demo.main())
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def run(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the demonstration here; returns its exit status, output and errors."""

    def call(*options: object) -> tuple[int, str, str]:
        defaults = ("--corpus", texts, "--out", tmp_path, "--length", 20)
        status = demo.main([*map(str, defaults), *map(str, options)])
        return status, *capsys.readouterr()

    return call


def start(texts: Path, out: Path, *options: object, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a run of its own, which saves a checkpoint every few steps."""
    arguments = ("--corpus", texts, "--out", out, "--size", "tiny", "--length", 1, *options)
    script = out.with_suffix(".py")
    script.write_text(EAGER)
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            # Two threads of several processes at once would mostly wait for each other.
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=log,
            stderr=log,
        )


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


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, output, errors = result
    assert status == 1
    assert output == ""
    assert errors.startswith("demo: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors


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
    found = corpus.load(None)
    assert sorted((found.training + found.held_out).split(b"\0")) == [
        b"",
        b"# a.py",
        b"# json/b.py",
    ]


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


def test_few_files_or_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name * 50)
    found = corpus.load(tmp_path)
    assert (found.files, found.held_out_files) == (2, 1)
    found = corpus.load(tmp_path / "one")
    assert found.training == b"\0" + (b"one" * 50)[:-7]
    assert found.held_out == b"\0" + (b"one" * 50)[-7:]


def test_hidden_and_binary_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "image").write_bytes(b"\x89\0")
    (tmp_path / "empty").touch()
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    found = corpus.load(tmp_path)
    assert sorted((found.training + found.held_out).split(b"\0")) == [b"", b"one", b"two"]


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
    with pytest.raises(corpus.DemoError, match=r"standard library's source is not in .*--corpus"):
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
    with pytest.raises(corpus.DemoError, match=r"100 bytes to learn from, at least 129 are needed"):
        corpus.Windows(b"x" * 100, 32, 3, seed=0)


# The plan


TWO_MINUTES = settings.Settings.new(
    "texts", minutes=2.0, steps=None, seed=0, size="tiny", accelerator="cpu"
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


def test_a_step_longer_than_the_budget() -> None:
    shares, elapsed = walk(replace(TWO_MINUTES, minutes=0.01), lambda _: 5.0)
    assert len(shares) == 11
    assert elapsed == 55.0


@pytest.mark.parametrize("steps", [1, 49, 1000])
def test_a_budget_of_steps_ignores_the_clock(steps: int) -> None:
    budget = replace(TWO_MINUTES, steps=steps)
    shares, _ = walk(budget, lambda step: random.Random(step).uniform(1.0, 9.0))
    assert shares == [step * (1.0 / steps) for step in range(steps)]


# Killed and resumed


def test_killed_at_any_step_it_resumes_with_the_identical_loss(texts: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(texts, whole, "--steps", 120)
    seen = [
        kill_after(start(texts, killed, *options), killed, step)
        for step, options in ((3, ("--steps", 120)), (60, ("--resume",)))
    ]
    finish(start(texts, killed, "--resume"), killed)
    finish(undisturbed, whole)
    expected = bits(whole)
    assert len(expected) == 120
    for losses in [*seen, bits(killed)]:
        assert losses == expected[: len(losses)]
    expected_weights = weights(whole / "last.ckpt")
    for name, weight in weights(killed / "last.ckpt").items():
        assert torch.equal(weight, expected_weights[name])


def test_with_a_budget_of_time_lost_steps_are_repeated(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen = kill_after(start(texts, out, "--minutes", 0.2), out, 6)
    saved = checkpoints.read(out / "last.ckpt")["demo"]
    assert saved["step"] <= len(seen)
    finish(start(texts, out, "--resume"), out)
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
    raise corpus.DemoError("stopped")


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
    (tmp_path / "one").write_text("x")
    assert_one_line(run("--corpus", tmp_path / "one"), "too little text")
    (tmp_path / "one").write_text("x" * 1000)
    assert_one_line(run("--corpus", tmp_path / "one"), "too small", "951", "are needed")


def test_unwritable_output_folder(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert_one_line(run("--out", out, "--corpus", "/nonexistent"), f"cannot write to {out}")


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
    "options",
    [("--minutes", "0"), ("--minutes", "nan"), ("--steps", "-1"), ("--devices", "x"), ("--what",)],
)
def test_options_that_make_no_sense(
    options: tuple[str, ...], run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_rows_that_processes_cannot_share(run: Callable[..., Any]) -> None:
    assert_one_line(run("--size", "tiny", "--devices", 3), "4 windows", "3 processes")


def test_a_loss_that_is_no_number(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Training, "forward", lambda self, x: self.model(x) * math.nan)
    status, _, errors = run("--size", "tiny", "--steps", 3)
    assert status == 1
    assert errors == "demo: the loss is nan after step 1\n"


# Several processes


def test_two_processes_learn_what_one_learns(texts: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runs = [start(texts, one, "--steps", 30), start(texts, two, "--steps", 30, "--devices", 2)]
    for process, out in zip(runs, (one, two), strict=True):
        finish(process, out)
    assert bits(two) == pytest.approx(bits(one), rel=1e-2)
    assert two.with_suffix(".log").read_text().count("held out  bits per byte") == 1


def test_two_machines(texts: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [tmp_path / "node0", tmp_path / "node1"]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    nodes = [
        start(texts, out, "--steps", 10, "--num-nodes", 2, NODE_RANK=str(rank), **places)
        for rank, out in enumerate(folders)
    ]
    for process, out in zip(nodes, folders, strict=True):
        finish(process, out)
    assert len(bits(tmp_path / "node0")) == 10
    assert "held out" not in (tmp_path / "node1.log").read_text()
