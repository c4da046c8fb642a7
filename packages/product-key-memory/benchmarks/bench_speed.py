"""What is timed and weighed of product-key-memory, and of its reference.

Every function prepares a subject of `bench_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DIM, HEADS, DIM_HEAD, TOPK, TOKENS = 512, 4, 128, 32, 1024
Run = Callable[[], Any]


def layer(device: str, num_keys: int, **options: Any) -> Any:
    """The same arguments are known to both packages."""
    from product_key_memory import PKM

    torch.manual_seed(0)
    return PKM(DIM, heads=HEADS, num_keys=num_keys, topk=TOPK, dim_head=DIM_HEAD, **options).to(
        device
    )


def tokens(n: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, DIM, generator=generator).to(device)


def forward(*, device: str, num_keys: int, n: int = TOKENS, compiled: bool = False) -> Run:
    module = layer(device, num_keys).eval()
    call = torch.compile(module) if compiled else module
    x = tokens(n, device)

    def run() -> None:
        with torch.no_grad():
            call(x)

    return run


def train_reference(*, device: str, num_keys: int, n: int = TOKENS) -> Run:
    """A step as the reference's README trains: Adam, with a learning rate of its own for values."""
    from product_key_memory import fetch_optimizer_parameters

    module = layer(device, num_keys)
    optimizer = torch.optim.Adam(fetch_optimizer_parameters(module), lr=1e-3)
    return step(module, [optimizer], device, n)


def train_ours(
    *, device: str, num_keys: int, rule: str = "adagrad", n: int = TOKENS, values: str = "float32"
) -> Run:
    from product_key_memory import PKMOptimizer, fetch_pkm_value_parameters

    dtype = getattr(torch, values)
    module = layer(device, num_keys, values_grad="factored", values_dtype=dtype)
    tables, rest = fetch_pkm_value_parameters(module)
    optimizers = [torch.optim.Adam(rest, lr=1e-3), PKMOptimizer(tables, lr=1e-2, rule=rule)]
    return step(module, optimizers, device, n)


def step(module: Any, optimizers: list[Any], device: str, n: int) -> Run:
    """Forward, backward, optimizers: towards a target that the layer has not."""
    x, target = tokens(n, device), tokens(n, device, seed=1)

    def run() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    # State is made by the first step, which is not what is measured.
    run()
    return run


def whole(*, device: str, trainer: str, **arguments: Any) -> Run:
    """Building the layer and its optimizers and taking two steps."""
    train = train_reference if trainer == "reference" else train_ours

    def run() -> None:
        train(device=device, **arguments)()

    return run
