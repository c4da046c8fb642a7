"""The two operators equal plain operations, in every derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from htm_pytorch import blocks
from htm_pytorch.chunkwise import attend_chunkwise
from htm_pytorch.fused import attend_fused
from htm_pytorch.plain import attend_plain
from shared_core.testing import assert_same_gradients

Attend = Callable[..., Tensor]


class Drawn(NamedTuple):
    """Two rows, 3 queries, 4 heads, 7 tokens in chunks of 3.

    Attributes:
        leaves: what gradients are taken of.
        fast, plain: functions of the leaves that are to be the same.
        op: the operator and its arguments.
    """

    leaves: list[Tensor]
    fast: Attend
    plain: Attend
    op: tuple[Any, tuple[Any, ...]]


def draw(device: torch.device, seed: int, kind: str, counts: bool = False) -> Drawn:
    """Of "few at a time" the probabilities are kept where `d` is 8, and not where it is 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    indices = torch.randint(-1, 3, (2, 3, 2), generator=generator).to(device)
    weights = normal(2, 3, 2).masked_fill(indices < 0, 0.0)
    mask = (torch.rand(2, 7, generator=generator) < 0.7).to(device)
    # A chunk is chosen only where a token of it takes part.
    mask[:, ::3] = True
    if counts:
        by_chunk = torch.tensor([[3, 1, 1], [2, 3, 1]], device=device)
        mask = by_chunk.gather(1, indices.clamp(min=0).flatten(1)).view_as(indices)
    if kind == "chunkwise":
        leaves = [normal(2, 3, 4, 5), normal(2, 7, 4, 5), normal(2, 7, 4, 6), weights]
        return Drawn(
            leaves,
            lambda q, keys, values, weights: attend_chunkwise(
                q, keys, values, weights.masked_fill(indices < 0, 0.0), indices, mask, 3
            ),
            lambda q, keys, values, weights: attend_plain(
                q, keys, values, weights, indices, mask, None, 3
            ),
            (torch.ops.htm_pytorch.attend_chunkwise.default, (*leaves, indices, mask, 3)),
        )
    d = int(kind)
    leaves = [normal(2, 3, 4, d), normal(2, 7, d), weights]
    rest = (indices, mask, normal(3, d), 3)
    return Drawn(
        leaves,
        lambda q, memories, weights: attend_fused(
            q, memories, weights.masked_fill(indices < 0, 0.0), *rest
        ),
        lambda q, memories, weights: attend_plain(q, memories[:, :, None], None, weights, *rest),
        (torch.ops.htm_pytorch.attend.default, (*leaves, *rest, d == 8)),
    )


KINDS = pytest.mark.parametrize("kind", ["2", "8", "chunkwise"])
COUNTS = pytest.mark.parametrize("counts", [False, True])


@KINDS
@COUNTS
@pytest.mark.parametrize("elements", [1, 40, 2**20])
def test_equals_plain_operations(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: str, counts: bool, elements: int
) -> None:
    """Whatever number of queries is worked on at a time."""
    for name in ("_WORKING_SET", "_SHARED_WORKING_SET", "_ACCELERATOR_WORKING_SET"):
        monkeypatch.setattr(blocks, name, elements)
    for seed in range(5):
        drawn = draw(device, seed, kind, counts)
        assert_same_gradients(drawn.fast, drawn.plain, drawn.leaves)


@KINDS
@COUNTS
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_every_derivative(device: torch.device, check: Any, kind: str, counts: bool) -> None:
    drawn = draw(device, 1, kind, counts)
    assert check(drawn.fast, tuple(x.requires_grad_() for x in drawn.leaves))


@KINDS
def test_a_third_derivative(device: torch.device, kind: str) -> None:
    drawn = draw(device, 1, kind)
    leaf = drawn.leaves[0].requires_grad_()

    def third(function: Any) -> Tensor:
        value = function(*drawn.leaves).pow(2).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = grad.pow(2).sum()
        return grad.detach()

    torch.testing.assert_close(third(drawn.fast), third(drawn.plain))


@KINDS
def test_registered_as_torch_wants_it(device: torch.device, kind: str) -> None:
    drawn = draw(device, 1, kind)
    for x in drawn.leaves:
        x.requires_grad_()
    torch.library.opcheck(*drawn.op)


@KINDS
def test_counts_are_masks(device: torch.device, kind: str) -> None:
    """(b, n, k) numbers of first tokens of each chosen chunk, and a mask that says the same."""
    by_chunk = torch.tensor([[3, 1, 1], [2, 3, 1]], device=device)
    said = (torch.arange(3, device=device) < by_chunk[..., None]).flatten(1)[:, :7]
    op, arguments = draw(device, 1, kind, counts=True).op
    tensors = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    integers = [i for i in tensors if arguments[i].dtype == torch.int64]
    by_mask = list(arguments)
    # The chunks come first, then the counts.
    by_mask[integers[1]] = said
    torch.testing.assert_close(op(*arguments), op(*by_mask), atol=0, rtol=0)


@KINDS
def test_masked_tokens_without_influence(device: torch.device, kind: str) -> None:
    """In the fused one even NaN; the chunkwise one wants finite numbers, however large."""
    drawn = draw(device, 2, kind)
    mask = next(x for x in drawn.op[1] if isinstance(x, Tensor) and x.dtype == torch.bool)
    bad = 1e12 if kind == "chunkwise" else float("nan")
    leaves = list(drawn.leaves)
    for i, x in enumerate(leaves):
        if x.shape[1] == 7:
            hidden = ~mask.view(2, 7, *[1] * (x.ndim - 2))
            leaves[i] = x.masked_fill(hidden, bad)
    grads = []
    for values in (drawn.leaves, leaves):
        given = [x.detach().requires_grad_() for x in values]
        out = drawn.fast(*given)
        grads.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
