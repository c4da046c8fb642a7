"""What is timed and weighed of feedback-transformer, and of its reference.

Every function prepares a subject of `bench_cases`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY, DIM, DEPTH, SEGMENT, SLOTS, HEADS, WIDTH = 20_000, 512, 6, 2, 256, 8, 64
PROMPT = 64
Run = Callable[[], Any]


def model(
    device: str, dtype: str = "float32", *, package: str = "feedback_transformer", **changes: Any
) -> Any:
    """The same arguments are known to both packages."""
    torch.manual_seed(0)
    settings = {
        "num_tokens": VOCABULARY,
        "dim": DIM,
        "depth": DEPTH,
        "seq_len": SEGMENT,
        "mem_len": SLOTS,
        "heads": HEADS,
        "dim_head": WIDTH,
    }
    module = importlib.import_module(package).FeedbackTransformer(**(settings | changes))
    return module.to(device, getattr(torch, dtype))


def tokens(b: int, n: int, device: str, most: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(most, (b, n), generator=generator).to(device)


def sequence(
    *,
    device: str,
    b: int,
    n: int,
    backward: bool = False,
    dtype: str = "float32",
    package: str = "feedback_transformer",
) -> Run:
    module, x = model(device, dtype, package=package), tokens(b, n, device)

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        module.zero_grad()
        module(x).sum().backward()

    return both if backward else forward


def reading(*, device: str, b: int, n: int, dtype: str = "float32") -> Run:  # noqa: ARG001
    """All weights that a segment is multiplied by, read once for each, and those of the logits."""
    module = model(device, dtype)
    matrices = [p for p in module.layers.parameters() if p.ndim == 2] + [module.to_kv.weight]

    def run() -> None:
        with torch.no_grad():
            for _ in range(n // SEGMENT):
                for matrix in matrices:
                    matrix.sum()
            module.to_logits.weight.sum()

    return run


def token(*, device: str, dtype: str = "float32") -> Run:
    """The next token of a stream, after as many as the reference reads again."""
    # So many are never asked for: the stream does not end.
    stream = model(device, dtype).stream(tokens(1, SLOTS, device), 10**9, temperature=0)
    for _ in range(4):
        next(stream)
    return lambda: next(stream)


def token_again(*, device: str) -> Run:
    """The reference has no stream: all tokens again for one more."""
    module = model(device, package="feedback_transformer_pytorch")
    x = tokens(1, PROMPT, device)

    def run() -> Tensor:
        with torch.no_grad():
            found: Tensor = module(x)[:, -1].argmax(-1)
            return found

    return run


def saved(
    *, device: str, n: int, package: str = "feedback_transformer", dim: int = 128
) -> Callable[[], float]:
    """MiB that the forward pass keeps for the backward pass, beside the parameters."""
    module = model(device, package=package, dim=dim, num_tokens=256)
    x = tokens(1, n, device, 256)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(y: Tensor) -> Tensor:
        # Kept, so that no place in memory is given twice.
        kept[y.untyped_storage().data_ptr()] = y.detach()
        return y

    def run() -> float:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
            out = module(x)
        sizes = [y.untyped_storage().nbytes() for place, y in kept.items() if place not in own]
        del out
        return sum(sizes) / 2**20

    return run


def splits(*, device: str, package: str = "feedback_transformer") -> Callable[[], float]:
    """The largest difference that splitting a sequence of 40 tokens anywhere makes, in float64."""
    changes = {"num_tokens": 50, "dim": 32, "depth": 2, "seq_len": 4, "mem_len": 10}
    module = model(device, "float64", package=package, **changes)
    x = tokens(2, 40, device, 50)

    def run() -> float:
        worst = 0.0
        with torch.no_grad():
            whole = module(x)
            for stop in range(2, 39):
                first, memory = module(x[:, :stop], return_memory=True)
                found = torch.cat((first, module(x[:, stop:], memory=memory)), 1)
                worst = max(worst, (found - whole).abs().max().item())
        return worst

    return run
