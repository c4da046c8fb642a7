"""The model against loops in the paper's notation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memformer import Memformer, oracle
from shared_core import RelativePositionBias
from shared_core.testing import assert_same_gradients

TOKENS = 11
HEADS, DEPTHS = (2, 3, 3), (2, 2)


def model_of(writer: str, updates: int) -> Memformer:
    torch.manual_seed(0)
    model = Memformer(
        dim=6,
        num_memory_slots=2,
        num_mem_updates=updates,
        mem_update_attn_heads=HEADS[2],
        enc_num_tokens=TOKENS,
        enc_depth=DEPTHS[0],
        enc_heads=HEADS[0],
        enc_max_seq_len=30,
        dec_num_tokens=TOKENS,
        dec_depth=DEPTHS[1],
        dec_heads=HEADS[1],
        dec_max_seq_len=30,
        writer=writer,
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def both(
    model: Memformer, src: Tensor, mask: Tensor, tgt: Tensor, tgt_mask: Tensor, given: bool
) -> tuple[Any, Any, list[Tensor]]:
    """Two functions of the parameters and, where `given`, of the memory."""
    names = [name for name, _ in model.named_parameters()]
    values = [x.detach() for x in model.parameters()]
    if given:
        values.append(torch.randn(len(src), model.num_mem, model.dim, dtype=torch.float64) * 2.0)

    def ours(*x: Tensor) -> Any:
        mems = x[len(names)] if given else None
        weights = dict(zip(names, x, strict=False))
        arguments = (src, tgt, mems, mask, tgt_mask)
        out = torch.func.functional_call(model, weights, arguments, {"return_logits": True})
        return out.enc_out[mask], out.mem, out.dec_out[tgt_mask]

    def slow(*x: Tensor) -> Any:
        weights = dict(zip(names, x, strict=False))
        rows = [
            oracle.segment(
                weights,
                src[i].tolist(),
                mask[i].tolist(),
                list(x[len(names)][i]) if given else None,
                tgt[i].tolist(),
                tgt_mask[i].tolist(),
                writer=model.writer,
                heads=HEADS,
                depths=DEPTHS,
                updates=model.num_mem_updates,
            )
            for i in range(len(src))
        ]
        enc, mem, logits = (torch.stack([torch.stack(r[i]) for r in rows]) for i in range(3))
        return enc[mask], mem, logits[tgt_mask]

    return ours, slow, values


@pytest.mark.parametrize("writer", ["gru", "bmn"])
@settings(max_examples=15)
@given(
    b=st.integers(1, 2), n=st.integers(1, 6), t=st.integers(1, 5), updates=st.integers(1, 2),
    given=st.booleans(), density=st.sampled_from([0.3, 0.7, 1.0]),
)  # fmt: skip
def test_model_equals_loops(
    writer: str, b: int, n: int, t: int, updates: int, given: bool, density: float
) -> None:
    model = model_of(writer, updates)
    src, tgt = torch.randint(TOKENS, (b, n)), torch.randint(TOKENS, (b, t))
    mask, tgt_mask = torch.rand(b, n) < density, torch.rand(b, t) < density
    assert_same_gradients(*both(model, src, mask, tgt, tgt_mask, given))


def test_a_long_segment_has_distances_of_all_kinds() -> None:
    model = model_of("gru", 1)
    src, tgt = torch.randint(TOKENS, (1, 22)), torch.randint(TOKENS, (1, 22))
    every = torch.ones(1, 22, dtype=torch.bool)
    assert_same_gradients(*both(model, src, every, tgt, every, False))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_t5(bidirectional: bool) -> None:
    bias = RelativePositionBias(1, bidirectional=bidirectional)
    distances = torch.arange(-300, 301)
    expected = [oracle.bucket(int(distance), bidirectional) for distance in distances]
    assert bias.buckets(distances).tolist() == expected
