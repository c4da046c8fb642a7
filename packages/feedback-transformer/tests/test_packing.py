"""Packed weights are those of now, wherever they are kept from, and as exact as they were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from feedback_transformer import FeedbackTransformer, packing

WIDE: dict[str, Any] = {"num_tokens": 300, "dim": 256, "depth": 2, "mem_len": 9, "dim_head": 32}


@pytest.fixture(params=["float32", "float32 in pairs", "bfloat16"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FeedbackTransformer:
    """On the CPU, where weights are packed, whatever the device of the other tests."""
    name, _, pairs = request.param.partition(" ")
    if pairs:
        # All of them are laid out anew, as only wide ones are in a larger model.
        monkeypatch.setattr(packing, "NARROW", 128)
        monkeypatch.setattr(packing, "PART", 128)
    else:
        monkeypatch.setattr(packing, "PAIR", 0)
    torch.manual_seed(0)
    return FeedbackTransformer(**WIDE).to(getattr(torch, name))


def tokens(n: int) -> Tensor:
    return torch.randint(300, (1, n), generator=torch.Generator().manual_seed(n))


def fresh(model: FeedbackTransformer) -> FeedbackTransformer:
    """The same numbers in a model that has kept nothing."""
    other = FeedbackTransformer(**WIDE).to(model.to_kv.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other


def by_optimiser(model: FeedbackTransformer) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    model(tokens(6)).square().sum().backward()
    optimizer.step()


def by_data(model: FeedbackTransformer) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def by_one_number(model: FeedbackTransformer) -> None:
    model.layers[1].ff.inner.weight.data[3, 5] += 4.0


def by_columns(model: FeedbackTransformer) -> None:
    weight = model.layers[0].ff.outer.weight
    weight.data.copy_(weight.data.roll(8, 1))


def by_rows(model: FeedbackTransformer) -> None:
    weight = model.layers[0].ff.inner.weight
    weight.data.copy_(weight.data.flip(0).clone())


def by_loading(model: FeedbackTransformer) -> None:
    torch.manual_seed(1)
    model.load_state_dict(FeedbackTransformer(**WIDE).state_dict())


def by_assigning(model: FeedbackTransformer) -> None:
    torch.manual_seed(1)
    other = FeedbackTransformer(**WIDE).to(model.to_kv.weight.dtype)
    model.load_state_dict(other.state_dict(), assign=True)


def by_moving(model: FeedbackTransformer) -> None:
    model.double()
    model.to_kv.weight.data *= 2.0
    model.float()


def by_identity_rolled(model: FeedbackTransformer) -> None:
    """All sums of all rows and columns stay."""
    with torch.no_grad():
        weight = model.layers[0].to_q.weight
        weight.copy_(weight.roll(8, 1))


def by_identity_assigned(model: FeedbackTransformer) -> None:
    weight = model.layers[0].to_q.weight
    weight.data = weight.data.roll(8, 1)


CHANGES = [
    by_optimiser,
    by_data,
    by_one_number,
    by_columns,
    by_rows,
    by_loading,
    by_assigning,
    by_moving,
    by_identity_rolled,
    by_identity_assigned,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_is_seen(
    model: FeedbackTransformer, change: Callable[[FeedbackTransformer], None]
) -> None:
    x = tokens(24)
    if change in (by_identity_rolled, by_identity_assigned):
        nn.init.eye_(model.layers[0].to_q.weight)
    with torch.no_grad():
        before = model(x)
        model.generate(x, 3)
    change(model)
    with torch.no_grad():
        out = model(x)
        steps = model.generate(x, 6, temperature=0)
        expected = fresh(model)
        assert torch.equal(out, expected(x))
        assert not torch.equal(out, before)
        assert torch.equal(steps, expected.generate(x, 6, temperature=0))


def test_weights_are_packed_once_while_they_stay(
    model: FeedbackTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for kind in (packing.Packed, packing.PackedPair, packing.PackedHalf):
        monkeypatch.setattr(kind, "__call__", _counted(kind.__call__, made))
    x = tokens(24)
    with torch.no_grad():
        first = model(x)
        kept = dict(model._packs._kept)
        again = model(x)
    assert torch.equal(first, again)
    assert all(model._packs._kept[name] is entry for name, entry in kept.items())
    if packing.can_pack(model.to_kv.weight, 2):
        assert kept
        assert made
    model(x)
    assert not model._packs._kept


def test_a_change_is_seen_through_autocast_and_inference_mode(model: FeedbackTransformer) -> None:
    x = tokens(24)
    for layer in model.layers:
        nn.init.eye_(layer.to_q.weight)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        by_identity_rolled(model)
        assert torch.equal(model(x), fresh(model)(x))
        assert not torch.equal(model(x), before)


def test_marks_are_those_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what is cast or laid out anew for a call, whose version and address tell nothing."""
    model = FeedbackTransformer(**WIDE, shared_kv=False)
    sources = []
    pack = packing.Packs.pack

    def spied(
        self: packing.Packs, name: str, weight: Tensor, source: Tensor, *rest: Any, half: bool
    ) -> Any:
        sources.append((source.untyped_storage().data_ptr(), source._version))
        return pack(self, name, weight, source, *rest, half=half)

    monkeypatch.setattr(packing.Packs, "pack", spied)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for p in model.parameters():
            p.mul_(1.0)
        model(tokens(24))
        model.generate(tokens(24), 3)
    assert sources
    assert set(sources) <= {(p.data_ptr(), p._version) for p in model.parameters()}


