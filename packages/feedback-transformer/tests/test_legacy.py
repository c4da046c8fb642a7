"""Checkpoints of the reference, and the switch to its numbers.

The numbers are made by other means than the model's: a loop over rows, segments, layers and heads.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from feedback_transformer import FeedbackTransformer, Memory, oracle
from shared_core.testing import assert_same_gradients

Slots = list[tuple[Tensor, Tensor]]


def row_as_the_reference(
    model: FeedbackTransformer, p: dict[str, Tensor], embeddings: Tensor, slots: Slots
) -> tuple[Tensor, Slots]:
    """Normalised states (n, d) of a row, and the keys and values of its slots."""
    shares = p["layer_weight"].softmax(0)
    outputs = []
    for piece in embeddings.split(model.seq_len):
        n = len(piece)
        states = [list(piece)]
        for layer in range(model.depth):
            name = f"layers.{layer}."
            normed = [oracle.norm(x, p, name + "attn_norm") for x in states[-1]]
            both = [p["to_kv.weight"] @ x for x in normed] if n > 1 else []
            seen = slots + [tuple(x.chunk(2)) for x in both]
            after = []
            for i, x in enumerate(states[-1]):
                # A query counts its place from 0, though the slots come first.
                stop = len(slots) + i + 1 if n > 1 else len(slots)
                y = x
                if not (model.seq_len == 1 and not slots):
                    query = p[name + "to_q.weight"] @ normed[i]
                    keys_values = [torch.cat(one) for one in seen[:stop]]
                    places = [max(0, i - j) for j in range(stop)]
                    found = oracle.attend(query, keys_values, model.heads, p, places)
                    y = x + p[name + "to_out.weight"] @ found + p[name + "to_out.bias"]
                inner = p[name + "ff.inner.weight"] @ oracle.norm(y, p, name + "ff_norm")
                value, gate = (inner + p[name + "ff.inner.bias"]).chunk(2)
                hidden = value * gate * 0.5 * (1.0 + torch.erf(gate / math.sqrt(2.0)))
                y = y + p[name + "ff.outer.weight"] @ hidden + p[name + "ff.outer.bias"]
                after.append(y)
            states.append(after)
        outputs += states[-1]
        for token in zip(*states, strict=True):
            mixed = sum((w * x for w, x in zip(shares, token, strict=True)), 0.0 * token[0])
            mixed = token[-1] if model.keep_last_hidden else mixed
            slots = [*slots, tuple((p["to_kv.weight"] @ mixed).chunk(2))]
        slots = slots[-model.mem_len :]
    return torch.stack([oracle.norm(x, p, "norm") for x in outputs]), slots


@settings(max_examples=25)
@given(
    n=st.integers(2, 8),
    m=st.integers(0, 5),
    seq_len=st.integers(1, 4),
    mem_len=st.integers(0, 6),
    last=st.booleans(),
)
def test_numbers_and_gradients(
    kit: Any, n: int, m: int, seq_len: int, mem_len: int, last: bool
) -> None:
    # The reference fails where a lone token has no memory.
    n = n + 1 if n < seq_len or m or n % seq_len != 1 else n
    model = kit.make(legacy=True, seq_len=seq_len, mem_len=mem_len, keep_last_hidden=last)
    parameters = dict(model.named_parameters())
    pair = (kit.normal(2, m, 8, seed=3), kit.normal(2, m, 8, seed=4)) if m else ()

    def ours(x: Tensor, pair: Any, *values: Tensor) -> Any:
        weights = dict(zip(parameters, values, strict=True))
        options = {"return_memory": True, "return_embeddings": True}
        out, memory = functional_call(model, weights, (x, pair or None), options)
        return out, memory.keys, memory.values

    def theirs(x: Tensor, pair: Any, *values: Tensor) -> Any:
        weights = dict(zip(parameters, values, strict=True))
        rows, keys, slots_of_values = [], [], []
        for row in range(2):
            slots = list(zip(pair[0][row], pair[1][row], strict=True)) if pair else []
            out, slots = row_as_the_reference(model, weights, x[row], slots)
            rows.append(out)
            keys.append(torch.stack([key for key, _ in slots]))
            slots_of_values.append(torch.stack([value for _, value in slots]))
        return torch.stack(rows), torch.stack(keys), torch.stack(slots_of_values)

    assert_same_gradients(ours, theirs, (kit.normal(2, n, 6), pair, *parameters.values()))


def test_dropout_acts(kit: Any) -> None:
    model = kit.make(legacy=True, attn_dropout=0.5, ff_dropout=0.5)
    x = kit.tokens(2, 6)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


# Checkpoints


def reference_state(model: FeedbackTransformer) -> dict[str, Tensor]:
    """The model's parameters under the reference's names."""
    wrap = "0.fn.fn." if model.seq_len == 1 else "0.fn."
    found = {}
    for name, value in model.state_dict().items():
        theirs = name
        for pattern, replacement in (
            (r"^to_kv\.", "shared_kv_proj."),
            (r"^to_logits\.", "to_logits.1."),
            (r"^norm\.", "to_logits.0."),
            (r"\.attn_norm\.", f".{wrap}norm."),
            (r"\.(to_q|to_out)\.", rf".{wrap}fn.\1."),
            (r"\.ff_norm\.", ".1.fn.norm."),
            (r"\.ff\.inner\.", ".1.fn.fn.net.0."),
            (r"\.ff\.outer\.", ".1.fn.fn.net.3."),
        ):
            theirs = re.sub(pattern, replacement, theirs)
        found[theirs] = value.clone()
    for layer in range(model.depth):
        found[f"layers.{layer}.{wrap}fn.to_kv.weight"] = found["shared_kv_proj.weight"]
    return found


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2])
def test_checkpoints_of_the_reference_load(kit: Any, seq_len: int, legacy: bool) -> None:
    model = kit.make(seq_len=seq_len)
    other = FeedbackTransformer(
        num_tokens=11,
        dim=6,
        depth=2,
        mem_len=5,
        heads=2,
        dim_head=4,
        seq_len=seq_len,
        legacy=legacy,
    ).to(model.to_kv.weight)
    result = other.load_state_dict(reference_state(model))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for ours, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    nested = torch.nn.ModuleDict({"a": other})
    nested.load_state_dict({f"a.{k}": v for k, v in reference_state(model).items()})


def test_half_a_checkpoint_is_refused(kit: Any) -> None:
    model = kit.make()
    state = reference_state(model)
    del state["layers.1.1.fn.norm.bias"]
    with pytest.raises(ValueError, match=r"1 missing \['layers.1.ff_norm.bias'\]"):
        model.load_state_dict(state)


def test_our_own_names_pass_untouched(kit: Any) -> None:
    model = kit.make()
    assert kit.make(keep_last_hidden=True).load_state_dict(model.state_dict())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len({value.data_ptr() for value in model.state_dict().values()}) == len(shapes)


# What it does not have


@pytest.mark.parametrize(
    ("option", "value"), [("shared_kv", False), ("norm_memory", True), ("dim_context", 3)]
)
def test_new_options_are_refused(kit: Any, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"legacy=True has no {option}"):
        kit.make(legacy=True, **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mask", torch.ones(2, 4, dtype=torch.bool)),
        ("detach_every", 2),
        ("checkpoint_every", 2),
        ("solver", "jacobi"),
    ],
)
def test_new_arguments_are_refused(kit: Any, option: str, value: Any) -> None:
    value = value.to(kit.device) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=f"legacy=True has no {option}: the reference knows none"):
        kit.make(legacy=True)(kit.tokens(2, 4), **{option: value})


def test_new_memories_are_refused(kit: Any) -> None:
    x = kit.tokens(2, 5)
    model = kit.make(legacy=True)
    _, memory = kit.make()(x, None, True)
    with pytest.raises(ValueError, match="legacy=True has no open_segment"):
        model(x, memory)
    masked = Memory(memory.keys, memory.values, mask=torch.ones_like(memory.keys[..., 0]) > 0)
    with pytest.raises(ValueError, match="legacy=True has no mask"):
        model(x, masked)


def test_a_lone_token_without_a_memory(kit: Any) -> None:
    with pytest.raises(ValueError, match="a lone token without a memory"):
        kit.make(legacy=True)(kit.tokens(2, 1))
    assert kit.make(legacy=True, seq_len=1)(kit.tokens(2, 1)).shape == (2, 1, 11)


def test_it_does_not_generate(kit: Any) -> None:
    with pytest.raises(ValueError, match="legacy=True cannot generate"):
        kit.make(legacy=True).generate(kit.tokens(2, 2), 3)
