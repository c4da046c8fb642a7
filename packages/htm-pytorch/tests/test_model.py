"""What the modules do with masks, sizes, options and types."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from htm_pytorch import HTMAttention, HTMBlock, SinusoidalPosition, attention, retrieval
from shared_core.testing import assert_masked_ignored, assert_same_gradients

DETACH = pytest.mark.parametrize("detach_memories", [False, True])


def chunks_of(m: int, c: int = 3) -> int:
    return -(-m // c)


def some(*shape: int, seed: int, device: torch.device) -> Tensor:
    """A mask of half True, half False, at random."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < 0.5).to(device)


# Masks of tokens


@given(m=st.integers(1, 10), kept=st.integers(0, 10), seed=st.integers(0, 99))
def test_masked_at_the_end_is_trimmed(
    make_attention: Any, randn: Any, impl: str, m: int, kept: int, seed: int
) -> None:
    """Whole chunks and parts of chunks, NaN in them included."""
    kept = min(m, kept)
    module = make_attention(impl=impl, topk_mems=3)
    queries, memories = randn(2, 3, 6, seed=seed), randn(2, m, 6, seed=seed + 100)
    memories[:, kept:] = torch.nan
    mask = (torch.arange(m, device=memories.device) < kept).expand(2, m)
    whole = module(queries, memories, mask, return_indices=True)
    trimmed = module(queries, memories[:, :kept], return_indices=True)
    torch.testing.assert_close(whole[0], trimmed[0], atol=1e-12, rtol=0)
    found = trimmed[1].shape[2]
    assert torch.equal(whole[1][..., :found], trimmed[1])
    assert whole[1][..., found:].eq(-1).all()


def test_rows_of_unequal_lengths(make_attention: Any, randn: Any, impl: str) -> None:
    """One batch of padded rows is the rows one by one."""
    module = make_attention(impl=impl)
    queries, memories = randn(4, 3, 6), randn(4, 10, 6, seed=2)
    lengths = (10, 4, 0, 7)
    mask = torch.zeros(4, 10, dtype=torch.bool, device=queries.device)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    out = module(queries, memories, mask)
    for row, length in enumerate(lengths):
        alone = module(queries[row, None], memories[row, None, :length])
        torch.testing.assert_close(out[row, None], alone, atol=1e-12, rtol=0)


@DETACH
def test_masked_tokens_change_nothing(
    make_attention: Any, randn: Any, impl: str, detach_memories: bool
) -> None:
    """In gradients neither; tokens of chosen chunks and whole chunks."""
    module = make_attention(impl=impl, topk_mems=3, detach_memories=detach_memories)
    queries = randn(2, 4, 6).requires_grad_()
    mask = some(2, 11, seed=3, device=queries.device)
    mask[0, 3:6] = False
    assert_masked_ignored(
        lambda x, mask: module(queries, x, mask),
        randn(2, 11, 6, seed=2),
        mask,
        output_mask=mask.new_ones(2, 4),
        parameters=[queries, *module.parameters()],
    )


@DETACH
def test_banned_chunks_change_nothing(
    make_attention: Any, randn: Any, impl: str, detach_memories: bool
) -> None:
    """Chunks that no query may attend to, and fewer of the others than a query asks for."""
    module = make_attention(impl=impl, topk_mems=3, detach_memories=detach_memories)
    queries = randn(2, 4, 6).requires_grad_()
    allowed = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool, device=queries.device)
    chunk_mask = allowed[:, None].expand(2, 4, 4)
    assert_masked_ignored(
        lambda x, mask: module(queries, x, None, chunk_mask),  # noqa: ARG005
        randn(2, 11, 6, seed=2),
        allowed.repeat_interleave(3, 1)[:, :11],
        output_mask=allowed.new_ones(2, 4),
        parameters=[queries, *module.parameters()],
    )


