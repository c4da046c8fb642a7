"""Every way to compute it equals the loops of the oracle, gradients included."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from htm_pytorch import HTMAttention, oracle
from shared_core.testing import assert_same_gradients


class Case(NamedTuple):
    b: int
    n: int
    m: int
    c: int
    k: int
    heads: int
    dim: int
    positions: bool
    masked: bool
    banned: bool
    seed: int

    def settings(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "heads": self.heads,
            "topk_mems": self.k,
            "mem_chunk_size": self.c,
            "dim_head": 3,
            "add_pos_enc": self.positions,
        }

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        queries, memories = draw(self.b, self.n, self.dim), draw(self.b, self.m, self.dim)
        mask = chunk_mask = None
        if self.masked:
            mask = (torch.rand(self.b, self.m, generator=generator) < 0.6).to(device)
        if self.banned:
            shape = (self.b, self.n, -(-self.m // self.c))
            chunk_mask = (torch.rand(shape, generator=generator) < 0.6).to(device)
        return queries, memories, mask, chunk_mask


cases = st.builds(
    Case,
    b=st.integers(1, 3),
    n=st.integers(1, 4),
    m=st.integers(1, 14),
    c=st.integers(1, 5),
    k=st.integers(1, 4),
    heads=st.integers(1, 3),
    dim=st.integers(1, 5),
    positions=st.booleans(),
    masked=st.booleans(),
    banned=st.booleans(),
    seed=st.integers(0, 2**16),
)


def expected(
    module: HTMAttention,
    queries: Tensor,
    memories: Tensor,
    mask: Tensor | None,
    chunk_mask: Tensor | None,
    weights: dict[str, Tensor] | None = None,
) -> Tensor:
    c = module.mem_chunk_size
    m, chunks = memories.shape[1], -(-memories.shape[1] // c)
    positions = queries.new_zeros(c, module.dim)
    if module.pos_emb is not None:
        positions = module.pos_emb(positions)
    if mask is None:
        mask = queries.new_ones(len(queries), m, dtype=torch.bool)
    if chunk_mask is None:
        chunk_mask = queries.new_ones(*queries.shape[:2], chunks, dtype=torch.bool)
    rows = [
        oracle.attend(
            *row,
            weights=weights or dict(module.named_parameters()),
            heads=module.heads,
            k=module.topk_mems,
            c=c,
            positions=positions,
        )[0]
        for row in zip(queries, memories, mask, chunk_mask, strict=True)
    ]
    return torch.stack(rows)


@given(case=cases)
def test_equals_the_oracle(
    device: torch.device, make_attention: Any, impl: str, case: Case
) -> None:
    module = make_attention(**case.settings(), impl=impl, detach_memories=False)
    queries, memories, mask, chunk_mask = case.inputs(device)
    parameters = dict(module.named_parameters())
    names = list(parameters)

    def ours(queries: Tensor, memories: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        out: Tensor = functional_call(module, weights, (queries, memories, mask, chunk_mask))
        # Nothing to attend to has no gradient that could be compared.
        return queries + out

    def theirs(queries: Tensor, memories: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        return queries + expected(module, queries, memories, mask, chunk_mask, weights)

    inputs = (queries, memories, *parameters.values())
    assert_same_gradients(ours, theirs, inputs)


@given(case=cases)
def test_indices_and_weights_are_the_oracle_s(
    device: torch.device, make_attention: Any, case: Case
) -> None:
    module = make_attention(**case.settings()).requires_grad_(False)
    queries, memories, mask, chunk_mask = case.inputs(device)
    found = module(queries, memories, mask, chunk_mask, return_indices=True, return_weights=True)
    _, indices, weights = found
    chunks = -(-case.m // case.c)
    assert indices.shape == weights.shape == (case.b, case.n, min(case.k, chunks))
    if mask is None:
        mask = memories.new_ones(case.b, case.m, dtype=torch.bool)
    if chunk_mask is None:
        chunk_mask = memories.new_ones(case.b, case.n, chunks, dtype=torch.bool)
    positions = queries.new_zeros(case.c, case.dim)
    for row in range(case.b):
        _, all_shares = oracle.attend(
            queries[row],
            memories[row],
            mask[row],
            chunk_mask[row],
            weights={name: x.detach() for name, x in module.named_parameters()},
            heads=case.heads,
            k=case.k,
            c=case.c,
            positions=positions,
        )
        for query, share in enumerate(all_shares):
            pairs = zip(indices[row, query].tolist(), weights[row, query].tolist(), strict=True)
            ours = {chunk: weight for chunk, weight in pairs if chunk >= 0}
            assert ours.keys() == share.keys()
            for chunk, weight in ours.items():
                assert weight == pytest.approx(float(share[chunk]), abs=1e-12)
            rest = weights[row, query][indices[row, query] < 0]
            assert rest.eq(0.0).all()


def test_parameters_have_a_gradient_each(make_attention: Any, randn: Any, impl: str) -> None:
    """That of the summary keys' bias is exactly zero; none is missing, as DDP wants it."""
    module: nn.Module = make_attention(impl=impl)
    for m in (0, 7):
        module.zero_grad()
        module(randn(2, 3, 6), randn(2, m, 6, seed=2)).sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            zero = m == 0 or name == "to_summary_keys.bias"
            assert parameter.grad.eq(0).all() == zero
