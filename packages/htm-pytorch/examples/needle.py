"""A needle in a haystack: the one event of a memory that a question asks for.

An event is 8 tokens. All of them show its random key, none of them exactly, beside a symbol: one
token has one of 16 answers, the others fillers. A question is the key of an event, and the answer
is what it asks for. One layer reads the memory: attention to the 4 events that look most relevant
(Lampinen et al. 2021, arXiv 2105.14039), or to all tokens in one softmax. Both have equally many
parameters, up to 1 %, and a linear readout. Every function draws from its seed alone.

Shapes: b memories, e events of each, n questions of each.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from demonstration import Tick, silent
from htm_pytorch import HTMAttention

TOKENS, KEY, ANSWERS = 8, 32, 16
WIDTH = KEY + 2 * ANSWERS
# What every element of a key, of variance 1, is off in a token: its standard deviation.
NOISE = 0.75
# Asked of a memory, and memories of a training step.
QUESTIONS, MEMORIES = 16, 32
# Found by trying, from 1e-4 to 1e-2: full attention reads large memories the better the slower it
# learns, but slower than this it takes thousands of steps.
RATES = {"htm": 3e-3, "full": 3e-4}
# Training ends once so many questions of the last steps were answered.
LEARNED, LAST_STEPS = 0.999, 16
_TEST_SEEDS = 2**32
# Otherwise torch's profiler writes to the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Events(NamedTuple):
    """Memories (b, e TOKENS, WIDTH), questions (b, n, WIDTH), their answers (b, n) int64."""

    memories: Tensor
    questions: Tensor
    answers: Tensor

    @staticmethod
    def draw(b: int, e: int, noise: float, generator: torch.Generator) -> Events:
        """The first events of each memory are asked for: none is special."""
        keys = F.normalize(torch.randn(b, e, KEY, generator=generator), dim=-1) * KEY**0.5
        shown = keys[:, :, None] + noise * torch.randn(b, e, TOKENS, KEY, generator=generator)
        answers = torch.randint(ANSWERS, (b, e), generator=generator)
        symbols = torch.randint(ANSWERS, 2 * ANSWERS, (b, e, TOKENS), generator=generator)
        place = torch.randint(TOKENS, (b, e, 1), generator=generator)
        symbols.scatter_(2, place, answers[..., None])
        tokens = torch.cat((shown, F.one_hot(symbols, 2 * ANSWERS)), -1)
        questions = F.pad(keys[:, :QUESTIONS], (0, 2 * ANSWERS))
        return Events(tokens.flatten(1, 2), questions, answers[:, :QUESTIONS])


class FullAttention(nn.Module):
    """One head of attention to all tokens, as wide as the parameters allow.

    More heads, each narrower, answer less.
    """

    def __init__(self, dim: int, dim_head: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(dim_head, dim)

    def forward(self, queries: Tensor, memories: Tensor) -> Tensor:
        keys, values = self.to_kv(memories).chunk(2, -1)
        found = F.scaled_dot_product_attention(self.to_q(queries), keys, values)
        out: Tensor = self.to_out(found)
        return out


class Reader(nn.Module):
    """A layer and a readout: logits (b, n, ANSWERS) of questions to memories."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(WIDTH, ANSWERS)

    def forward(self, questions: Tensor, memories: Tensor) -> Tensor:
        logits: Tensor = self.readout(self.layer(questions, memories))
        return logits


def layer(kind: str) -> nn.Module:
    """The layer of a "htm" or a "full" reader."""
    if kind == "full":
        return FullAttention(WIDTH, 96)
    return HTMAttention(
        WIDTH, heads=1, topk_mems=4, mem_chunk_size=TOKENS, dim_head=64, add_pos_enc=False
    )


@dataclass(frozen=True)
class Trained:
    """How long a reader was trained, and its accuracy in the last steps of it."""

    steps: int
    accuracy: float


def train(
    seed: int,
    kind: str,
    *,
    events: int = 16,
    steps: int = 4000,
    noise: float = NOISE,
    tick: Tick = silent,
) -> tuple[Reader, Trained]:
    """Trains on new memories all the time, until the reader answers or `steps` are over."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    reader = Reader(layer(kind))
    optimizer = torch.optim.Adam(reader.parameters(), RATES[kind])
    shares: list[float] = []
    recent = 0.0
    while len(shares) < steps and (recent < LEARNED or len(shares) < LAST_STEPS):
        drawn = Events.draw(MEMORIES, events, noise, generator)
        logits = reader(drawn.questions, drawn.memories)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), drawn.answers.flatten()).backward()
        optimizer.step()
        shares.append(_right(logits, drawn))
        recent = mean(shares[-LAST_STEPS:])
        tick(min(1.0, recent / LEARNED))
    return reader, Trained(len(shares), recent)


@torch.no_grad()
def accuracy(
    reader: Reader,
    seed: int,
    events: int,
    *,
    memories: int = 256,
    noise: float = NOISE,
    tick: Tick = silent,
) -> float:
    """Share of questions that are answered, of memories that training has not seen."""
    generator = torch.Generator().manual_seed(_TEST_SEEDS + seed)
    right = []
    for number in range(1, memories + 1):
        drawn = Events.draw(1, events, noise, generator)
        right.append(_right(reader(drawn.questions, drawn.memories), drawn))
        tick(number / memories)
    return mean(right)


def _right(logits: Tensor, drawn: Events) -> float:
    return (logits.argmax(-1) == drawn.answers).double().mean().item()


@torch.no_grad()
def cost(reader: Reader, events: int) -> tuple[float, int]:
    """Seconds, and most bytes held beside the memory, to answer the questions of one memory."""
    drawn = Events.draw(1, events, NOISE, torch.Generator().manual_seed(0))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        reader(drawn.questions, drawn.memories)
        times.append(time.perf_counter() - start)
    return median(times), most_bytes(lambda: reader(drawn.questions, drawn.memories))


def most_bytes(run: Callable[[], object]) -> int:
    """Most bytes of new tensors that something holds at a time, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        record.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in trace if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    held: list[int] = [*accumulate((event["args"]["Bytes"] for event in changes), initial=0)]
    return max(held)
