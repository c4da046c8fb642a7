"""Bad input is refused before any work, and the message carries the numbers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch

from feedback_transformer import FeedbackTransformer, Memory, fused, packing
from shared_core.testing import assert_refused

SETTINGS: dict[str, Any] = {
    "num_tokens": 11,
    "dim": 6,
    "depth": 2,
    "mem_len": 5,
    "seq_len": 3,
    "heads": 2,
    "dim_head": 4,
}


@pytest.fixture
def model(kit: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that must not begin to work."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    module = kit.make(seq_len=3)
    monkeypatch.setattr(module.token_emb, "forward", work)
    monkeypatch.setattr(module, "_weights", work)
    return module


# Constructor


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_that_are_too_small(name: str, value: int) -> None:
    if name == "mem_len" and value == 0:
        return
    least = 0 if name == "mem_len" else 1
    call = lambda: FeedbackTransformer(**(SETTINGS | {name: value}))  # noqa: E731
    assert_refused(ValueError, call, f"{name} must be at least {least}, got {value}")


@pytest.mark.parametrize("name", [*SETTINGS, "dim_context"])
@pytest.mark.parametrize("value", [2.0, "2", True])
def test_numbers_that_are_no_integers(name: str, value: Any) -> None:
    call = lambda: FeedbackTransformer(**(SETTINGS | {name: value}))  # noqa: E731
    assert_refused(TypeError, call, f"{name} must be an integer, got {value!r}")


def test_no_width_of_a_context() -> None:
    call = lambda: FeedbackTransformer(**SETTINGS, dim_context=0)  # noqa: E731
    assert_refused(ValueError, call, "dim_context must be at least 1, got 0")


@pytest.mark.parametrize("name", ["attn_dropout", "ff_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_dropouts(name: str, value: float) -> None:
    call = lambda: FeedbackTransformer(**SETTINGS, **{name: value})  # noqa: E731
    assert_refused(ValueError, call, f"{name} must be from 0 to 1, got {value}")


@pytest.mark.parametrize("name", ["attn_dropout", "ff_dropout"])
def test_dropouts_that_are_no_numbers(name: str) -> None:
    call = lambda: FeedbackTransformer(**SETTINGS, **{name: "a"})  # noqa: E731
    assert_refused(TypeError, call, f"{name} must be a number, got 'a'")


def test_unknown_keywords(kit: Any) -> None:
    assert_refused(TypeError, lambda: FeedbackTransformer(**SETTINGS, no_such=1), "no_such")
    assert_refused(TypeError, lambda: kit.make()(kit.tokens(1, 2), no_such=1), "no_such")
    assert_refused(
        TypeError, lambda: kit.make().generate(kit.tokens(1, 2), 1, no_such=1), "no_such"
    )


def test_arguments_have_names(kit: Any) -> None:
    assert_refused(TypeError, lambda: FeedbackTransformer(11, 6, 2, 5), "positional")
    x = kit.tokens(1, 2)
    assert_refused(
        TypeError, lambda: kit.make()(x, None, False, torch.ones(1, 2) > 0), "positional"
    )


def test_no_keyword_is_swallowed() -> None:
    for function in (FeedbackTransformer.__init__, FeedbackTransformer.forward):
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


# Input


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), ()])
def test_tokens_of_another_shape(kit: Any, model: Any, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.int64, device=kit.device)
    assert_refused(ValueError, lambda: model(x), f"tokens must be (b, n), got shape {shape}")


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (6,)])
def test_embeddings_of_another_shape(kit: Any, model: Any, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.float64, device=kit.device)
    assert_refused(ValueError, lambda: model(x), f"embeddings must be (b, n, 6), got shape {shape}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_another_type(kit: Any, model: Any, dtype: torch.dtype) -> None:
    x = kit.normal(2, 3, 6).to(dtype)
    assert_refused(TypeError, lambda: model(x), "embeddings must be torch.float64", f"got {dtype}")


def test_no_tokens(kit: Any, model: Any) -> None:
    assert_refused(
        ValueError, lambda: model(kit.tokens(2, 0)), "at least 1 token, got shape (2, 0)"
    )
    assert_refused(
        ValueError, lambda: model(kit.normal(2, 0, 6)), "at least 1 token, got shape (2, 0, 6)"
    )
    assert_refused(ValueError, lambda: model.generate(kit.tokens(2, 0), 3), "(2, 0)")


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.uint8, torch.int16])
def test_other_types(kit: Any, model: Any, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype, device=kit.device)
    assert_refused(
        TypeError, lambda: model(x), "torch.int32 or torch.int64, or floating-point", dtype
    )


@pytest.mark.parametrize("token", [-1, 11, 700])
def test_tokens_outside_the_vocabulary(kit: Any, model: Any, token: int) -> None:
    """Looked for on the CPU only: elsewhere the look would wait for the device."""
    if kit.device.type != "cpu":
        pytest.skip("not looked for here")
    x = kit.tokens(2, 3)
    x[1, 2] = token
    for call in (lambda: model(x), lambda: model.generate(x, 1)):
        assert_refused(ValueError, call, "tokens must be from 0 to 10, got", token)


def test_masks(kit: Any, model: Any) -> None:
    x = kit.tokens(2, 4)
    mask = torch.ones(2, 4, device=kit.device)
    assert_refused(
        TypeError, lambda: model(x, mask=mask), "mask must be boolean, got torch.float32"
    )
    for shape in ((2, 3), (1, 4), (4,), (2, 4, 1)):
        mask = torch.ones(shape, dtype=torch.bool, device=kit.device)
        assert_refused(
            ValueError, partial(model, x, mask=mask), f"mask must be (2, 4), got shape {shape}"
        )


def test_contexts(kit: Any, model: Any) -> None:
    x, context = kit.tokens(2, 4), kit.normal(2, 3, 5)
    assert_refused(ValueError, lambda: model(x, context=context), "context", "dim_context=None")
    mask = torch.ones(2, 3, dtype=torch.bool, device=kit.device)
    assert_refused(ValueError, lambda: model(x, context_mask=mask), "context", "dim_context=None")
    other = kit.make(dim_context=5)
    for call in (lambda **c: other(x, **c), lambda **c: other.generate(x, 2, **c)):
        assert_refused(ValueError, call, "dim_context=5 needs a context, got None")
        for shape in ((2, 3, 4), (1, 3, 5), (3, 5)):
            given = kit.normal(*shape)
            words = f"context must be (2, n, 5), got shape {shape}"
            assert_refused(ValueError, lambda: call(context=given), words)  # noqa: B023
        assert_refused(TypeError, lambda: call(context=context.long()), "context must be floating")  # noqa: B023
        bad = {"context": context, "context_mask": mask[:, :2]}
        assert_refused(
            ValueError, partial(call, **bad), "context_mask must be (2, 3), got shape (2, 2)"
        )
        bad = {"context": context, "context_mask": mask.float()}
        assert_refused(TypeError, partial(call, **bad), "context_mask must be boolean")


@pytest.mark.parametrize("name", ["detach_every", "checkpoint_every"])
def test_lengths_of_truncation(kit: Any, model: Any, name: str) -> None:
    x = kit.tokens(2, 4)
    for value in (0, -3):
        words = f"{name} must be at least 1, got {value}"
        assert_refused(ValueError, lambda: model(x, **{name: value}), words)  # noqa: B023
    assert_refused(
        TypeError, lambda: model(x, **{name: 3.0}), f"{name} must be an integer, got 3.0"
    )
    words = f"{name} must be a multiple of seq_len=3, got 4"
    assert_refused(ValueError, lambda: model(x, **{name: 4}), words)


@pytest.mark.parametrize("solver", ["", "newton", None])
def test_solvers(kit: Any, model: Any, solver: Any) -> None:
    words = f"solver must be one of sequential, jacobi, got {solver!r}"
    assert_refused(ValueError, lambda: model(kit.tokens(2, 4), solver=solver), words)


# Memories


def memory_of(kit: Any, b: int = 2, n: int = 8, **changes: Any) -> Memory:
    found: Memory = kit.make(**({"seq_len": 3} | changes))(kit.tokens(b, n), None, True)[1]
    return found


def test_memories_of_another_kind(kit: Any, model: Any) -> None:
    x = kit.tokens(2, 4)
    keys = kit.normal(2, 3, 8)
    assert_refused(TypeError, lambda: model(x, keys), "Memory or a pair of tensors, got Tensor")
    assert_refused(TypeError, lambda: model(x, {"keys": keys}), "pair of tensors, got dict")
    assert_refused(ValueError, lambda: model(x, (keys,)), "a pair of tensors, got 1")
    assert_refused(ValueError, lambda: model(x, (keys, keys, keys)), "a pair of tensors, got 3")
    assert_refused(
        TypeError, lambda: model(x, (keys, None)), "must hold tensors, got Tensor and NoneType"
    )
    assert_refused(
        TypeError, lambda: model(x, (keys.long(), keys)), "floating point, got torch.int64"
    )


def test_memories_of_another_shape(kit: Any, model: Any) -> None:
    x = kit.tokens(2, 4)
    keys = kit.normal(2, 3, 8)
    call = lambda: model(x, (keys, keys[:, :2]))  # noqa: E731
    assert_refused(ValueError, call, "of one shape", "(2, 3, 8) and (2, 2, 8)")
    assert_refused(ValueError, lambda: model(x, (keys[0], keys[0])), "(3, 8) and (3, 8)")


def test_memories_of_another_model_or_batch(kit: Any, model: Any) -> None:
    x = kit.tokens(2, 4)
    for other, shape in (
        (memory_of(kit, heads=3), "(2, 7, 12)"),
        (memory_of(kit, b=3), "(3, 7, 8)"),
        (memory_of(kit, shared_kv=False), "(2, 7, 16)"),
    ):
        words = "memory must be (2, m, 8) for this model and input, got shape"
        assert_refused(ValueError, lambda: model(x, other), words, shape)  # noqa: B023
    assert_refused(
        ValueError,
        lambda: model(x, memory_of(kit, depth=3)),
        "layer_keys of the memory must be (2, 2, p, 8)",
        "(2, 3, 2, 8)",
    )
    assert_refused(
        ValueError,
        lambda: model(x, memory_of(kit, seq_len=4, n=7)),
        "3 tokens in an open segment, the model has segments of 3",
    )


def test_open_segments_of_another_shape(kit: Any, model: Any) -> None:
    x, memory = kit.tokens(2, 4), memory_of(kit)
    inside = memory.layer_keys
    assert inside is not None
    for keys, values, words in (
        (inside, None, "(2, 2, 2, 8) and None"),
        (None, inside, "None and (2, 2, 2, 8)"),
        (inside, inside[:, :, :1], "(2, 2, 2, 8) and (2, 2, 1, 8)"),
        (inside[0], inside[0], "(2, 2, 8) and (2, 2, 8)"),
    ):
        bad = memory._replace(layer_keys=keys, layer_values=values)
        assert_refused(
            ValueError, partial(model, x, bad), "of one shape (b, layers, p, width)", words
        )
    short = memory._replace(keys=memory.keys[:, :1], values=memory.values[:, :1])
    assert_refused(
        ValueError, lambda: model(x, short), "a memory of 1 slots has 2 tokens in an open"
    )


def test_masks_of_a_memory(kit: Any, model: Any) -> None:
    x, memory = kit.tokens(2, 4), memory_of(kit)
    bad = memory._replace(mask=torch.ones(2, 6, dtype=torch.bool, device=kit.device))
    assert_refused(
        ValueError, lambda: model(x, bad), "mask of the memory must be (2, 7), got", "(2, 6)"
    )
    bad = memory._replace(mask=torch.ones(2, 7, device=kit.device))
    assert_refused(TypeError, lambda: model(x, bad), "mask of the memory must be boolean")


# Generation


def test_generation(kit: Any) -> None:
    model, x = kit.make(), kit.tokens(2, 3)
    for call in (model.generate, model.stream):
        assert_refused(ValueError, lambda: call(x, -1), "length must be at least 0, got -1")  # noqa: B023
        assert_refused(TypeError, lambda: call(x.double(), 1), "integer tokens, got torch.float64")  # noqa: B023
        assert_refused(ValueError, lambda: call(x, 1, temperature=-1.0), "temperature", -1.0)  # noqa: B023
        assert_refused(ValueError, lambda: call(x[0], 1), "(3,)")  # noqa: B023


def test_masks_and_memories_of_prompts(kit: Any, model: Any) -> None:
    x = kit.tokens(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool, device=kit.device)
    for call in (model.generate, model.stream):
        words = "mask must be (2, 4), got shape (2, 3)"
        assert_refused(ValueError, lambda: call(x, 1, mask=mask[:, 1:]), words)  # noqa: B023
        assert_refused(TypeError, lambda: call(x, 1, mask=mask.float()), "mask must be boolean")  # noqa: B023
        late = mask.clone()
        late[1, 3] = False
        words = "the last token of a prompt must take part, masked in row 1"
        assert_refused(ValueError, lambda: call(x, 1, mask=late), words)  # noqa: B023
        words = "memory must be (2, m, 8)"
        assert_refused(ValueError, lambda: call(x, 1, memory=memory_of(kit, b=3)), words)  # noqa: B023


def test_second_derivatives_through_dropout(kit: Any) -> None:
    model = kit.make(ff_dropout=0.5).train()
    x = kit.normal(1, 4, 6).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, retain_graph=True)
    assert grad.isfinite().all()
    assert_refused(
        RuntimeError,
        lambda: torch.autograd.grad(model(x).square().sum(), x, create_graph=True),
        "second derivatives need dropout to be 0",
    )


# Inside


def test_weights_are_packed_once(kit: Any) -> None:
    model = kit.make()
    weights = model._weights()
    packed = packing.Packed.__new__(packing.Packed)
    assert_refused(TypeError, lambda: fused.matrix(packed), "weights must not be packed yet")
    laid_out = weights._replace(key_value=packed)
    from feedback_transformer.feedback import _project

    sizes = model._sizes()
    assert_refused(
        TypeError,
        lambda: _project(kit.normal(1, 1, 6), laid_out, weights.layers[0], 0, sizes),
        "packed keys and values need a matrix for each group",
    )
