"""Numbers for tests, the same in every run and on every device."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Randn(Protocol):
    """`normal` on the device of the tests: the fixture `randn`."""

    def __call__(
        self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64
    ) -> Tensor: ...


def normal(
    *shape: int,
    device: torch.device | str = "cpu",
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Normal numbers that depend on the seed alone: drawn in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def wave(shape: tuple[int, ...], phase: int) -> Tensor:
    """A tensor in float64 that needs no random generator, for values that are written down."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.4 * torch.sin(n * (1.3 + 0.11 * phase) + phase)).reshape(shape)


def displace(module: Module) -> Module:
    """Takes every trained parameter from its initial value: ones, zeros and equal rows hide faults.

    Changes the module in place, always by the same numbers, and returns it.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter))
    return module
