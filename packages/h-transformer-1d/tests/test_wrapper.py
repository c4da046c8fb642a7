"""AutoregressiveWrapper: the reference's training loss and its generate, with what it promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from h_transformer_1d import AutoregressiveWrapper
from h_transformer_1d.autoregressive_wrapper import top_k


def test_loss_is_the_next_token_cross_entropy(make_model: Any, tokens: Any) -> None:
    model = make_model()
    x = tokens(3, 20)
    loss = AutoregressiveWrapper(model)(x)
    logits = model(x[:, :-1])
    expected = F.cross_entropy(logits.reshape(-1, 20), x[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_ignore_index(make_model: Any, tokens: Any) -> None:
    model = make_model()
    x = tokens(2, 20)
    x[0, 5] = 7
    wrapper = AutoregressiveWrapper(model, ignore_index=7)
    logits = model(x[:, :-1])
    expected = F.cross_entropy(logits.reshape(-1, 20), x[:, 1:].reshape(-1), ignore_index=7)
    torch.testing.assert_close(wrapper(x), expected, atol=1e-6, rtol=0)


def test_a_list_of_unequal_tensors(device: torch.device, make_model: Any, tokens: Any) -> None:
    """The loss of a ragged list is the mean over all next tokens, each in its own sequence."""
    model = make_model()
    rows = [tokens(length, seed=length) for length in (20, 9, 13, 2)]
    total, count = torch.zeros((), device=device), 0
    for row in rows:
        logits = model(row[None, :-1])
        total = total + F.cross_entropy(logits[0], row[1:], reduction="sum")
        count += len(row) - 1
    for given in (rows, tuple(rows)):
        loss = AutoregressiveWrapper(model)(given)
        torch.testing.assert_close(loss, total / count, atol=1e-6, rtol=0)


def test_a_mask_over_all_tokens(device: torch.device, make_model: Any, tokens: Any) -> None:
    """What is masked is neither seen nor predicted: the loss is that of the shorter sequences."""
    x = tokens(2, 20)
    lengths = torch.tensor([20, 11], device=device)
    mask = torch.arange(20, device=device)[None] < lengths[:, None]
    wrapper = AutoregressiveWrapper(make_model())
    loss = wrapper(x, mask=mask)
    assert torch.equal(loss, wrapper(torch.where(mask, x, 5), mask=mask))
    torch.testing.assert_close(loss, wrapper([x[0], x[1, :11]]), atol=1e-6, rtol=0)


def test_a_mask_over_the_inputs(device: torch.device, make_model: Any, tokens: Any) -> None:
    """A mask one short is that of the inputs; where it knows of a target, it leaves it out too."""
    x = tokens(2, 20)
    lengths = torch.tensor([19, 11], device=device)
    mask = torch.arange(19, device=device)[None] < lengths[:, None]
    wrapper = AutoregressiveWrapper(make_model())
    loss = wrapper(x, mask=mask)
    other = x.clone()
    other[1, 11:19] = 5
    assert torch.equal(loss, wrapper(other, mask=mask))
    assert not torch.equal(loss, wrapper(x))


def test_a_mask_changes_the_loss(device: torch.device, make_model: Any, tokens: Any) -> None:
    wrapper = AutoregressiveWrapper(make_model())
    x = tokens(2, 20)
    mask = torch.arange(20, device=device)[None].expand(2, 20) % 4 != 1
    assert not torch.equal(wrapper(x), wrapper(x, mask=mask))


@pytest.mark.parametrize("columns", [1, 18, 21])
def test_a_mask_of_another_length_is_refused(
    device: torch.device, make_model: Any, tokens: Any, columns: int
) -> None:
    wrapper = AutoregressiveWrapper(make_model())
    mask = torch.ones(2, columns, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=str(columns)):
        wrapper(tokens(2, 20), mask=mask)


def test_one_dimensional_prompts(make_model: Any, tokens: Any) -> None:
    wrapper = AutoregressiveWrapper(make_model())
    prompt = tokens(7)
    out = wrapper.generate(prompt, 9, temperature=0.0)
    assert out.shape == (9,)
    assert torch.equal(out, wrapper.generate(prompt[None], 9, temperature=0.0)[0])


def test_temperature_zero_is_greedy_and_passes_max_seq_len(make_model: Any, tokens: Any) -> None:
    model = make_model(max_seq_len=32)
    long = make_model(max_seq_len=128)
    prompt = tokens(2, 5)
    out = AutoregressiveWrapper(model).generate(prompt, 60, temperature=0.0)
    whole = torch.cat((prompt, out), dim=1)
    with torch.no_grad():
        best = long(whole)[:, 4:-1].argmax(dim=-1)
    assert torch.equal(out, best)


def test_the_filter_is_called_with_thres(make_model: Any, tokens: Any) -> None:
    calls = []

    def filter_logits(logits: Tensor, thres: float) -> Tensor:
        calls.append((tuple(logits.shape), thres))
        keep = torch.full_like(logits, float("-inf"))
        keep[:, 11] = logits[:, 11]
        return keep

    wrapper = AutoregressiveWrapper(make_model())
    out = wrapper.generate(tokens(3, 4), 5, filter_logits_fn=filter_logits, filter_thres=0.25)
    assert (out == 11).all()
    assert calls == [((3, 20), 0.25)] * 5


@pytest.mark.parametrize(("options", "kept"), [({}, 2), ({"filter_thres": 0.75}, 5)])
def test_the_default_filter(
    make_model: Any, tokens: Any, options: dict[str, float], kept: int
) -> None:
    """Of 20 tokens 0.9, the default, leaves the best two, 0.75 the best five."""
    model = make_model()
    prompt = tokens(4, 6)
    torch.manual_seed(0)
    out = AutoregressiveWrapper(model).generate(prompt, 30, **options)
    with torch.no_grad():
        logits = model(torch.cat((prompt, out), dim=1))[:, 5:-1]
    best = logits.topk(kept, dim=-1).indices
    assert (best == out[..., None]).any(dim=-1).all()
    for place in range(kept):
        assert (best[..., place] == out).any()


def test_temperature(make_model: Any, tokens: Any) -> None:
    """Very hot draws are nearly uniform over what the filter keeps, very cold ones greedy."""
    wrapper = AutoregressiveWrapper(make_model())
    prompt = tokens(1, 6).expand(400, 6)
    everything = {"filter_logits_fn": lambda logits, **_: logits}
    torch.manual_seed(0)
    cold = wrapper.generate(prompt, 1, temperature=1e-4, **everything)
    assert torch.equal(cold, wrapper.generate(prompt, 1, temperature=0.0, **everything))
    hot = wrapper.generate(prompt, 1, temperature=1e4, **everything)
    assert len(hot.unique()) >= 18


def test_generation_after_eos_is_padding(make_model: Any, tokens: Any) -> None:
    model = make_model()
    wrapper = AutoregressiveWrapper(model, pad_value=19)
    prompt = tokens(3, 6)
    greedy = wrapper.generate(prompt, 12, temperature=0.0)
    eos = int(greedy[0, 4])
    out = wrapper.generate(prompt, 12, eos_token=eos, temperature=0.0)
    assert out.shape == (3, 12)
    for row, free in zip(out.tolist(), greedy.tolist(), strict=True):
        end = free.index(eos) if eos in free else len(free)
        assert row == free[: end + 1] + [19] * (11 - end)


def test_an_end_token_in_the_prompt_ends_nothing(make_model: Any, tokens: Any) -> None:
    wrapper = AutoregressiveWrapper(make_model())
    prompt = tokens(2, 6)
    for end in range(1, 20):
        prompt[:, 0] = end
        free = wrapper.generate(prompt, 3, temperature=0.0)
        if end not in free:
            assert torch.equal(wrapper.generate(prompt, 3, temperature=0.0, eos_token=end), free)
            return
    raise AssertionError("every token follows itself")


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_the_mode_as_it_was(make_model: Any, tokens: Any, training: bool) -> None:
    model = make_model(attn_dropout=0.5, ff_dropout=0.5).train(training)
    wrapper = AutoregressiveWrapper(model)
    wrapper.train(training)
    submodule = list(model.modules())[-1]
    submodule.train(not training)
    flags = [module.training for module in wrapper.modules()]
    prompt = tokens(2, 6)
    out = wrapper.generate(prompt, 5, temperature=0.0)
    assert [module.training for module in wrapper.modules()] == flags
    assert not out.requires_grad
    model.eval()
    # Dropout is off while generating.
    assert torch.equal(out, wrapper.generate(prompt, 5, temperature=0.0))


def test_top_k_keeps_the_largest(device: torch.device) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(device)
    kept = top_k(logits, thres=0.75)
    assert (kept.isfinite().sum(dim=-1) == 10).all()
    assert torch.equal(kept.topk(10).values, logits.topk(10).values)
    # The reference keeps nothing of fewer than ten tokens, and fails.
    assert (top_k(logits[:, :5]).isfinite().sum(dim=-1) == 1).all()


def test_max_seq_len_and_state_dict(make_model: Any) -> None:
    model = make_model()
    wrapper = AutoregressiveWrapper(model)
    assert wrapper.net is model
    assert wrapper.max_seq_len == 64
    assert set(wrapper.state_dict()) == {f"net.{name}" for name in model.state_dict()}


def test_a_batch_without_targets_has_no_loss(make_model: Any, tokens: Any) -> None:
    model = make_model()
    x = tokens(2, 9)
    loss = AutoregressiveWrapper(model)(x, mask=torch.zeros_like(x, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_loss_takes_int32(make_model: Any, tokens: Any, legacy: bool) -> None:
    wrapper = AutoregressiveWrapper(make_model(legacy=legacy))
    x = tokens(2, 17)
    assert wrapper(x.int()) == wrapper(x)


def test_a_compiled_model_decodes_step_by_step(make_model: Any, tokens: Any) -> None:
    model = make_model(max_seq_len=16).eval()
    compiled = torch.compile(model, backend="eager")
    prompt = tokens(2, 12)
    # Full passes over the last 16 tokens would go on differently.
    assert torch.equal(
        AutoregressiveWrapper(compiled).generate(prompt, 30, temperature=0.0),
        AutoregressiveWrapper(model).generate(prompt, 30, temperature=0.0),
    )


def test_wrapper_messages(make_model: Any, tokens: Any) -> None:
    wrapper = AutoregressiveWrapper(make_model())
    with pytest.raises((TypeError, ValueError)):
        wrapper.generate(tokens(2, 3, 4), 3)
    with pytest.raises(ValueError, match="-1"):
        wrapper.generate(tokens(2, 3), -1)
    with pytest.raises(ValueError, match=r"-0\.5"):
        wrapper.generate(tokens(2, 3), 3, temperature=-0.5)
    with pytest.raises(ValueError, match="1"):
        wrapper(tokens(2, 1))
    with pytest.raises(ValueError, match="at least one"):
        wrapper([])
    with pytest.raises(TypeError):
        wrapper.generate(tokens(2, 3), 3, no_such_option=1)
    with pytest.raises(TypeError):
        wrapper(tokens(2, 3), no_such_option=1)
    with pytest.raises(TypeError, match="Linear has none"):
        AutoregressiveWrapper(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="num_tokens=None"):
        AutoregressiveWrapper(make_model(num_tokens=None))
    with pytest.raises(ValueError, match="list"):
        wrapper([[1, 2, 3], [4, 5]])
    bidirectional = make_model(causal=False)
    with pytest.raises(ValueError, match="causal"):
        AutoregressiveWrapper(bidirectional).generate(tokens(2, 3), 3)
