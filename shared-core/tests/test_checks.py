"""`checks`: what is right passes, and a message has the name and what was given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shared_core import checks
from shared_core.checks import (
    check_at_least,
    check_choice,
    check_dropout,
    check_integers,
    check_legacy_options,
    check_length,
    check_mask,
    check_probability,
    check_tokens,
    check_vectors,
)
from shared_core.testing import assert_compiles, assert_exports, assert_refused

TOKENS = torch.zeros(2, 3, dtype=torch.int64)
VECTORS = torch.zeros(2, 3, 4)
MASK = torch.zeros(2, 3, dtype=torch.bool)

ACCEPTED: list[Callable[[], None]] = [
    partial(check_integers, a=0, b=-3),
    partial(check_at_least, 1, a=1, b=2),
    partial(check_at_least, 0, a=0),
    partial(check_probability, a=0.0, b=1.0, c=1),
    partial(check_dropout, a=0.0, b=0.999, c=0),
    partial(check_choice, "kind", "b", ("a", "b")),
    partial(check_tokens, "x", TOKENS),
    partial(check_tokens, "x", TOKENS.int(), 2),
    partial(check_vectors, "x", VECTORS, 4),
    partial(check_vectors, "x", VECTORS.bfloat16(), 4, 2),
    partial(check_vectors, "x", VECTORS[:, :0], 4, least=0),
    partial(check_mask, "mask", None, (2, 3)),
    partial(check_mask, "mask", MASK, (2, 3)),
    partial(check_mask, "mask", MASK, MASK.shape),
    partial(check_length, "x", 4, 4),
    partial(check_legacy_options, norm=True, scale=True),
]

REFUSED: list[tuple[type[Exception], Callable[[], None], list[object]]] = [
    (TypeError, partial(check_integers, a=1, size=2.0), ["size", 2.0]),
    (TypeError, partial(check_integers, size=True), ["size", True]),
    (TypeError, partial(check_at_least, 1, size="4"), ["size", "'4'"]),
    (TypeError, partial(check_at_least, 1, size=None), ["size", None]),
    (ValueError, partial(check_at_least, 1, a=1, size=0), ["size", 1, 0]),
    (ValueError, partial(check_at_least, 5, size=4), ["size", 5, 4]),
    (TypeError, partial(check_probability, share="half"), ["share", "'half'"]),
    (ValueError, partial(check_probability, a=0.5, share=1.01), ["share", 1.01]),
    (ValueError, partial(check_probability, share=-0.01), ["share", -0.01]),
    (ValueError, partial(check_probability, share=float("nan")), ["share", "nan"]),
    (TypeError, partial(check_dropout, dropout=None), ["dropout", None]),
    (ValueError, partial(check_dropout, dropout=1.0), ["dropout", "[0, 1)", 1.0]),
    (ValueError, partial(check_dropout, dropout=-0.1), ["dropout", -0.1]),
    (ValueError, partial(check_dropout, dropout=float("nan")), ["dropout", "nan"]),
    (ValueError, partial(check_choice, "kind", "c", ("a", "b")), ["kind", "a, b", "'c'"]),
    (TypeError, partial(check_tokens, "x", [[1, 2]]), ["x", "tensor", "list"]),
    (TypeError, partial(check_tokens, "x", TOKENS.float()), ["x", torch.float32]),
    (TypeError, partial(check_tokens, "x", TOKENS.to(torch.uint8)), ["x", torch.uint8]),
    (ValueError, partial(check_tokens, "x", TOKENS[0]), ["x", (3,)]),
    (ValueError, partial(check_tokens, "x", TOKENS[:, :0]), ["x", (2, 0)]),
    (ValueError, partial(check_tokens, "x", TOKENS, 5), ["x", "(5, n)", (2, 3)]),
    (TypeError, partial(check_vectors, "x", None, 4), ["x", "tensor", "NoneType"]),
    (TypeError, partial(check_vectors, "x", VECTORS.long(), 4), ["x", torch.int64]),
    (ValueError, partial(check_vectors, "x", VECTORS, 5), ["x", "(b, n, 5)", (2, 3, 4)]),
    (ValueError, partial(check_vectors, "x", VECTORS[0], 4), ["x", (3, 4)]),
    (ValueError, partial(check_vectors, "x", VECTORS[:, :0], 4), ["x", "n >= 1", (2, 0, 4)]),
    (ValueError, partial(check_vectors, "x", VECTORS, 4, 3), ["x", "(3, n, 4)", (2, 3, 4)]),
    (TypeError, partial(check_mask, "mask", [True], (1,)), ["mask", "tensor", "list"]),
    (TypeError, partial(check_mask, "mask", TOKENS, (2, 3)), ["mask", torch.int64]),
    (ValueError, partial(check_mask, "mask", MASK[:1], (2, 3)), ["mask", (2, 3), (1, 3)]),
    (ValueError, partial(check_mask, "mask", MASK[None], (2, 3)), ["mask", (2, 3), (1, 2, 3)]),
    (ValueError, partial(check_length, "src", 5, 4), ["src", 5, 4]),
    (ValueError, partial(check_legacy_options, a=True, b=False, c=False), ["legacy", "b, c"]),
]


@pytest.mark.parametrize("check", ACCEPTED)
def test_what_is_right_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("error", "check", "fragments"), REFUSED)
def test_what_is_wrong_is_refused(
    error: type[Exception], check: Callable[[], None], fragments: list[object]
) -> None:
    assert_refused(error, check, *fragments)


def test_every_check_is_tried() -> None:
    def names(tried: list[Any]) -> set[str]:
        return {check.func.__name__ for check in tried}

    assert names(ACCEPTED) == set(checks.__all__)
    assert names([check for _, check, _ in REFUSED]) == set(checks.__all__)


class Checked(torch.nn.Module):
    def forward(self, x: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        check_at_least(1, size=x.shape[2])
        check_probability(share=0.5)
        check_dropout(dropout=0.5)
        check_choice("kind", "a", ("a", "b"))
        check_vectors("x", x, 4, mask.shape[0])
        check_tokens("tokens", tokens, x.shape[0])
        check_mask("mask", mask, x.shape[:2])
        check_mask("mask", None, x.shape[:2])
        check_length("x", x.shape[1], 100)
        return x * (mask * tokens)[..., None]


def test_a_graph_does_not_break_at_them(device: torch.device) -> None:
    def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.arange(2 * n, device=device).view(2, n)
        return torch.randn(2, n, 4, device=device), tokens % 2 == 0, tokens

    assert_compiles(Checked(), inputs(3))
    assert_compiles(Checked(), inputs(3), dynamic=True)
    length = torch.export.Dim("length", min=2, max=50)
    assert_exports(Checked(), inputs(3), ({1: length},) * 3, inputs(7))
