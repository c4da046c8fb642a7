"""Bad input is refused before any work, and the message carries the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from product_key_memory import (
    PKM,
    MaskedBatchNorm1D,
    MemoryPool,
    ProductKeyRouter,
    product_top_k,
)
from shared_core.testing import assert_refused

SETTINGS: dict[str, Any] = {"dim": 12, "heads": 2, "num_keys": 7, "topk": 4, "dim_head": 6}


# The lookup


@pytest.mark.parametrize("k", [0, -1, 6, 100])
def test_slots_of_a_lookup(device: torch.device, k: int) -> None:
    for sizes in ((5, 9), (9, 5)):
        first, second = (torch.zeros(2, size, device=device) for size in sizes)
        fragments = [f"k={k}", f"{sizes[0]} x {sizes[1]}"]
        assert_refused(ValueError, lambda f=first, s=second: product_top_k(f, s, k), *fragments)


def test_scores_of_two_halves(device: torch.device) -> None:
    first = torch.zeros(2, 3, 5, device=device)
    for shape in ((2, 5), (3, 2, 5), (2, 1, 5), (5,)):
        second = torch.zeros(shape, device=device)
        assert_refused(ValueError, lambda s=second: product_top_k(first, s, 2), (2, 3, 5), shape)
        assert_refused(ValueError, lambda s=second: product_top_k(s, first, 2), (2, 3, 5), shape)


# Constructors

BUILDERS = [
    pytest.param(lambda **changes: PKM(**(SETTINGS | changes)), id="PKM"),
    pytest.param(lambda **changes: ProductKeyRouter(**(SETTINGS | changes)), id="router"),
]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("name", ["dim", "heads", "topk", "dim_head", "num_keys"])
@pytest.mark.parametrize(
    ("error", "value"),
    [
        (ValueError, 0),
        (ValueError, -3),
        (TypeError, True),
    ],
)
def test_numbers(build: Any, name: str, error: type[Exception], value: Any) -> None:
    assert_refused(error, lambda: build(**{name: value}), name, value)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("name", ["dim", "heads", "topk", "dim_head"])
@pytest.mark.parametrize("value", [4.0, "4", None])
def test_integers(build: Any, name: str, value: Any) -> None:
    assert_refused(TypeError, lambda: build(**{name: value}), name, repr(value))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("error", "value", "fragments"),
    [
        (ValueError, (7,), ["num_keys", "pair", (7,)]),
        (ValueError, (7, 7, 7), ["num_keys", (7, 7, 7)]),
        (ValueError, (), ["num_keys", ()]),
        (ValueError, 7.5, ["num_keys", 7.5]),
        (ValueError, "77", ["num_keys", "'77'"]),
        (ValueError, None, ["num_keys", None]),
        (ValueError, (7, 0), ["num_keys", 0]),
        (ValueError, (-7, 7), ["num_keys", -7]),
        (TypeError, (7, 7.0), ["num_keys", 7.0]),
        (TypeError, (False, 7), ["num_keys", False]),
        (ValueError, 3, ["topk=4", 3]),
        (ValueError, (3, 9), ["topk=4", (3, 9)]),
        (ValueError, (9, 3), ["topk=4", (9, 3)]),
    ],
)
def test_sub_keys(build: Any, error: type[Exception], value: Any, fragments: list[object]) -> None:
    assert_refused(error, lambda: build(num_keys=value), *fragments)


@pytest.mark.parametrize(
    "name", ["input_dropout", "query_dropout", "value_dropout", "attn_dropout"]
)
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_probabilities(name: str, value: float) -> None:
    for build in (PKM, ProductKeyRouter) if name == "query_dropout" else (PKM,):
        assert_refused(ValueError, lambda b=build: b(**(SETTINGS | {name: value})), name, value)


POOL = MemoryPool(49, 12)


@pytest.mark.parametrize(
    ("error", "changes", "fragments"),
    [
        (ValueError, {"query_norm": "rms"}, ["query_norm", "rms", "layer", "batch", "none"]),
        (ValueError, {"query_norm": "layer", "use_layernorm": False}, ["layer", "use_layernorm"]),
        (ValueError, {"query_norm": "none", "use_layernorm": False}, ["none", "use_layernorm"]),
        (ValueError, {"gate": "silu"}, ["gate", "silu", "softmax", "relu", "sigmoid"]),
        (
            ValueError,
            {"gate": "softmax", "non_competitive_gates": True},
            ["softmax", "non_competitive_gates"],
        ),
        (
            ValueError,
            {"experts": True, "concat_values_and_combine": True},
            ["experts", "concat_values_and_combine"],
        ),
        (ValueError, {"values_grad": "sparse"}, ["values_grad", "sparse", "dense", "factored"]),
        (TypeError, {"values_dtype": torch.int64}, ["values_dtype", torch.int64]),
        (TypeError, {"values_dtype": 16}, ["values_dtype", 16]),
        (TypeError, {"pool": nn.Embedding(49, 12)}, ["MemoryPool", "Embedding"]),
        (ValueError, {"pool": MemoryPool(48, 12)}, [49, 12, 48]),
        (ValueError, {"pool": MemoryPool(49, 13)}, [49, 12, 13]),
        (ValueError, {"pool": POOL, "num_keys": (7, 8)}, [56, 49]),
        (ValueError, {"pool": POOL, "concat_values_and_combine": True}, [49, 6, 12]),
        (ValueError, {"pool": POOL, "experts": True}, ["experts=True", "experts=False"]),
        (
            ValueError,
            {"pool": MemoryPool(49, 12, experts=True)},
            ["experts=False", "experts=True"],
        ),
        (ValueError, {"pool": POOL, "values_grad": "factored"}, ["values_grad"]),
        (ValueError, {"pool": POOL, "values_dtype": torch.bfloat16}, ["values_dtype"]),
    ],
)
def test_options(error: type[Exception], changes: dict[str, Any], fragments: list[object]) -> None:
    assert_refused(error, lambda: PKM(**(SETTINGS | changes)), *fragments)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_keys": (7, 7)},
        {"query_norm": "none"},
        {"key_norm": True},
        {"gate": "sigmoid"},
        {"pool": POOL},
        {"values_grad": "factored"},
        {"values_dtype": torch.bfloat16},
        {"gated_output": True},
        {"experts": True},
    ],
)
def test_the_reference_has_no_such_option(changes: dict[str, Any]) -> None:
    assert_refused(ValueError, lambda: PKM(**(SETTINGS | changes), legacy=True), "legacy", *changes)
    PKM(**(SETTINGS | changes))


def test_a_refused_layer_has_drawn_nothing() -> None:
    """No random number is gone, so nothing was built."""
    for changes in ({"values_grad": "sparse"}, {"topk": 8}, {"values_dtype": 16}, {"gate": "?"}):
        before = torch.get_rng_state()
        with pytest.raises((ValueError, TypeError)):
            PKM(**(SETTINGS | changes))
        assert before.equal(torch.get_rng_state())


@pytest.mark.parametrize(
    ("error", "changes", "fragments"),
    [
        (ValueError, {"slots": 0}, ["slots", 0]),
        (TypeError, {"slots": 4.0}, ["slots", 4.0]),
        (ValueError, {"dim": -1}, ["dim", -1]),
        (TypeError, {"dim": "3"}, ["dim", "'3'"]),
        (ValueError, {"values_grad": "sparse"}, ["values_grad", "sparse", "dense", "factored"]),
        (TypeError, {"dtype": torch.int32}, ["dtype", torch.int32]),
        (TypeError, {"dtype": "brain"}, ["dtype", "'brain'"]),
    ],
)
def test_pools(error: type[Exception], changes: dict[str, Any], fragments: list[object]) -> None:
    assert_refused(error, lambda: MemoryPool(**({"slots": 20, "dim": 3} | changes)), *fragments)


@pytest.mark.parametrize("fn", [nn.LayerNorm(3), nn.BatchNorm2d(3)])
def test_what_a_mask_can_norm(fn: Any) -> None:
    assert_refused(TypeError, lambda: MaskedBatchNorm1D(fn), "BatchNorm1d", type(fn).__name__)


@pytest.mark.parametrize(
    "call",
    [
        lambda: PKM(**SETTINGS, num_memories=3),
        lambda: ProductKeyRouter(**SETTINGS, gate="relu"),
        lambda: MemoryPool(20, 3, sparse=True),
        lambda: MaskedBatchNorm1D(nn.BatchNorm1d(3), momentum=0.1),
        lambda: PKM(**SETTINGS)(torch.zeros(2, 12), mask=None),
        lambda: PKM(**SETTINGS)(torch.zeros(2, 12), gumbel_noise=0.0),
        lambda: ProductKeyRouter(**SETTINGS)(torch.zeros(2, 12), mem_trainable_mask=None),
        lambda: MaskedBatchNorm1D(nn.BatchNorm1d(3))(torch.zeros(2, 3), input_mask=None),
        lambda: product_top_k(torch.zeros(5), torch.zeros(5), 2, sorted=False),
        # New arguments have no place in the order of the old ones.
        lambda: PKM(12, 2, 7, 4, 6, 0.0, 0.0, 0.0, 0.0, *[False] * 6, "layer"),
        lambda: ProductKeyRouter(12, 7),
        lambda: MemoryPool(20, 3, True),
    ],
)
def test_no_argument_is_swallowed(call: Any) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument|positional argument"):
        call()


# Forward


@pytest.mark.parametrize("build", [*BUILDERS, pytest.param(None, id="batch")])
def test_inputs(device: torch.device, build: Any) -> None:
    """Wrong ones leave the statistics alone, too."""
    module = build() if build else PKM(**SETTINGS, use_layernorm=False)
    module.to(device)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    x = torch.zeros(2, 5, 12, device=device)
    for shape in ((2, 5, 11), (2, 5, 13), (12, 5), (1,), (0,), ()):
        given = torch.zeros(shape, device=device)
        assert_refused(ValueError, lambda g=given: module(g), "(..., 12)", shape)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        assert_refused(TypeError, lambda d=dtype: module(x.to(d)), "floating point", dtype)
    for shape in ((2, 4), (5,), (2, 1), (1, 5), (2, 5, 1), (2, 5, 12), ()):
        mask = torch.ones(shape, device=device, dtype=torch.bool)
        assert_refused(ValueError, lambda m=mask: module(x, m), "input_mask", (2, 5), shape)
    for dtype in (torch.int64, torch.float32, torch.uint8):
        mask = torch.ones(2, 5, device=device, dtype=dtype)
        assert_refused(TypeError, lambda m=mask: module(x, m), "input_mask", dtype)
    torch.testing.assert_close(module.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_layernorm": False}, {"legacy": True}])
def test_trainable_slots(device: torch.device, options: dict[str, Any]) -> None:
    pkm = PKM(**SETTINGS, **options).to(device)
    before = {name: x.clone() for name, x in pkm.state_dict().items()}
    x = torch.zeros(2, 5, 12, device=device)
    for shape in ((48,), (50,), (7, 7), (1, 49), (49, 1), ()):
        mask = torch.ones(shape, device=device, dtype=torch.bool)
        assert_refused(ValueError, lambda m=mask: pkm(x, None, m), "mem_trainable_mask", 49, shape)
    for dtype in (torch.int64, torch.float32, torch.uint8):
        mask = torch.ones(49, device=device, dtype=dtype)
        assert_refused(TypeError, lambda m=mask: pkm(x, None, m), "mem_trainable_mask", dtype)
    torch.testing.assert_close(pkm.state_dict(), before, atol=0, rtol=0)


def test_pool_inputs(device: torch.device) -> None:
    pool = MemoryPool(20, 3).to(device)
    indices = torch.zeros(4, 2, dtype=torch.int64, device=device)
    weights = torch.zeros(4, 2, device=device)
    for dtype in (torch.int32, torch.float32, torch.bool):
        assert_refused(TypeError, lambda d=dtype: pool(indices.to(d), weights), "int64", dtype)
    for i, w in (
        (indices, weights[:3]),
        (indices, weights[:, :1]),
        (indices[:2], weights),
        (indices[0], weights[0]),
        (indices[None], weights[None]),
        (indices, weights[None]),
    ):
        assert_refused(ValueError, lambda i=i, w=w: pool(i, w), tuple(i.shape), tuple(w.shape))
    for shape in ((19,), (20, 1), ()):
        mask = torch.ones(shape, device=device, dtype=torch.bool)
        assert_refused(ValueError, lambda m=mask: pool(indices, weights, m), 20, shape)
    mask = torch.ones(20, device=device)
    assert_refused(TypeError, lambda: pool(indices, weights, mask), "boolean", torch.float32)
    assert_refused(ValueError, lambda: pool.activations(indices, weights), "experts=True")
    assert_refused(ValueError, lambda: pool(indices, weights, x=torch.zeros(4, 3)), "experts=True")


def test_norm_inputs(device: torch.device) -> None:
    norm = MaskedBatchNorm1D(nn.BatchNorm1d(3)).to(device)
    before = {name: x.clone() for name, x in norm.state_dict().items()}
    x = torch.zeros(2, 5, 3, device=device)
    for shape in ((2, 3, 5), (2, 4), (4,), ()):
        given = torch.zeros(shape, device=device)
        assert_refused(ValueError, lambda g=given: norm(g), "(..., 3)", shape)
    for shape in ((2, 4), (5,), (2, 1), (2, 5, 3), (10,)):
        mask = torch.ones(shape, device=device, dtype=torch.bool)
        assert_refused(ValueError, lambda m=mask: norm(x, m), (2, 5), shape)
    for dtype in (torch.int64, torch.float32):
        mask = torch.ones(2, 5, device=device, dtype=dtype)
        assert_refused(TypeError, lambda m=mask: norm(x, m), "boolean", dtype)
    torch.testing.assert_close(norm.state_dict(), before, atol=0, rtol=0)


def test_legacy_normalises_over_time(device: torch.device) -> None:
    pkm = PKM(**SETTINGS, use_layernorm=False, legacy=True).to(device)
    assert pkm(torch.ones(2, 6, 12, device=device)).shape == (2, 6, 12)
    for shape in ((2, 5, 12), (6, 12), (2, 1, 6, 12)):
        x = torch.ones(shape, device=device)
        assert_refused(ValueError, lambda x=x: pkm(x), "legacy", "(b, 6, d)", shape[:-1])
