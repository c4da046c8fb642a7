"""Checkpoints of the reference, and the switch to its numbers.

The numbers are made by other means than the module's: a loop over rows, queries, chunks and heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from htm_pytorch import HTMAttention, HTMBlock
from shared_core.testing import assert_same_gradients

LOWEST = -torch.finfo(torch.float64).max


def as_the_reference(
    module: HTMAttention,
    weights: dict[str, Tensor],
    queries: Tensor,
    memories: Tensor,
    mask: Tensor | None,
    chunk_mask: Tensor | None,
) -> Tensor:
    """Zeros in front, which count unless there is a mask; no row, and no query, goes without."""
    c, k, heads, d = module.mem_chunk_size, module.topk_mems, module.heads, module.dim
    missing = -memories.shape[1] % c
    memories = F.pad(memories.detach(), (0, 0, missing, 0))
    positions = memories.new_zeros(c, d)
    if module.pos_emb is not None:
        angles = torch.arange(c - 1, -1, -1.0).to(memories)[:, None] * weights["pos_emb.inv_freqs"]
        positions = torch.cat((angles.sin(), angles.cos()), -1)
    rows = []
    for row in range(len(queries)):
        seen = torch.ones(len(memories[row]), dtype=torch.bool, device=memories.device)
        if mask is not None:
            seen = F.pad(mask[row], (missing, 0), value=False)
        tokens = memories[row].masked_fill(~seen[:, None], 0.0)
        chunks = range(0, len(tokens), c)
        for i, query in enumerate(queries[row]):
            asking = (
                weights["to_summary_queries.weight"] @ query + weights["to_summary_queries.bias"]
            )
            relevance = []
            for j, first in enumerate(chunks):
                chunk, there = tokens[first : first + c], seen[first : first + c]
                count = c if mask is None else there.sum() + module.eps
                key = weights["to_summary_keys.weight"] @ (chunk.sum(0) / count)
                score = asking @ (key + weights["to_summary_keys.bias"]) / d**0.5
                if not there.any() or (chunk_mask is not None and not chunk_mask[row, i, j]):
                    score = torch.full_like(score, LOWEST)
                relevance.append(score)
            best, chosen = torch.stack(relevance).topk(k)
            out = torch.zeros_like(query)
            for weight, j in zip(best.softmax(0), chosen.tolist(), strict=True):
                first = chunks[j]
                chunk = tokens[first : first + c] + positions
                keys, values = (chunk @ weights["attn.to_kv.weight"].T).chunk(2, -1)
                q = weights["attn.to_q.weight"] @ query
                answers = []
                for a, key, value in zip(
                    q.chunk(heads), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True
                ):
                    scores = key @ a / len(a) ** 0.5
                    scores = scores.masked_fill(~seen[first : first + c], LOWEST)
                    answers.append(scores.softmax(0) @ value)
                answer = weights["attn.to_out.weight"] @ torch.cat(answers)
                out = out + weight * (answer + weights["attn.to_out.bias"])
            rows.append(out)
    return torch.stack(rows).view(queries.shape)


def draw(
    shape: tuple[int, int, int], masked: bool, banned: bool, device: torch.device
) -> tuple[Tensor | None, ...]:
    """Queries and memories (b, n, m) of width 6; masks of tokens and of chunks of 3."""
    b, n, m = shape
    generator = torch.Generator().manual_seed(b + n + m)
    queries = torch.randn(b, n, 6, generator=generator, dtype=torch.float64)
    memories = torch.randn(b, m, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(b, m, generator=generator) < 0.5 if masked else None
    chunk_mask = torch.rand(b, n, -(-m // 3), generator=generator) < 0.5 if banned else None
    return tuple(None if x is None else x.to(device) for x in (queries, memories, mask, chunk_mask))


# Numbers


@given(
    b=st.integers(1, 2),
    n=st.integers(1, 3),
    m=st.integers(4, 10),
    masked=st.booleans(),
    banned=st.booleans(),
    positions=st.booleans(),
    eps=st.sampled_from([1e-5, 0.5]),
)
def test_numbers_and_gradients(
    device: torch.device,
    make_attention: Any,
    b: int,
    n: int,
    m: int,
    masked: bool,
    banned: bool,
    positions: bool,
    eps: float,
) -> None:
    """Rows and queries with nothing to attend to included."""
    module = make_attention(legacy=True, add_pos_enc=positions, eps=eps)
    queries, memories, mask, chunk_mask = draw((b, n, m), masked, banned, device)
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())

    def ours(queries: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(parameters, values, strict=True))
        out: Tensor = functional_call(module, weights, (queries, memories, mask, chunk_mask))
        return out

    def theirs(queries: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(parameters, values, strict=True)) | buffers
        assert memories is not None
        return as_the_reference(module, weights, queries, memories, mask, chunk_mask)

    assert_same_gradients(ours, theirs, (queries, *parameters.values()))


def test_a_row_of_nothing_is_a_constant(device: torch.device, make_attention: Any) -> None:
    """What the reference does with it: all alike, the zeros that stand for masked tokens."""
    queries, memories, _, _ = draw((2, 3, 7), False, False, device)
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device)
    module = make_attention(legacy=True, add_pos_enc=False)
    out = module(queries, memories, mask)
    torch.testing.assert_close(out, module.attn.to_out.bias.expand_as(out), atol=1e-12, rtol=0)
    assert make_attention()(queries, memories, mask).eq(0.0).all()


def test_memories_get_no_gradient(device: torch.device, make_attention: Any) -> None:
    queries, memories, mask, _ = draw((2, 3, 7), True, False, device)
    memories.requires_grad_()
    make_attention(legacy=True)(queries, memories, mask).sum().backward()
    assert memories.grad is None


def test_chunks_are_padded_in_front(device: torch.device, make_attention: Any) -> None:
    """Of 4 tokens the first chunk holds one."""
    module = make_attention(legacy=True, topk_mems=1)
    queries, memories, _, _ = draw((1, 2, 4), False, False, device)
    first = torch.tensor([[[True, False], [False, True]]], device=device)
    out = module(queries, memories, None, first)
    other = memories.clone()
    other[:, 1:] += 1
    after = module(queries, other, None, first)
    assert torch.equal(after[:, 0], out[:, 0])
    assert not torch.allclose(after[:, 1], out[:, 1])


def test_the_block_adds_normalised_queries(device: torch.device, make_block: Any) -> None:
    module = make_block(legacy=True)
    given = draw((2, 3, 7), True, True, device)
    normed = module.norm(given[0])
    expected = normed + module.attn(normed, *given[1:])
    torch.testing.assert_close(module(*given), expected, atol=1e-12, rtol=0)
    assert not torch.allclose(module(*given), make_block()(*given))


def test_differs_only_where_the_reference_departs(
    device: torch.device, make_attention: Any
) -> None:
    """Whole chunks without a mask are the same with and without."""
    queries, memories, _, chunk_mask = draw((2, 3, 9), False, True, device)
    chunk_mask[..., 0] = True
    old, new = make_attention(legacy=True), make_attention()
    for arguments in ((), (None, chunk_mask)):
        found = [module(queries, memories, *arguments) for module in (old, new)]
        torch.testing.assert_close(*found, atol=1e-12, rtol=0)
    assert not torch.allclose(old(queries, memories[:, :8]), new(queries, memories[:, :8]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_halves_work(
    device: torch.device, make_attention: Any, dtype: torch.dtype, masked: bool
) -> None:
    """The reference's crashes are not reproduced."""
    module = make_attention(legacy=True, topk_mems=3)
    queries, memories, mask, chunk_mask = draw((2, 3, 7), masked, masked, device)
    expected = module(queries, memories, mask, chunk_mask)
    out = module.to(dtype)(queries.to(dtype), memories.to(dtype), mask, chunk_mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=0.1, rtol=0.1)