@DETACH
def test_a_chunk_banned_for_one_query(
    make_attention: Any, randn: Any, impl: str, detach_memories: bool
) -> None:
    """It may hold anything, though another query attends to it; that one is not asked here."""
    module = make_attention(impl=impl, detach_memories=detach_memories)
    queries, memories = randn(1, 2, 6), randn(1, 6, 6, seed=2)
    chunk_mask = torch.tensor([[[True, False], [False, True]]], device=queries.device)
    expected = module(queries[:, :1], memories[:, :3])
    for value in (0.0, 1e3, torch.nan):
        memories[:, 3:] = value
        out = module(queries, memories, None, chunk_mask)[:, :1]
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_padding_is_at_the_end(make_attention: Any, randn: Any, impl: str) -> None:
    """The last chunk is cut, and more tokens move no boundary and no position."""
    module = make_attention(impl=impl, topk_mems=4)
    queries, memories = randn(2, 3, 6), randn(2, 12, 6, seed=2)
    for m in range(1, 12):
        first = torch.ones(2, 3, chunks_of(m), dtype=torch.bool, device=queries.device)
        first[..., -1:] = m % 3 == 0
        more = torch.zeros(2, 3, 4, dtype=torch.bool, device=queries.device)
        more[..., : chunks_of(m)] = first
        part = module(queries, memories[:, :m], None, first)
        torch.testing.assert_close(part, module(queries, memories, None, more), atol=1e-12, rtol=0)


def test_positions_are_those_inside_a_chunk(make_attention: Any, randn: Any, impl: str) -> None:
    """The first token of a cut chunk is as far from its end as that of a whole one."""
    queries, token = randn(1, 3, 6), randn(1, 1, 6, seed=2)
    module = make_attention(impl=impl, topk_mems=1)
    alone = module(queries, token)
    shifted = torch.cat((randn(1, 3, 6, seed=3), token), 1)
    second = torch.tensor([False, True], device=queries.device).expand(1, 3, 2)
    found = module(queries, shifted, None, second)
    torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)
    # At another place inside the chunk it is another token.
    mask = torch.tensor([[False, True]], device=queries.device)
    assert not torch.allclose(module(queries, token.expand(1, 2, 6), mask), alone)


# Sizes


@pytest.mark.parametrize("k", [4, 5, 100])
def test_more_chunks_wanted_than_there_are(
    make_attention: Any, randn: Any, impl: str, k: int
) -> None:
    queries, memories = randn(2, 3, 6), randn(2, 11, 6, seed=2)
    found = [
        make_attention(impl=impl, topk_mems=wanted)(
            queries, memories, return_indices=True, return_weights=True
        )
        for wanted in (k, 4)
    ]
    torch.testing.assert_close(*found, atol=0, rtol=0)
    assert found[0][1].shape == (2, 3, 4)


