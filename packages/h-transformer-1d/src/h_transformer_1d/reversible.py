"""Residual stacks of (f, g) pairs: sequential, or reversible with activations of one layer.

Sequential:  x <- x + f(x);  x <- x + g(x).
Reversible (Gomez et al. 2017, arXiv 1707.04585, equation 6, 7): y1 = x1 + f(x2), y2 = x2 + g(y1),
started from two copies of x and ended by their sum. The backward pass computes the inputs of a
layer from its outputs instead of having kept them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from h_transformer_1d.legacy import REVERSIBLE_KEYS
from shared_core import register_key_map

Route = Sequence[tuple[bool, bool]]
Function = Callable[[Tensor], Tensor]


class _Sequence(nn.Module):
    """What both stacks share: their layers, the routing of arguments, layer dropout."""

    def __init__(
        self,
        layers: Iterable[Iterable[nn.Module]],
        args_route: Mapping[str, Route],
        layer_dropout: float,
    ) -> None:
        super().__init__()
        pairs = [list(pair) for pair in layers]
        for number, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(f"layer {number} must be a pair (f, g), got {len(pair)} modules")
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.args_route = dict(args_route)
        for name, route in self.args_route.items():
            if len(route) != len(self.layers):
                raise ValueError(
                    f"args_route[{name!r}] must hold {len(self.layers)} entries, one a layer, "
                    f"got {len(route)}"
                )
        if not 0.0 <= layer_dropout < 1.0:
            raise ValueError(f"layer_dropout must be in [0, 1), got {layer_dropout}")
        self.layer_dropout = layer_dropout

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """The modules (f, g) of each layer."""
        for pair in self.layers:
            f, g = pair.children()
            yield f, g

    def bind(self, **arguments: Any) -> list[tuple[Function, Function]]:
        """The layers as functions of one tensor, with `arguments` sent along their routes."""
        unknown = arguments.keys() - self.args_route.keys()
        if unknown:
            raise TypeError(f"no route for {sorted(unknown)}, known: {sorted(self.args_route)}")
        bound = []
        for number, (f, g) in enumerate(self.pairs()):
            chosen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
            for name, value in arguments.items():
                for wanted, into in zip(self.args_route[name][number], chosen, strict=True):
                    if wanted:
                        into[name] = value
            bound.append((_bind(f, chosen[0]), _bind(g, chosen[1])))
        return bound

    def kept(self, pairs: list[tuple[Function, Function]]) -> list[tuple[Function, Function]]:
        """Layer dropout: leaves layers out while training, never all of them."""
        if not self.training or self.layer_dropout == 0.0:
            return pairs
        dropped = (torch.rand(len(pairs)) < self.layer_dropout).tolist()
        return [pair for pair, drop in zip(pairs, dropped, strict=True) if not drop] or pairs[:1]


def _bind(module: nn.Module, arguments: dict[str, Any]) -> Function:
    def call(x: Tensor) -> Tensor:
        out: Tensor = module(x, **arguments)
        return out

    return call


class SequentialSequence(_Sequence):
    """Plain residual layers.

    Args:
        layers: pairs (f, g) of modules, each (b, n, d) -> (b, n, d).
        args_route: for each keyword of `forward`, one (to f, to g) a layer.
        layer_dropout: probability with which training leaves a layer out.
    """

    def __init__(
        self,
        layers: Iterable[Iterable[nn.Module]],
        args_route: Mapping[str, Route] = MappingProxyType({}),
        layer_dropout: float = 0.0,
    ) -> None:
        super().__init__(layers, args_route, layer_dropout)

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Maps (b, n, d) to (b, n, d).

        Raises:
            TypeError: a keyword has no route.
        """
        return self.run(x, self.kept(self.bind(**arguments)))

    @staticmethod
    def run(x: Tensor, pairs: Iterable[tuple[Function, Function]]) -> Tensor:
        """Passes x through the pairs with ordinary autograd."""
        for f, g in pairs:
            x = x + f(x)
            x = x + g(x)
        return x


class ReversibleSequence(_Sequence):
    """Reversible residual layers: training keeps the activations of one layer, not of all.

    Works in training and evaluation, with dropout, frozen inputs, `torch.autograd.grad` and
    autocast. Under `torch.compile` the same function runs with ordinary autograd.

    Args: as `SequentialSequence`.
    """

    def __init__(
        self,
        blocks: Iterable[Iterable[nn.Module]],
        args_route: Mapping[str, Route] = MappingProxyType({}),
        layer_dropout: float = 0.0,
    ) -> None:
        super().__init__(blocks, args_route, layer_dropout)
        register_key_map(self, REVERSIBLE_KEYS)

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Maps (b, n, d) to (b, n, d).

        Raises:
            TypeError: a keyword has no route.
        """
        pairs = self.kept(self.bind(**arguments))
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.run(x, pairs)
        held: list[Tensor] = [p for p in self.parameters() if p.requires_grad]
        held += [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
        y1, y2 = _Reversible.apply(x, pairs, *held)  # type: ignore[no-untyped-call]
        out: Tensor = y1 + y2
        return out

    @staticmethod
    def run(x: Tensor, pairs: Iterable[tuple[Function, Function]]) -> Tensor:
        """Passes x through the pairs with ordinary autograd."""
        x1 = x2 = x
        for f, g in pairs:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return x1 + x2


class _Replay:
    """A function that can be called again under the random state and autocast of its first call."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def first(self, x: Tensor) -> Tensor:
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(x)
        kind = x.device.type
        self.autocast = (
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
            torch.is_autocast_cache_enabled(),
        )
        return self.function(x)

    def again(self, x: Tensor) -> Tensor:
        kind, dtype, enabled, cache = self.autocast
        with (
            torch.random.fork_rng(self.devices, device_type=kind if self.devices else "cuda"),
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache),
        ):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states)
            return self.function(x)


class _Reversible(torch.autograd.Function):
    """(x, pairs, *held) -> (y1, y2); `held` are the tensors that want a gradient from inside."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pairs: list[tuple[Function, Function]], *held: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.pairs = [(_Replay(f), _Replay(g)) for f, g in pairs]
        y1 = y2 = x
        for f, g in ctx.pairs:
            y1 = y1 + f.first(y2)
            y2 = y2 + g.first(y1)
        ctx.save_for_backward(y1, y2, *held)
        return y1, y2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, *held = ctx.saved_tensors
        grad1, grad2 = grads
        sums: list[Tensor | None] = [None] * len(held)

        def pull(replay: _Replay, at: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            """The function's value at `at`, and what `grad` of it asks of `at`."""
            with torch.enable_grad():
                at = at.detach().requires_grad_()
                value = replay.again(at)
                found = torch.autograd.grad(value, (at, *held), grad, allow_unused=True)
            for i, part in enumerate(found[1:]):
                if part is not None:
                    before = sums[i]
                    sums[i] = part if before is None else before + part
            return value.detach(), torch.zeros_like(at) if found[0] is None else found[0]

        for f, g in reversed(ctx.pairs):
            value, step = pull(g, y1, grad2)
            y2 = y2 - value
            grad1 = grad1 + step
            value, step = pull(f, y2, grad1)
            y1 = y1 - value
            grad2 = grad2 + step
        return grad1 + grad2, None, *sums
