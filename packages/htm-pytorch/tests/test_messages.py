"""Bad input is refused before any work, and the message carries the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from htm_pytorch import HTMAttention, HTMBlock, SinusoidalPosition
from shared_core.testing import assert_refused

SETTINGS: dict[str, Any] = {
    "dim": 6,
    "heads": 2,
    "topk_mems": 2,
    "mem_chunk_size": 3,
    "dim_head": 4,
}
CLASSES = pytest.mark.parametrize("cls", [HTMAttention, HTMBlock])
LEGACY = pytest.mark.parametrize("legacy", [False, True])


# Constructors


@CLASSES
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_below_one(cls: Any, name: str, value: int) -> None:
    assert_refused(
        ValueError, lambda: cls(**(SETTINGS | {name: value})), f"{name} must be at least 1", value
    )


@CLASSES
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [2.0, "2", None, True])
def test_numbers_that_are_no_integers(cls: Any, name: str, value: Any) -> None:
    call = lambda: cls(**(SETTINGS | {name: value}))  # noqa: E731
    assert_refused(TypeError, call, f"{name} must be an integer, got {value!r}")


@CLASSES
@pytest.mark.parametrize("impl", ["", "fast", "Auto", None])
def test_implementations(cls: Any, impl: Any) -> None:
    call = lambda: cls(**SETTINGS, impl=impl)  # noqa: E731
    assert_refused(ValueError, call, f"impl must be one of auto, absorbed, projected, got {impl!r}")


@CLASSES
@pytest.mark.parametrize("call", ["constructor", "forward"])
def test_unknown_keywords(cls: Any, call: str) -> None:
    if call == "constructor":
        assert_refused(TypeError, lambda: cls(**SETTINGS, no_such_option=1), "no_such_option")
        return
    x = torch.zeros(1, 2, 6)
    assert_refused(TypeError, lambda: cls(**SETTINGS)(x, x, no_such_option=1), "no_such_option")


@CLASSES
def test_new_arguments_have_names(cls: Any) -> None:
    assert_refused(TypeError, lambda: cls(6, 2, 2, 3, 4, True, 1e-5, False), "positional argument")
    x = torch.zeros(1, 2, 6)
    assert_refused(
        TypeError, lambda: cls(**SETTINGS)(x, x, None, None, True), "positional argument"
    )


@pytest.mark.parametrize(
    "scales", [(0.0, 1e4), (-1.0, 1e4), (2.0, 0.0), (float("nan"), 1e4), (2.0, float("inf"))]
)
def test_timescales(scales: tuple[float, float]) -> None:
    fragments = ["timescales must be finite and above 0", *scales]
    assert_refused(ValueError, lambda: SinusoidalPosition(6, *scales), *fragments)


def test_width_of_positions() -> None:
    assert_refused(ValueError, lambda: SinusoidalPosition(0), "dim must be at least 1, got 0")
    assert_refused(TypeError, lambda: SinusoidalPosition(6.0), "dim must be an integer, got 6.0")
    for scale, width in ((4.0, 4), (1.0, 12)):
        said = f"min_timescale {scale} gives a width of {width}, not 6"
        assert_refused(ValueError, lambda scale=scale: SinusoidalPosition(6, scale), said)


@CLASSES
@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_eps(cls: Any, eps: float) -> None:
    assert_refused(
        ValueError, lambda: cls(**SETTINGS, eps=eps), "eps must be finite and at least 0", eps
    )


@CLASSES
@pytest.mark.parametrize("option", ["return_indices", "return_weights"])
def test_what_legacy_does_not_return(cls: Any, option: str) -> None:
    x = torch.zeros(1, 6, 6)
    module = cls(**SETTINGS, legacy=True)
    assert_refused(
        ValueError, lambda: module(x, x, **{option: True}), f"legacy=True has no {option}"
    )


@CLASSES
def test_options_that_the_reference_does_not_have(cls: Any) -> None:
    assert_refused(
        ValueError,
        lambda: cls(**SETTINGS, legacy=True, detach_memories=False, impl="projected"),
        "legacy=True has no detach_memories, impl",
    )


# Tensors


def build(cls: Any, device: torch.device, legacy: bool) -> Any:
    return cls(**SETTINGS, legacy=legacy).to(device)


@CLASSES
@LEGACY
@pytest.mark.parametrize("name", ["queries", "memories"])
def test_sequences(device: torch.device, cls: Any, legacy: bool, name: str) -> None:
    module = build(cls, device, legacy)
    given = {key: torch.zeros(2, 7, 6, device=device) for key in ("queries", "memories")}
    for shape in ((7, 6), (2, 7, 5), (2, 7, 6, 1), (6,), (2, 6, 7)):
        bad = given | {name: torch.zeros(shape, device=device)}
        assert_refused(ValueError, lambda b=bad: module(**b), f"{name} must be (b, n, 6)", shape)
    for dtype in (torch.int64, torch.bool):
        bad = given | {name: given[name].to(dtype)}
        assert_refused(
            TypeError, lambda b=bad: module(**b), f"{name} must be floating point, got {dtype}"
        )


@CLASSES
@LEGACY
def test_batches(device: torch.device, cls: Any, legacy: bool) -> None:
    module = build(cls, device, legacy)
    for b, other in ((2, 3), (2, 1), (1, 2)):
        queries = torch.zeros(b, 4, 6, device=device)
        memories = torch.zeros(other, 7, 6, device=device)
        call = lambda q=queries, x=memories: module(q, x)  # noqa: E731
        assert_refused(ValueError, call, "must be of one batch", f"got {b} and {other} rows")


@CLASSES
@LEGACY
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("mask", (3, 7), [(7,), (1, 7), (3, 6), (3, 1), (3, 7, 1), (7, 3), (3, 9)]),
        # Of 7 tokens, 3 chunks; of 3 rows with 3 queries.
        (
            "chunk_attn_mask",
            (3, 3, 3),
            [(3, 3), (3,), (1, 3, 3), (3, 1, 3), (3, 3, 1), (3, 3, 4), (3, 3, 2)],
        ),
    ],
)
def test_masks(
    device: torch.device,
    cls: Any,
    legacy: bool,
    name: str,
    right: tuple[int, ...],
    wrong: list[tuple[int, ...]],
) -> None:
    """Neither broadcast nor converted."""
    module = build(cls, device, legacy)
    queries = torch.zeros(3, 3, 6, device=device)
    memories = torch.zeros(3, 7, 6, device=device)
    for shape in wrong:
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        call = lambda x=mask: module(queries, memories, **{name: x})  # noqa: E731
        assert_refused(ValueError, call, f"{name} must be {right}", f"got shape {shape}")
    for dtype in (torch.float32, torch.int64, torch.uint8):
        mask = torch.ones(right, dtype=dtype, device=device)
        call = lambda x=mask: module(queries, memories, **{name: x})  # noqa: E731
        assert_refused(TypeError, call, f"{name} must be boolean, got {dtype}")


def test_chunks_for_the_reference_s_numbers(device: torch.device) -> None:
    module = build(HTMAttention, device, True)
    for m in (0, 1, 3):
        queries, memories = (torch.zeros(2, n, 6, device=device) for n in (4, m))
        call = lambda q=queries, x=memories: module(q, x)  # noqa: E731
        assert_refused(ValueError, call, f"legacy=True needs 2 chunks of 3 tokens, got {m}")
