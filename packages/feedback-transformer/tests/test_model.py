"""What the model promises: causality, masks, splits, memories, dropout, truncation, Jacobi."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feedback_transformer import FeedbackTransformer, Memory, feedback, fused, jacobi
from shared_core.testing import (
    assert_causal,
    assert_masked_ignored,
    assert_pieces_equal_whole,
    assert_prefix_consistent,
)

# Causality, prefixes, pieces


@pytest.mark.usefixtures("route")
def test_causal(kit: Any, changes: dict[str, Any]) -> None:
    model = kit.make(**changes)
    assert_causal(model, kit.tokens(2, 11))
    assert_prefix_consistent(model, kit.tokens(2, 11))


def test_every_split_gives_the_same(kit: Any, changes: dict[str, Any]) -> None:
    """All splits of 5 tokens, beginning after 0 to 3 others."""
    model = kit.make(**changes)
    x, mask = kit.tokens(2, 8), kit.mask(2, 8)
    for masked in (False, True):
        with torch.no_grad():
            for begin, cuts in itertools.product(range(4), range(2**4)):
                n = begin + 5
                places = [begin] + [begin + i for i in range(1, 5) if cuts >> (i - 1) & 1] + [n]
                outputs, memory = [], None
                for start, stop in itertools.pairwise(sorted({0, *places})):
                    part = mask[:, start:stop] if masked else None
                    out, memory = model(x[:, start:stop], memory, True, mask=part)
                    outputs.append(out)
                expected = model(x[:, :n], mask=mask[:, :n] if masked else None)
                torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seq_len", [1, 2, 3])
def test_splits_at_segments_change_no_bit(kit: Any, seq_len: int) -> None:
    model = kit.make(seq_len=seq_len)
    x = kit.tokens(2, 12)
    with torch.no_grad():
        whole = model(x)
        for stop in range(seq_len, 12, seq_len):
            first, memory = model(x[:, :stop], None, True)
            assert torch.equal(torch.cat((first, model(x[:, stop:], memory)), 1), whole)


def test_pieces_by_the_shared_assertion(kit: Any, changes: dict[str, Any]) -> None:
    model = kit.make(**changes)
    assert_pieces_equal_whole(
        model, lambda x, memory: model(x, memory, True), kit.tokens(2, 9), atol=1e-12
    )


@settings(max_examples=30)
@given(
    seq_len=st.integers(1, 5),
    mem_len=st.integers(0, 7),
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    masked=st.booleans(),
)
def test_drawn_splits(
    kit: Any, seq_len: int, mem_len: int, lengths: list[int], masked: bool
) -> None:
    model = kit.make(seq_len=seq_len, mem_len=mem_len)
    n = sum(lengths)
    x, mask = kit.tokens(2, n), kit.mask(2, n) if masked else None
    with torch.no_grad():
        expected, whole = model(x, None, True, mask=mask)
        outputs, memory = [], None
        start = 0
        for length in lengths:
            part = None if mask is None else mask[:, start : start + length]
            out, memory = model(x[:, start : start + length], memory, True, mask=part)
            outputs.append(out)
            start += length
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-12, rtol=0)
    assert memory is not None
    for ours, theirs in zip(memory, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


# Masks


@pytest.mark.usefixtures("route")
def test_what_is_masked_changes_nothing(kit: Any, changes: dict[str, Any]) -> None:
    model = kit.make(**changes)
    mask = kit.mask(2, 9)
    parameters = list(model.parameters())

    def run(x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = model(x, mask=mask)
        return out

    assert_masked_ignored(run, kit.normal(2, 9, 6), mask, parameters=parameters)
    assert_masked_ignored(run, kit.tokens(2, 9), mask)


def test_what_is_masked_in_a_context_changes_nothing(kit: Any) -> None:
    model = kit.make(dim_context=6)
    x = kit.tokens(2, 5)

    def run(context: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = model(x, context=context, context_mask=mask)
        return out

    everywhere = torch.ones(2, 5, dtype=torch.bool, device=kit.device)
    mask = kit.mask(2, 9)
    assert_masked_ignored(
        run, kit.normal(2, 9, 6), mask, output_mask=everywhere, parameters=[*model.parameters()]
    )


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("seq_len", [1, 2])
def test_padding_in_front_is_as_none_for_whole_segments(kit: Any, seq_len: int) -> None:
    model = kit.make(seq_len=seq_len)
    x = kit.tokens(2, 6)
    padded = torch.cat((kit.tokens(2, 4, seed=9), x), 1)
    mask = torch.arange(10, device=kit.device).expand(2, 10) >= 4
    torch.testing.assert_close(model(padded, mask=mask)[:, 4:], model(x), atol=1e-12, rtol=0)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("seq_len", [1, 3])
def test_a_row_of_nothing_adds_nothing(kit: Any, seq_len: int) -> None:
    """Attention of a token that sees nothing is 0, bias included: as if there were no weights."""
    model = kit.make(seq_len=seq_len)
    x = kit.tokens(2, 5)
    nothing = torch.zeros(2, 5, dtype=torch.bool, device=kit.device)
    expected = model(x, mask=nothing)
    for layer in model.layers:
        for parameter in layer.to_out.parameters():
            parameter.data += 1.0
    assert torch.equal(model(x, mask=nothing), expected)
    assert not torch.equal(model(x)[:, 1:], expected[:, 1:])


def test_the_first_token_of_single_ones_sees_nothing(kit: Any) -> None:
    model = kit.make(seq_len=1)
    x = kit.tokens(2, 3)
    before = model(x)
    for layer in model.layers:
        layer.to_out.bias.data += 1.0
    assert torch.equal(model(x)[:, 0], before[:, 0])
    assert (model(x)[:, 1] != before[:, 1]).any()


# Memories


@pytest.mark.parametrize("seq_len", [1, 3])
def test_a_memory_has_a_slot_for_each_token(kit: Any, seq_len: int) -> None:
    model = kit.make(seq_len=seq_len, mem_len=5)
    for n in range(1, 12):
        _, memory = model(kit.tokens(2, n), None, True)
        p = n % seq_len
        assert memory.open_length == p
        assert memory.keys.shape == memory.values.shape == (2, min(n - p, 5) + p, 8)
        assert memory.mask is None
        if p:
            assert memory.layer_keys.shape == memory.layer_values.shape == (2, 2, p, 8)
        else:
            assert memory.layer_keys is None


def test_slots_are_what_the_oracle_remembers(kit: Any, changes: dict[str, Any]) -> None:
    from feedback_transformer import oracle

    model = kit.make(**changes)
    x = kit.tokens(1, 9)
    _, memory = model(x, None, True)
    _, vectors = oracle.run(
        model.token_emb(x)[0],
        dict(model.named_parameters()),
        depth=2,
        heads=2,
        seq_len=model.seq_len,
        mem_len=model.mem_len,
        keep_last_hidden=model.keep_last_hidden,
    )
    slots = memory.keys.shape[1]
    both = torch.stack(vectors[9 - slots :] or vectors[:0]) if slots else memory.keys[0]
    expected = (both @ model.to_kv.weight.T).unflatten(-1, (-1, 2, 8)) if slots else None
    if expected is not None:
        torch.testing.assert_close(memory.keys[0], expected[:, :, 0].flatten(1))
        torch.testing.assert_close(memory.values[0], expected[:, :, 1].flatten(1))


def test_a_plain_pair_is_a_memory(kit: Any) -> None:
    model = kit.make()
    x = kit.tokens(2, 10)
    whole, _ = model(x, None, True)
    _, (keys, values, *_) = model(x[:, :6], None, True)
    for pair in ((keys, values), [keys, values], Memory(keys, values)):
        found = model(x[:, 6:], pair)
        torch.testing.assert_close(found, whole[:, 6:], atol=1e-12, rtol=0)
    # More slots than the model keeps: the last ones count.
    long = torch.cat((keys + 1.0, keys), 1), torch.cat((values - 1.0, values), 1)
    torch.testing.assert_close(model(x[:, 6:], long), whole[:, 6:], atol=1e-12, rtol=0)


def test_memory_detach_to_reorder(kit: Any) -> None:
    model = kit.make(seq_len=3)
    x, mask = kit.tokens(3, 8), kit.mask(3, 8)
    first, memory = model(x[:, :5], None, True, mask=mask[:, :5])
    assert memory.keys.requires_grad
    assert not any(y.requires_grad for y in memory.detach())
    assert all(y.device.type == "meta" for y in memory.to("meta"))
    order = torch.tensor([2, 0, 0, 1])
    moved = memory.reorder(order)
    expected = model(x[:, 5:], memory, mask=mask[:, 5:])[order]
    found = model(x[order, 5:], moved, mask=mask[order, 5:])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert first.shape == (3, 5, 11)


def test_a_memory_is_not_changed_by_a_call(kit: Any) -> None:
    model = kit.make(seq_len=3)
    _, memory = model(kit.tokens(2, 8), None, True)
    copies = [y.clone() for y in memory if y is not None]
    for _ in range(2):
        out, left = model(kit.tokens(2, 8), memory, True)
        left.keys.data.zero_()
        out.data.zero_()
        kept = [y for y in memory if y is not None]
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_a_memory_is_the_callers_to_change(kit: Any) -> None:
    """With one row and one head it needs no copy on its way out, and has one all the same."""
    model = kit.make(heads=1, mem_len=100)
    x = model.token_emb(kit.tokens(1, 8)).detach().requires_grad_()
    found = []
    for change in (False, True):
        out, memory = model(x, None, True)
        if change:
            memory.keys.data.zero_()
            memory.values.data.zero_()
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(found[0], found[1])


def test_no_memory_sees_its_segment_alone(kit: Any) -> None:
    model = kit.make(mem_len=0, seq_len=3)
    x, y = kit.tokens(2, 9), kit.tokens(2, 9, seed=7)
    mixed = torch.cat((y[:, :6], x[:, 6:]), 1)
    assert torch.equal(model(x)[:, 6:], model(mixed)[:, 6:])
    # Two slots of one token each: what came before them is seen through them.
    assert not torch.equal(
        kit.make(mem_len=2, seq_len=1)(x)[:, 8], kit.make(mem_len=2, seq_len=1)(mixed)[:, 8]
    )


def test_places_in_the_memory_count(kit: Any) -> None:
    model = kit.make()
    x = kit.tokens(2, 8)
    _, memory = model(x[:, :6], None, True)
    other = memory._replace(keys=memory.keys.flip(1), values=memory.values.flip(1))
    before, after = model(x[:, 6:], memory), model(x[:, 6:], other)
    assert (before - after).abs().max() > 1e-3


def test_embeddings_in_and_out(kit: Any) -> None:
    model = kit.make()
    x = kit.tokens(2, 7)
    states = model(model.token_emb(x), return_embeddings=True)
    assert states.shape == (2, 7, 6)
    assert torch.equal(model.to_logits(states), model(x))


def test_an_empty_batch(kit: Any, changes: dict[str, Any]) -> None:
    model = kit.make(**changes)
    x = kit.tokens(0, 7)
    out, memory = model(x, None, True)
    assert out.shape == (0, 7, 11)
    assert model(x, memory).shape == (0, 7, 11)
    out.sum().backward()


# Options


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("every", [2, 4])
def test_detach_every_cuts_gradients_and_changes_no_output(kit: Any, every: int) -> None:
    model = kit.make(mem_len=100)
    x = model.token_emb(kit.tokens(2, 9)).detach().requires_grad_()
    torch.testing.assert_close(model(x, detach_every=every), model(x), atol=1e-12, rtol=0)
    for t in range(9):
        (grad,) = torch.autograd.grad(model(x, detach_every=every)[:, t].square().sum(), x)
        begin = t // every * every
        assert not grad[:, :begin].any()
        assert grad[:, begin : t + 1].any(-1).all()
        (grad,) = torch.autograd.grad(model(x)[:, t].square().sum(), x)
        assert grad[:, : t + 1].any(-1).all()


def test_detach_every_with_checkpoints_and_an_open_segment(kit: Any) -> None:
    """Both count from the beginning of the open segment."""
    model = kit.make(seq_len=3, mem_len=100)
    x = model.token_emb(kit.tokens(2, 12)).detach()
    _, memory = model(x[:, :2], None, True)
    rest = x[:, 2:].clone().requires_grad_()
    found = []
    for options in ({}, {"checkpoint_every": 3}, {"checkpoint_every": 9}):
        out = model(rest, memory.detach(), detach_every=6, **options)
        (grad,) = torch.autograd.grad(out[:, 4:].square().sum(), rest)
        # The first four tokens complete the first two segments.
        assert not grad[:, :4].any()
        assert grad[:, 4:].any(-1).all()
        found.append(grad)
    torch.testing.assert_close(found[1:], found[:1] * 2, atol=1e-12, rtol=0)


def test_checkpoints_keep_no_activations(kit: Any) -> None:
    model = kit.make(mem_len=4)
    x = kit.tokens(2, 64)

    def kept(**options: Any) -> int:
        sizes: dict[int, int] = {}

        def note(y: Tensor) -> Tensor:
            storage = y.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return y

        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
            model(x, return_embeddings=True, **options)
        return sum(sizes.values())

    assert 2 * kept(checkpoint_every=8) < kept()


@pytest.mark.parametrize("which", ["attn_dropout", "ff_dropout"])
def test_dropout_acts_alike_on_both_ways(
    kit: Any, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only while training; the ways drop other units, but on average as many."""
    model = kit.make(**{which: 0.1})
    x = kit.tokens(1, 6).expand(4000, 6)
    with torch.no_grad():
        assert len(model.eval()(x).flatten(1).unique(dim=0)) < 10
        fused_out = model.train()(x)
        monkeypatch.setattr("feedback_transformer.sequence.can_fuse", lambda *_: False)
        plain_out = model(x)
    assert len(fused_out.flatten(1).unique(dim=0)) > 1000
    error = (fused_out.mean(0) - plain_out.mean(0)).abs()
    assert (error <= 5 * (2 / 4000) ** 0.5 * plain_out.std(0)).all()
    torch.testing.assert_close(fused_out.std(0), plain_out.std(0), atol=0.02, rtol=0.1)


