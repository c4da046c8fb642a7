"""Residual stacks of (f, g) pairs: sequential, or reversible with activations of one layer.

Sequential:  x <- x + f(x);  x <- x + g(x).
Reversible (Gomez et al. 2017, arXiv 1707.04585, equation 6, 7): y1 = x1 + f(x2), y2 = x2 + g(y1),
started from two copies of x and ended by their sum. The backward pass computes the inputs of a
layer from its outputs instead of having kept them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    get_device_states,
    set_checkpoint_early_stop,
    set_device_states,
)

from h_transformer_1d.legacy import REVERSIBLE_KEYS
from shared_core import register_key_map
from shared_core.checks import check_probability

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
        check_probability(layer_dropout=layer_dropout)
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
    DDP and FSDP2. Without saving memory the same function runs under `torch.compile`, and for
    `HTransformer1D.forward(..., return_state=True)`.

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
        return _Chain([function for pair in pairs for function in pair]).run(x)

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

    Every F_k is checkpointed without its input s_(k+1), so that the graph keeps none: in the
    forward pass a state lives while a later one, or somebody outside, needs it. The chain keeps
    the last two; when the backward pass computes F_k again, the value gives
    s_k = s_(k+2) - F_k(s_(k+1)) back.
    """

    def __init__(self, functions: list[Function]) -> None:
        self.functions = functions
        self.states: dict[int, Tensor] = {}
        """Without graph. They come in pairs s_k, s_(k+1), from which one can go back."""
        self.first: list[_FirstCall] = []

    def run(self, x: Tensor) -> Tensor:
        """The sum of the last two states."""
        before = now = x
        self._know(0, x, x)
        for k in range(len(self.functions)):
            self.first.append(_FirstCall(now.dtype, now.requires_grad, _random_state(x)))
            # The value is wanted to its end, though gradients may need only its beginning.
            with set_checkpoint_early_stop(False):
                value = checkpoint(
                    partial(self._call, k, [now]), x, use_reentrant=False, preserve_rng_state=False
                )
            before, now = now, before + value
            self._know(k + 1, before, now)
            del self.states[k]
        return before + now

    def _call(self, k: int, state: list[Tensor], x: Tensor) -> Tensor:
        """F_k(s_(k+1)), which is called once forward and again in the backward pass.

        Args:
            state: s_(k+1) at the first call, and no longer thereafter.
            x: the input of the stack.
        """
        if state:
            return self.functions[k](state.pop())
        self._know(0, x, x)
        if not self._knows(k):
            self._go_back(k + 1)
        return self._step_back(k)

    def _go_back(self, k: int) -> None:
        """Makes s_k and s_(k+1) known where no gradient has asked for the functions above."""
        top = next(i for i in range(k, len(self.functions) + 1) if self._knows(i))
        for i in reversed(range(k, top)):
            with torch.no_grad():
                self._step_back(i)

    def _step_back(self, k: int) -> Tensor:
        """F_k(s_(k+1)) as at its first call, which makes s_k known."""
        dtype, requires_grad, random = self.first[k]
        state = self.states[k + 1].detach().to(dtype).requires_grad_(requires_grad)
        with _same_draws(random):
            value = self.functions[k](state)
        if k not in self.states:
            self.states[k] = self.states[k + 2] - value.detach()
        if k + 2 < len(self.functions):
            self.states.pop(k + 2, None)
        return value

    def _know(self, k: int, state: Tensor, following: Tensor) -> None:
        self.states[k], self.states[k + 1] = state.detach(), following.detach()

    def _knows(self, k: int) -> bool:
        return k in self.states and k + 1 in self.states


class _RandomState(NamedTuple):
    """Of the CPU's generator, and of those of the devices."""

    cpu: Tensor
    device_type: str
    devices: list[int]
    states: list[Tensor]


class _FirstCall(NamedTuple):
    """What the input of a function was like, and the draws to come."""

    dtype: torch.dtype
    requires_grad: bool
    random: _RandomState


def _random_state(x: Tensor) -> _RandomState:
    kind = x.device.type
    if getattr(getattr(torch, kind, None), "_initialized", False):
        return _RandomState(torch.get_rng_state(), kind, *get_device_states(x))
    return _RandomState(torch.get_rng_state(), "cpu", [], [])


@contextmanager
def _same_draws(state: _RandomState) -> Iterator[None]:
    """Draws the numbers that were drawn after `state`, and leaves the generators alone."""
    with torch.random.fork_rng(state.devices, device_type=state.device_type):
        torch.set_rng_state(state.cpu)
        set_device_states(state.devices, state.states, device_type=state.device_type)
        yield
