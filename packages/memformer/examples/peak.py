"""Peak memory of a training step over some segments: python peak.py replay|bptt SEGMENTS.

A process of its own for each measurement: what an earlier one has left would be used unseen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peak_memory
from demonstration import DemoError

TOKENS, WIDTH, BATCH = 256, 128, 4
WAYS = ("replay", "bptt")


def measure(way: str, segments: int) -> float:
    """MiB that a step needs beyond model and data. Raises DemoError where it cannot be told."""
    command = [sys.executable, str(Path(__file__).resolve()), way, str(segments)]
    # It imports what this process does, from wherever that was found.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise DemoError(f"cannot measure {way} over {segments} segments: {reason}")
    return float(found.stdout)


def main(way: str, segments: int) -> None:
    """Prints by how much a step raises the largest resident size, in MiB."""
    # A small one before it loads all code, and what loading has taken is free again.
    prepare(way, 2, tokens=8)()
    print(peak_memory.peak(prepare(way, segments, tokens=TOKENS), exact=False) / 2**20)


def prepare(way: str, segments: int, *, tokens: int) -> Callable[[], None]:
    import torch

    from memformer import Memformer, memory_replay_backprop

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Memformer(
        dim=WIDTH,
        num_memory_slots=16,
        enc_num_tokens=256,
        enc_depth=2,
        enc_max_seq_len=tokens,
        dec_num_tokens=256,
        dec_depth=1,
        dec_max_seq_len=tokens,
    )
    src = torch.randint(256, (BATCH, segments * tokens))
    tgt = torch.randint(256, (BATCH, tokens))

    def replay() -> None:
        memory_replay_backprop(model, src, tgt)

    def bptt() -> None:
        mem = None
        for segment in src.split(tokens, 1)[:-1]:
            mem = model(segment, mems=mem).mem
        model(src[:, -tokens:], tgt, mem).dec_out.backward()

    return {"replay": replay, "bptt": bptt}[way]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