def test_weights_that_were_made_in_inference_mode(model: FeedbackTransformer) -> None:
    """They have no version: the sums tell."""
    x = tokens(24)
    with torch.inference_mode():
        other = fresh(model)
        assert torch.equal(other(x), model(x))
        kept = dict(other._packs._kept)
        other(x)
        assert all(other._packs._kept[name] is entry for name, entry in kept.items())
        by_one_number(other)
        assert torch.equal(other(x), fresh(other)(x))


def test_weights_that_are_views_of_one_vector(model: FeedbackTransformer) -> None:
    """They begin anywhere in it, where bits cannot always be summed."""
    x = tokens(24)
    with torch.no_grad():
        expected = model(x), model.generate(x, 3, temperature=0)
        vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
        assert model.to_kv.weight.storage_offset() % 2
        for _ in range(2):
            assert torch.equal(model(x), expected[0])
            assert torch.equal(model.generate(x, 3, temperature=0), expected[1])
            by_data(model)
            expected = fresh(model)(x), fresh(model).generate(x, 3, temperature=0)


def test_a_call_gives_the_same_after_any_other(
    model: FeedbackTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feedback_transformer import generation, layout

    for module, name in ((generation, "MANY"), (layout, "FEWEST_HALF")):
        monkeypatch.setattr(module, name, 20)
    calls = [
        lambda: model(tokens(2)),
        lambda: model(tokens(24)),
        lambda: model(tokens(60)),
        lambda: model.generate(tokens(2), 19, temperature=0),
        lambda: model.generate(tokens(2), 20, temperature=0),
    ]
    with torch.no_grad():
        expected = []
        for call in calls:
            model._packs.clear()
            expected.append(call())
        for first in calls:
            for call, alone in zip(calls, expected, strict=True):
                first()
                assert torch.equal(call(), alone)
                # One kind of each weight at a time.
                assert not any("Packed" in name for name in model._packs._kept)


def test_a_model_that_moves_keeps_nothing(model: FeedbackTransformer) -> None:
    whole = nn.Sequential(model)
    for move in (lambda: model.to("meta"), whole.float, whole.bfloat16):
        model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.zeros_(p)
        with torch.no_grad():
            model(tokens(24))
        assert model._packs._kept or not packing.can_pack(model.to_kv.weight, 2)
        assert move() is not None
        assert not model._packs._kept


def test_another_thread_may_drop_what_is_kept(
    model: FeedbackTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two looks at it."""
    x = tokens(24)
    with torch.no_grad():
        expected = model(x)
        marks = packing._Marks.of

        def dropping(weight: Tensor, source: Tensor) -> Any:
            model._packs.clear()
            return marks(weight, source)

        same = packing._Marks.same

        def dropping_too(ours: Any, theirs: Any) -> bool:
            model._packs.clear()
            return same(ours, theirs) and False

        monkeypatch.setattr(packing._Marks, "of", staticmethod(dropping))
        assert torch.equal(model(x), expected)
        monkeypatch.setattr(packing._Marks, "of", staticmethod(marks))
        monkeypatch.setattr(packing._Marks, "same", dropping_too)
        assert torch.equal(model(x), expected)


def _counted(call: Any, made: list[int]) -> Any:
    def counted(*args: Any) -> Any:
        made.append(1)
        return call(*args)

    return counted


def test_copies_and_files_keep_nothing(model: FeedbackTransformer) -> None:
    x = tokens(24)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not other._packs._kept
            assert torch.equal(other(x), expected)
    assert set(model.state_dict()) == set(fresh(model).state_dict())


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows of any type and shape; those of bfloat16 in float16 are the more exact ones."""
    generator = torch.Generator().manual_seed(rows)
    weight = (0.05 * torch.randn(512, 256, generator=generator)).to(dtype)
    x = torch.randn(rows, 256, generator=generator)
    bias = torch.randn(512, generator=generator)
    if not packing.can_pack(weight, rows):
        pytest.skip("nothing is packed here")
    expected = x.double() @ weight.double().T
    kinds: list[Any] = [packing.Packed(weight)]
    if dtype == torch.float32:
        kinds.append(packing.PackedPair(weight))
        monkeypatch.setattr(packing, "NARROW", 128)
        monkeypatch.setattr(packing, "PART", 64)
        kinds.append(packing.PackedPair(weight))
        assert [len(x._parts) for x in kinds[1:]] == [1, 4]
    if packing.fits_half(weight, rows):
        kinds.append(packing.PackedHalf(weight))
    for packed in kinds:
        loose = dtype == torch.bfloat16 and isinstance(packed, packing.Packed)
        near = {"atol": 0.05 if loose else 1e-4, "rtol": 0.0, "check_dtype": False}
        torch.testing.assert_close(packed(x), expected, **near)
        torch.testing.assert_close(packed(x, bias), expected + bias, **near)
        torch.testing.assert_close(packed(x.view(rows, 1, 256))[:, 0], expected, **near)
        torch.testing.assert_close(packed(x.t().contiguous().t()), expected, **near)
        with torch.autocast("cpu"):
            torch.testing.assert_close(packed(x, bias), expected + bias, **near)
        half = packed(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half, expected, **(near | {"atol": 0.05}))


def test_two_rows_of_float32_are_columns() -> None:
    for shape, dtype, suits in (
        ((64, 1024), torch.float32, True),
        ((64, 2048), torch.float32, True),
        ((64, 1032), torch.float32, False),
        ((64, 512), torch.bfloat16, False),
    ):
        weight = torch.zeros(*shape, dtype=dtype)
        assert packing.suits_pair(weight, 2) == suits
        assert not any(packing.suits_pair(weight, rows) for rows in (1, 3, 4))
    # A narrow one is read where it lies.
    weight = torch.randn(512, 512)
    kept = packing.Packs()
    if packing.can_pack(weight, 2):
        packed = kept.pack("it", weight, weight, 2, half=True)
        assert isinstance(packed, packing.PackedPair)
        assert packed._parts.data_ptr() == weight.data_ptr()
        assert not kept._kept


def test_weights_that_float16_would_spoil() -> None:
    weight = torch.full((256, 256), 0.05, dtype=torch.bfloat16)
    if not packing._has_half():
        pytest.skip("nothing is kept in float16 here")
    assert packing.fits_half(weight, 2)
    assert not packing.fits_half(weight, packing.FEW + 1)
    assert not packing.fits_half(weight.float(), 2)
    for number in (1e5, -1e5, float("nan"), float("inf")):
        other = weight.clone()
        other[3, 4] = number
        assert not packing.fits_half(other, 2)
    assert not packing.fits_half(weight * 1e-3, 2)


def test_long_answers_in_float16_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn from a bfloat16 model is what one in float32 of the same numbers draws."""
    from feedback_transformer import generation

    monkeypatch.setattr(generation, "MANY", 1)
    torch.manual_seed(0)
    model = FeedbackTransformer(**WIDE).bfloat16()
    wide = fresh(model.float())
    model = model.bfloat16()
    x = tokens(9)
    logits: list[list[Tensor]] = [[], []]
    for found, one in zip(logits, (model, wide), strict=True):
        step = one._stepper(x, 8, None, None, None, None)
        with torch.no_grad():
            out, window = step(x, None)
            for token in tokens(8)[0]:
                out, window = step(token.view(1, 1), window)
                found.append(out.float())
    for ours, theirs in zip(*logits, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