# Options


@pytest.mark.parametrize("cls", [HTMAttention, HTMBlock])
@pytest.mark.parametrize(
    "option", [{"detach_memories": False}, {"impl": "absorbed"}, {"impl": "projected"}]
)
def test_new_options_are_refused(cls: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"legacy=True has no {next(iter(option))}"):
        cls(6, 2, legacy=True, **option)
    with pytest.raises(ValueError, match="legacy=True has no detach_memories, impl"):
        cls(6, 2, legacy=True, detach_memories=False, impl="absorbed")


def test_too_few_chunks_are_refused(device: torch.device, make_attention: Any) -> None:
    queries, memories, _, _ = draw((2, 3, 3), False, False, device)
    with pytest.raises(ValueError, match="needs 2 chunks of 3 tokens, got 3"):
        make_attention(legacy=True)(queries, memories)


# Checkpoints


def reference_state(prefix: str = "", positions: bool = True) -> dict[str, Tensor]:
    """state_dict() of the reference's attention of width 6 with 2 heads of 4."""
    shapes = {
        "to_summary_queries.weight": (6, 6),
        "to_summary_queries.bias": (6,),
        "to_summary_keys.weight": (6, 6),
        "to_summary_keys.bias": (6,),
        "attn.to_q.weight": (8, 6),
        "attn.to_kv.weight": (16, 6),
        "attn.to_out.weight": (6, 8),
        "attn.to_out.bias": (6,),
    }
    if positions:
        shapes["pos_emb.inv_freqs"] = (3,)
    generator = torch.Generator().manual_seed(7)
    return {f"{prefix}{name}": torch.randn(s, generator=generator) for name, s in shapes.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_reference_checkpoints_load_strictly(
    make_attention: Any, make_block: Any, legacy: bool, positions: bool
) -> None:
    options = {"legacy": legacy, "add_pos_enc": positions}
    state = reference_state(positions=positions)
    of_a_block = reference_state("attn.", positions)
    of_a_block |= {"norm.weight": torch.rand(6), "norm.bias": torch.rand(6)}
    for make, checkpoint in ((make_attention, state), (make_block, of_a_block)):
        module: nn.Module = make(**options)
        module.load_state_dict(checkpoint)
        arrived = module.state_dict()
        assert arrived.keys() == checkpoint.keys()
        for name, x in checkpoint.items():
            assert torch.equal(arrived[name].cpu().float(), x), name


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_bring_no_numerics(
    device: torch.device, make_attention: Any, legacy: bool
) -> None:
    """Only `legacy` decides, whatever module the checkpoint is of."""
    given = draw((2, 3, 8), False, False, device)
    module, other = make_attention(legacy=legacy), make_attention(legacy=not legacy)
    expected = module(*given)
    with torch.no_grad():
        module.to_summary_queries.weight.zero_()
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(*given), expected)


def test_half_a_checkpoint_is_refused(make_attention: Any) -> None:
    state = reference_state()
    del state["pos_emb.inv_freqs"]
    with pytest.raises(RuntimeError, match=r"pos_emb\.inv_freqs"):
        make_attention().load_state_dict(state)