@pytest.mark.parametrize("dropouts", [(0.4, 0.0), (0.0, 0.4), (0.3, 0.3)])
def test_gradients_with_dropout(kit: Any, dropouts: tuple[float, float]) -> None:
    """By finite differences, with the same units dropped each time."""
    model = kit.make(attn_dropout=dropouts[0], ff_dropout=dropouts[1], dim=4, depth=1).train()
    x = model.token_emb(kit.tokens(2, 6)).detach().requires_grad_()

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = model(x, return_embeddings=True)
        return out

    layer = model.layers[0]
    weights = (layer.to_q.weight, layer.ff.outer.weight, layer.ff.inner.bias, model.to_kv.weight)
    assert torch.autograd.gradcheck(run, (x, *weights))


def test_full_dropout_is_finite(kit: Any) -> None:
    model = kit.make(attn_dropout=1.0, ff_dropout=1.0).train()
    loss = model(kit.tokens(2, 6)).square().sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Jacobi


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    passes: list[int] = []
    one = jacobi._pass

    def counted(*args: Any) -> Any:
        passes.append(1)
        return one(*args)

    monkeypatch.setattr(jacobi, "_pass", counted)
    return passes


@pytest.mark.parametrize("masked", [False, True])
def test_jacobi_is_right_where_it_ends(
    kit: Any, changes: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jacobi, "PASSES", 100)
    passes = count_passes(monkeypatch)
    ran = []
    whole = fused.run_fused
    monkeypatch.setattr(
        "feedback_transformer.sequence.run_fused", lambda *x: (ran.append(1), whole(*x))[1]
    )
    model = kit.make(**changes)
    x, mask = kit.tokens(2, 14), kit.mask(2, 14) if masked else None
    with torch.no_grad():
        expected = model(x, mask=mask)
        ran.clear()
        first, memory = model(
            x[:, :5], None, True, mask=None if mask is None else mask[:, :5], solver="jacobi"
        )
        rest = model(x[:, 5:], memory, mask=None if mask is None else mask[:, 5:], solver="jacobi")
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, atol=1e-10, rtol=0)
    assert passes
    assert not ran


