"""The assertions on what a module survives: graphs, dtypes, devices, files, processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared_core import FeedForward
from shared_core.testing import (
    assert_compiles,
    assert_data_parallel,
    assert_exports,
    assert_hub_round_trip,
    assert_portable,
)


class Pair(NamedTuple):
    output: Tensor
    count: Tensor


class Sound(nn.Module):
    """What no assertion has anything against; the faulty ones differ in one point."""

    def __init__(self, dim: int = 3, name: str = "x") -> None:
        super().__init__()
        self.body = FeedForward(dim)
        self.name = name
        self.register_buffer("scale", torch.full((dim,), 2.0))

    def forward(self, x: Tensor) -> Pair:
        return Pair(self.body(x) * self.scale, torch.ones_like(x, dtype=torch.long))


def inputs(n: int = 5) -> tuple[Tensor]:
    return (torch.randn(2, n, 3),)


# assert_compiles


def breaks(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x * 2


def reads_a_value(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x


def computes_otherwise(x: Tensor) -> Tensor:
    return x * (3 if torch.compiler.is_compiling() else 2)


def differs_in_the_gradient(x: Tensor) -> Tensor:
    return x.detach() * 2 + x - x.detach() if torch.compiler.is_compiling() else x * 2


def loses_the_gradient(x: Tensor) -> Tensor:
    return x.detach() * 2 if torch.compiler.is_compiling() else x * 2


def test_compiles(device: torch.device) -> None:
    assert_compiles(Sound().to(device), [x.to(device) for x in inputs()])
    assert_compiles(lambda x: (x > 0, {"a": [x]}), inputs(), backend="eager", dynamic=True)


@pytest.mark.parametrize("fn", [breaks, reads_a_value])
def test_compiles_fails_on_a_graph_break(fn: Callable[..., Any]) -> None:
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        assert_compiles(fn, inputs())


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (computes_otherwise, "outputs, aot_eager"),
        (differs_in_the_gradient, "gradients, aot_eager"),
        (loses_the_gradient, "gradients, aot_eager: 0 tensors against 1"),
    ],
)
def test_compiles_fails_on_other_results(fn: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_compiles(fn, inputs())


def test_compiles_fails_on_the_gradient_of_a_parameter() -> None:
    class Faulty(Sound):
        def forward(self, x: Tensor) -> Any:
            weight = self.body.inner.weight
            return x @ (weight.detach() if torch.compiler.is_compiling() else weight).T

    with pytest.raises(AssertionError, match="gradients, aot_eager, tensor 1"):
        assert_compiles(Faulty(), inputs())


# assert_exports


class Wrapped(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


LENGTH = ({1: torch.export.Dim("length", min=2, max=40)},)


def test_exports(device: torch.device) -> None:
    module = Sound().to(device)
    given, other = ([x.to(device) for x in inputs(n)] for n in (5, 9))
    assert_exports(module, given, LENGTH, other)


def test_exports_fails() -> None:
    branching = Wrapped(lambda x: x * 2 if x.shape[1] > 4 else x)
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        assert_exports(branching, inputs(), LENGTH, inputs(9))
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        assert_exports(Wrapped(lambda x: x.view(2, 5, 3)), inputs(), LENGTH, inputs(9))
    with pytest.raises(AssertionError, match=r"exported, sizes \[\(2, 5, 3\)\]"):
        assert_exports(Wrapped(computes_otherwise), inputs(), LENGTH, inputs(9))
    # Right for the length it was traced with.
    remembers = Wrapped(lambda x: x * len(x.unbind(0)) + x.new_tensor(int(x.shape[1])))
    with pytest.raises((AssertionError, torch._dynamo.exc.UserError)):
        assert_exports(remembers, inputs(), LENGTH, inputs(9))
    with pytest.raises(ValueError, match=r"must differ from inputs in size, both are \[\(2, 5, 3"):
        assert_exports(Sound(), inputs(), LENGTH, inputs())


# assert_portable


class NoPickle(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x


class BadCopy(Sound):
    def __deepcopy__(self, memo: dict[int, Any]) -> BadCopy:
        return BadCopy()


class BadPickle(Sound):
    def __deepcopy__(self, memo: dict[int, Any]) -> BadPickle:
        other = BadPickle()
        other.load_state_dict(self.state_dict())
        return other

    def __reduce__(self) -> Any:
        return (BadPickle, ())


class LostOnMeta(Sound):
    """A buffer that is computed when built and not saved is garbage after `to_empty`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.body(x + self.positions)


class FixedDevice(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(3, device="cpu"))

    def forward(self, x: Tensor) -> Any:
        return self.body(x + self.extra)


