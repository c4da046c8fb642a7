"""The text of the demonstration: found on this machine, split by file, cut into windows.

A text is the bytes of its files, each after one zero byte, which marks where a file begins.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from demonstration import DemoError

FILE_START = b"\0"
HELD_OUT_PERCENT = 5
# Files are held out where there are so many, and if that makes a share between these.
HELD_OUT_FILES_FROM = 20
HELD_OUT_LEAST_PERCENT, HELD_OUT_MOST_PERCENT = 1, 20
# Of a huge corpus no more than this is held out, so that measuring it takes seconds.
HELD_OUT_LIMIT = 2**20
# xz reads the training text as well only where that takes seconds.
PRIMER_LIMIT = 2**25
# A standard library with less source than this was stripped of it.
STDLIB_LEAST = 2**20
NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Two texts that share no file, or are the two parts of one text.

    Attributes:
        name: what it is, for the report.
        path: where it lies, if it is not the standard library.
        training, held_out: the texts.
        files, held_out_files: how many files they hold together, and how many are held out; 0 if
            it is the last part of the text.
    """

    name: str
    path: str | None
    training: bytes
    held_out: bytes
    files: int
    held_out_files: int

    def sha256(self) -> str:
        """A name for the two texts that no other two have."""
        both = (hashlib.sha256(text).digest() for text in (self.training, self.held_out))
        return hashlib.sha256(b"".join(both)).hexdigest()


def load(path: Path | None, out: Path | None = None) -> Corpus:
    """The corpus at `path`, a folder or a file, or the standard library's source.

    A file is held out if the hash of its path in the folder falls into the held-out share. Of a
    single file the last part is held out, and so it is of few files or very unequal ones. What a
    run writes, in `out`, is no part of its corpus.

    Raises:
        DemoError: there is nothing to read, or `out` is the folder to read.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        name = f"source of Python {sysconfig.get_python_version()}'s standard library"
        files = sorted(file for file in root.rglob("*.py") if _is_library(file.relative_to(root)))
        texts, _ = _read(root, files)
        if sum(map(len, texts.values())) < STDLIB_LEAST:
            raise DemoError(
                f"the standard library's source is not in {root} (zipped or stripped?); "
                "--corpus PATH takes any other text"
            )
        return _split(name, None, texts)
    if not path.exists():
        raise DemoError(f"no corpus: {path} does not exist")
    if path.is_file():
        root, files = path.parent, [path]
    else:
        root, own = path.resolve(), None if out is None else out.resolve()
        if own == root:
            raise DemoError(
                f"the results cannot lie in {out}, which is the corpus; --out says where"
            )
        files = sorted(file for file in root.rglob("*") if not _is_hidden(file.relative_to(root)))
        if own is not None and root in own.parents:
            files = [file for file in files if own not in file.parents]
    texts, no_text = _read(root, files)
    found = _split(str(path), str(path.resolve()), texts)
    if min(len(found.training), len(found.held_out)) <= len(FILE_START):
        message = f"no corpus: {path} holds too little text to learn from and to measure on"
        if no_text:
            message += f"; files that hold a zero byte are no text: {no_text}"
        raise DemoError(message)
    return found


def _is_library(file: Path) -> bool:
    return NOT_THE_LIBRARY.isdisjoint(file.parts)


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _read(root: Path, files: Iterable[Path]) -> tuple[dict[str, bytes], int]:
    """The files that are text, by their path in `root`, and how many are not."""
    texts, no_text = {}, 0
    for file in files:
        if not file.is_file():
            continue
        try:
            text = file.read_bytes()
        except OSError as problem:
            raise DemoError(f"cannot read {file}: {problem.strerror}") from problem
        if FILE_START in text:
            no_text += 1
        elif text:
            texts[file.relative_to(root).as_posix()] = text
    return texts, no_text


def _split(name: str, path: str | None, texts: dict[str, bytes]) -> Corpus:
    """Holds out files by the hash of their path, or the last part; of large corpora only some."""
    held_out: dict[str, bytes] = {}
    for file in sorted(texts, key=_hash):
        room = HELD_OUT_LIMIT - sum(map(len, held_out.values()))
        if room > 0 and _hash(file) % 100 < HELD_OUT_PERCENT:
            held_out[file] = texts[file][:room]
    size, total = sum(map(len, held_out.values())), sum(map(len, texts.values()))
    least = min(total * HELD_OUT_LEAST_PERCENT // 100, HELD_OUT_LIMIT)
    even = least <= size <= total * HELD_OUT_MOST_PERCENT // 100
    if len(texts) < HELD_OUT_FILES_FROM or not even:
        text = _join(texts.values())
        cut = len(text) - min((len(text) - 1) * HELD_OUT_PERCENT // 100, HELD_OUT_LIMIT)
        return Corpus(name, path, text[:cut], FILE_START + text[cut:], len(texts), 0)
    training = _join(text for file, text in texts.items() if file not in held_out)
    measured = _join(held_out[file] for file in texts if file in held_out)
    return Corpus(name, path, training, measured, len(texts), len(held_out))


def _hash(path: str) -> int:
    """A number that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big")


