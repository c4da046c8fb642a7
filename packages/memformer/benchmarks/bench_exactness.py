"""What memformer gets right to the last digit, and what its memory recalls.

Every function prepares a subject of `bench_cases`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import bench_speed
import torch

import peak_memory

SEEDS = range(5)
STEPS = 1500


def model(**options: Any) -> Any:
    from memformer import Memformer

    torch.manual_seed(0)
    return Memformer(
        dim=32,
        num_memory_slots=4,
        enc_num_tokens=20,
        enc_depth=2,
        enc_max_seq_len=24,
        dec_num_tokens=20,
        dec_depth=2,
        dec_max_seq_len=24,
        **options,
    ).double()


def padding(*, device: str) -> Callable[[], float]:
    """How far rows of a padded batch are from the same rows alone: output, memory, loss."""

    def run() -> float:
        memformer = model().to(device)
        generator = torch.Generator().manual_seed(1)
        src = torch.randint(20, (4, 24), generator=generator).to(device)
        tgt = torch.randint(20, (4, 9), generator=generator).to(device)
        lengths = torch.tensor([24, 1, 7, 16], device=device)
        mask = torch.arange(24, device=device) < lengths[:, None]
        mems = torch.randn(4, 4, 32, generator=generator, dtype=torch.float64).to(device)
        worst = 0.0
        with torch.no_grad():
            # The reference gives a loss alone.
            whole = memformer(src, tgt, mems, mask)
            for i, n in enumerate(lengths.tolist()):
                row = memformer(src[i : i + 1, :n], None, mems[i : i + 1])
                for a, b in ((whole.enc_out[i, :n], row.enc_out[0]), (whole.mem[i], row.mem[0])):
                    worst = max(worst, float((a - b).abs().max()))
        return worst

    return run


def held(*, device: str) -> Callable[[], float]:
    """How much a segment of padding changes the memory, relative to its norm, in percent."""

    def run() -> float:
        memformer = model().to(device)
        mems = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)).double()
        src = torch.zeros(1, 24, dtype=torch.int64, device=device)
        with torch.no_grad():
            out = memformer(src, mems=mems.to(device), src_mask=src.bool())
        return 100 * float((out.mem.cpu() - mems).norm() / mems.norm())

    return run


def gradient(*, device: str) -> Callable[[], float]:
    """How far replay's gradients are from one graph's, relative to the largest of a parameter."""
    from memformer import memory_replay_backprop

    def run() -> float:
        memformer = model().to(device)
        generator = torch.Generator().manual_seed(1)
        src = torch.randint(20, (2, 6 * 24), generator=generator).to(device)
        tgt = torch.randint(20, (2, 9), generator=generator).to(device)
        memory_replay_backprop(memformer, src, tgt)
        found = [p.grad.clone() for p in memformer.parameters()]
        memformer.zero_grad()
        mem = None
        for segment in src.split(24, 1)[:-1]:
            mem = memformer(segment, mems=mem).mem
        memformer(src[:, -24:], tgt, mem).dec_out.backward()
        pairs = [(a, p.grad) for a, p in zip(found, memformer.parameters(), strict=True)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    return run


def bounded(*, device: str) -> Callable[[], float]:
    """The largest norm of a slot after 500 segments, with the GRU's gate forced open."""

    def run() -> float:
        memformer = model(encoder_only=True).float().to(device)
        generator = torch.Generator().manual_seed(1)
        mem: Any = None
        with torch.no_grad():
            memformer.gru.bias_hh[32:64] += 100.0
            for _ in range(500):
                src = torch.randint(20, (1, 24), generator=generator).to(device)
                mem = memformer(src, mems=mem).mem
        return float(mem.norm(dim=-1).max())

    return run


def seconds(*, device: str, segments: int) -> Callable[[], float]:
    """What one segment of a training step takes, of a processor; once, since it takes minutes."""
    torch.set_num_threads(1)
    bench_speed.replay(device=device, segments=2)()
    run = bench_speed.replay(device=device, segments=segments)

    def measured() -> float:
        start = time.process_time()
        run()
        return (time.process_time() - start) / segments

    return measured


def growth(*, device: str, segments: int) -> Callable[[], float]:
    """MiB that replay's peak grows by with a segment, from 8 segments on."""
    torch.set_num_threads(1)
    bench_speed.replay(device=device, segments=2)()

    def run() -> float:
        least, most = (
            peak_memory.peak(bench_speed.replay(device=device, segments=n)) for n in (8, segments)
        )
        return (most - least) / 2**20 / (segments - 8)

    return run


def _recalled(seed: int) -> dict[int, float]:
    """What a model that was trained in this process recalls, by segments."""
    import recall

    torch.set_num_threads(1)
    return recall.examine(recall.train(seed, STEPS).model, seed)


@functools.cache
def _all_recalled() -> list[dict[int, float]]:
    """Of every seed; a process for each, as many at a time as there are processors."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(_recalled, SEEDS))


def recalled(*, device: str, segments: int) -> Callable[[], float]:  # noqa: ARG001
    """Of five seeds the worst share of values recalled so many segments later, in percent."""
    return lambda: 100 * min(found[segments] for found in _all_recalled())