class Tied(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.body


class NotSaved(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.randn(3)

    def forward(self, x: Tensor) -> Any:
        return self.body(x + self.offset)


class StaysFloat(Sound):
    def forward(self, x: Tensor) -> Any:
        return self.body(x).float()


class ImpreciseInDouble(Sound):
    def forward(self, x: Tensor) -> Any:
        return self.body(x) * (1.5 if x.dtype == torch.float64 else 1.0)


class RefusesBfloat16(Sound):
    def forward(self, x: Tensor) -> Any:
        return self.body(x) @ torch.eye(3)


class InfiniteInBfloat16(Sound):
    def forward(self, x: Tensor) -> Any:
        return self.body(x) / (1e-3 if x.dtype != torch.bfloat16 else 0)


class RefusesAutocast(Sound):
    def forward(self, x: Tensor) -> Any:
        index = torch.zeros_like(x, dtype=torch.long)
        return torch.zeros_like(x).scatter_add(1, index, self.body(x))


class FrozenUnderAutocast(Sound):
    def forward(self, x: Tensor) -> Any:
        x = self.body.inner(x)
        detached = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        return self.body.outer(x.detach() if detached else x)


class CountsItsCalls(Sound):
    """Recomputation sees another state than the first pass."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        if torch.is_grad_enabled():
            self.calls += 1
        return self.body(x * (1 + self.calls))


class InfiniteGradient(Sound):
    def forward(self, x: Tensor) -> Any:
        return (self.body(x) * 0).sqrt()


class WrongIn(Sound):
    """Adds a constant to its outputs in one dtype: gradients stay right."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Any:
        return self.body(x) + (1.0 if x.dtype == self.dtype else 0.0)


class WrongUnderAutocast(Sound):
    def forward(self, x: Tensor) -> Any:
        return self.body(x) + (1.0 if torch.is_autocast_enabled(x.device.type) else 0.0)


def test_portable(device: torch.device) -> None:
    assert_portable(Sound, inputs(), device)
    assert_portable(partial(nn.Embedding, 5, 3), (torch.tensor([[0, 4]]),), str(device))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (NoPickle, Exception, "lambda"),
        (BadCopy, AssertionError, "deepcopy"),
        (BadPickle, AssertionError, "pickle"),
        (LostOnMeta, AssertionError, "meta device"),
        (FixedDevice, AssertionError, "meta device: a parameter or buffer was made elsewhere"),
        (Tied, RuntimeError, "share memory"),
        (NotSaved, Exception, "meta"),
        (StaysFloat, AssertionError, r"an output is torch\.float32, not torch\.float64"),
        (ImpreciseInDouble, AssertionError, "float64"),
        (partial(WrongIn, torch.float64), AssertionError, "float64: "),
        (partial(WrongIn, torch.bfloat16), AssertionError, "bfloat16: an output is off by"),
        (WrongUnderAutocast, AssertionError, "autocast: an output is off by"),
        (RefusesBfloat16, RuntimeError, "dtype"),
        (InfiniteInBfloat16, AssertionError, "an output is not finite"),
        (RefusesAutocast, RuntimeError, "dtype"),
        (FrozenUnderAutocast, AssertionError, r"autocast: .* \['body.inner.bias'"),
        (CountsItsCalls, AssertionError, "activation checkpointing"),
        (InfiniteGradient, AssertionError, "not finite"),
    ],
)
def test_portable_fails(
    build: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        assert_portable(build, inputs())


# assert_hub_round_trip


class Forgets(Sound):
    """Outputs depend on what no file holds."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__(dim)
        self.offset = torch.randn(dim)

    def forward(self, x: Tensor) -> Any:
        return self.body(x) + self.offset


class Unstorable(Sound):
    def __init__(self, dim: int = 3, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__(dim)
        self.act = act


def test_hub_round_trip(tmp_path: Path) -> None:
    assert_hub_round_trip(Sound, {"dim": 3, "name": "y"}, inputs(), tmp_path / "a")
    assert_hub_round_trip(Sound, {"dim": 3}, inputs(), tmp_path / "b")
    assert (tmp_path / "b" / "config.json").is_file()


def test_hub_round_trip_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="hub round trip"):
        assert_hub_round_trip(Forgets, {"dim": 3}, inputs(), tmp_path / "a")
    with pytest.raises(AssertionError, match=r"saved \{'dim': 3, 'act': .*, got back \{'dim': 3"):
        assert_hub_round_trip(Unstorable, {"dim": 3, "act": F.gelu}, inputs(), tmp_path / "b")


# assert_data_parallel


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([FeedForward(3), FeedForward(3, gated=True)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Unused(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(2))


class UnusedInAGroup(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if not dist.is_initialized() else x + self.layers[0](x)


class MixesTheBatch(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.mean()


def test_data_parallel() -> None:
    x = torch.randn(4, 5, 3)
    assert_data_parallel(Blocks, (x,), blocks=("layers.0", "layers.1"))


def test_data_parallel_fails() -> None:
    x = torch.randn(4, 5, 3)
    with pytest.raises(AssertionError, match="parameters without a gradient: extra"):
        assert_data_parallel(Unused, (x,))
    with pytest.raises(AssertionError, match="DDP, rank 0, gradients of layers"):
        assert_data_parallel(MixesTheBatch, (x,))
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        assert_data_parallel(UnusedInAGroup, (x,))
    for shape in ((3, 5, 3), ()):
        with pytest.raises(ValueError, match=r"every input needs an even batch, got shape \("):
            assert_data_parallel(Blocks, (torch.ones(shape),))
    with pytest.raises(TypeError, match="top level"):
        assert_data_parallel(partial(Blocks), (x,))
