"""The word problem of S3, and two models that are to solve it.

A word is a sequence of permutations of three things, and the answer at every place is the product
of all permutations so far. What is asked for has to be kept and changed with every token: a
transformer of a few layers looks at all tokens at once and has no place for it, a feedback
transformer sees in its memory what it has worked out for the token before.
"""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demonstration import Tick, silent
from feedback_transformer import FeedbackTransformer
from shared_core import FeedForward, RelativePositionBias

DIM, DEPTH, HEADS = 32, 2, 4
MEMORY = 1
ROWS = 64
RATE = 4e-3
PERMUTATIONS = list(itertools.permutations(range(3)))


def products() -> Tensor:
    """Numbers of the products of all pairs of permutations, (6, 6)."""
    return torch.tensor(
        [
            [PERMUTATIONS.index(tuple(first[i] for i in second)) for second in PERMUTATIONS]
            for first in PERMUTATIONS
        ]
    )


def draw(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words and their answers, both (rows, length)."""
    table = products()
    words = torch.randint(len(table), (rows, length), generator=generator)
    answers = [words[:, 0]]
    for token in words[:, 1:].unbind(1):
        answers.append(table[answers[-1], token])
    return words, torch.stack(answers, 1)


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each of the normalised states."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.to_qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.to_out = nn.Linear(DIM, DIM)
        self.ff_norm = nn.LayerNorm(DIM)
        self.ff = FeedForward(DIM, gated=True)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        heads = self.to_qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.to_out(found.transpose(1, 2).flatten(2))
        out: Tensor = x + self.ff(self.ff_norm(x))
        return out


class Transformer(nn.Module):
    """A plain causal transformer of the same layers, as many and as wide, and the same places."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(PERMUTATIONS), DIM)
        self.places = RelativePositionBias(HEADS)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)
        self.to_logits = nn.Linear(DIM, len(PERMUTATIONS))

    def forward(self, words: Tensor) -> Tensor:
        x, n = self.tokens(words), words.shape[1]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        places = torch.arange(n, device=x.device)
        bias = self.places(places[:, None] - places).permute(2, 0, 1)
        bias = bias.masked_fill(future, float("-inf"))
        for layer in self.layers:
            x = layer(x, bias)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits


def build(kind: str, seed: int) -> nn.Module:
    """A "feedback" or a "plain" transformer."""
    torch.manual_seed(seed)
    if kind == "plain":
        return Transformer()
    return FeedbackTransformer(
        num_tokens=len(PERMUTATIONS),
        dim=DIM,
        depth=DEPTH,
        seq_len=1,
        mem_len=MEMORY,
        heads=HEADS,
        dim_head=DIM // HEADS,
    )


class Trained(NamedTuple):
    """How a model has learned: so many steps in so much time, and the loss of each."""

    steps: int
    seconds: float
    losses: list[float]


def train(
    model: nn.Module,
    length: int,
    seed: int,
    *,
    steps: int | None = None,
    seconds: float = 0.0,
    tick: Tick = silent,
) -> Trained:
    """Trains on random words for so many steps, or, where None, for so much time of a processor.

    The words are of `length`; all models see the same ones. The learning rate falls to nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.99))
    losses: list[float] = []
    start = time.process_time()
    done = 0.0
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1.0 - done)
        words, answers = draw(ROWS, length, generator)
        loss = F.cross_entropy(model(words).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = len(losses) / steps if steps is not None else (time.process_time() - start) / seconds
        tick(min(1.0, done))
    return Trained(len(losses), time.process_time() - start, losses)


@torch.no_grad()
def accuracy(model: nn.Module, length: int, seed: int, rows: int = 500) -> list[float]:
    """The share of right answers at every place of words that were not seen in training."""
    words, answers = draw(rows, length, torch.Generator().manual_seed(10**6 + seed))
    right = model.eval()(words).argmax(-1) == answers
    model.train()
    shares: list[float] = right.float().mean(0).tolist()
    return shares
