"""A causal transformer that remembers all of its past, and what it learns by that.

    python causal_transformer.py      a minute on 1 core

A text comes in segments. Inside a segment, tokens attend to each other as in any causal
transformer; an `HTMBlock` lets them attend to the few relevant chunks of all segments before, of
which each layer keeps the hidden states that came in. A memory holds whole segments only, so
nothing sees the future. The text here begins with a word, goes on with noise, and says the word
again at its end: only who remembers can know it.

Shapes: b texts, t tokens of a segment, m tokens before it, d model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htm_pytorch import HTMBlock

LETTERS, NOISES, WORD = 16, 16, 4
START, AGAIN = LETTERS + NOISES, LETTERS + NOISES + 1
VOCABULARY = LETTERS + NOISES + 2


class Layer(nn.Module):
    """Attention inside the segment, attention to the past, and a feed-forward layer."""

    def __init__(self, dim: int, heads: int, chunk_size: int, topk: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.past = HTMBlock(dim, heads, topk, chunk_size, dim // heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x (b, t, d), the same layer's past (b, m, d)."""
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(found.transpose(1, 2).flatten(2))
        x = self.past(x, past)
        out: Tensor = x + self.feed_forward(x)
        return out


class CausalTransformer(nn.Module):
    """Logits of the next token.

    Args:
        segment: most tokens of a segment.
        chunk_size: tokens of a chunk of the memory; best a divisor of `segment`, since then an
            append never adds to a chunk that others have attended to.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int = 64,
        *,
        depth: int = 2,
        heads: int = 2,
        segment: int = 16,
        chunk_size: int = 8,
        topk: int = 2,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.segment = segment
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(segment, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, chunk_size, topk) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocabulary)

    def forward(
        self, tokens: Tensor, past: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Reads a segment.

        Args:
            tokens: (b, t) of int64.
            past: what the segment before returned; None at the start of a text.

        Returns:
            Logits (b, t, vocabulary), and of each layer the hidden states (b, m + t, d) of all
            segments so far, detached.
        """
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        past = past or [x.new_empty(len(x), 0, self.dim) for _ in self.layers]
        longer = []
        for layer, before in zip(self.layers, past, strict=True):
            longer.append(torch.cat((before, x.detach()), 1))
            x = layer(x, before)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits, longer

    def losses(self, text: Tensor, *, forget: bool = False) -> Tensor:
        """Next-token losses (b, n - 1) of a text (b, n), segment by segment.

        With `forget` every segment is read as if it were the first.
        """
        past, found = None, []
        for first in range(0, text.shape[1] - 1, self.segment):
            targets = text[:, first + 1 : first + 1 + self.segment]
            logits, past = self(text[:, first : first + targets.shape[1]], past)
            past = None if forget else past
            found.append(F.cross_entropy(logits.mT, targets, reduction="none"))
        return torch.cat(found, 1)

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int) -> Tensor:
        """The most likely tokens (b, length) after a prompt (b, n), n at least 1."""
        *whole, rest = prompt.split(self.segment, 1)
        past = None
        for segment in whole:
            past = self(segment, past)[1]
        found = []
        for _ in range(length):
            logits, longer = self(rest, past)
            found.append(logits[:, -1:].argmax(-1))
            if rest.shape[1] == self.segment:
                past, rest = longer, rest[:, :0]
            rest = torch.cat((rest, found[-1]), 1)
        return torch.cat(found, 1)


def texts(b: int, segments: int, segment: int, generator: torch.Generator) -> Tensor:
    """Texts (b, segments * segment): START, a word, noise, AGAIN, and the word."""
    text = torch.randint(LETTERS, START, (b, segments * segment), generator=generator)
    word = torch.randint(LETTERS, (b, WORD), generator=generator)
    text[:, 0] = START
    text[:, 1 : 1 + WORD] = word
    text[:, -1 - WORD] = AGAIN
    text[:, -WORD:] = word
    return text


def train(
    model: CausalTransformer, *, steps: int = 300, rows: int = 32, segments: int = 3, seed: int = 0
) -> list[float]:
    """Trains by the loss of all next tokens; returns what the word at the end lost, by step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history = []
    for _ in range(steps):
        losses = model.losses(texts(rows, segments, model.segment, generator))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        history.append(losses[:, -WORD:].mean().item())
    return history


def main() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(VOCABULARY)
    train(model)
    print(f"loss of a word that was said before; who cannot know it: {math.log(LETTERS):.2f}")
    for segments in (3, 80):
        text = texts(32, segments, model.segment, torch.Generator().manual_seed(1))
        with torch.no_grad():
            kept, forgotten = (
                model.losses(text, forget=forget)[:, -WORD:].mean() for forget in (False, True)
            )
        guessed = model.generate(text[:, :-WORD], WORD) == text[:, -WORD:]
        print(
            f"{text.shape[1]:5} tokens: {kept:.2f} with its past, {forgotten:.2f} without; "
            f"{100 * guessed.float().mean():.0f} % of the letters written"
        )


if __name__ == "__main__":
    main()
