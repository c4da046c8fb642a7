"""Generation: greedy is the argmax of the whole forward, streaming is generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

MODELS = [
    pytest.param({}, id="sibling"),
    pytest.param({"scheme": "neighbor"}, id="neighbor"),
    pytest.param({"reversible": True, "shift_tokens": True}, id="reversible shifted"),
    pytest.param({"heads": 4, "kv_heads": 2, "level_bias": True}, id="grouped biased"),
]


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("length", [1, 3, 4, 9, 40])
def test_greedy_is_the_argmax_of_the_whole(
    make_model: Any, tokens: Any, changes: dict[str, Any], length: int
) -> None:
    model = make_model(**changes).eval()
    prompt = tokens(3, length)
    out = model.generate(prompt, 20, temperature=0.0)
    assert out.shape == (3, 20)
    assert out.dtype == torch.long
    with torch.no_grad():
        best = model(torch.cat((prompt, out), dim=1))[:, length - 1 : -1].argmax(dim=-1)
    assert torch.equal(out, best)


@pytest.mark.parametrize("changes", MODELS)
def test_generation_past_max_seq_len(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    """Nothing in the state knows max_seq_len: a short model goes on as a long one would."""
    short = make_model(**changes, max_seq_len=16).eval()
    long = make_model(**changes, max_seq_len=200).eval()
    prompt = tokens(2, 9)
    out = short.generate(prompt, 120, temperature=0.0)
    with torch.no_grad():
        best = long(torch.cat((prompt, out), dim=1))[:, 8:-1].argmax(dim=-1)
    assert torch.equal(out, best)


def test_a_prompt_longer_than_max_seq_len(make_model: Any, tokens: Any) -> None:
    short, long = make_model(max_seq_len=16).eval(), make_model(max_seq_len=64).eval()
    prompt = tokens(2, 50)
    assert torch.equal(
        short.generate(prompt, 5, temperature=0.0), long.generate(prompt, 5, temperature=0.0)
    )


@pytest.mark.parametrize("changes", MODELS)
def test_stream_is_generate(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    prompt = tokens(3, 7)
    device = prompt.device

    def draws(method: Any) -> Any:
        generator = torch.Generator(device).manual_seed(4)
        return method(prompt, 30, temperature=0.8, top_k=7, generator=generator)

    whole = draws(model.generate)
    streamed = list(draws(model.stream))
    assert all(token.shape == (3,) for token in streamed)
    assert torch.equal(torch.stack(streamed, dim=1), whole)


def test_draws_come_from_the_models_distribution(make_model: Any, tokens: Any) -> None:
    model = make_model().eval()
    prompt = tokens(1, 7).expand(20000, 7)
    with torch.no_grad():
        expected = model(prompt[:1])[0, -1].softmax(dim=-1)
    torch.manual_seed(0)
    drawn = model.generate(prompt, 1).flatten().bincount(minlength=20) / 20000
    spread = (expected * (1 - expected) / 20000).sqrt()
    assert ((drawn - expected).abs() <= 5 * spread).all()


def test_filters(make_model: Any, tokens: Any) -> None:
    """Every filter at its narrowest is greedy; top_k=3 draws the best three and not only one."""
    model = make_model().eval()
    prompt = tokens(4, 7)
    greedy = model.generate(prompt, 12, temperature=0.0)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert torch.equal(model.generate(prompt, 12, **narrow), greedy), narrow
    torch.manual_seed(0)
    out = model.generate(prompt, 12, top_k=3)
    with torch.no_grad():
        best = model(torch.cat((prompt, out), dim=1))[:, 6:-1].topk(3, dim=-1).indices
    assert (best == out[..., None]).any(dim=-1).all()
    assert not torch.equal(out, greedy)


def test_generator_and_temperature(make_model: Any, tokens: Any) -> None:
    model = make_model()
    prompt = tokens(2, 7)

    def draw(seed: int, **changes: Any) -> Tensor:
        generator = torch.Generator(prompt.device).manual_seed(seed)
        return model.generate(prompt, 20, generator=generator, **changes)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), draw(1, temperature=3.0))
    assert torch.equal(draw(1, temperature=1e-5), draw(2, temperature=0.0))


def test_ended_rows_are_padded(make_model: Any, tokens: Any) -> None:
    model = make_model()
    prompt = tokens(6, 7)
    free = model.generate(prompt, 30, temperature=0.0)
    # A token that some row meets early and some row late or never.
    eos = int(free[0, 5])
    out = model.generate(prompt, 30, temperature=0.0, eos_token=eos, pad_value=17)
    assert out.shape == (6, 30)
    for row, expected in zip(out.tolist(), free.tolist(), strict=True):
        end = expected.index(eos) if eos in expected else 29
        assert row == expected[: end + 1] + [17] * (29 - end)


def test_the_stream_stops_when_all_rows_have_ended(make_model: Any, tokens: Any) -> None:
    model = make_model()
    prompt = tokens(1, 7).expand(3, 7)
    free = model.generate(prompt[:1], 30, temperature=0.0)[0].tolist()
    eos = free[5]
    last = free.index(eos)
    streamed = list(model.stream(prompt, 30, temperature=0.0, eos_token=eos))
    assert len(streamed) == last + 1
    out = model.generate(prompt, 30, temperature=0.0, eos_token=eos, pad_value=3)
    assert out[:, : last + 1].tolist() == [free[: last + 1]] * 3
    assert (out[:, last + 1 :] == 3).all()


def test_no_token_wanted(make_model: Any, tokens: Any) -> None:
    model = make_model()
    assert model.generate(tokens(2, 7), 0).shape == (2, 0)
    assert list(model.stream(tokens(2, 7), 0)) == []


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients(make_model: Any, tokens: Any, training: bool) -> None:
    """Generation runs in eval mode without gradients, and leaves both as they were."""
    model = make_model(attn_dropout=0.5, ff_dropout=0.5).train(training)
    list(model.modules())[-1].train(not training)
    flags = [module.training for module in model.modules()]
    prompt = tokens(2, 7)
    out = model.generate(prompt, 8, temperature=0.0)
    assert torch.equal(out, model.generate(prompt, 8, temperature=0.0))
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    for token in model.stream(prompt, 4, temperature=0.0):
        # The caller's code between two tokens is the caller's.
        assert torch.is_grad_enabled()
        assert not token.requires_grad


def test_two_streams_at_once(make_model: Any, tokens: Any) -> None:
    model = make_model()
    first, second = tokens(2, 7, seed=1), tokens(3, 9, seed=2)
    expected = [model.generate(prompt, 10, temperature=0.0) for prompt in (first, second)]
    pairs = list(
        zip(
            model.stream(first, 10, temperature=0.0),
            model.stream(second, 10, temperature=0.0),
            strict=True,
        )
    )
    assert torch.equal(torch.stack([a for a, _ in pairs], dim=1), expected[0])
    assert torch.equal(torch.stack([b for _, b in pairs], dim=1), expected[1])
