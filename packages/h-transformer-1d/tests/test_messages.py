"""Bad input is refused before any work, and the message carries the numbers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import nn

from h_transformer_1d import (
    AutoregressiveWrapper,
    CausalHAttention1D,
    HAttention1D,
    HTransformer1D,
    ReversibleSequence,
    SequentialSequence,
    h_attention,
)
from shared_core.testing import assert_refused


def attention_inputs(device: torch.device, **changes: Any) -> dict[str, Any]:
    q, k, v = torch.zeros(3, 2, 6, 21, 8, device=device)
    return {"q": q, "k": k, "v": v, "causal": False, "block_size": 4, **changes}


@pytest.mark.parametrize(
    ("name", "shape", "fragments"),
    [
        ("q", (2, 21, 8), ["q", (2, 21, 8)]),
        ("k", (6, 21, 8), ["k", (6, 21, 8)]),
        ("v", (1, 2, 6, 21, 8), ["v", (1, 2, 6, 21, 8)]),
        ("v", (2, 6, 22, 8), [(2, 6, 21, 8), (2, 6, 22, 8)]),
        ("mask", (2, 20), [(2, 21), (2, 20)]),
        ("mask", (21,), [(2, 21), (21,)]),
        ("mask", (3, 21), [(2, 21), (3, 21)]),
        ("mask", (1, 21), [(2, 21), (1, 21)]),
        ("level_bias", (3,), [6, (3,)]),
        ("level_bias", (3, 5), [6, (3, 5)]),
        ("level_bias", (0, 6), [6, (0, 6)]),
        ("level_bias", (1, 3, 6), [6, (1, 3, 6)]),
    ],
)
def test_shapes(
    device: torch.device, name: str, shape: tuple[int, ...], fragments: list[object]
) -> None:
    dtype = torch.bool if name == "mask" else torch.float32
    x = torch.zeros(shape, dtype=dtype, device=device)
    assert_refused(
        ValueError, lambda: h_attention(**attention_inputs(device, **{name: x})), *fragments
    )


@pytest.mark.parametrize(
    ("shape", "fragments"),
    [
        ((3, 6, 21, 8), [(3, 6, 21, 8), (2, 6, 21, 8)]),
        ((2, 6, 22, 8), [(2, 6, 22, 8), (2, 6, 21, 8)]),
        ((2, 6, 21, 9), [(2, 6, 21, 9), (2, 6, 21, 8)]),
        ((2, 4, 21, 8), [6, 4]),
        ((2, 0, 21, 8), [6, 0]),
        ((2, 12, 21, 8), [6, 12]),
    ],
)
def test_shapes_of_both_keys_and_values(
    device: torch.device, shape: tuple[int, ...], fragments: list[object]
) -> None:
    x = torch.zeros(shape, device=device)
    assert_refused(
        ValueError, lambda: h_attention(**attention_inputs(device, k=x, v=x)), *fragments
    )


def test_no_token(device: torch.device) -> None:
    q, k, v = torch.zeros(3, 2, 6, 0, 8, device=device)
    assert_refused(
        ValueError, lambda: h_attention(q, k, v, causal=True, block_size=4), "(2, 6, 0, 8)"
    )


@pytest.mark.parametrize(
    ("name", "dtype", "fragments"),
    [
        ("q", torch.int64, ["q", torch.int64]),
        ("k", torch.float64, ["k", torch.float32, torch.float64]),
        ("v", torch.bfloat16, ["v", torch.float32, torch.bfloat16]),
    ],
)
def test_types(
    device: torch.device, name: str, dtype: torch.dtype, fragments: list[object]
) -> None:
    changed = attention_inputs(device)
    changed[name] = changed[name].to(dtype)
    assert_refused(TypeError, lambda: h_attention(**changed), *fragments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_is_boolean(device: torch.device, dtype: torch.dtype) -> None:
    mask = torch.ones(2, 21, dtype=dtype, device=device)
    assert_refused(
        TypeError, lambda: h_attention(**attention_inputs(device, mask=mask)), "mask", dtype
    )


@pytest.mark.parametrize(
    ("error", "changes", "fragments"),
    [
        (ValueError, {"block_size": 0}, ["block_size", 0]),
        (ValueError, {"block_size": -4}, ["block_size", -4]),
        (TypeError, {"block_size": 4.0}, ["block_size", 4.0]),
        (TypeError, {"block_size": "4"}, ["block_size", "4"]),
        (ValueError, {"block_size": 5, "scheme": "neighbor"}, ["neighbor", "even", 5]),
        (ValueError, {"block_size": 1, "scheme": "neighbor"}, ["neighbor", "even", 1]),
        (ValueError, {"scheme": "siblings"}, ["siblings", "sibling", "neighbor"]),
        (ValueError, {"query_resolution": "rough"}, ["rough", "fine", "coarse"]),
        (ValueError, {"causal": True, "query_resolution": "coarse"}, ["coarse", "causal"]),
        (ValueError, {"dropout": -0.1}, ["dropout", -0.1]),
        (ValueError, {"dropout": 1.5}, ["dropout", 1.5]),
        (ValueError, {"dropout": float("nan")}, ["dropout", "nan"]),
        (ValueError, {"impl": "quick"}, ["quick", "auto", "plain", "fused", "flex"]),
        (ValueError, {"impl": "flex", "query_resolution": "coarse"}, ["flex", "coarse"]),
        (ValueError, {"impl": "flex", "dropout": 0.1}, ["flex", 0.1]),
        (ValueError, {"impl": "fused", "dropout": 0.1}, ["fused", 0.1]),
    ],
)
def test_options(
    device: torch.device, error: type[Exception], changes: dict[str, Any], fragments: list[object]
) -> None:
    assert_refused(error, lambda: h_attention(**attention_inputs(device, **changes)), *fragments)


def model_arguments(**changes: Any) -> dict[str, Any]:
    settings = {
        "num_tokens": 20,
        "dim": 16,
        "depth": 2,
        "max_seq_len": 64,
        "causal": True,
        "heads": 4,
        "dim_head": 8,
        "block_size": 4,
    }
    return settings | changes


def refuses(error: type[Exception], name: str, value: object) -> None:
    assert_refused(error, lambda: HTransformer1D(**model_arguments(**{name: value})), name, value)


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "name",
    [
        "num_tokens",
        "dim",
        "depth",
        "max_seq_len",
        "heads",
        "dim_head",
        "ff_mult",
        "block_size",
        "kv_heads",
    ],
)
def test_sizes_are_positive(name: str, value: int) -> None:
    refuses(ValueError, name, value)


@pytest.mark.parametrize("value", [8.0, "8", None])
@pytest.mark.parametrize("name", ["dim", "depth", "max_seq_len", "heads", "dim_head", "block_size"])
def test_sizes_are_whole_numbers(name: str, value: object) -> None:
    refuses(TypeError, name, value)


@pytest.mark.parametrize("name", ["attn_dropout", "ff_dropout"])
@pytest.mark.parametrize("value", [-0.25, 1.25])
def test_dropout_is_a_probability(name: str, value: float) -> None:
    refuses(ValueError, name, value)


@pytest.mark.parametrize(
    ("error", "changes", "fragments"),
    [
        (ValueError, {"kv_heads": 3}, [4, 3]),
        (ValueError, {"kv_heads": 8}, [4, 8]),
        (ValueError, {"scheme": "neighbor", "block_size": 7}, ["neighbor", "even", 7]),
        (ValueError, {"scheme": "nearest"}, ["nearest", "sibling", "neighbor"]),
        (ValueError, {"query_resolution": "coarse"}, ["coarse", "causal"]),
        (ValueError, {"query_resolution": "exact", "causal": False}, ["exact", "fine", "coarse"]),
        (ValueError, {"dim_head": 7}, ["dim_head", 7]),
        (TypeError, {"pos_emb": 3}, ["pos_emb", "int"]),
        (TypeError, {"pos_emb": nn.Identity()}, ["pos_emb", "Identity"]),
        (TypeError, {"no_such_option": 1}, ["no_such_option"]),
    ],
)
def test_model_options(
    error: type[Exception], changes: dict[str, Any], fragments: list[object]
) -> None:
    assert_refused(error, lambda: HTransformer1D(**model_arguments(**changes)), *fragments)


def test_a_rotary_embedding_wider_than_a_head() -> None:
    pos_emb = RotaryEmbedding(dim=12)
    assert_refused(ValueError, lambda: HTransformer1D(**model_arguments(pos_emb=pos_emb)), 12, 8)
    assert_refused(
        ValueError, lambda: HAttention1D(16, heads=2, dim_head=8, pos_emb=pos_emb), 12, 8
    )


def test_arguments_are_keywords() -> None:
    with pytest.raises(TypeError):
        HTransformer1D(20, 16, 2, 64)
    with pytest.raises(TypeError):
        HAttention1D(16, 8)
    with pytest.raises(TypeError):
        CausalHAttention1D(16, 64)
    for cls in (HTransformer1D, HAttention1D, CausalHAttention1D):
        kinds = [p.kind for p in inspect.signature(cls).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds
        assert inspect.Parameter.VAR_POSITIONAL not in kinds


def test_defaults_are_those_of_the_reference() -> None:
    """A user of the reference finds the same names, in the same order, with the same defaults."""
    empty = inspect.Parameter.empty
    expected = {
        HTransformer1D: {
            "num_tokens": empty,
            "dim": empty,
            "depth": empty,
            "max_seq_len": empty,
            "causal": False,
            "heads": 8,
            "dim_head": 64,
            "ff_mult": 4,
            "block_size": 128,
            "pos_emb": None,
            "reversible": False,
            "shift_tokens": False,
        },
        HAttention1D: {
            "dim": empty,
            "heads": 8,
            "dim_head": 64,
            "block_size": 16,
            "pos_emb": None,
            "eps": 1e-8,
        },
        CausalHAttention1D: {
            "dim": empty,
            "max_seq_len": empty,
            "heads": 8,
            "dim_head": 64,
            "block_size": 16,
            "eps": 1e-8,
            "pos_emb": None,
        },
        AutoregressiveWrapper: {"net": empty, "ignore_index": -100, "pad_value": 0},
        ReversibleSequence: {"blocks": empty, "layer_dropout": 0.0},
    }
    for cls, defaults in expected.items():
        parameters = inspect.signature(cls).parameters
        assert [name for name in parameters if name in defaults] == list(defaults)
        for name, default in defaults.items():
            assert parameters[name].default == default, (cls, name)
    assert list(inspect.signature(SequentialSequence).parameters)[1:] == [
        "args_route",
        "layer_dropout",
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_model_inputs(device: torch.device, causal: bool) -> None:
    model = HTransformer1D(**model_arguments(causal=causal)).to(device)

    def ids(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.long, device=device)

    assert_refused(ValueError, lambda: model(ids(2, 65)), 65, 64)
    assert_refused(ValueError, lambda: model(ids(21)), (21,))
    assert_refused(ValueError, lambda: model(ids(2, 3, 4)), (2, 3, 4))
    assert_refused(ValueError, lambda: model(ids(2, 0)), (2, 0))
    assert_refused(TypeError, lambda: model(ids(2, 21).float()), torch.float32)
    mask = torch.ones(2, 21, dtype=torch.bool, device=device)
    assert_refused(ValueError, lambda: model(ids(2, 20), mask=mask), (2, 20), (2, 21))
    assert_refused(ValueError, lambda: model(ids(1, 21), mask=mask), (1, 21), (2, 21))
    assert_refused(TypeError, lambda: model(ids(2, 21), mask=mask.long()), "mask", torch.int64)
    with pytest.raises(TypeError):
        model(ids(2, 21), no_such_option=1)


@pytest.mark.parametrize("causal", [True, False])
def test_embedding_inputs(device: torch.device, causal: bool) -> None:
    model = HTransformer1D(**model_arguments(num_tokens=None, causal=causal)).to(device)
    x = torch.zeros(2, 21, 16, device=device)
    assert_refused(ValueError, lambda: model(x[..., :15]), 16, 15)
    assert_refused(ValueError, lambda: model(x[0]), (21, 16))
    assert_refused(ValueError, lambda: model(torch.zeros(2, 65, 16, device=device)), 65, 64)
    assert_refused(TypeError, lambda: model(x.long()), torch.int64)
    if causal:
        prompt = torch.ones(2, 3, dtype=torch.long, device=device)
        assert_refused(ValueError, lambda: model.generate(prompt, 3), "num_tokens")
        assert_refused(ValueError, lambda: model.stream(prompt, 3), "num_tokens")


def test_attention_inputs(device: torch.device) -> None:
    causal = CausalHAttention1D(16, max_seq_len=30, heads=2, dim_head=8, block_size=4).to(device)
    bidirectional = HAttention1D(16, heads=2, dim_head=8, block_size=4).to(device)
    for attention in (causal, bidirectional):
        x = torch.zeros(2, 21, 16, device=device)
        assert_refused(ValueError, lambda: attention(x[0]), (21, 16))  # noqa: B023
        assert_refused(ValueError, lambda: attention(x[..., :15]), 16, 15)  # noqa: B023
        mask = torch.ones(2, 20, dtype=torch.bool, device=device)
        assert_refused(ValueError, lambda: attention(x, mask=mask), (2, 20), (2, 21))  # noqa: B023
        assert_refused(TypeError, lambda: attention(x, mask=x[..., 0]), "mask", torch.float32)  # noqa: B023
        assert_refused(ValueError, lambda: attention(x[:, :0]), 0)  # noqa: B023
        angles = torch.zeros(20, 8, device=device)
        assert_refused(ValueError, lambda: attention(x, angles=angles), (20, 8), 21)  # noqa: B023
        wide = torch.zeros(21, 10, device=device)
        assert_refused(ValueError, lambda: attention(x, angles=wide), (21, 10), 8)  # noqa: B023
    assert_refused(ValueError, lambda: causal(torch.zeros(2, 31, 16, device=device)), 31, 30)
    with pytest.raises(TypeError):
        CausalHAttention1D(16, max_seq_len=30, query_resolution="coarse")


def test_only_causal_models_step(device: torch.device) -> None:
    model = HTransformer1D(**model_arguments(causal=False)).to(device)
    causal = HTransformer1D(**model_arguments()).to(device)
    x = torch.ones(2, 5, dtype=torch.long, device=device)
    assert_refused(ValueError, lambda: model.init_state(2), "causal")
    assert_refused(ValueError, lambda: model.step(x, causal.init_state(2)), "causal")
    assert_refused(ValueError, lambda: model(x, return_state=True), "causal")
    assert_refused(ValueError, lambda: model.generate(x, 3), "causal")
    assert_refused(ValueError, lambda: model.stream(x, 3), "causal")


def test_steps(device: torch.device) -> None:
    model = HTransformer1D(**model_arguments()).to(device)

    def ids(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.long, device=device)

    assert_refused(ValueError, lambda: model.init_state(-1), -1)
    state = model.init_state(2)
    assert_refused(ValueError, lambda: model.step(ids(3, 1), state), 3, 2)
    assert_refused(ValueError, lambda: model.step(ids(2), state), (2,))
    assert_refused(ValueError, lambda: model.step(ids(2, 0), state), (2, 0))
    assert_refused(TypeError, lambda: model.step(ids(2, 1).float(), state), torch.float32)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"depth": 3}, ["3 layers", "has 1"]),
        ({"scheme": "neighbor"}, ["neighbor", "sibling"]),
        ({"block_size": 4}, ["blocks of 4", "blocks of 8"]),
        ({"kv_heads": 1}, ["(2, 2, 8, 8)", "(2, 1, 8, 8)"]),
        ({"dim_head": 16}, ["(2, 2, 8, 16)"]),
        ({"shift_tokens": True}, ["2 shifted", "model 0"]),
    ],
)
def test_a_state_of_another_model(
    device: torch.device, changes: dict[str, Any], fragments: list[object]
) -> None:
    settings = {"depth": 1, "heads": 2, "dim_head": 8, "block_size": 8, "causal": True}
    model = HTransformer1D(**model_arguments(**settings)).to(device)
    other = HTransformer1D(**model_arguments(**{**settings, **changes})).to(device)
    x = torch.ones(2, 9, dtype=torch.long, device=device)
    _, state = other(x, return_state=True)
    assert_refused(ValueError, lambda: model.step(x[:, :1], state), *fragments)


def test_rotary_with_xpos() -> None:
    xpos = RotaryEmbedding(8, use_xpos=True)
    assert_refused(
        ValueError, lambda: HTransformer1D(**model_arguments(pos_emb=xpos)), "use_xpos=True"
    )


def test_legacy_length() -> None:
    arguments = model_arguments(legacy=True, max_seq_len=24, block_size=8)
    assert_refused(
        ValueError, lambda: HTransformer1D(**arguments), "max_seq_len=24", "block_size=8"
    )


def test_the_type_of_a_level_bias(device: torch.device) -> None:
    q = torch.randn(1, 2, 9, 4, device=device)
    bias = torch.zeros(3, 2, dtype=torch.int64, device=device)
    call = partial(h_attention, q, q, q, causal=True, block_size=4, level_bias=bias)
    assert_refused(TypeError, call, torch.int64)


def test_generation(device: torch.device) -> None:
    model = HTransformer1D(**model_arguments()).to(device)
    prompt = torch.ones(2, 3, dtype=torch.long, device=device)
    for call in (model.generate, model.stream):
        # stream refuses when it is called, not when its first token is asked for.
        assert_refused(ValueError, lambda: call(prompt, -1), -1)  # noqa: B023
        assert_refused(ValueError, lambda: call(prompt, 3, temperature=-0.5), -0.5)  # noqa: B023
        assert_refused(ValueError, lambda: call(prompt, 3, top_k=0), "top_k", 0)  # noqa: B023
        assert_refused(ValueError, lambda: call(prompt, 3, top_p=1.5), "top_p", 1.5)  # noqa: B023
        assert_refused(ValueError, lambda: call(prompt, 3, top_p=-0.5), "top_p", -0.5)  # noqa: B023
        assert_refused(ValueError, lambda: call(prompt, 3, min_p=1.5), "min_p", 1.5)  # noqa: B023
        assert_refused(ValueError, lambda: call(prompt[0], 3), (3,))  # noqa: B023
        assert_refused(ValueError, lambda: call(prompt[:, :0], 3), (2, 0))  # noqa: B023
        assert_refused(TypeError, lambda: call(prompt.float(), 3), torch.float32)  # noqa: B023
        with pytest.raises(TypeError):
            call(prompt, 3, no_such_option=1)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"scheme": "neighbor"}, ["legacy", "scheme"]),
        ({"query_resolution": "coarse", "causal": False}, ["legacy", "query_resolution"]),
        ({"level_bias": True}, ["legacy", "level_bias"]),
        ({"kv_heads": 2}, ["legacy", "kv_heads"]),
        ({"num_tokens": None}, ["legacy", "num_tokens"]),
        ({"attn_dropout": 0.1}, ["legacy", "dropout"]),
        ({"ff_dropout": 0.1}, ["legacy", "dropout"]),
    ],
)
def test_legacy_knows_no_new_option(changes: dict[str, Any], fragments: list[object]) -> None:
    assert_refused(
        ValueError, lambda: HTransformer1D(**model_arguments(legacy=True, **changes)), *fragments
    )


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"scheme": "neighbor"}, ["legacy", "scheme"]),
        ({"query_resolution": "coarse"}, ["legacy", "query_resolution"]),
        ({"level_bias": True}, ["legacy", "level_bias"]),
        ({"kv_heads": 2}, ["legacy", "kv_heads"]),
        ({"dropout": 0.1}, ["legacy", "dropout"]),
    ],
)
def test_legacy_attention_knows_no_new_option(
    changes: dict[str, Any], fragments: list[object]
) -> None:
    assert_refused(
        ValueError, lambda: HAttention1D(16, heads=4, legacy=True, **changes), *fragments
    )
    if "query_resolution" not in changes:
        assert_refused(
            ValueError,
            lambda: CausalHAttention1D(16, max_seq_len=64, heads=4, legacy=True, **changes),
            *fragments,
        )


@pytest.mark.parametrize("value", [-0.5, 1.1, 1.5])
def test_layer_dropout_is_a_probability(value: float) -> None:
    blocks = nn.ModuleList([nn.ModuleList([nn.Identity(), nn.Identity()])])
    for sequence in (ReversibleSequence, SequentialSequence):
        assert_refused(ValueError, lambda: sequence(blocks, layer_dropout=value), value)  # noqa: B023
        odd = nn.ModuleList([nn.ModuleList([nn.Identity()] * 3)])
        assert_refused(ValueError, lambda: sequence(odd), 3)  # noqa: B023
        with pytest.raises(TypeError, match="no_such_argument"):
            sequence(blocks)(torch.zeros(1, 2, 4), no_such_argument=1)


@pytest.mark.parametrize("value", [2, 5])
def test_dim_head_fits_the_rotary_embedding(value: int) -> None:
    assert_refused(
        ValueError, lambda: HTransformer1D(**model_arguments(dim_head=value)), "dim_head", value
    )
