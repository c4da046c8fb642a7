"""Data parallel training: two processes against one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from .processes import address, resolve, run_ranks
from .trees import assert_close, map_tensors, tensors

RANKS = 2


def assert_data_parallel(
    build: Callable[[], nn.Module],
    inputs: Sequence[Any],
    *,
    blocks: Sequence[str] = (),
    atol: float = 1e-6,
    rtol: float = 1e-4,
    timeout: float = 120.0,
) -> None:
    """DDP and FSDP2 over two gloo processes give the gradients of one process.

    The loss is the mean square of the floating-point outputs, so a model must treat the rows of a
    batch apart from each other. Each way runs twice: DDP notices unused parameters the second time.

    Args:
        build: at the top level of a file; makes the same module each time, or loads its weights.
        inputs: positional arguments, the batch first in every tensor and even.
        blocks: names of submodules that FSDP2 shards on their own, before the whole.
        atol: absolute tolerance.
        rtol: relative tolerance.
        timeout: see `run_ranks`.

    Raises:
        AssertionError: gradients differ, or a parameter has none.
        ValueError: the batch is odd.
        RuntimeError: a process failed, as DDP does with unused parameters.
    """
    for x in tensors(list(inputs)):
        if x.ndim == 0 or x.shape[0] % RANKS:
            raise ValueError(f"every input needs an even batch, got shape {tuple(x.shape)}")
    module = build()
    weights = module.state_dict()
    expected = _train(module, tuple(inputs))
    unused = [n for n, p in module.named_parameters() if p.requires_grad and n not in expected]
    if unused:
        raise AssertionError(f"parameters without a gradient: {', '.join(unused)}")
    both = run_ranks(
        _both, RANKS, address(build), weights, tuple(inputs), tuple(blocks), timeout=timeout
    )
    for rank, ways in enumerate(both):
        for way, gradients in ways.items():
            what = f"{way}, rank {rank}, gradients of {', '.join(expected)}"
            assert_close(
                list(gradients.values()), list(expected.values()), what, atol=atol, rtol=rtol
            )


def _both(
    builder: tuple[str, str, str],
    weights: dict[str, Tensor],
    inputs: tuple[Any, ...],
    blocks: tuple[str, ...],
) -> dict[str, dict[str, Tensor]]:
    """In each process: the gradients by both ways, from this process's part of the batch."""
    from torch.distributed.fsdp import fully_shard

    build = resolve(*builder)
    rank = dist.get_rank()
    part = map_tensors(lambda x: x.chunk(RANKS)[rank], inputs)

    module = build()
    module.load_state_dict(weights)
    replicated = _train(nn.parallel.DistributedDataParallel(module), part)

    module = build()
    module.load_state_dict(weights)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in blocks:
        fully_shard(module.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh)
    return {
        "DDP": {name.removeprefix("module."): x for name, x in replicated.items()},
        "FSDP2": _train(module, part),
    }


def _train(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The gradients of the second of two equal steps."""
    for _ in range(2):
        module.zero_grad()
        outputs = [y for y in tensors(module(*inputs)) if y.requires_grad]
        torch.stack([y.float().square().mean() for y in outputs]).sum().backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
