"""Training pairs; `stream` and `generate` over small step functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_core import (
    FeedForward,
    eval_mode,
    filter_logits,
    generate,
    next_token_pairs,
    stream,
    top_k,
)
from shared_core.testing import assert_compiles

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
VOCABULARY = 8


def tokens(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


# next_token_pairs


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_pairs_without_a_mask(device: torch.device, dtype: torch.dtype) -> None:
    x = tokens([1, 2, 3, 4], [5, 6, 7, 8]).to(device, dtype)
    inputs, targets, mask = next_token_pairs(x)
    assert inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert targets.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert mask is None
    assert (inputs.dtype, targets.dtype) == (dtype, torch.int64)
    assert inputs.device == targets.device == x.device


def test_pairs_with_a_mask(device: torch.device) -> None:
    x = tokens([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]).to(device)
    given = tokens([1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]).bool().to(device)
    inputs, targets, mask = next_token_pairs(x, given, ignore_index=-1)
    assert torch.equal(inputs, x[:, :-1])
    assert targets.tolist() == [[2, 3, -1], [6, -1, 8], [2, 3, 4]]
    assert mask is not None
    assert torch.equal(mask, given[:, :-1])


def test_pairs_with_a_mask_of_the_inputs(device: torch.device) -> None:
    """The last token counts as the one before it does."""
    x = tokens([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]).to(device)
    given = tokens([1, 1, 0], [0, 1, 1], [1, 0, 0]).bool().to(device)
    _, targets, mask = next_token_pairs(x, given)
    assert targets.tolist() == [[2, -100, -100], [6, 7, 8], [-100, -100, -100]]
    assert mask is not None
    assert torch.equal(mask, given)


@pytest.mark.parametrize("kind", [list, tuple])
def test_pairs_of_a_list(device: torch.device, kind: type) -> None:
    rows = kind(torch.tensor(row, device=device) for row in ([1, 2, 3, 4], [5], [6, 7], [8, 9, 1]))
    inputs, targets, mask = next_token_pairs(rows, pad_value=7, ignore_index=-5)
    assert inputs.tolist() == [[1, 2, 3], [5, 7, 7], [6, 7, 7], [8, 9, 1]]
    assert targets.tolist() == [[2, 3, 4], [-5, -5, -5], [7, -5, -5], [9, 1, -5]]
    assert mask is not None
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert inputs.device == targets.device == mask.device == rows[0].device


def test_pairs_of_a_list_are_those_of_its_padding() -> None:
    rows = [torch.randint(1, 9, (length,)) for length in (6, 2, 4, 0)]
    lengths = torch.tensor([[6], [2], [4], [0]])
    mask = torch.arange(6) < lengths
    padded = torch.zeros(4, 6, dtype=torch.long)
    padded[mask] = torch.cat(rows)
    for ours, theirs in zip(next_token_pairs(rows), next_token_pairs(padded, mask), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_pairs_refuse() -> None:
    x = tokens([1, 2, 3], [4, 5, 6])
    for wrong in (x.float(), x.bool(), x.cfloat()):
        with pytest.raises(TypeError, match=f"x must hold integer tokens, got {wrong.dtype}"):
            next_token_pairs(wrong)
    for shape in ((3,), (2, 3, 4), (2, 1), (2, 0)):
        message = re.escape(f"x must be (b, t) with t >= 2, got shape {shape}")
        with pytest.raises(ValueError, match=message):
            next_token_pairs(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(TypeError, match=r"mask must be boolean, got torch\.int64"):
        next_token_pairs(x, torch.ones_like(x))
    for shape in ((2, 1), (2, 4), (1, 3), (2,)):
        message = re.escape(f"mask must be (2, 3) or (2, 2), got {shape}")
        with pytest.raises(ValueError, match=message):
            next_token_pairs(x, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"at least one tensor, each \(t,\), got \[\]"):
        next_token_pairs([])
    with pytest.raises(ValueError, match=r"each \(t,\), got \[\(3,\), \(1, 3\)\]"):
        next_token_pairs([x[0], x[:1]])
    with pytest.raises(TypeError, match="x must hold integer tokens"):
        next_token_pairs([x[0].float()])
    with pytest.raises(ValueError, match=r"t >= 2, got shape \(2, 1\)"):
        next_token_pairs([x[0, :1], x[0, :1]])
    with pytest.raises(ValueError, match="mask must be None for a list of sequences"):
        next_token_pairs([x[0]], x.bool())


def test_pairs_traced(device: torch.device) -> None:
    x = tokens([1, 2, 3], [4, 5, 6]).to(device)
    assert_compiles(next_token_pairs, (x, x > 2))
    assert_compiles(lambda a, b: next_token_pairs([a, b]), (x[0], x[1, :2]))


# stream and generate


def counting(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The next token is the last plus one, modulo the vocabulary."""
    return 50.0 * torch.eye(VOCABULARY)[(tokens + 1) % VOCABULARY], state


