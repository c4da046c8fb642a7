"""Tokens as they come: the same as asking again for all of them, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def again(model: Any, prompt: Tensor, length: int, **options: Any) -> Tensor:
    """Greedy tokens from the whole sequence each time."""
    x = prompt
    for _ in range(length):
        x = torch.cat((x, model(x, **options)[:, -1:].argmax(-1)), 1)
    return x[:, prompt.shape[1] :]


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_greedy_is_what_the_model_thinks_most_likely(
    kit: Any, changes: dict[str, Any], n: int
) -> None:
    model = kit.make(**changes)
    prompt = kit.tokens(3, n)
    found = model.generate(prompt, 12, temperature=0)
    assert found.dtype == torch.int64
    assert torch.equal(found, again(model, prompt, 12))
    assert len(found.unique()) > 1


def test_with_a_context(kit: Any) -> None:
    model = kit.make(dim_context=5)
    context, mask = kit.normal(3, 4, 5), kit.mask(3, 4)
    options = {"context": context, "context_mask": mask}
    found = model.generate(kit.tokens(3, 3), 7, temperature=0, **options)
    assert torch.equal(found, again(model, kit.tokens(3, 3), 7, **options))


def test_stream_is_generate(kit: Any) -> None:
    model = kit.make()
    draws = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01}
    generators = [torch.Generator(kit.device).manual_seed(4) for _ in range(2)]
    found = model.generate(kit.tokens(3, 4), 8, generator=generators[0], **draws)
    tokens = [*model.stream(kit.tokens(3, 4), 8, generator=generators[1], **draws)]
    assert torch.equal(torch.stack(tokens, 1), found)
    assert not any(token.requires_grad for token in tokens)


def test_rows_end_apart(kit: Any) -> None:
    model = kit.make()
    prompt = kit.tokens(4, 3)
    free = model.generate(prompt, 10, temperature=0)
    eos = int(free[0, 2])
    found = model.generate(prompt, 10, temperature=0, eos_token=eos, pad_value=77)
    for ours, theirs in zip(found.tolist(), free.tolist(), strict=True):
        end = theirs.index(eos) + 1 if eos in theirs else 10
        assert ours == theirs[:end] + [77] * (10 - end)
    assert 77 in found


def test_dropout_is_off_and_the_mode_stays(kit: Any) -> None:
    model = kit.make(attn_dropout=0.5, ff_dropout=0.5).train()
    found = model.generate(kit.tokens(2, 3), 6, temperature=0)
    assert model.training
    assert torch.equal(found, again(model.eval(), kit.tokens(2, 3), 6))


@pytest.mark.parametrize("length", [0, 1])
def test_short_answers(kit: Any, length: int) -> None:
    assert kit.make().generate(kit.tokens(2, 3), length).shape == (2, length)


def test_biases_grow_with_what_is_remembered(kit: Any) -> None:
    model = kit.make(mem_len=200, seq_len=3)
    prompt = kit.tokens(1, 1)
    found = model.generate(prompt, 60, temperature=0)
    assert torch.equal(found, again(model, prompt, 60))


@pytest.mark.parametrize("before", [4, 5])
def test_goes_on_from_a_memory(kit: Any, changes: dict[str, Any], before: int) -> None:
    model = kit.make(**changes)
    x = kit.tokens(3, 8)
    _, memory = model(x[:, :before], None, True)
    expected = model.generate(x, 9, temperature=0)
    for given in (memory, memory.detach()):
        found = model.generate(x[:, before:], 9, temperature=0, memory=given)
        assert torch.equal(found, expected)
    streamed = [*model.stream(x[:, before:], 9, temperature=0, memory=memory)]
    assert torch.equal(torch.stack(streamed, 1), expected)


@pytest.mark.parametrize("seq_len", [1, 2])
def test_shorter_prompts_are_padded_in_front(kit: Any, seq_len: int) -> None:
    """By whole segments: a row goes on as it does alone."""
    model = kit.make(seq_len=seq_len)
    x = kit.tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool, device=kit.device)
    mask[0, :4] = False
    found = model.generate(x, 8, temperature=0, mask=mask)
    assert torch.equal(found[:1], model.generate(x[:1, 4:], 8, temperature=0))
    assert torch.equal(found[1:], model.generate(x[1:], 8, temperature=0))
    assert torch.equal(torch.stack([*model.stream(x, 8, temperature=0, mask=mask)], 1), found)
    # What is behind the mask does not matter.
    x[0, :4] = 3
    assert torch.equal(model.generate(x, 8, temperature=0, mask=mask), found)
