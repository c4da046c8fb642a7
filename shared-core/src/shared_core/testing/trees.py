"""Nested inputs and outputs: tensors in tuples, lists and dicts, to any depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nested value, in order; what is not a tensor is left out."""
    return list(_walk(value))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A nested value with `function` applied to each of its tensors; named tuples stay such."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def to_float(value: Any, dtype: torch.dtype) -> Any:
    """A nested value with its floating-point tensors in `dtype`."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def fresh_leaves(value: Any) -> Any:
    """A detached copy whose floating-point tensors want gradients."""
    return map_tensors(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), value)


def assert_close(actual: Any, expected: Any, what: str, *, atol: float, rtol: float = 0.0) -> None:
    """Compares nested values tensor by tensor; dtype and device count, NaN differs from NaN."""
    ours, theirs = tensors(actual), tensors(expected)
    if len(ours) != len(theirs) or not theirs:
        raise AssertionError(f"{what}: {len(ours)} tensors against {len(theirs)}")
    for i, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        name = what if len(ours) == 1 else f"{what}, tensor {i}"

        def named(message: str, name: str = name) -> str:
            return f"{name}: {message}"

        torch.testing.assert_close(a.detach(), e.detach(), atol=atol, rtol=rtol, msg=named)


def random_sum(value: Any) -> Tensor:
    """A scalar that every number of every output changes, each with a weight of its own.

    The weights are the same for outputs of the same shapes.
    """
    outputs = [y for y in tensors(value) if y.requires_grad]
    if not outputs:
        raise AssertionError("no output depends on anything that wants a gradient")
    generator = torch.Generator().manual_seed(0)
    total = outputs[0].new_zeros((), dtype=torch.float64)
    for y in outputs:
        weight = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)
        total = total + (y.to(torch.float64) * weight).sum()
    return total


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _walk(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _walk(part)
