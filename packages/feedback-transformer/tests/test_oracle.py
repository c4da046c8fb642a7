"""Outputs and gradients equal a loop over tokens, layers, heads and slots, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from feedback_transformer import FeedbackTransformer
from shared_core.testing import assert_same_gradients


def compare(
    kit: Any,
    model: FeedbackTransformer,
    x: Tensor,
    mask: Tensor | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    **options: Any,
) -> None:
    names = [name for name, _ in model.named_parameters() if name not in ("token_emb.weight",)]
    values = [dict(model.named_parameters())[name] for name in names]
    embeddings = model.token_emb(x)
    options |= {"mask": mask, "context_mask": context_mask, "return_embeddings": True}

    def ours(embeddings: Tensor, context: Tensor | None, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        given = options | {"context": context}
        out: Tensor = functional_call(model, weights, (embeddings,), given)
        return out

    def theirs(embeddings: Tensor, context: Tensor | None, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        return kit.by_oracle(model, embeddings, weights, mask, context, context_mask)

    assert_same_gradients(ours, theirs, (embeddings, context, *values))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients(
    kit: Any,
    changes: dict[str, Any],
    masked: bool,
) -> None:
    model = kit.make(**changes)
    mask = kit.mask(2, 11) if masked else None
    compare(kit, model, kit.tokens(2, 11), mask)


@settings(max_examples=25)
@given(
    b=st.integers(1, 3),
    n=st.integers(1, 9),
    seq_len=st.integers(1, 4),
    mem_len=st.integers(0, 8),
    depth=st.integers(1, 3),
    masked=st.booleans(),
    shared=st.booleans(),
    norm=st.booleans(),
)
def test_drawn_shapes(
    kit: Any,
    b: int,
    n: int,
    seq_len: int,
    mem_len: int,
    depth: int,
    masked: bool,
    shared: bool,
    norm: bool,
) -> None:
    model = kit.make(
        seq_len=seq_len, mem_len=mem_len, depth=depth, shared_kv=shared, norm_memory=norm
    )
    mask = kit.mask(b, n, seed=n) if masked else None
    compare(kit, model, kit.tokens(b, n, seed=b), mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seq_len", [1, 3])
def test_context(kit: Any, seq_len: int, masked: bool) -> None:
    model = kit.make(dim_context=5, seq_len=seq_len)
    context = kit.normal(2, 4, 5)
    context_mask = None
    if masked:
        context_mask = torch.tensor([[True, False, True, True], [False] * 4], device=kit.device)
    mask = kit.mask(2, 7) if masked else None
    compare(kit, model, kit.tokens(2, 7), mask, context, context_mask)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("every", [4, 8])
def test_checkpoints_change_nothing(kit: Any, every: int) -> None:
    compare(kit, kit.make(), kit.tokens(2, 11), checkpoint_every=every)


@pytest.mark.usefixtures("route")
def test_gradients_through_a_carried_memory(kit: Any, changes: dict[str, Any]) -> None:
    """The graph goes on through it, open segment included."""
    model = kit.make(**changes)
    x, mask = kit.tokens(2, 11), kit.mask(2, 11)
    weights = dict(model.named_parameters())
    cotangent = kit.normal(2, 11, 6)
    found = []
    for split in (11, 5, 6, 1):
        memory, outputs = None, []
        for piece, part in zip(x.split(split, 1), mask.split(split, 1), strict=True):
            out, memory = model(piece, memory, True, mask=part, return_embeddings=True)
            outputs.append(out)
        total = (torch.cat(outputs, 1) * cotangent).sum()
        wanted = [p for key, p in weights.items() if not key.startswith("to_logits")]
        found.append(torch.autograd.grad(total, wanted))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-10, rtol=0)


def test_second_derivatives(kit: Any) -> None:
    for changes in ({}, {"seq_len": 1, "norm_memory": True, "mem_len": 2}, {"shared_kv": False}):
        model = kit.make(dim=4, dim_head=2, depth=1, **changes)
        x, memory = kit.tokens(1, 4), model(kit.tokens(1, 4), None, True)[1]
        embeddings = model.token_emb(x).detach().requires_grad_()
        keys, values = (y.detach().requires_grad_() for y in memory[:2])
        mask = torch.tensor([[True, False, True, True]], device=kit.device)

        def run(
            embeddings: Tensor,
            keys: Tensor,
            values: Tensor,
            model: FeedbackTransformer = model,
            mask: Tensor = mask,
        ) -> tuple[Tensor, ...]:
            memory = (keys, values)
            out, left = model(embeddings, memory, True, mask=mask, return_embeddings=True)
            return out, left.keys, left.values

        assert torch.autograd.gradcheck(run, (embeddings, keys, values))
        assert torch.autograd.gradgradcheck(run, (embeddings, keys, values))


def test_only_what_is_wanted_gets_a_gradient(kit: Any) -> None:
    model = kit.make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ff.inner" in name)
    model(kit.tokens(2, 6)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("ff.inner" in name)


def test_gradients_twice_from_one_graph(kit: Any) -> None:
    """The backward pass leaves what it was given as it was."""
    model = kit.make()
    loss = model(kit.tokens(2, 8)).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


@pytest.mark.parametrize("way", ["two calls", "an open segment", "checkpoints"])
def test_first_gradients_that_can_be_differentiated_again(kit: Any, way: str) -> None:
    """The same with a graph of their own, also where what is carried has one."""
    model = kit.make(seq_len=2, mem_len=3)
    tokens = kit.tokens(2, 12)
    cut = {"two calls": 6, "an open segment": 5, "checkpoints": 12}[way]
    every = 4 if way == "checkpoints" else None
    found = []
    for create_graph in (False, True):
        first, memory = model(tokens[:, :cut], return_memory=True, checkpoint_every=every)
        loss = first.square().mean()
        if cut < 12:
            loss = loss + model(tokens[:, cut:], memory).square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-12, rtol=1e-9)
