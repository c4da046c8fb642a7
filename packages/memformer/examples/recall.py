"""Key/value recall across segments: the task, the model, its training and its examination.

The first segment holds 4 pairs of a key and a value; all that follow hold fillers. At the end of
any segment the decoder may be asked for the values: it gets a key and has to say the value, of 8.
It sees no tokens but those of the segment it is asked in, so what it knows it has from the memory.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from demonstration import Tick, silent
from memformer import Memformer, memory_replay_backprop

PAIRS = 4
KEYS = VALUES = FILLERS = 8
LENGTH = 16
TRAINED = 8
"""Segments of a training sequence at most."""
ASKED = (1, 2, 4, 8, 16, 32, 64)
CHANCE = 1 / VALUES


class Facts(NamedTuple):
    """Pairs of a batch: keys and values (b, PAIRS), the values as the decoder's tokens."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def draw(batch: int, generator: torch.Generator) -> Facts:
        keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :PAIRS]
        return Facts(keys, KEYS + torch.randint(VALUES, (batch, PAIRS), generator=generator))

    def segments(self, count: int, generator: torch.Generator) -> Tensor:
        """(b, count, LENGTH) tokens: the pairs, then fillers."""
        first = KEYS + VALUES
        shape = (len(self.keys), count, LENGTH)
        tokens = torch.randint(first, first + FILLERS, shape, generator=generator)
        tokens[:, 0, : 2 * PAIRS] = torch.stack(self, 2).flatten(1)
        return tokens

    def questions(self, generator: torch.Generator) -> Tensor:
        """(b, 2 PAIRS) tokens: all keys in random order, each with its value behind it."""
        order = torch.rand(self.keys.shape, generator=generator).argsort(1)
        return torch.stack((self.keys.gather(1, order), self.values.gather(1, order)), 2).flatten(1)


def model(seed: int) -> Memformer:
    """Few slots, written by the paper's rule, whose biases do not learn.

    A bias pulls its slot back a little at every segment, and training makes it as large as a few
    segments allow. Left as small as it begins, a slot keeps what it has for hundreds of them.
    """
    torch.manual_seed(seed)
    found = Memformer(
        dim=64,
        num_memory_slots=16,
        mem_update_attn_heads=4,
        enc_num_tokens=KEYS + VALUES + FILLERS,
        enc_depth=1,
        enc_heads=4,
        enc_max_seq_len=LENGTH,
        dec_num_tokens=KEYS + VALUES,
        dec_depth=1,
        dec_heads=4,
        dec_max_seq_len=2 * PAIRS,
        writer="bmn",
    )
    found.memory_slots.requires_grad_(False)
    return found


class Trained(NamedTuple):
    """A model, the losses of its steps in nats, and how long they took in seconds."""

    model: Memformer
    losses: list[float]
    seconds: float


def train(
    seed: int,
    steps: int,
    *,
    batch: int = 32,
    rate: float = 2e-3,
    minutes: float | None = None,
    tick: Tick = silent,
) -> Trained:
    """Trains by replay on up to `TRAINED` segments, more of them as the loss allows.

    Every segment is followed by questions. Ends after `minutes`, if that is sooner.
    """
    pupil = model(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in pupil.parameters() if p.requires_grad], rate)
    start, losses, longest, recent = time.perf_counter(), [], 1, 2.0
    for step in range(steps):
        share = step / steps
        if minutes is not None:
            share = max(share, (time.perf_counter() - start) / (60 * minutes))
        if share >= 1.0:
            break
        # Up in fifty steps, then as it is, and in the second half down to nothing.
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50, 2 - 2 * share)
        # Every other sequence is shorter, so that none of the lengths is forgotten.
        count = longest
        if step % 2:
            count = int(torch.randint(1, longest + 1, (), generator=generator))
        facts = Facts.draw(batch, generator)
        src = facts.segments(count, generator).flatten(1)
        asked = [facts.questions(generator) for _ in range(count)]
        optimizer.zero_grad()
        found = memory_replay_backprop(pupil, src, asked)
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        losses.append(float(found.losses[-1]))
        recent = 0.95 * recent + 0.05 * losses[-1]
        if recent < 0.8 and longest < TRAINED:
            longest, recent = 2 * longest, 1.6
        tick(share)
    return Trained(pupil, losses, time.perf_counter() - start)


@torch.no_grad()
def examine(
    pupil: Memformer, seed: int, *, batch: int = 512, remember: bool = True, tick: Tick = silent
) -> dict[int, float]:
    """The share of values that are recalled, by the segment after which they are asked for.

    With `remember` False each segment begins with the initial memory.
    """
    pupil.eval()
    # Other facts than any that were trained with.
    generator = torch.Generator().manual_seed(2**31 + seed)
    facts = Facts.draw(batch, generator)
    src = facts.segments(max(ASKED), generator)
    mem, found = None, {}
    for number in range(1, max(ASKED) + 1):
        asked = facts.questions(generator)
        out = pupil(src[:, number - 1], asked, mem, return_logits=True)
        mem = out.mem if remember else None
        if number in ASKED:
            said = out.dec_out[:, ::2, KEYS:].argmax(-1) + KEYS
            found[number] = float((said == asked[:, 1::2]).float().mean())
        tick(number / max(ASKED))
    pupil.train()
    return found