@pytest.mark.parametrize(
    "shape", [(2, 3, 0), (2, 0, 7), (0, 3, 7), (0, 0, 0), (2, 1, 1), (1, 1, 100)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_size(
    make_attention: Any, make_block: Any, randn: Any, impl: str, shape: Any, masked: bool
) -> None:
    """Of a batch, queries and memories; forward and backward."""
    b, n, m = shape
    for make in (make_attention, make_block):
        module = make(impl=impl, detach_memories=False)
        queries = randn(b, n, 6).requires_grad_()
        memories = randn(b, m, 6, seed=2).requires_grad_()
        masks = ()
        if masked:
            masks = (
                queries.new_ones(b, m, dtype=torch.bool),
                queries.new_ones(b, n, chunks_of(m), dtype=torch.bool),
            )
        out, indices, weights = module(
            queries, memories, *masks, return_indices=True, return_weights=True
        )
        assert out.shape == queries.shape
        assert indices.shape == weights.shape == (b, n, min(2, chunks_of(m)))
        assert indices.dtype == torch.int64
        assert weights.dtype == queries.dtype
        if m == 0:
            kept = queries if make is make_block else torch.zeros_like(queries)
            assert torch.equal(out, kept)
        out.sum().backward()
        for x in (queries, *module.parameters()):
            assert x.grad is not None
            assert x.grad.isfinite().all()


def test_tensors_of_any_strides(make_attention: Any, randn: Any, impl: str) -> None:
    module = make_attention(impl=impl)
    queries, memories = randn(3, 5, 6), randn(3, 8, 6, seed=2)
    mask = some(3, 8, seed=1, device=queries.device)
    chunk_mask = some(3, 5, 3, seed=2, device=queries.device)
    expected = module(queries, memories, mask, chunk_mask)

    def scattered(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    out = module(*(scattered(x) for x in (queries, memories, mask, chunk_mask)))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    one = module(queries[:1].expand(3, 5, 6), memories[:1].expand(3, 8, 6))
    alone = module(queries[:1], memories[:1])
    torch.testing.assert_close(one, alone.expand(3, 5, 6), atol=1e-12, rtol=0)


# Nothing to attend to


@pytest.mark.parametrize("by", ["tokens", "chunks", "together"])
def test_nothing_to_attend_to_is_zero(
    make_attention: Any, make_block: Any, randn: Any, impl: str, by: str
) -> None:
    """Exactly, and so are its gradients. By either mask, or by both together."""
    module = make_attention(impl=impl, detach_memories=False)
    queries = randn(2, 3, 6).requires_grad_()
    memories = randn(2, 8, 6, seed=2).requires_grad_()
    mask = torch.ones(2, 8, dtype=torch.bool, device=queries.device)
    chunk_mask = mask.new_ones(2, 3, 3)
    if by == "tokens":
        mask[1] = False
        nothing = [(1, 0), (1, 1), (1, 2)]
    elif by == "chunks":
        chunk_mask[0, 1] = chunk_mask[1, 2] = False
        nothing = [(0, 1), (1, 2)]
    else:
        mask[0, :6] = False
        chunk_mask[0, 2, 2] = False
        nothing = [(0, 2)]
    out, indices, weights = module(
        queries, memories, mask, chunk_mask, return_indices=True, return_weights=True
    )
    out.sum().backward()
    for row in range(2):
        for query in range(3):
            is_nothing = (row, query) in nothing
            for x in (out, weights, queries.grad):
                assert x[row, query].eq(0.0).all() == is_nothing
            assert indices[row, query].eq(-1).all() == is_nothing
    residual = make_block(impl=impl)(queries, memories, mask, chunk_mask)
    for place in nothing:
        assert torch.equal(residual[place], queries[place])


def test_a_causal_mask_of_chunks(make_attention: Any, randn: Any, impl: str) -> None:
    """A query of each chunk, to the chunks before: none sees its own or a later one."""
    module = make_attention(impl=impl, topk_mems=2)
    queries, memories = randn(2, 5, 6), randn(2, 15, 6, seed=2)
    past = torch.ones(5, 5, dtype=torch.bool, device=queries.device).tril(-1).expand(2, 5, 5)
    before = module(queries, memories, None, past)
    assert before[:, 0].eq(0.0).all()
    for t in range(15):
        changed = memories.clone()
        changed[:, t:] = torch.nan
        after = module(queries, changed, None, past)
        sees_nothing_of_it = t // 3 + 1
        assert torch.equal(after[:, :sees_nothing_of_it], before[:, :sees_nothing_of_it])


# Options


def test_the_block_adds_its_input(make_block: Any, randn: Any, impl: str) -> None:
    module = make_block(impl=impl)
    queries, memories = randn(2, 3, 6), randn(2, 8, 6, seed=2)
    mask = some(2, 8, seed=1, device=queries.device)
    chunk_mask = some(2, 3, 3, seed=2, device=queries.device)
    options = {"return_indices": True, "return_weights": True}
    out, *rest = module(queries, memories, mask, chunk_mask, **options)
    found = module.attn(module.norm(queries), memories, mask, chunk_mask, **options)
    torch.testing.assert_close(out, queries + found[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(rest, list(found[1:]), atol=0, rtol=0)
    assert torch.equal(module(queries, memories, mask, chunk_mask), out)


def test_returned_values(make_attention: Any, randn: Any, impl: str) -> None:
    module = make_attention(impl=impl, topk_mems=3)
    queries, memories = randn(2, 4, 6), randn(2, 14, 6, seed=2)
    out = module(queries, memories)
    assert isinstance(out, Tensor)
    with_indices = module(queries, memories, return_indices=True)
    with_weights = module(queries, memories, return_weights=True)
    both = module(queries, memories, return_indices=True, return_weights=True)
    torch.testing.assert_close(with_indices, both[:2], atol=0, rtol=0)
    torch.testing.assert_close(with_weights, both[::2], atol=0, rtol=0)
    assert torch.equal(both[0], out)
    _, indices, weights = both
    assert all(len(set(row)) == 3 for row in indices.flatten(0, 1).tolist())
    assert (weights.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(out[..., 0]), atol=1e-12, rtol=0)
    # The same chunks alone give the same.
    chosen = torch.zeros(2, 4, 5, dtype=torch.bool, device=out.device).scatter(2, indices, True)
    torch.testing.assert_close(module(queries, memories, None, chosen), out, atol=1e-12, rtol=0)


def test_weights_can_be_trained(make_attention: Any, randn: Any, impl: str) -> None:
    """A loss on what was found where reaches what asks, and what is asked."""
    module = make_attention(impl=impl)
    _, weights = module(randn(2, 3, 6), randn(2, 8, 6, seed=2), return_weights=True)
    weights[..., 0].sum().backward()
    for name in ("to_summary_queries.weight", "to_summary_keys.weight"):
        assert module.get_parameter(name).grad.any()


@DETACH
def test_gradients_of_memories(
    make_attention: Any, randn: Any, impl: str, detach_memories: bool
) -> None:
    module = make_attention(impl=impl, detach_memories=detach_memories)
    queries = randn(2, 3, 6).requires_grad_()
    memories = randn(2, 8, 6, seed=2).requires_grad_()
    module(queries, memories).sum().backward()
    assert queries.grad.any()
    assert (memories.grad is None) == detach_memories
    if not detach_memories:
        assert memories.grad.any()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ways that are taken from now on."""
    taken: list[str] = []
    for name in ("_absorbed", "_projected"):
        way = getattr(attention, name)

        def run(*args: Any, name: str = name, way: Any = way) -> Any:
            taken.append(name)
            return way(*args)

        monkeypatch.setattr(attention, name, run)
    return taken


def test_auto_takes_what_costs_less(make_attention: Any, randn: Any, taken: list[str]) -> None:
    """Chunks that serve many queries are projected, others are not; both give the same."""
    settings = {"dim_head": 4, "topk_mems": 2}
    for n, m, name in ((2, 30, "_absorbed"), (60, 9, "_projected"), (60, 90, "_absorbed")):
        queries, memories = randn(2, n, 6), randn(2, m, 6, seed=2)
        taken.clear()
        out = make_attention(**settings)(queries, memories)
        assert taken == [name]
        for impl in ("absorbed", "projected"):
            module = make_attention(**settings, impl=impl)
            taken.clear()
            torch.testing.assert_close(module(queries, memories), out, atol=1e-11, rtol=0)
            assert taken == [f"_{impl}"]


def test_auto_never_projects_to_more_than_there_is(
    make_attention: Any, randn: Any, taken: list[str]
) -> None:
    for dim_head in (6, 7):
        module = make_attention(dim_head=dim_head)
        taken.clear()
        module(randn(2, 100, 6), randn(2, 4, 6, seed=2))
        assert taken == ["_absorbed"]


def test_both_ways_have_the_same_gradients(make_attention: Any, randn: Any) -> None:
    queries, memories = randn(2, 3, 6), randn(2, 11, 6, seed=2)
    mask = some(2, 11, seed=1, device=queries.device)
    chunk_mask = some(2, 3, 4, seed=2, device=queries.device)
    ways = [make_attention(impl=impl, detach_memories=False) for impl in ("absorbed", "projected")]

    def through(module: Any) -> Any:
        return lambda queries, memories, *values: torch.func.functional_call(
            module,
            dict(zip(dict(module.named_parameters()), values, strict=True)),
            (queries, memories, mask, chunk_mask),
        )

    assert_same_gradients(*map(through, ways), (queries, memories, *ways[0].parameters()))


def test_every_argument_of_forward_matters(
    make_attention: Any, make_block: Any, randn: Any
) -> None:
    queries, memories = randn(2, 3, 6), randn(2, 8, 6, seed=2)
    given = {
        "queries": queries,
        "memories": memories,
        "mask": torch.ones(2, 8, dtype=torch.bool, device=queries.device),
        "chunk_attn_mask": torch.ones(2, 3, 3, dtype=torch.bool, device=queries.device),
    }
    others = {
        "queries": randn(2, 3, 6, seed=3),
        "memories": randn(2, 8, 6, seed=4),
        "mask": some(2, 8, seed=1, device=queries.device),
        "chunk_attn_mask": some(2, 3, 3, seed=2, device=queries.device),
    }
    for module in (make_attention(), make_block(), make_attention(legacy=True)):
        out = module(**given)
        for name, other in others.items():
            assert not torch.allclose(module(**(given | {name: other})), out), name
        for name in ("return_indices", "return_weights") if not module.legacy else ():
            assert len(module(**given, **{name: True})) == 2


@pytest.mark.parametrize(
    "change",
    [{"topk_mems": 1}, {"mem_chunk_size": 2}, {"add_pos_enc": False}, {"heads": 1, "dim_head": 8}],
)
def test_every_argument_of_the_constructor_matters(
    make_attention: Any, randn: Any, change: dict[str, Any]
) -> None:
    """With weights of the same shapes."""
    given = (randn(2, 3, 6), randn(2, 8, 6, seed=2))
    weights = dict(make_attention().named_parameters())
    module = make_attention(**change)
    assert not torch.allclose(
        torch.func.functional_call(module, weights, given), make_attention()(*given)
    )


@pytest.mark.parametrize("cls", [HTMAttention, HTMBlock])
def test_what_was_asked_for_is_kept(cls: Any) -> None:
    module = cls(6, 2, 3, 4, 5, False, 0.1, detach_memories=False, impl="absorbed")
    attention = module.attn if cls is HTMBlock else module
    found = [
        getattr(attention, name)
        for name in ("dim", "heads", "topk_mems", "mem_chunk_size", "dim_head", "eps")
    ]
    assert found == [6, 2, 3, 4, 5, 0.1]
    assert attention.pos_emb is None
    assert not attention.detach_memories
    assert attention.impl == "absorbed"
    assert not attention.legacy
    assert cls(6, 2, legacy=True).legacy


# Types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_dtype(
    make_block: Any, randn: Any, impl: str, dtype: torch.dtype, positions: bool, masked: bool
) -> None:
    """Near the same rounded weights and inputs in float64, to all chunks: the choice is the same.

    Of the results and of every gradient.
    """
    module = make_block(impl=impl, topk_mems=4, add_pos_enc=positions, detach_memories=False)
    module.to(dtype)
    exact = copy.deepcopy(module).double()
    masks = ()
    if masked:
        masks = (
            some(2, 11, seed=1, device=module.norm.weight.device),
            some(2, 3, 4, seed=2, device=module.norm.weight.device),
        )
    queries, memories = randn(2, 3, 6, dtype=dtype), randn(2, 11, 6, seed=2, dtype=dtype)
    found = []
    for layer, dtype_of in ((module, dtype), (exact, torch.float64)):
        leaves = [x.detach().to(dtype_of).requires_grad_() for x in (queries, memories)]
        out, weights = layer(*leaves, *masks, return_weights=True)
        assert out.dtype == weights.dtype == dtype_of
        out.sum().backward()
        parameters = dict(layer.named_parameters())
        gradients = {name: x.grad for name, x in parameters.items()}
        gradients |= dict(zip(("queries", "memories"), (x.grad for x in leaves), strict=True))
        assert all(x.dtype == dtype_of for x in gradients.values())
        found.append({"out": out, "weights": weights} | gradients)
    error = {torch.bfloat16: 0.04, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    for name, expected in found[1].items():
        difference = (found[0][name].double() - expected).abs().max()
        assert difference <= error * (expected.abs().max() + 0.2), name


def test_many_chunks_in_halves(randn: Any, device: torch.device, impl: str) -> None:
    """Sums of many tokens and chunks are not kept in 8 bits."""
    torch.manual_seed(0)
    module = HTMAttention(16, 2, 8, 32, 8, impl=impl).to(device)
    queries, memories = randn(2, 4, 16) * 3, randn(2, 256, 16, seed=2) + 3
    expected = module.double()(queries, memories)
    for dtype, error in ((torch.bfloat16, 0.03), (torch.float16, 0.004)):
        out = module.to(dtype)(queries.to(dtype), memories.to(dtype))
        assert (out.double() - expected).abs().max() < error * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memories_in_halves(make_attention: Any, randn: Any, impl: str, dtype: torch.dtype) -> None:
    """Read by a module in full precision: results are the module's."""
    module = make_attention(impl=impl, topk_mems=4, detach_memories=False)
    queries, memories = randn(2, 3, 6), randn(2, 11, 6, seed=2, dtype=dtype).requires_grad_()
    mask = some(2, 11, seed=1, device=queries.device)
    out = module(queries, memories, mask)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, module(queries, memories.double(), mask), atol=0.02, rtol=0.02)
    out.sum().backward()
    assert memories.grad.dtype == dtype
    assert memories.grad.isfinite().all()


@pytest.mark.parametrize("dim", [1, 5, 7])
def test_odd_width(make_attention: Any, randn: Any, impl: str, dim: int) -> None:
    module = make_attention(dim=dim, impl=impl)
    assert module(randn(2, 3, dim), randn(2, 8, dim, seed=2)).shape == (2, 3, dim)


# Positions


@pytest.mark.parametrize("dim", [1, 4, 7])
@pytest.mark.parametrize("scales", [(), (2.0, 50.0)])
def test_positions(device: torch.device, dim: int, scales: tuple[float, ...]) -> None:
    positions = SinusoidalPosition(dim, *scales).to(device)
    found = positions(torch.zeros(2, 5, dim, dtype=torch.float64, device=device))
    assert found.dtype == torch.float64
    longest = scales[1] if scales else 1e4
    waves = [longest ** (-2 * i / dim) for i in range(-(-dim // 2))]
    for place, row in enumerate(found):
        angles = torch.tensor([(4 - place) * wave for wave in waves], dtype=torch.float64)
        expected = torch.cat((angles.sin(), angles.cos()))[:dim]
        torch.testing.assert_close(row.cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_in_halves_are_rounded_once(device: torch.device, dtype: torch.dtype) -> None:
    """At the end. Frequencies of 8 bits would be whole turns off after some hundred tokens."""
    x = torch.zeros(300, 16, device=device)
    exact = SinusoidalPosition(16).to(device)(x)
    cast = SinusoidalPosition(16).to(device).to(dtype)
    copied = copy.deepcopy(cast).float()
    for positions in (cast, copied):
        assert torch.equal(positions(x.to(dtype)), exact.to(dtype))
    torch.set_default_dtype(dtype)
    try:
        born = SinusoidalPosition(16).to(device)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(born(x.to(dtype)), exact.to(dtype))


@pytest.mark.parametrize("m", [12, 14])
def test_views_of_memories(make_attention: Any, randn: Any, m: int, impl: str) -> None:
    """Slices of a buffer with room, tokens first, one memory for all rows, every other token."""
    module = make_attention(impl=impl)
    queries, tokens = randn(2, 3, 6), randn(2, m, 6, seed=2)
    room = randn(2, m + 5, 6, seed=3)
    room[:, :m] = tokens
    strided = randn(2, 2 * m, 6, seed=4)
    strided[:, ::2] = tokens
    wide = randn(2, m, 12, seed=5)
    wide[..., ::2] = tokens
    views = [room[:, :m], tokens.transpose(0, 1).contiguous().transpose(0, 1)]
    views += [strided[:, ::2], wide[..., ::2]]
    for view in views:
        assert not view.is_contiguous()
        torch.testing.assert_close(
            module(queries, view), module(queries, tokens), atol=1e-12, rtol=0
        )
    one = tokens[:1].expand(2, -1, -1)
    expected = module(queries, one.contiguous())
    torch.testing.assert_close(module(queries, one), expected, atol=1e-12, rtol=0)


def test_masked_nan_everywhere(make_attention: Any, randn: Any, monkeypatch: Any) -> None:
    """In whole chunks and in parts of them, summarised a chunk at a time."""
    monkeypatch.setattr(retrieval, "_CONVERTED", 1)
    module = make_attention()
    queries, memories = randn(2, 3, 6), randn(2, 20, 6, seed=2)
    mask = some(2, 20, seed=1, device=queries.device)
    mask[:, 3:9] = False
    hidden = memories.masked_fill(~mask[..., None], float("nan"))
    out = module(queries, memories, mask)
    torch.testing.assert_close(module(queries, hidden, mask), out, atol=1e-12, rtol=0)


def test_forward_mode_and_function_transforms(make_attention: Any, randn: Any, impl: str) -> None:
    """By queries and memories; parameters too, since their products are seen by both."""
    module = make_attention(impl=impl, detach_memories=False)
    queries, memories = randn(1, 3, 6), randn(1, 8, 6, seed=2)
    given = queries.requires_grad_(), memories.requires_grad_()
    forward_mode = {"check_forward_ad": True, "check_backward_ad": False}
    assert torch.autograd.gradcheck(module, given, **forward_mode)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(module, parameters, given)
        return out.pow(2).sum()

    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    found = torch.func.grad(loss)({name: x.detach() for name, x in parameters.items()})
    torch.testing.assert_close(list(found.values()), list(expected))