def _join(texts: Iterable[bytes]) -> bytes:
    return b"".join(FILE_START + text for text in texts)


def as_tensor(text: bytes) -> Tensor:
    """A text as (n,) uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows:
    """Windows of a text in an order that is a function of the seed and the step alone.

    Every pass over the text cuts it anew, from a random offset, and takes each window once.

    Args:
        text: the bytes.
        length: bytes to predict in a window; a window holds one more.
        rows: windows in a step.
        seed: of the order.

    Raises:
        DemoError: the text is shorter than a window.
    """

    def __init__(self, text: bytes, length: int, rows: int, seed: int) -> None:
        self._text = as_tensor(text)
        self._length = length
        self._rows = rows
        self._seed = seed
        # One window less than fits, for the random offset.
        self._count = (len(text) - 1) // length - 1
        if self._count < rows:
            raise DemoError(
                f"the corpus is too small: {len(text):,} bytes to learn from, "
                f"at least {(rows + 1) * length + 1:,} are needed"
            )
        self._pass = -1
        self._starts = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """(rows, length + 1) bytes as integers."""
        number, step = divmod(step, self._count // self._rows)
        if number != self._pass:
            self._pass, self._starts = number, self._cut(number)
        starts = self._starts[step * self._rows : (step + 1) * self._rows]
        return self._text[starts[:, None] + torch.arange(self._length + 1)].long()

    def _cut(self, number: int) -> Tensor:
        """Where the windows of a pass start."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        offset = torch.randint(self._length, (1,), generator=generator)
        return offset + torch.randperm(self._count, generator=generator) * self._length


def compressors(corpus: Corpus) -> dict[str, float]:
    """Bits per held-out byte of the usual compressors, each at its strongest setting.

    All get the held-out text as one stream, so they may use one file to compress the next. The
    last one has read the training text too, as the model has; left out where that is huge.
    """
    text = corpus.held_out
    jobs: dict[str, Callable[[], int]] = {
        "gzip": lambda: len(gzip.compress(text, 9)),
        "bz2": lambda: len(bz2.compress(text, 9)),
        "xz": lambda: len(_xz(text)),
    }
    if len(corpus.training) <= PRIMER_LIMIT:
        jobs["xz after the training text"] = lambda: (
            len(_xz(corpus.training + text)) - len(_xz(corpus.training))
        )
    sizes: dict[str, Future[int]] = {name: Future() for name in jobs}
    for name, job in jobs.items():
        # Whoever interrupts the program does not wait for xz.
        Thread(target=_fulfil, args=(sizes[name], job), daemon=True).start()
    # A wait without end would miss an interrupt that comes just before it begins.
    while wait(sizes.values(), timeout=0.2).not_done:
        pass
    return {name: 8 * size.result() / len(text) for name, size in sizes.items()}


def _fulfil(size: Future[int], job: Callable[[], int]) -> None:
    try:
        size.set_result(job())
    # Raised where the result is asked for.
    except BaseException as problem:
        size.set_exception(problem)


def _xz(text: bytes) -> bytes:
    """xz with a dictionary that reaches back over the whole text."""
    dictionary = max(4096, 1 << (len(text) - 1).bit_length())
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return lzma.compress(text, filters=[options])
