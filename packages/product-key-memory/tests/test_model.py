"""The layer: against the oracle, masks, shapes, shared pools, and what each argument does."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from product_key_memory import PKM, MemoryPool, ProductKeyMemory, ProductKeyRouter, oracle
from product_key_memory.factors import collect_factors, factors_of
from product_key_memory.model import gumbel_noise
from product_key_memory.operators import write, write_rows
from shared_core.testing import assert_masked_ignored, assert_same_gradients


class Case(NamedTuple):
    """A layer, tokens and masks, small enough to be built from a seed."""

    options: dict[str, Any]
    leading: tuple[int, ...]
    masked: bool
    frozen: bool
    training: bool
    seed: int

    def build(self, device: torch.device) -> tuple[PKM, Tensor, Tensor, Tensor | None]:
        torch.manual_seed(self.seed)
        pkm = PKM(5, **self.options).double().train(self.training)
        with torch.no_grad():
            for parameter in pkm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            for name, buffer in pkm.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 2.0)
        x = torch.randn(*self.leading, 5, dtype=torch.float64)
        mask = torch.rand(self.leading) < (0.6 if self.masked else 2)
        trainable = torch.rand(pkm.num_memories) < 0.5 if self.frozen else None
        to = None if trainable is None else trainable.to(device)
        return pkm.to(device), x.to(device), mask.to(device), to


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    square = draw(st.booleans())
    kind = draw(st.sampled_from(["", "", "concat_values_and_combine", "experts"]))
    options: dict[str, Any] = {
        "heads": draw(st.integers(1, 3)),
        "num_keys": sizes[0] if square else sizes,
        "topk": draw(st.integers(1, sizes[0] if square else min(sizes))),
        "dim_head": draw(st.integers(2, 4)),
        "query_norm": draw(st.sampled_from(["layer", "batch", "none"])),
        "key_norm": draw(st.booleans()),
        "gate": draw(st.sampled_from(["softmax", "relu", "sigmoid"])),
        "pre_layernorm": draw(st.booleans()),
        "norm_output": draw(st.booleans()),
        "gated_output": draw(st.booleans()),
    }
    return Case(
        options=options | ({kind: True} if kind else {}),
        leading=draw(st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 3)])),
        masked=draw(st.booleans()),
        frozen=draw(st.booleans()),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def layer_norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.weight" not in p:
        return x
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def batch_norm(x: Tensor, pkm: PKM, p: dict[str, Tensor]) -> Tensor:
    mean, var = x.mean(0), x.var(0, correction=0)
    if not pkm.training:
        mean, var = pkm.norm.fn.running_mean, pkm.norm.fn.running_var
    return (x - mean) / (var + 1e-5).sqrt() * p["norm.fn.weight"] + p["norm.fn.bias"]


def pkm_oracle(
    pkm: PKM, p: dict[str, Tensor], x: Tensor, mask: Tensor, trainable: Tensor | None
) -> Tensor:
    """The layer, token by token, of those tokens only that the mask keeps."""
    out = 0 * x
    tokens = layer_norm(x[mask], p, "pre_layernorm")
    if len(tokens) == 0:
        return out
    queries = tokens @ p["to_queries.weight"].T
    if "norm.fn.weight" in p:
        queries = batch_norm(queries, pkm, p)
    # Features in (half, head, d_k) order.
    queries = layer_norm(queries.reshape(len(tokens), 2, pkm.heads, pkm.dim_head), p, "norm")
    keys = layer_norm(p["keys"], p, "key_norm")
    first, second = pkm.key_sizes
    c1, c2 = keys.unbind(2) if first == second else keys.split([first, second], dim=1)
    tables = [p[name] for name in ("values.weight", "values.inputs") if name in p]
    if trainable is not None:
        tables = [torch.where(trainable[:, None], table, table.detach()) for table in tables]
    values, k, gate = tables[0], pkm.topk, pkm.gate
    results = []
    for q, token in zip(queries, tokens, strict=True):
        if pkm.concat_values_and_combine:
            y = oracle.concatenated(q, c1, c2, values, k, p["combine.weight"], gate)
        elif pkm.experts:
            y = oracle.experts(token, q, c1, c2, tables[1], values, k, gate)
        else:
            y = oracle.memory(q, c1, c2, values, k, gate)
        if "to_gate.weight" in p:
            y = oracle.gated(token, y, p["to_gate.weight"], p["to_out.weight"])
        results.append(layer_norm(y, p, "output_norm"))
    return out.masked_scatter(mask[..., None], torch.stack(results))


def assert_equals_oracle(case: Case, device: torch.device) -> None:
    pkm, x, mask, trainable = case.build(device)
    parameters = dict(pkm.named_parameters())

    # The tokens once more in the output: with ReLU everything may be zero.
    def ours(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        given = mask if case.masked else None
        return functional_call(pkm, p, (x, given, trainable)), x * 1

    def theirs(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return pkm_oracle(pkm, p, x, mask, trainable), x * 1

    assert_same_gradients(ours, theirs, (x, parameters), atol=1e-10)


@given(case=cases())
def test_equals_oracle(device: torch.device, case: Case) -> None:
    """Outputs and all gradients, whatever the options, the shape and the masks."""
    assert_equals_oracle(case, device)


@pytest.mark.parametrize("training", [True, False])
def test_every_kind_equals_oracle(
    device: torch.device, changes: dict[str, Any], training: bool
) -> None:
    """Each of the kinds at least once with all masks; hypothesis draws what it likes."""
    plain = {"heads": 2, "num_keys": 6, "topk": 3, "dim_head": 4} | changes
    if not plain.pop("use_layernorm", True):
        plain["query_norm"] = "batch"
    case = Case(plain, (3, 4), masked=True, frozen=True, training=training, seed=0)
    assert_equals_oracle(case, device)


def test_kinds_differ(make_pkm: Any, randn: Any, changes: dict[str, Any]) -> None:
    x = randn(2, 5, 12)
    if changes:
        assert not torch.allclose(make_pkm(**changes)(x), make_pkm()(x))


def check_gradients(make_pkm: Any, randn: Any, changes: dict[str, Any], check: Any) -> None:
    size = {"num_keys": 3} if isinstance(changes.get("num_keys", 3), int) else {}
    pkm = make_pkm(**(changes | size | {"heads": 1, "topk": 2, "dim_head": 2}))
    names, parameters = zip(*pkm.named_parameters(), strict=True)
    mask = torch.tensor([True, True, False], device=parameters[0].device)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return functional_call(pkm, given, (x, mask))[:2]

    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    # Numbers that are masked have no part in the numerical derivative either.
    assert check(run, (randn(3, 12).requires_grad_(), *leaves), fast_mode=True)


def check_forward_mode(*inputs: Any, **options: Any) -> bool:
    options |= {"check_forward_ad": True, "check_backward_ad": False}
    return torch.autograd.gradcheck(*inputs, **options)


def test_gradcheck(make_pkm: Any, randn: Any, changes: dict[str, Any]) -> None:
    """By the tokens and by the parameters."""
    check_gradients(make_pkm, randn, changes, torch.autograd.gradcheck)


def test_forward_mode(make_pkm: Any, randn: Any, changes: dict[str, Any]) -> None:
    check_gradients(make_pkm, randn, changes, check_forward_mode)


def test_gradgradcheck(make_pkm: Any, randn: Any, everything: dict[str, Any]) -> None:
    check_gradients(make_pkm, randn, everything, torch.autograd.gradgradcheck)


def test_function_transforms(make_pkm: Any, randn: Any) -> None:
    pkm, x = make_pkm(), randn(3, 12)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(pkm, parameters, (x,))
        return out.pow(2).sum()

    parameters = dict(pkm.named_parameters())
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    torch.testing.assert_close(list(found.values()), list(expected))


# Masks


def awkward_mask(device: torch.device) -> Tensor:
    """Three rows of 5: scattered places, all of them, and a row without a token."""
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], device=device)
    return mask.bool()


@pytest.mark.parametrize("training", [True, False])
def test_masked_tokens_have_no_influence(
    device: torch.device, make_pkm: Any, randn: Any, changes: dict[str, Any], training: bool
) -> None:
    pkm = make_pkm(**changes).train(training)
    x, mask = randn(3, 5, 12), awkward_mask(device)
    assert_masked_ignored(pkm, x, mask, parameters=list(pkm.parameters()))
    for rubbish in (0.0, 1e30, torch.nan, torch.inf):
        out = pkm(torch.where(mask[..., None], x, rubbish), mask)
        assert out[~mask].eq(0).all()
        assert out[mask].isfinite().all()
    assert all(y.isfinite().all() for y in pkm.state_dict().values())
    assert not torch.allclose(pkm(x, mask), pkm(x))


@pytest.mark.parametrize("training", [True, False])
def test_masked_equals_trimmed(
    device: torch.device, make_pkm: Any, randn: Any, changes: dict[str, Any], training: bool
) -> None:
    """Outputs, gradients, and the statistics of batch normalisation."""
    x, mask = randn(3, 5, 12), awkward_mask(device)
    weight = randn(3, 5, 12, seed=2)
    found = []
    for tokens, kept in ((x, mask), (x[mask], None)):
        pkm = make_pkm(**changes).train(training)
        leaf = tokens.clone().requires_grad_()
        out = pkm(leaf, kept)
        rows = slice(None) if kept is None else kept
        (out[rows] * weight[mask]).sum().backward()
        gradients = {name: p.grad for name, p in pkm.named_parameters()}
        assert not any(gradient is None for gradient in gradients.values())
        found.append([out[rows], leaf.grad[rows], gradients, dict(pkm.named_buffers())])
    torch.testing.assert_close(found[0], found[1], atol=1e-11, rtol=0)


def test_masked_tokens_touch_no_slot(device: torch.device, make_pkm: Any, randn: Any) -> None:
    """An optimizer that moves what was touched must not meet what padding looked up."""
    x, mask = randn(3, 5, 12), awkward_mask(device)
    touched = []
    for tokens, kept in ((x, mask), (x[mask], None)):
        pkm = make_pkm(values_grad="factored")
        collect_factors(pkm.values.weight)
        pkm(tokens, kept).sum().backward()
        (factors,) = factors_of(pkm.values.weight)
        touched.append(torch.cat([slots for slots, _ in write_rows(*factors)]))
    assert touched[0].equal(touched[1])


def test_no_token_kept(
    device: torch.device, make_pkm: Any, randn: Any, changes: dict[str, Any]
) -> None:
    pkm = make_pkm(**changes)
    before = {name: y.clone() for name, y in pkm.named_buffers()}
    x = randn(2, 3, 12).requires_grad_()
    out = pkm(x, torch.zeros(2, 3, dtype=torch.bool, device=device))
    assert out.eq(0).all()
    out.sum().backward()
    for y in (x, *pkm.parameters()):
        assert y.grad is not None
        assert y.grad.eq(0).all()
    torch.testing.assert_close(dict(pkm.named_buffers()), before, atol=0, rtol=0)


@pytest.mark.parametrize("query_norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_router_and_masks(
    device: torch.device, randn: Any, query_norm: str, training: bool
) -> None:
    """A masked token scores 0 at slot 0, counts nowhere, and gets no gradient."""
    torch.manual_seed(0)
    settings = {"heads": 2, "num_keys": (5, 7), "topk": 3, "dim_head": 6}
    router = ProductKeyRouter(12, query_norm=query_norm, key_norm=True, **settings)
    router.to(device, torch.float64).train(training)
    with torch.no_grad():
        for number, parameter in enumerate(router.parameters()):
            parameter.add_(0.3 * randn(*parameter.shape, seed=number))
    x, mask = randn(3, 5, 12), awkward_mask(device)

    def scores(x: Tensor, mask: Tensor) -> Tensor:
        return router(x, mask)[1]

    assert_masked_ignored(scores, x, mask, parameters=list(router.parameters()))
    slots, found = router(torch.where(mask[..., None], x, torch.nan), mask)
    assert slots.shape == found.shape == (3, 5, 2, 3)
    assert slots[~mask].eq(0).all()
    assert found[~mask].eq(0).all()
    alone = router(x[mask])
    assert slots[mask].equal(alone[0])
    torch.testing.assert_close(found[mask], alone[1], atol=1e-12, rtol=0)


# The router


@pytest.mark.parametrize("num_keys", [5, (5, 7), (7, 5)])
def test_router_finds_the_best_slots(device: torch.device, randn: Any, num_keys: Any) -> None:
    torch.manual_seed(0)
    router = ProductKeyRouter(12, num_keys=num_keys, heads=2, topk=4, dim_head=3)
    router.to(device, torch.float64)
    x = randn(2, 3, 12)
    slots, scores = router(x)
    assert slots.dtype == torch.int64
    queries = router.norm((x @ router.to_queries.weight.T).unflatten(-1, (2, 2, 3)))
    c1, c2 = router.sub_keys()
    assert c1.shape[1] * c2.shape[1] == router.num_memories
    for place in ((0, 0), (0, 2), (1, 1)):
        for head in range(2):
            q1, q2 = queries[place][:, head]
            best, at = oracle.slot_scores(q1, q2, c1[head], c2[head]).topk(4)
            assert slots[place][head].equal(at)
            torch.testing.assert_close(scores[place][head], best, atol=1e-12, rtol=0)


def test_a_layer_is_its_router_and_its_pool(make_pkm: Any, randn: Any) -> None:
    pkm = make_pkm()
    router = ProductKeyRouter(12, heads=2, num_keys=7, topk=4, dim_head=6).to(pkm.keys)
    names = router.state_dict().keys()
    router.load_state_dict({k: v for k, v in pkm.state_dict().items() if k in names})
    x = randn(2, 3, 12)
    slots, scores = router(x)
    rows = pkm.values(slots.reshape(6, 8), scores.softmax(-1).reshape(6, 8))
    torch.testing.assert_close(pkm(x), rows.view(2, 3, 12), atol=1e-12, rtol=0)


@pytest.mark.parametrize("leading", [(), (4,), (2, 0), (2, 1, 3, 1)])
def test_router_takes_any_shape(device: torch.device, randn: Any, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    router = ProductKeyRouter(12, num_keys=7, heads=2, topk=4, dim_head=3).to(device).double()
    x = randn(*leading, 12)
    slots, scores = router(x)
    assert slots.shape == scores.shape == (*leading, 2, 4)
    flat = router(x.reshape(math.prod(leading), 12))
    assert slots.reshape(-1).equal(flat[0].reshape(-1))
    torch.testing.assert_close(scores.reshape(-1), flat[1].reshape(-1), atol=1e-12, rtol=0)


# Shapes


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3), (1, 2, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_any_leading_shape(
    device: torch.device,
    make_pkm: Any,
    randn: Any,
    changes: dict[str, Any],
    leading: tuple[int, ...],
    masked: bool,
) -> None:
    pkm = make_pkm(**changes).eval()
    x = randn(*leading, 12)
    mask = torch.ones(leading, dtype=torch.bool, device=device) if masked else None
    out = pkm(x, mask)
    assert out.shape == x.shape
    for token, expected in zip(x.reshape(-1, 12), out.reshape(-1, 12), strict=True):
        torch.testing.assert_close(pkm(token[None])[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (2, 0, 12), (2, 0, 3, 12)])
@pytest.mark.parametrize("masked", [False, True])
def test_no_tokens(
    device: torch.device,
    make_pkm: Any,
    changes: dict[str, Any],
    shape: tuple[int, ...],
    masked: bool,
) -> None:
    pkm = make_pkm(**changes)
    before = {name: y.clone() for name, y in pkm.named_buffers()}
    x = torch.zeros(shape, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(shape[:-1], dtype=torch.bool, device=device) if masked else None
    out = pkm(x, mask)
    assert out.shape == shape
    out.sum().backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in pkm.parameters())
    torch.testing.assert_close(dict(pkm.named_buffers()), before, atol=0, rtol=0)


@pytest.mark.parametrize("leading", [(), (1,), (1, 1)])
def test_training_on_one_token(
    make_pkm: Any, randn: Any, changes: dict[str, Any], leading: tuple[int, ...]
) -> None:
    pkm = make_pkm(**changes)
    out = pkm(randn(*leading, 12))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in pkm.parameters())


def test_strides_do_not_matter(
    device: torch.device, make_pkm: Any, randn: Any, changes: dict[str, Any]
) -> None:
    pkm = make_pkm(**changes)
    x, mask = randn(3, 5, 12), awkward_mask(device)
    expected = pkm(x, mask)
    for order in ((1, 0, 2), (2, 1, 0)):
        other = x.permute(order).contiguous().permute(order)
        assert not other.is_contiguous()
        torch.testing.assert_close(pkm(other, mask), expected, atol=1e-12, rtol=0)
        masks = mask.t().contiguous().t()
        torch.testing.assert_close(pkm(other, masks), expected, atol=1e-12, rtol=0)
    repeated = x[:1].expand(3, 5, 12)
    torch.testing.assert_close(pkm(repeated, mask), pkm(repeated.clone(), mask))


def test_input_is_left_alone(
    device: torch.device, make_pkm: Any, randn: Any, changes: dict[str, Any]
) -> None:
    pkm = make_pkm(**changes)
    x, mask = randn(3, 5, 12), awkward_mask(device)
    copies = x.clone(), mask.clone()
    pkm(x, mask)
    assert x.equal(copies[0])
    assert mask.equal(copies[1])


# Slots that stay as they are


@pytest.mark.parametrize("way", ["dense", "factored"])
def test_frozen_slots(
    device: torch.device, make_pkm: Any, randn: Any, changes: dict[str, Any], way: str
) -> None:
    """Gradients of exactly zero for frozen slots, every other gradient as it was."""
    x, mask = randn(3, 5, 12), awkward_mask(device)
    found = []
    outputs = []
    for frozen in (False, True):
        pkm = make_pkm(values_grad=way, **changes)
        trainable = torch.arange(pkm.num_memories, device=device) % 3 > 0
        if way == "factored":
            for table in pkm.values.parameters():
                collect_factors(table)
        out = pkm(x, mask, trainable if frozen else None)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in pkm.named_parameters()}
        if way == "factored":
            for name, table in pkm.values.named_parameters():
                assert gradients[f"values.{name}"] is None
                gradients[f"values.{name}"] = write(*factors_of(table)[0], pkm.num_memories)
        found.append(gradients)
        outputs.append(out)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=0)
    free, held = found
    for name in free:
        if name.startswith("values"):
            assert free[name][~trainable].ne(0).any(), name
            assert held[name][~trainable].eq(0).all(), name
            free[name][~trainable] = 0.0
        torch.testing.assert_close(held[name], free[name], atol=1e-12, rtol=0)


def test_factors_equal_the_dense_gradient(
    device: torch.device, make_pkm: Any, randn: Any, changes: dict[str, Any]
) -> None:
    x, mask = randn(3, 5, 12), awkward_mask(device)
    dense = make_pkm(**changes)
    factored = make_pkm(values_grad="factored", **changes)
    for table in factored.values.parameters():
        collect_factors(table)
    for pkm in (dense, factored):
        # Two batches add up.
        pkm(x, mask).square().sum().backward()
        pkm(x.flip(0)).sin().sum().backward()
    expected = dict(dense.named_parameters())
    for name, parameter in factored.named_parameters():
        gradient = parameter.grad
        if name.startswith("values"):
            assert gradient is None
            parts = [write(*factors, factored.num_memories) for factors in factors_of(parameter)]
            gradient = parts[0] + parts[1]
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-11, rtol=0)


# Shared pools


@pytest.mark.parametrize("way", ["dense", "factored"])
def test_layers_share_a_pool(device: torch.device, make_pkm: Any, randn: Any, way: str) -> None:
    torch.manual_seed(3)
    pool = MemoryPool(49, 12, values_grad=way).to(device, torch.float64)
    first, second = make_pkm(pool=pool), make_pkm(pool=pool, heads=3, topk=2)
    assert first.values is pool
    both = nn.Sequential(first, second)
    assert sum("values" in name for name, _ in both.named_parameters()) == 1
    # Loading finds the table under both names.
    state = both.state_dict()
    assert {"0.values.weight", "1.values.weight"} <= state.keys()
    assert state["0.values.weight"].data_ptr() == state["1.values.weight"].data_ptr()
    both.load_state_dict({name: y.clone() for name, y in state.items()})
    assert first.values.weight is second.values.weight

    apart = [make_pkm(), make_pkm(heads=3, topk=2)]
    for own, sharing in zip(apart, both, strict=True):
        own.load_state_dict(sharing.state_dict())
    x = randn(2, 5, 12)
    factors = collect_factors(pool.weight)
    out = both(x)
    expected = apart[1](apart[0](x))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    out.square().sum().backward()
    expected.square().sum().backward()
    total = apart[0].values.weight.grad + apart[1].values.weight.grad
    if way == "factored":
        assert pool.weight.grad is None
        assert len(factors) == 2
        found = write(*factors[0], 49) + write(*factors[1], 49)
    else:
        assert factors == []
        found = pool.weight.grad
    torch.testing.assert_close(found, total, atol=1e-11, rtol=0)


@pytest.mark.parametrize("option", ["experts", "concat_values_and_combine"])
def test_a_pool_of_the_right_kind(device: torch.device, make_pkm: Any, option: str) -> None:
    width = 6 if option == "concat_values_and_combine" else 12
    pool = MemoryPool(49, width, experts=option == "experts", dtype=torch.bfloat16).to(device)
    pkm = make_pkm(pool=pool, **{option: True})
    assert pkm.values is pool
    x = torch.ones(2, 12, device=device, dtype=torch.float64)
    assert pkm(x).shape == (2, 12)
    own = PKM(12, heads=2, num_keys=7, topk=4, dim_head=6, **{option: True})
    assert own.values.weight.shape == pool.weight.shape
    assert (own.values.inputs is None) == (pool.inputs is None)


# Noise


def test_gumbel_noise_has_its_distribution(device: torch.device) -> None:
    torch.manual_seed(0)
    first = torch.zeros(500, 100, device=device)
    second = torch.zeros(500, 60, device=device)
    noises = gumbel_noise(first, second)
    for noise, like in zip(noises, (first, second), strict=True):
        assert noise.shape == like.shape
        # Kolmogorov and Smirnov: beyond this in one of ten thousand samples.
        ordered = noise.double().flatten().sort().values
        ranks = torch.arange(1, len(ordered) + 1, device=device) / len(ordered)
        assert ((-(-ordered).exp()).exp() - ranks).abs().max() < 2.23 / len(ordered) ** 0.5
    assert abs(torch.corrcoef(torch.stack([noises[0][:, 0], noises[1][:, 0]]))[0, 1]) < 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gumbel_noise_is_finite(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    scores = torch.zeros(2000, 100, device=device, dtype=dtype)
    for noise in gumbel_noise(scores, scores):
        assert noise.dtype == dtype
        assert noise.isfinite().all()
    # The ends of what uniform numbers can be.
    for extreme in (0.0, 1.0 - 2**-24, 1.0):
        monkeypatch.setattr(torch, "rand", lambda *s, e=extreme, **_: torch.full(s, e))
        assert all(n.isfinite().all() for n in gumbel_noise(scores.cpu(), scores.cpu()))


def test_noise_chooses_by_softmax(device: torch.device, randn: Any) -> None:
    """With standard Gumbel noise on the scores the best one is a draw from their softmax."""
    torch.manual_seed(0)
    router = ProductKeyRouter(12, num_keys=(3, 4), heads=1, topk=1, dim_head=3)
    router.to(device, torch.float64)
    x = randn(12)
    queries = router.norm((x @ router.to_queries.weight.T).unflatten(-1, (2, 3)))
    c1, c2 = router.sub_keys()
    expected = oracle.slot_scores(queries[0], queries[1], c1[0], c2[0]).softmax(-1)
    slots, _ = router(x.expand(20_000, 12), gumbel_noise_scale=1.0)
    found = slots.flatten().bincount(minlength=12) / 20_000
    assert (found - expected).abs().max() < 4.5 * 0.5 / 20_000**0.5


def test_noise_in_training_only(make_pkm: Any, randn: Any, changes: dict[str, Any]) -> None:
    x = randn(2, 5, 12)
    pkm = make_pkm(**changes)
    torch.manual_seed(1)
    plain = pkm(x, gumbel_noise_scale=0.0)
    noisy = pkm(x, gumbel_noise_scale=1.0)
    assert not torch.allclose(noisy, plain)
    assert not torch.allclose(pkm(x, gumbel_noise_scale=1.0), noisy)
    noisy.sum().backward()
    assert pkm.keys.grad.isfinite().all()
    # As strong as it is told to be: within a rounding of the scores it chooses nothing else.
    torch.testing.assert_close(pkm(x, gumbel_noise_scale=1e-9), plain, atol=1e-6, rtol=0)
    pkm.eval()
    assert pkm(x, gumbel_noise_scale=1.0).equal(pkm(x))


def test_legacy_noise_in_evaluation_too(make_pkm: Any, randn: Any) -> None:
    pkm = make_pkm(legacy=True).eval()
    x = randn(2, 5, 12)
    assert not torch.allclose(pkm(x, gumbel_noise_scale=1.0), pkm(x))


def test_noise_in_float16(make_pkm: Any, randn: Any) -> None:
    pkm = make_pkm().half()
    for seed in range(20):
        torch.manual_seed(seed)
        out = pkm(randn(4, 50, 12, dtype=torch.float16), gumbel_noise_scale=1.0)
        assert out.isfinite().all()


# Dropout


@pytest.mark.parametrize(
    "option", ["input_dropout", "query_dropout", "value_dropout", "attn_dropout"]
)
def test_dropout_acts_in_training_only(
    make_pkm: Any, randn: Any, changes: dict[str, Any], option: str
) -> None:
    x = randn(2, 5, 12)
    pkm, plain = make_pkm(**changes, **{option: 0.5}), make_pkm(**changes)
    assert not torch.allclose(pkm(x), pkm(x))
    # A new one: statistics have moved.
    pkm = make_pkm(**changes, **{option: 0.5}).eval()
    torch.testing.assert_close(pkm(x), plain.eval()(x), atol=1e-12, rtol=0)
    assert make_pkm(**changes, **{option: 1.0})(x).isfinite().all()


def test_dropout_where_it_belongs(make_pkm: Any, randn: Any) -> None:
    """Everything dropped: zero from the values and the weights, one place from the query."""
    x = randn(2, 5, 12)
    for option in ("value_dropout", "attn_dropout"):
        assert make_pkm(**{option: 1.0})(x).eq(0).all()
    # After the norms, so every query is zero and every slot as good as another.
    out = make_pkm(query_dropout=1.0)(x)
    assert out.ne(0).any()
    torch.testing.assert_close(out, out[:1, :1].expand_as(out))
    assert make_pkm(query_dropout=1.0, gate="relu")(x).eq(0).all()
    # Before the norm of the output.
    pkm = make_pkm(value_dropout=1.0, norm_output=True)
    torch.testing.assert_close(pkm(x), pkm.output_norm.bias.expand_as(x))
    # Before the queries and after the norm of the input.
    assert make_pkm(input_dropout=1.0, pre_layernorm=True, gated_output=True)(x).eq(0).all()


# Coordinate descent


def test_differentiable_topk(device: torch.device, make_pkm: Any, randn: Any) -> None:
    """The same choice and values; a gradient to sub-keys that were not chosen as well."""
    pytest.importorskip("colt5_attention")
    x = randn(2, 5, 12)
    plain, soft = make_pkm(), make_pkm(differentiable_topk=True)
    torch.testing.assert_close(soft(x), plain(x), atol=1e-6, rtol=1e-6)
    reached = []
    for pkm in (plain, soft):
        # Scores near each other.
        pkm.keys.data *= 0.05
        pkm(x[:1, :1]).square().sum().backward()
        reached.append(pkm.keys.grad.flatten(3).ne(0).any(-1).sum().item())
    assert reached[0] <= 2 * 2 * 4 < reached[1]
    torch.manual_seed(0)
    router = ProductKeyRouter(
        12, num_keys=(5, 8), heads=2, topk=3, dim_head=6, differentiable_topk=True
    )
    router.to(device, torch.float64)
    other = ProductKeyRouter(12, num_keys=(5, 8), heads=2, topk=3, dim_head=6).to(x)
    other.load_state_dict(router.state_dict())
    assert router(x)[0].equal(other(x)[0])
    torch.testing.assert_close(router(x)[1], other(x)[1], atol=1e-6, rtol=1e-6)


def test_coordinate_descent_is_imported_on_demand() -> None:
    code = (
        "import sys, torch\n"
        "from product_key_memory import PKM\n"
        "PKM(4, num_keys=3, topk=2, dim_head=2)(torch.ones(1, 4))\n"
        "print('colt5_attention' in sys.modules)"
    )
    path = [p for p in sys.path if p]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.strip() == "False"


# Parameters


def test_a_new_layer_starts_like_the_reference(device: torch.device) -> None:
    """Its distributions: normal keys and values, a uniform linear map."""
    torch.manual_seed(0)
    pkm = PKM(64, num_keys=32, dim_head=16).to(device)
    shapes = {name: tuple(p.shape) for name, p in pkm.named_parameters()}
    assert shapes == {
        "to_queries.weight": (2 * 4 * 16, 64),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "keys": (4, 32, 2, 16),
        "values.weight": (1024, 64),
    }
    assert abs(pkm.keys.std().item() - 0.25) < 0.01
    assert abs(pkm.values.weight.std().item() - 0.125) < 0.002
    assert 0.98 / 8 < pkm.to_queries.weight.abs().max() <= 1 / 8
    concat = PKM(64, num_keys=32, dim_head=16, concat_values_and_combine=True)
    assert concat.values.weight.shape == (1024, 16)
    assert abs(concat.values.weight.std().item() - 0.25) < 0.01
    assert concat.combine is not None
    assert concat.combine.weight.shape == (64, 64)


def test_arguments_in_the_order_of_the_reference() -> None:
    kinds = inspect.signature(PKM).parameters.values()
    expected = {
        "dim": inspect.Parameter.empty,
        "heads": 4,
        "num_keys": 128,
        "topk": 32,
        "dim_head": 128,
        "input_dropout": 0.0,
        "query_dropout": 0.0,
        "value_dropout": 0.0,
        "attn_dropout": 0.0,
        "use_layernorm": True,
        "pre_layernorm": False,
        "differentiable_topk": False,
        "concat_values_and_combine": False,
        "norm_output": False,
        "non_competitive_gates": False,
    }
    assert {p.name: p.default for p in kinds if p.kind == p.POSITIONAL_OR_KEYWORD} == expected
    assert [p.name for p in kinds if p.kind == p.POSITIONAL_OR_KEYWORD] == list(expected)
    forward = inspect.signature(PKM.forward).parameters
    assert list(forward) == [
        "self",
        "x",
        "input_mask",
        "mem_trainable_mask",
        "gumbel_noise_scale",
    ]
    assert ProductKeyMemory is PKM


def test_options_that_say_the_same(make_pkm: Any, randn: Any) -> None:
    x = randn(2, 5, 12)
    for one, other in (
        ({"use_layernorm": False}, {"query_norm": "batch"}),
        ({"use_layernorm": False, "query_norm": "batch"}, {"query_norm": "batch"}),
        ({}, {"query_norm": "layer", "gate": "softmax"}),
        ({"non_competitive_gates": True}, {"gate": "relu"}),
        ({"num_keys": 7}, {"num_keys": (7, 7)}),
        ({"num_keys": [5, 7]}, {"num_keys": (5, 7)}),
    ):
        assert make_pkm(**one)(x).equal(make_pkm(**other)(x))
    assert make_pkm(num_keys=(7, 7)).num_keys == 7
    assert make_pkm(num_keys=[5, 7]).num_keys == (5, 7)


@pytest.mark.parametrize("prefix", ["", "1.2."])
def test_statistics_of_the_reference_are_repeated(make_pkm: Any, randn: Any, prefix: str) -> None:
    """Its batch norm has dim_head features, which heads and halves have in common."""
    pkm: Any = make_pkm(use_layernorm=False).eval()
    small = {
        "weight": randn(6),
        "bias": randn(6, seed=2),
        "running_mean": randn(6, seed=3),
        "running_var": randn(6, seed=4).exp(),
    }
    state = {name: randn(*y.shape, seed=5) for name, y in pkm.state_dict().items() if y.ndim}
    state |= {f"norm.fn.{name}": y for name, y in small.items()}
    state["norm.fn.num_batches_tracked"] = torch.tensor(11)
    given = {prefix + name: y for name, y in state.items()}
    copies = dict(given)
    holder: nn.Module = pkm
    if prefix:
        holder = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), nn.Identity(), pkm))
    holder.load_state_dict(given)
    assert all(given[name] is copies[name] for name in copies)
    assert pkm.norm.fn.num_batches_tracked == 11
    for name, y in small.items():
        assert pkm.state_dict()[f"norm.fn.{name}"].equal(y.repeat(4))
    # What it computes: every sub-query by the same statistics.
    x = randn(2, 5, 12)
    halves = (x @ state["to_queries.weight"].T).unflatten(-1, (4, 6))
    halves = (halves - small["running_mean"]) / (small["running_var"] + 1e-5).sqrt()
    queries = (halves * small["weight"] + small["bias"]).flatten(-2)
    torch.testing.assert_close(pkm._normalise(pkm.to_queries(x), None), queries, atol=1e-12, rtol=0)
    # Our own statistics go through untouched.
    other = make_pkm(use_layernorm=False)
    other.load_state_dict(pkm.state_dict())
    assert other.norm.fn.running_mean.equal(pkm.norm.fn.running_mean)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(pkm.state_dict() | {"norm.fn.weight": randn(5)})


def test_running_statistics_are_learnt(device: torch.device, make_pkm: Any, randn: Any) -> None:
    """In the long run evaluation normalises as training does."""
    pkm = make_pkm(use_layernorm=False)
    x, mask = randn(3, 5, 12), awkward_mask(device)
    for _ in range(150):
        trained = pkm(x, mask)
    queries = pkm.to_queries(x[mask])
    statistics = pkm.norm.fn
    assert statistics.num_batches_tracked == 150
    torch.testing.assert_close(statistics.running_mean, queries.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(statistics.running_var, queries.var(0), atol=1e-6, rtol=1e-6)
    before = {name: y.clone() for name, y in pkm.named_buffers()}
    evaluated = pkm.eval()(x, mask)
    assert not torch.allclose(evaluated, trained)
    # The unbiased variance is an eighth larger than the one of training.
    statistics.running_var.mul_(7 / 8)
    torch.testing.assert_close(pkm(x, mask), trained, atol=1e-5, rtol=1e-5)
    assert pkm.norm.fn.running_mean.equal(before["norm.fn.running_mean"])
