"""What a package's benchmarks/parity_cases.py is written in.

That file defines COMPARISONS, and where the package has something to compare there, SIGNATURES and
INITIAL. It is imported in both environments, so it imports a package only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Side = Literal["ours", "reference"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """The same weights and the same inputs on both sides give the same.

    Attributes:
        name: unique.
        build: build(side, legacy) makes the module; the reference is asked with legacy=True.
        inputs: made once, on the reference's side; floating inputs get gradients, compared too.
        run: run(module, inputs) gives the outputs to compare. Floating ones are differentiated;
            others must be equal.
        gradients: whether to compare gradients at all.
        loads_by_default: whether the reference's state dict must also load into build("ours",
            False), strictly.
    """

    name: str
    build: Callable[[Side, bool], nn.Module]
    inputs: Callable[[], Tensors]
    run: Callable[[nn.Module, Tensors], Tensors]
    gradients: bool = True
    loads_by_default: bool = True


@dataclass(frozen=True)
class Signature:
    """A callable of the reference and ours, each as "module:name" or "module:name.name".

    Only where `any_keyword` is True, ours may take **keywords; the reference takes them there too.
    """

    reference: str
    ours: str
    any_keyword: bool = False


@dataclass(frozen=True)
class Initial:
    """A module whose initial parameters are drawn alike by both sides."""

    name: str
    build: Callable[[Side, bool], nn.Module]
    draws: int = 16
