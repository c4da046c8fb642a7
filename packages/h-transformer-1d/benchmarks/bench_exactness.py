"""How far h-transformer-1d and its reference are from what they should give, in float64.

Every function prepares a subject of `bench_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_speed import HEADS, Core, merged, reference_core, split
from torch import Tensor

SEEDS = range(8)
LENGTHS = (1, 2, 63, 129, 300, 1024)
Attend = Callable[..., Tensor]


def shapes() -> Iterator[tuple[int, dict[str, Any]]]:
    """Lengths, and the options of `h_attention` to try them with."""
    for n in LENGTHS:
        for block in (4, 16, 128):
            for scheme in ("sibling", "neighbor"):
                options = {"block_size": block, "scheme": scheme}
                yield n, {**options, "causal": True}
                yield n, {**options, "causal": False}
                yield n, {**options, "causal": False, "query_resolution": "coarse"}


def random_mask(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(1, n, generator=generator) < 0.7


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def row_sums_ours(*, device: str) -> Callable[[], float]:
    from h_transformer_1d import h_attention

    def run() -> float:
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for n, options in shapes():
            q, k = (normal(1, 2, n, 16, generator=generator).to(device) for _ in range(2))
            one = torch.ones_like(k)
            worst = max(worst, (h_attention(q, k, one, **options) - 1).abs().max().item())
            mask = random_mask(n, generator).to(device)
            sums = h_attention(q, k, one, mask=mask, **options)
            # A row that sees nothing gives exactly 0.
            worst = max(worst, torch.minimum((sums - 1).abs(), sums.abs()).max().item())
        return worst

    return run


def row_sums_exact(*, device: str) -> Callable[[], float]:
    def run() -> float:
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for n in LENGTHS:
            q, k = (normal(1, 2, n, 16, generator=generator).to(device) for _ in range(2))
            for causal in (True, False):
                sums = F.scaled_dot_product_attention(q, k, torch.ones_like(k), is_causal=causal)
                worst = max(worst, (sums - 1).abs().max().item())
        return worst

    return run


def row_sums_reference(*, device: str) -> Callable[[], float]:
    def run() -> float:
        packed = normal(1, 1024, 3 * 32, generator=torch.Generator().manual_seed(0)).to(device)
        packed[..., 64:] = 1.0
        errors: list[float] = [
            (reference_core(causal, 2, 16, 16, 1024).to(device)(packed) - 1).abs().max().item()
            for causal in (True, False)
        ]
        return max(errors)

    return run


def coverage(weights: Tensor, causal: bool) -> float:
    """Per cent of the pairs that have a weight; 0 if a token sees a later one."""
    allowed = torch.ones_like(weights, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if (weights[~allowed] != 0).any():
        return 0.0
    return 100.0 * (weights[allowed] > 0).double().mean().item()


def coverage_ours(*, device: str) -> Callable[[], float]:
    from h_transformer_1d import h_attention

    def run() -> float:
        least = 100.0
        for n, options in shapes():
            one = torch.eye(n, dtype=torch.float64, device=device)[None, None]
            zero = torch.zeros_like(one)
            weights = h_attention(zero, zero, one, **options)[0, 0]
            least = min(least, coverage(weights, options["causal"]))
        return least

    return run


def coverage_reference(*, device: str) -> Callable[[], float]:
    def run() -> float:
        least = 100.0
        for causal in (True, False):
            packed = torch.zeros(1, 1024, 3 * 1024, dtype=torch.float64, device=device)
            packed[0, :, 2 * 1024 :] = torch.eye(1024, dtype=torch.float64)
            core = reference_core(causal, 1, 1024, 16, 1024).to(device)
            least = min(least, coverage(core(packed)[0], causal))
        return least

    return run


def leak(attend: Attend, n: int, device: str, generator: torch.Generator) -> float:
    """How much rows of unmasked tokens change when masked tokens do; attend(packed, mask)."""
    mask = random_mask(n, generator).to(device)
    packed, other = (normal(1, n, 3 * 32, generator=generator).to(device) for _ in range(2))
    changed = torch.where(mask[..., None], packed, other)
    difference = (attend(packed, mask) - attend(changed, mask))[mask]
    return difference.abs().max().item() if difference.numel() else 0.0


def leak_ours(*, device: str) -> Callable[[], float]:
    from h_transformer_1d import h_attention

    def run() -> float:
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for n, options in shapes():

            def attend(packed: Tensor, mask: Tensor, options: dict[str, Any] = options) -> Tensor:
                return merged(h_attention(*split(packed, 16), mask=mask, **options))

            worst = max(worst, leak(attend, n, device, generator))
        return worst

    return run


def leak_reference(*, device: str) -> Callable[[], float]:
    def run() -> float:
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for causal in (True, False):
            core = reference_core(causal, 2, 16, 16, 1024).to(device)
            worst = max(worst, leak(partial(_with_mask, core), 1024, device, generator))
        return worst

    return run


def _with_mask(core: Callable[..., Tensor], packed: Tensor, mask: Tensor) -> Tensor:
    return core(packed, mask=mask)


def series(heads: int, n: int, width: int, generator: torch.Generator) -> Tensor:
    """x_t = 0.95 x_{t-1} + e_t with unit variance at every t: (1, n, heads * width)."""
    x = normal(1, n, heads * width, generator=generator)
    for t in range(1, n):
        x[:, t] = 0.95 * x[:, t - 1] + (1 - 0.95**2) ** 0.5 * x[:, t]
    return x


def relative_error(attend: Core, kind: str) -> float:
    """Mean over seeds of |result - exact| / |exact|; `attend` takes packed input."""
    errors: list[float] = []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        width = 16 if kind == "q = k" else 64
        a, b, c = (series(HEADS, 1024, width, generator) for _ in range(3))
        packed = torch.cat(
            {"q = k": (a, a, b), "q = k = v": (a, a, a)}.get(kind, (a, b, c)), dim=-1
        )
        q, k, v = split(packed, width)
        exact = merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        errors.append(((attend(packed) - exact).norm() / exact.norm()).item())
    return sum(errors) / len(errors)


def error_ours(*, device: str, kind: str, scheme: str) -> Callable[[], float]:  # noqa: ARG001
    from h_transformer_1d import h_attention

    attend = partial(h_attention, causal=True, block_size=32, scheme=scheme)
    return lambda: relative_error(
        lambda x: merged(attend(*split(x, x.shape[-1] // (3 * HEADS)))), kind
    )


def error_reference(*, device: str, kind: str) -> Callable[[], float]:  # noqa: ARG001
    return lambda: relative_error(
        lambda x: reference_core(True, HEADS, x.shape[-1] // (3 * HEADS), 32, 1024)(x), kind
    )