def gentle(device: torch.device, dtype: torch.dtype) -> FeedbackTransformer:
    """As it is built, but for places and layers: few passes are enough."""
    torch.manual_seed(1)
    model = FeedbackTransformer(
        num_tokens=17, dim=32, depth=3, mem_len=16, seq_len=1, heads=2, dim_head=16
    ).to(device, dtype)
    with torch.no_grad():
        model.pos_emb.relative_attention_bias.weight.mul_(0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_jacobi_is_as_exact_as_the_sequence(device: torch.device, dtype: torch.dtype) -> None:
    """Units of half precision are no bound to stop at."""
    model = gentle(device, dtype)
    x = torch.randint(17, (2, 40), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x)
        error = (model(x) - expected).abs().max()
        found = (model(x, solver="jacobi") - expected).abs().max()
    assert found <= 3 * error


@pytest.mark.parametrize("large", [1e2, 1e4, 1e6])
def test_jacobi_does_not_measure_a_row_by_another(
    device: torch.device, large: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jacobi, "PASSES", 100)
    model = gentle(device, torch.float32)
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0)).to(device)
    x[1, -1] *= large
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())[0]
        found = model(x, solver="jacobi")[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_jacobi_with_dropout_or_a_context(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(monkeypatch)
    x = kit.tokens(2, 8)
    with torch.no_grad():
        dropping = kit.make(ff_dropout=0.5).train()
        torch.manual_seed(0)
        expected = dropping(x)
        torch.manual_seed(0)
        assert torch.equal(dropping(x, solver="jacobi"), expected)
        kit.make(dim_context=5)(x, solver="jacobi", context=kit.normal(2, 3, 5))
        assert not passes
        dropping.eval()(x, solver="jacobi")
    assert passes


def test_jacobi_falls_back(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After few passes the last segments are not there yet; the result is right all the same."""
    monkeypatch.setattr(jacobi, "PASSES", 3)
    passes = count_passes(monkeypatch)
    model = kit.make(seq_len=1)
    x = kit.tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(model(x, solver="jacobi"), model(x))
    assert len(passes) == 3


def test_jacobi_leaves_gradients_to_the_sequence(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(monkeypatch)
    model = kit.make()
    assert torch.equal(model(kit.tokens(2, 8), solver="jacobi"), model(kit.tokens(2, 8)))
    assert not passes


# Learning


def test_learns_to_count(device: torch.device) -> None:
    """The parity of all tokens so far: what a transformer of one pass cannot keep."""
    torch.manual_seed(0)
    model = FeedbackTransformer(
        num_tokens=2, dim=32, depth=1, mem_len=1, seq_len=1, heads=2, dim_head=16
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        x = torch.randint(2, (64, 8), generator=generator).to(device)
        loss = torch.nn.functional.cross_entropy(
            model(x).flatten(0, 1), (x.cumsum(1) % 2).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_packed_weights_give_the_same(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large enough to be packed where that is possible; rows are filled up, or many."""
    torch.manual_seed(0)
    model = FeedbackTransformer(num_tokens=300, dim=256, depth=2, mem_len=9, dim_head=32)
    model = model.to(device)
    for b in (1, 2, 3, 40):
        x = torch.randint(300, (b, 24), generator=torch.Generator().manual_seed(b)).to(device)
        found = []
        for packing in (True, False):
            with monkeypatch.context() as patch:
                if not packing:
                    patch.setattr("feedback_transformer.packing.can_pack", lambda *_: False)
                model.zero_grad()
                out = model(x)
                out.square().sum().backward()
                steps = model.generate(x[:, :3], 4, temperature=0)
                found.append((out, steps, [p.grad.clone() for p in model.parameters()]))
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
        assert torch.equal(found[0][1], found[1][1])
        for ours, theirs in zip(found[0][2], found[1][2], strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize(("n", "gradients"), [(2, True), (2, False), (4, True)])
def test_one_segment_with_gradients_is_left_to_autograd(
    kit: Any, n: int, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is faster there."""
    ran = []
    whole = fused.run_fused
    monkeypatch.setattr(
        "feedback_transformer.sequence.run_fused", lambda *x: (ran.append(1), whole(*x))[1]
    )
    with torch.set_grad_enabled(gradients):
        kit.make()(kit.tokens(2, n))
    assert bool(ran) == (n > 2 or not gradients)


def test_saved_activations_are_linear_in_the_length(kit: Any) -> None:
    model = kit.make(mem_len=4)
    sizes = []
    for n in (64, 128, 256):
        kept: dict[int, int] = {}

        def note(y: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y

        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
            model(kit.tokens(1, n), return_embeddings=True)
        sizes.append(sum(kept.values()))
    assert (sizes[2] - sizes[1]) == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.05)


def test_biases_are_a_window_of_the_largest(kit: Any) -> None:
    positions = kit.make().pos_emb
    for s in (1, 3):
        large = feedback.bias_table(positions, s, 9)
        for m in range(9):
            assert torch.equal(large[..., 9 - m :], feedback.bias_table(positions, s, m))