class Spy:
    """A step that records what it is called with; its state counts the calls."""

    def __init__(self, step: Step = counting) -> None:
        self.step = step
        self.fed: list[Any] = []
        self.states: list[Any] = []
        self.gradients: list[bool] = []

    def __call__(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.fed.append(tokens.tolist())
        self.states.append(state)
        self.gradients.append(torch.is_grad_enabled())
        logits, _ = self.step(tokens, state)
        return logits, 1 if state is None else state + 1


def test_the_step_gets_the_prompt_then_each_token() -> None:
    spy = Spy()
    out = generate(spy, tokens([1, 2], [5, 6]), 3, temperature=0)
    assert out.tolist() == [[3, 4, 5], [7, 0, 1]]
    assert out.dtype == torch.int64
    assert spy.fed == [[[1, 2], [5, 6]], [[3], [7]], [[4], [0]]]
    assert spy.states == [None, 1, 2]


def test_only_the_last_logits_are_used() -> None:
    def last_only(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, _ = counting(tokens, state)
        return torch.cat((torch.full_like(logits, math.nan), logits[:, -1:]), dim=1), state

    assert generate(last_only, tokens([1, 2]), 2, temperature=0).tolist() == [[3, 4]]


def test_stream_yields_as_it_goes() -> None:
    spy = Spy()
    out = stream(spy, tokens([1], [2]), 5, temperature=0)
    assert isinstance(out, Iterator)
    assert spy.fed == []
    assert next(out).tolist() == [2, 3]
    assert len(spy.fed) == 1
    assert [token.tolist() for token in out] == [[3, 4], [4, 5], [5, 6], [6, 7]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_every_integer_prompt(device: torch.device, dtype: torch.dtype) -> None:
    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert tokens.device.type == device.type
        logits, state = counting(tokens.cpu().long(), state)
        return logits.to(device), state

    out = generate(step, tokens([1, 2]).to(device, dtype), 2, temperature=0, pad_value=-1)
    assert out.tolist() == [[3, 4]]
    assert (out.dtype, out.device.type) == (torch.int64, device.type)


def test_ended_rows_are_padded_and_all_ended_stops() -> None:
    spy = Spy()
    prompt = tokens([1], [3], [4])
    out = generate(spy, prompt, 6, temperature=0, eos_token=5, pad_value=-9)
    assert out.tolist() == [[2, 3, 4, 5, -9, -9], [4, 5, -9, -9, -9, -9], [5] + [-9] * 5]
    # The padding is outside the vocabulary; the step sees the end token in its place.
    assert spy.fed[1:] == [[[2], [4], [5]], [[3], [5], [5]], [[4], [5], [5]]]
    streamed = list(stream(counting, prompt, 6, temperature=0, eos_token=5, pad_value=-9))
    assert torch.equal(torch.stack(streamed, dim=1), out[:, :4])


def test_an_end_token_never_drawn_changes_nothing() -> None:
    prompt = tokens([1], [5])
    free = generate(counting, prompt, 7, temperature=0)
    assert torch.equal(generate(counting, prompt, 7, temperature=0, eos_token=99), free)
    # Token 0 ends, though it is also the padding; one in the prompt ends nothing.
    out = generate(counting, tokens([5, 0], [7, 6]), 4, temperature=0, eos_token=0)
    assert out.tolist() == [[1, 2, 3, 4], [7, 0, 0, 0]]


def test_ended_rows_stay_ended_when_drawing() -> None:
    def uniform(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.zeros(*tokens.shape, VOCABULARY), state

    out = generate(uniform, torch.zeros(200, 1, dtype=torch.long), 30, eos_token=3, pad_value=-1)
    for row in out.tolist():
        end = row.index(3) if 3 in row else 30
        assert -1 not in row[:end]
        assert all(token == -1 for token in row[end + 1 :])


def test_length_zero() -> None:
    spy = Spy()
    assert list(stream(spy, tokens([1]), 0)) == []
    assert generate(spy, tokens([1], [2]), 0).shape == (2, 0)
    assert spy.fed == []


def test_an_empty_batch() -> None:
    prompt = torch.zeros(0, 3, dtype=torch.long)
    assert generate(counting, prompt, 4).shape == (0, 4)
    assert generate(counting, prompt, 4, eos_token=1).shape == (0, 4)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_gradient_mode_is_the_callers_between_tokens(enabled: bool) -> None:
    spy = Spy()
    with torch.set_grad_enabled(enabled):
        for _ in stream(spy, tokens([1]), 3):
            assert torch.is_grad_enabled() == enabled
            with torch.set_grad_enabled(not enabled):
                pass
        out = stream(spy, tokens([1]), 3)
        next(out)
        assert torch.is_grad_enabled() == enabled
        del out
        assert torch.is_grad_enabled() == enabled
    assert torch.is_grad_enabled()
    assert not any(spy.gradients)


def test_the_gradient_mode_survives_a_failing_step() -> None:
    def fail(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise KeyError(f"step of {tokens.shape[1]} after {state}")

    with pytest.raises(KeyError, match="step of 1 after None"):
        generate(fail, tokens([1]), 3)
    assert torch.is_grad_enabled()


def test_tokens_of_a_model_with_parameters() -> None:
    torch.manual_seed(1)
    embed, body, head = nn.Embedding(VOCABULARY, 6), FeedForward(6), nn.Linear(6, VOCABULARY)
    model = nn.Sequential(embed, body, nn.Dropout(0.9), head)
    with eval_mode(model):
        out = generate(lambda tokens, state: (model(tokens), state), tokens([1], [2]), 5)
    assert out.shape == (2, 5)
    assert not out.requires_grad


FIXED = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0])


def fixed(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    return FIXED.expand(*tokens.shape, VOCABULARY), state


@pytest.mark.parametrize(
    "options",
    [{"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 3, "min_p": 0.5}],
    ids=str,
)
def test_every_filter_is_used(options: dict[str, Any]) -> None:
    kept = filter_logits(FIXED, **options).isfinite().nonzero().flatten()
    prompt = torch.zeros(500, 1, dtype=torch.long)
    drawn = generate(fixed, prompt, 1, temperature=5.0, **options)
    assert torch.equal(drawn.unique(), kept)
    assert len(kept) < VOCABULARY
    assert torch.equal(next(stream(fixed, prompt, 1, temperature=5.0, **options)).unique(), kept)


def test_a_filter_of_ones_own() -> None:
    shapes = []

    def only_seven(logits: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape))
        return logits.masked_fill(torch.arange(VOCABULARY) != 7, -math.inf)

    out = generate(fixed, tokens([1, 2], [3, 4]), 3, filter_fn=only_seven)
    assert (out == 7).all()
    assert shapes == [(2, VOCABULARY)] * 3
    drawn = generate(fixed, torch.zeros(300, 1, dtype=torch.long), 1, filter_fn=top_k)
    assert drawn.unique().tolist() == [0]


def test_temperature() -> None:
    prompt = torch.zeros(3000, 1, dtype=torch.long)
    for temperature in (0.5, 2.0):
        drawn = generate(fixed, prompt, 1, temperature=temperature).flatten()
        frequencies = drawn.bincount(minlength=VOCABULARY) / 3000
        expected = (FIXED / temperature).softmax(0)
        torch.testing.assert_close(frequencies, expected, atol=0.04, rtol=0)


def test_the_generator_decides() -> None:
    prompt = torch.zeros(20, 1, dtype=torch.long)

    def run(seed: int, function: Callable[..., Any] = generate) -> Any:
        return function(fixed, prompt, 5, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.stack(list(run(1, stream)), dim=1), run(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", [stream, generate])
def test_refused_when_called(function: Callable[..., Any]) -> None:
    """By the call itself: `stream` is not iterated here, and no step is made."""
    spy = Spy()
    prompt = tokens([1, 2])
    for wrong in (prompt.float(), prompt.bool()):
        with pytest.raises(TypeError, match=f"prompt must hold integer tokens, got {wrong.dtype}"):
            function(spy, wrong, 3)
    for shape in ((3,), (1, 2, 3), (2, 0)):
        message = re.escape(f"prompt must be (b, t) with t >= 1, got shape {shape}")
        with pytest.raises(ValueError, match=message):
            function(spy, torch.zeros(shape, dtype=torch.long), 3)
    for wrong_length in (2.0, True, None):
        with pytest.raises(TypeError, match=f"length must be an integer, got {wrong_length}"):
            function(spy, prompt, wrong_length)
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        function(spy, prompt, -1)
    for name, value in (("eos_token", 2.0), ("eos_token", False), ("pad_value", None)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {value}"):
            function(spy, prompt, 3, **{name: value})
    for options, message in (
        ({"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ({"min_p": -0.5}, "min_p must be from 0 to 1, got -0.5"),
        ({"filter_fn": top_k, "top_k": 4}, "filter_fn excludes top_k=4, top_p=None and min_p=None"),
        ({"filter_fn": top_k, "min_p": 0.0}, "top_p=None and min_p=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            function(spy, prompt, 3, **options)
    with pytest.raises(TypeError, match=r"top_k must be an integer, got 1\.5"):
        function(spy, prompt, 3, top_k=1.5)
    with pytest.raises(ValueError, match="generator is on cpu, but the tokens are on meta"):
        function(spy, prompt.to("meta"), 3, generator=torch.Generator())
    with pytest.raises(TypeError, match="unexpected keyword"):
        function(spy, prompt, 3, filter_thres=0.9)
    assert spy.fed == []


@pytest.mark.parametrize("shape", [(1, VOCABULARY), (2, 1, VOCABULARY), (1, 0, VOCABULARY)])
def test_wrong_logits_are_refused(shape: tuple[int, ...]) -> None:
    message = re.escape(f"step must return logits (1, t, V), got {shape}")
    with pytest.raises(ValueError, match=message):
        generate(lambda _, state: (torch.zeros(shape), state), tokens([1]), 2)
    with pytest.raises(TypeError, match="logits must be floating point"):
        generate(lambda tokens, state: (tokens[..., None], state), tokens([1]), 2)


def test_on_the_meta_device() -> None:
    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.zeros(*tokens.shape, VOCABULARY, device="meta"), state

    out = generate(step, torch.zeros(2, 3, dtype=torch.long, device="meta"), 4, top_k=2)
    assert out.shape == (2, 4)
    assert out.device.type == "meta"
