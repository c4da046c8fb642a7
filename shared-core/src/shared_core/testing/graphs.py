"""Models as graphs: `torch.compile` and `torch.export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .trees import assert_close, fresh_leaves, random_sum, tensors


def assert_compiles(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    backend: str = "aot_eager",
    *,
    dynamic: bool | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-4,
) -> None:
    """`torch.compile(fullgraph=True)` runs forward and backward, and both equal the eager ones.

    Args:
        fn: a module or a function without randomness.
        inputs: positional arguments; floating-point tensors get gradients too.
        backend: of `torch.compile`.
        dynamic: of `torch.compile`.
        atol: absolute tolerance.
        rtol: relative tolerance.

    Raises:
        AssertionError: compiled and eager results differ. A graph break raises torch's own error.
    """
    torch.compiler.reset()
    parameters = list(fn.parameters()) if isinstance(fn, nn.Module) else []
    compiled = torch.compile(fn, fullgraph=True, backend=backend, dynamic=dynamic)
    results = []
    for function in (compiled, fn):
        leaves = fresh_leaves(tuple(inputs))
        outputs = function(*leaves)
        gradients: Sequence[Tensor] = ()
        if any(y.requires_grad for y in tensors(outputs)):
            wanted = [x for x in [*tensors(leaves), *parameters] if x.requires_grad]
            gradients = torch.autograd.grad(
                random_sum(outputs), wanted, allow_unused=True, materialize_grads=True
            )
        results.append((tensors(outputs), gradients))
    torch.compiler.reset()
    (outputs, gradients), (eager_outputs, eager_gradients) = results
    assert_close(outputs, eager_outputs, f"outputs, {backend}", atol=atol, rtol=rtol)
    if gradients or eager_gradients:
        assert_close(gradients, eager_gradients, f"gradients, {backend}", atol=atol, rtol=rtol)


def assert_exports(
    module: nn.Module,
    inputs: Sequence[Any],
    dynamic_shapes: Any,
    other_inputs: Sequence[Any],
    *,
    atol: float = 1e-5,
    rtol: float = 1e-4,
) -> None:
    """`torch.export` gives one graph that equals the module, for another length too.

    Args:
        module: in evaluation mode, or without randomness.
        inputs: positional arguments to trace with.
        dynamic_shapes: of `torch.export.export`.
        other_inputs: positional arguments of other sizes.
        atol: absolute tolerance.
        rtol: relative tolerance.

    Raises:
        AssertionError: graph and module differ. What cannot be exported raises torch's own error.
        ValueError: `other_inputs` has the sizes of `inputs`.
    """
    sizes = [tuple(x.shape) for x in tensors(list(inputs))]
    if sizes == [tuple(x.shape) for x in tensors(list(other_inputs))]:
        raise ValueError(f"other_inputs must differ from inputs in size, both are {sizes}")
    program = torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic_shapes)
    graph = program.module()
    with torch.no_grad():
        for given in (inputs, other_inputs):
            what = f"exported, sizes {[tuple(x.shape) for x in tensors(list(given))]}"
            assert_close(graph(*given), module(*given), what, atol=atol, rtol=rtol)
