"""What is timed and weighed of h-transformer-1d, and of its reference.

Every function prepares a subject of `bench_cases`, which says what "core" means.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH, BLOCK = 8, 64, 128
DIM = HEADS * WIDTH
LONGEST = 65536
DECODED = 4096
Run = Callable[[], Any]
Core = Callable[[Tensor], Tensor]


def core_ours(
    *, device: str, n: int = 0, size: int = 0, dtype: str, causal: bool, backward: bool = False
) -> Run:
    from h_transformer_1d import h_attention

    resolution = "fine" if causal else "coarse"
    attend = partial(h_attention, causal=causal, block_size=BLOCK, query_resolution=resolution)
    return core_run(lambda x: merged(attend(*split(x))), device, n or size, dtype, backward)


def core_exact(
    *, device: str, n: int = 0, size: int = 0, dtype: str, backward: bool = False
) -> Run:
    return core_run(exact, device, n or size, dtype, backward)


def exact(packed: Tensor) -> Tensor:
    q, k, v = split(packed)
    return merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def core_reference(*, device: str, n: int, dtype: str, causal: bool, backward: bool = False) -> Run:
    core = reference_core(causal, HEADS, WIDTH, BLOCK, n).to(device, getattr(torch, dtype))
    return core_run(core, device, n, dtype, backward)


def core_run(core: Core, device: str, n: int, dtype: str, backward: bool) -> Run:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(1, n, 3 * DIM, generator=generator).to(device, getattr(torch, dtype))
    if not backward:
        return lambda: no_grad(core, packed)
    cotangent = torch.randn(1, n, DIM, generator=generator).to(packed)
    packed.requires_grad_()

    def run() -> None:
        packed.grad = None
        core(packed).backward(cotangent)

    return run


def no_grad(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch.no_grad():
        return function(*arguments)


def split(packed: Tensor, width: int = WIDTH) -> list[Tensor]:
    """(1, n, 3 * h * d) to three views (1, h, n, d)."""
    return [x.unflatten(-1, (-1, width)).transpose(1, 2) for x in packed.chunk(3, dim=-1)]


def merged(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def reference_core(causal: bool, heads: int, width: int, block: int, n: int) -> Any:
    """The reference's attention module on packed queries, keys and values."""
    from h_transformer_1d.h_transformer_1d import (  # type: ignore[import-not-found]
        CausalHAttention1D,
        HAttention1D,
    )

    settings = {"heads": heads, "dim_head": width, "block_size": block}
    if causal:
        module = CausalHAttention1D(heads * width, max_seq_len=n, **settings)
    else:
        module = HAttention1D(heads * width, **settings)
    module.to_qkv = module.to_out = nn.Identity()
    return module


def model(device: str, max_seq_len: int) -> Any:
    """One layer; the same arguments are known to both packages."""
    from h_transformer_1d import HTransformer1D

    return HTransformer1D(
        num_tokens=256, dim=DIM, depth=1, max_seq_len=max_seq_len, causal=True, heads=HEADS,
        dim_head=WIDTH, block_size=BLOCK,
    ).to(device)  # fmt: skip


def text(n: int, device: str) -> Tensor:
    return torch.randint(256, (1, n), generator=torch.Generator().manual_seed(0)).to(device)


def decode_ours(*, device: str) -> Run:
    module = model(device, DECODED)
    tokens = text(DECODED, device)
    with torch.no_grad():
        _, start = module(tokens[:, :-BLOCK], return_state=True)

    def run() -> None:
        state = start
        with torch.no_grad():
            for token in tokens[:, -BLOCK:].split(1, dim=1):
                _, state = module.step(token, state)

    return run


def decode_reference(*, device: str) -> Run:
    return partial(no_grad, model(device, DECODED), text(DECODED, device))


def state_size(*, device: str, n: int) -> Callable[[], float]:
    def bytes_of(x: Any) -> int:
        if isinstance(x, Tensor):
            return x.untyped_storage().nbytes()
        return sum(map(bytes_of, x)) if isinstance(x, tuple) else 0

    def run() -> float:
        module = model(device, LONGEST)
        with torch.no_grad():
            _, state = module(text(LONGEST, device), return_state=True)
            if n > LONGEST:
                _, state = module.step(text(n - LONGEST, device), state)
        return bytes_of(state) / 2**20

    return run


def cache_size(*, device: str) -> Callable[[], float]:
    keys_and_values = torch.empty(2, 1, HEADS, LONGEST, WIDTH, device=device)
    return lambda: keys_and_values.numel() * keys_and_values.element_size() / 2**20
