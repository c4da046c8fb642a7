"""What memformer gets right to the last digit, and what its memory recalls.

Every function prepares a subject of `bench_cases`.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bench_speed
import torch

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


def peak(*, device: str, kind: str, segments: int, **options: object) -> Callable[[], float]:
    """MiB that a fresh process's run takes beyond what was held before it.

    What is freed is given back at once: as the C library chooses, fragments of the heap come and go
    by tens of MiB.
    """
    script = """
import ctypes
import json
import sys
from pathlib import Path
import torch
import bench_speed

def status(key):
    return int(Path("/proc/self/status").read_text().partition(key)[2].split()[0]) / 2**10

torch.set_num_threads(1)
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
kind, device, segments, options = json.loads(sys.argv[1])
prepare = getattr(bench_speed, kind)
prepare(device=device, segments=2, n=16, **options)()
run = prepare(device=device, segments=segments, **options)
if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    print((torch.cuda.max_memory_allocated() - before) / 2**20)
else:
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS:")
    run()
    # Not getrusage, which counts what the process that started this one had.
    print(status("VmHWM:") - before)
"""
    command = [sys.executable, "-c", script, json.dumps([kind, device, segments, options])]
    folder = Path(__file__).resolve().parent

    def run() -> float:
        out = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=1200
        )
        return float(out.stdout)

    return run


def growth(*, device: str, segments: int) -> Callable[[], float]:
    """MiB that replay's peak grows by with a segment, from 8 segments on."""
    least, most = (peak(device=device, kind="replay", segments=n) for n in (8, segments))
    return lambda: (most() - least()) / (segments - 8)


def _recalled(seed: int) -> dict[int, float]:
    """What a model that was trained in this process recalls, by segments."""
    torch.set_num_threads(1)
    folder = str(Path(__file__).resolve().parent.parent / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module("recall")
    found: dict[int, float] = module.examine(module.train(seed, STEPS).model, seed)
    return found


@functools.cache
def _all_recalled() -> list[dict[int, float]]:
    """Of every seed; a process for each, as many at a time as there are processors."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(_recalled, SEEDS))


def recalled(*, device: str, segments: int) -> Callable[[], float]:  # noqa: ARG001
    """Of five seeds the worst share of values recalled so many segments later, in percent."""
    return lambda: 100 * min(found[segments] for found in _all_recalled())
