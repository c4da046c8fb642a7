"""What is timed and weighed of memformer, and of its reference.

Every function prepares a subject of `bench_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DIM, SLOTS, TOKENS, VOCABULARY = 512, 128, 1024, 256
Run = Callable[[], Any]


def build(device: str, *, dtype: str = "float32", n: int = TOKENS, **options: Any) -> Any:
    """The same arguments are known to both packages."""
    from memformer import Memformer

    torch.manual_seed(0)
    model = Memformer(
        dim=DIM,
        num_memory_slots=SLOTS,
        enc_num_tokens=VOCABULARY,
        enc_depth=2,
        enc_max_seq_len=n,
        dec_num_tokens=VOCABULARY,
        dec_depth=2,
        dec_max_seq_len=n,
        **options,
    )
    return model.to(device, getattr(torch, dtype))


def tokens(*shape: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, shape, generator=generator).to(device)


def forward(*, device: str, dtype: str = "float32", writer: str = "") -> Run:
    # The reference knows one writer.
    options: dict[str, Any] = {"writer": writer} if writer else {}
    model = build(device, dtype=dtype, **options)
    src, tgt = (tokens(1, TOKENS, device=device, seed=i) for i in range(2))

    def run() -> None:
        with torch.no_grad():
            model(src, tgt)

    return run


def backward(*, device: str, dtype: str = "float32") -> Run:
    """Forward and backward: of the loss, and of the memory as a later segment would ask for it."""
    model = build(device, dtype=dtype)
    src, tgt = (tokens(1, TOKENS, device=device, seed=i) for i in range(2))

    def run() -> None:
        model.zero_grad()
        out = model(src, tgt)
        (out.dec_out + out.mem.square().mean()).backward()

    return run


def replay(
    *, device: str, segments: int, n: int = TOKENS, every: bool = False, **options: Any
) -> Run:
    """A target for the last segment, or for every one."""
    from memformer import memory_replay_backprop

    model = build(device, n=n, **options)
    src, tgt = tokens(1, segments * n, device=device), tokens(1, n, device=device, seed=1)
    # The reference knows no targets of other segments.
    targets: Any = [tgt] * segments if every else tgt

    def run() -> None:
        model.zero_grad()
        memory_replay_backprop(model, src, targets)

    return run


def at_once(*, device: str, segments: int, n: int = TOKENS, every: bool = False) -> Run:
    """Back-propagation through all segments at once."""
    model = build(device, n=n)
    src, tgt = tokens(1, segments * n, device=device), tokens(1, n, device=device, seed=1)

    def run() -> None:
        model.zero_grad()
        mem, loss = None, torch.zeros((), device=device)
        for i, segment in enumerate(src.split(n, 1)):
            out = model(segment, tgt if every or i == segments - 1 else None, mem)
            mem, loss = out.mem, loss + out.dec_out
        loss.backward()

    return run


def decode(*, device: str, length: int, last: int = 16) -> Run:
    """The `last` tokens of a sequence of `length`, one by one, with keys and values kept."""
    net = build(device).eval().decoder.net
    blocks = net.layer_blocks
    context = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(2)).to(device)
    x = tokens(1, length, device=device)
    with torch.no_grad():
        start = blocks.init_state(1, TOKENS, context)
        if length > last:
            _, start = blocks.step(net.embed(x[:, :-last]), start)

    def run() -> None:
        state = start
        with torch.no_grad():
            for token in x[:, -last:].split(1, 1):
                hidden, state = blocks.step(net.embed(token), state)
                net.read(hidden)

    return run


def decode_anew(*, device: str, length: int) -> Run:
    """One token of the reference's, whose generation fails: a pass over all tokens."""
    net = build(device).eval().decoder.net
    context = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(2)).to(device)
    x = tokens(1, length, device=device)

    def run() -> None:
        with torch.no_grad():
            net(x, context=context)

    return run
