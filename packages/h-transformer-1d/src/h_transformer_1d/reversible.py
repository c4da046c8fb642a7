"""Residual stacks of (f, g) pairs: sequential, or reversible with activations of one layer.

Sequential:  x <- x + f(x);  x <- x + g(x).
Reversible (Gomez et al. 2017, arXiv 1707.04585, equation 6, 7): y1 = x1 + f(x2), y2 = x2 + g(y1),
started from two copies of x and ended by their sum. The backward pass computes the inputs of a
layer from its outputs instead of having kept them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

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
        self.layers: nn.ModuleList = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.args_route: dict[str, Route] = dict(args_route)
        for name, route in self.args_route.items():
            if len(route) != len(self.layers):
                raise ValueError(
                    f"args_route[{name!r}] must hold {len(self.layers)} entries, one a layer, "
                    f"got {len(route)}"
                )
        if not 0.0 <= layer_dropout <= 1.0:
            raise ValueError(f"layer_dropout must be in [0, 1], got {layer_dropout}")
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
        """Layer dropout: leaves layers out while training, but one at least stays."""
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

    Works in training and evaluation, with dropout, frozen inputs, `torch.autograd.grad`, autocast,
    DDP and FSDP2. Under `torch.compile` the same function runs without saving memory.

    Args:
        blocks: pairs (f, g) of modules, each (b, n, d) -> (b, n, d).
        args_route: for each keyword of `forward`, one (to f, to g) a layer.
        layer_dropout: probability with which training leaves a layer out.
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
        return _Chain(x, [function for pair in pairs for function in pair]).result()

    @staticmethod
    def run(x: Tensor, pairs: Iterable[tuple[Function, Function]]) -> Tensor:
        """Passes x through the pairs with ordinary autograd."""
        x1 = x2 = x
        for f, g in pairs:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return x1 + x2


class _Chain:
    """The states s_0 = s_1 = x and s_(k+2) = s_k + F_k(s_(k+1)) of a reversible stack.

    Every F_k is checkpointed. A state's storage is freed as soon as no later state needs it; when
    the backward pass computes F_k again, the value gives s_k = s_(k+2) - F_k(s_(k+1)) back.
    """

    def __init__(self, x: Tensor, functions: list[Function]) -> None:
        self.functions = functions
        self.states = [x, x]
        self.called: set[int] = set()
        for k in range(len(functions)):
            # The value is wanted to its end, though gradients may need only its beginning.
            with set_checkpoint_early_stop(False):
                value = checkpoint(partial(self._call, k), self.states[k + 1], use_reentrant=False)
            self.states.append(self.states[k] + value)
            self._free(k)

    def result(self) -> Tensor:
        return self.states[-2] + self.states[-1]

    def _call(self, k: int, x: Tensor) -> Tensor:
        """F_k(x), which is called once forward and again in the backward pass."""
        if k not in self.called:
            self.called.add(k)
            return self.functions[k](x)
        self._restore(k + 1)
        if _is_freed(x):
            # Within another checkpoint, x is the state of a chain that was made again.
            _fill(x, self.states[k + 1].detach())
        value = self.functions[k](x)
        self._give_back(k, value)
        self._free(k + 2)
        return value

    def _free(self, k: int) -> None:
        """Frees s_k, unless it is the input or one of the last two."""
        if 2 <= k < len(self.functions):
            self.states[k].untyped_storage().resize_(0)

    def _restore(self, k: int) -> None:
        """Gives s_k back where no gradient has asked for F_k, which then draws no numbers."""
        if _is_freed(self.states[k]):
            self._restore(k + 2)
            self._restore(k + 1)
            with torch.no_grad():
                self._give_back(k, self.functions[k](self.states[k + 1]))

    def _give_back(self, k: int, value: Tensor) -> None:
        if _is_freed(self.states[k]):
            _fill(self.states[k], self.states[k + 2].detach() - value.detach())


def _is_freed(x: Tensor) -> bool:
    return x.numel() > 0 and x.untyped_storage().size() == 0


def _fill(x: Tensor, content: Tensor) -> None:
    """Gives x storage again; through `data`, so that autograd sees no change of what it saved."""
    x.untyped_storage().resize_(x.numel() * x.element_size())
    x.data.copy_(content)
