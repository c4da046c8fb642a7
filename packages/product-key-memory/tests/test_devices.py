"""Where the layer has to go: graphs, precisions, files, processes, other people's mixins."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from product_key_memory import PKM, MemoryPool, ProductKeyRouter
from product_key_memory.factors import collect_factors
from shared_core.testing import (
    assert_compiles,
    assert_data_parallel,
    assert_exports,
    assert_hub_round_trip,
    assert_portable,
)

SETTINGS: dict[str, Any] = {"dim": 12, "heads": 2, "num_keys": 7, "topk": 4, "dim_head": 6}


def build(**changes: Any) -> PKM:
    torch.manual_seed(0)
    return PKM(**(SETTINGS | changes))


def tokens(device: torch.device, n: int = 5, b: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(b, n, 12, generator=generator)
    mask = torch.rand(b, n, generator=generator) < 0.7
    return x.to(device), mask.to(device)


@pytest.mark.parametrize("masked", [False, True])
def test_portable(device: torch.device, changes: dict[str, Any], masked: bool) -> None:
    assert_portable(lambda: build(**changes), tokens(device)[: 1 + masked], device)


def test_values_of_another_dtype(device: torch.device) -> None:
    """The table in bfloat16, all else in float32, in copies and files, too."""
    x, mask = tokens(device)
    for changes in ({}, {"experts": True}, {"concat_values_and_combine": True}):
        pkm = build(values_dtype=torch.bfloat16, **changes).to(device)
        assert {p.dtype for p in pkm.values.parameters()} == {torch.bfloat16}
        assert {p.dtype for n, p in pkm.named_parameters() if "values" not in n} == {torch.float32}
        assert pkm.values.weight.numel() * pkm.values.weight.element_size() == 2 * 49 * (
            6 if "concat_values_and_combine" in changes else 12
        )
        out = pkm(x, mask)
        assert out.dtype == torch.float32
        wide = build(**changes).to(device)
        wide.load_state_dict(pkm.state_dict())
        torch.testing.assert_close(out, wide(x, mask), atol=0.05, rtol=0.05)
        for y in (out, wide(x, mask)):
            y.square().sum().backward()
        for (name, p), q in zip(pkm.named_parameters(), wide.parameters(), strict=True):
            assert p.grad.dtype == p.dtype
            torch.testing.assert_close(
                p.grad.float(), q.grad, atol=0.05 * q.grad.abs().max().item(), rtol=0.05, msg=name
            )
        with torch.device("meta"):
            blank = build(values_dtype=torch.bfloat16, **changes)
        blank.to_empty(device=device).load_state_dict(pkm.state_dict())
        for copied in (blank, copy.deepcopy(pkm), pickle.loads(pickle.dumps(pkm))):
            assert copied(x, mask).equal(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(
    device: torch.device, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """The whole layer in halves: next to the same rounded weights in float64, where both agree."""
    pkm = build(**changes).to(device, dtype).eval()
    exact = copy.deepcopy(pkm).double()
    x = tokens(device, n=40)[0].to(dtype)
    out = pkm(x)
    assert out.dtype == dtype
    error = (out.double() - exact(x.double())).abs()
    scale = exact(x.double()).abs().mean()
    # A rounded score may let another slot win now and then.
    assert error.median() < (0.05 if dtype == torch.bfloat16 else 0.01) * scale
    out.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in pkm.parameters())


def test_autocast(device: torch.device, changes: dict[str, Any]) -> None:
    pkm = build(**changes).to(device)
    x, mask = tokens(device, n=40)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = pkm(x, mask)
        halves = pkm(x.bfloat16(), mask)
    expected = pkm(x, mask)
    for y in (out, halves):
        assert y.isfinite().all()
        assert (y.float() - expected).abs().median() < 0.1 * expected.abs().mean() + 1e-3
        y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in pkm.parameters())


def test_autocast_keeps_sums_in_the_dtype_of_the_values(device: torch.device) -> None:
    """Neither the operators nor their gradients are rounded to bfloat16."""
    pool = MemoryPool(20, 8, experts=True).to(device)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(20, (6, 4), generator=generator).to(device)
    weights = torch.randn(6, 4, generator=generator).to(device).requires_grad_()
    x = torch.randn(6, 8, generator=generator).to(device).requires_grad_()
    found = []
    for enabled in (False, True):
        for y in (weights, x, *pool.parameters()):
            y.grad = None
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            out = pool(indices, weights * pool.activations(indices, x))
            out.square().sum().backward()
        found.append([out, *(y.grad for y in (weights, x, *pool.parameters()))])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


# Graphs


def test_compiles(device: torch.device, everything: dict[str, Any]) -> None:
    pkm = build(**everything).to(device)
    trainable = torch.arange(pkm.num_memories, device=device) % 2 > 0
    assert_compiles(pkm, (*tokens(device), trainable))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_every_kind_compiles(device: torch.device, changes: dict[str, Any], masked: bool) -> None:
    assert_compiles(build(**changes).to(device), tokens(device)[: 1 + masked])


@pytest.mark.slow
def test_compiles_with_noise(device: torch.device) -> None:
    pkm = build().to(device)
    x, _ = tokens(device)
    compiled = torch.compile(pkm, fullgraph=True, backend="aot_eager")
    outs = [compiled(x, gumbel_noise_scale=1.0) for _ in range(2)]
    assert not torch.allclose(outs[0], outs[1])
    torch.testing.assert_close(pkm.eval()(x), compiled(x, gumbel_noise_scale=1.0))
    torch.compiler.reset()


def test_compiles_under_autocast(device: torch.device) -> None:
    pkm = build(experts=True, gated_output=True).to(device)

    def run(x: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return pkm(x, mask)

    assert_compiles(run, tokens(device))


@pytest.mark.slow
def test_compiles_for_any_length(device: torch.device) -> None:
    """Without a recompilation, batch normalisation's statistics included."""
    pkm = build(use_layernorm=False, topk=2).to(device)
    eager = copy.deepcopy(pkm)
    compiled = torch.compile(pkm, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, b in ((5, 2), (9, 2), (2, 4), (33, 3)):
            x, mask = tokens(device, n, b)
            torch.testing.assert_close(compiled(x, mask), eager(x, mask), atol=1e-5, rtol=1e-4)
    for name, y in pkm.state_dict().items():
        torch.testing.assert_close(y, eager.state_dict()[name])
    torch.compiler.reset()


def test_compiles_with_inductor(device: torch.device) -> None:
    assert_compiles(build().to(device), tokens(device), backend="inductor")


def export(device: torch.device, changes: dict[str, Any], masked: bool) -> None:
    pkm = build(**changes).to(device).eval()
    b, n = torch.export.Dim("b"), torch.export.Dim("n")
    shapes = ({0: b, 1: n}, {0: b, 1: n})[: 1 + masked]
    given = [tokens(device, length, rows)[: 1 + masked] for length, rows in ((5, 2), (9, 3))]
    assert_exports(pkm, given[0], shapes, given[1])


def test_exports(device: torch.device, everything: dict[str, Any]) -> None:
    export(device, everything, masked=True)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_every_kind_exports(device: torch.device, changes: dict[str, Any], masked: bool) -> None:
    export(device, changes, masked)


def test_router_goes_everywhere(device: torch.device) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return ProductKeyRouter(
            12, heads=2, num_keys=(5, 7), topk=4, dim_head=6, query_norm="batch", key_norm=True
        ).eval()

    x, mask = tokens(device)
    assert_portable(make, (x, mask), device)
    n = torch.export.Dim("n")
    given = [tokens(device, length) for length in (5, 9)]
    assert_exports(make().to(device), given[0], ({1: n}, {1: n}), given[1])


def test_every_module_can_be_drawn_anew(changes: dict[str, Any]) -> None:
    """As frameworks do that build a model on the meta device."""
    pkm = PKM(**(SETTINGS | changes))
    with torch.no_grad():
        for parameter in pkm.parameters():
            parameter.fill_(torch.nan)
    for module in pkm.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in pkm.parameters())


# Files


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_hub(tmp_path: Path, changes: dict[str, Any], dtype: str | None) -> None:
    x, _ = tokens(torch.device("cpu"))
    changes["values_dtype"] = dtype
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(PKM).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert_hub_round_trip(PKM, defaults | SETTINGS | changes, (x,), tmp_path)


def test_hub_of_the_router(tmp_path: Path) -> None:
    settings = SETTINGS | {"num_keys": [5, 7], "query_norm": "batch", "key_norm": True}
    x, _ = tokens(torch.device("cpu"))
    assert_hub_round_trip(ProductKeyRouter, settings, (x,), tmp_path)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "safetensors"])
def test_training_goes_on_in_a_copy(
    device: torch.device, tmp_path: Path, changes: dict[str, Any], way: str
) -> None:
    """Also what loading depends on: hooks and statistics."""
    pkm = build(**changes).to(device)
    x, mask = tokens(device)
    pkm(x, mask).square().sum().backward()
    other = build(**changes).to(device)
    if way == "deepcopy":
        other = copy.deepcopy(pkm)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(pkm))
    elif way == "torch.save":
        torch.save(pkm.state_dict(), tmp_path / "state")
        other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    else:
        save_file(pkm.state_dict(), tmp_path / "state")
        other.load_state_dict(load_file(tmp_path / "state", device=str(device)))
    found = []
    for module in (pkm, other):
        module.zero_grad()
        out = module(x, mask)
        out.square().sum().backward()
        found.append([out, {n: p.grad for n, p in module.named_parameters()}])
        # A checkpoint under the names of an older release goes into the copy as well.
        state = {
            n.replace("values.weight", "values.0.weight"): y.clone()
            for n, y in module.state_dict().items()
        }
        with torch.no_grad():
            module.values.weight.zero_()
        module.load_state_dict(state)
        assert module.values.weight.any()
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    torch.testing.assert_close(dict(pkm.named_buffers()), dict(other.named_buffers()))


def test_a_copy_shares_nothing(device: torch.device, changes: dict[str, Any]) -> None:
    pkm = build(**changes).to(device)
    other = copy.deepcopy(pkm)
    with torch.no_grad():
        for y in other.state_dict().values():
            y.zero_()
    assert all(bool(p.any()) for name, p in pkm.named_parameters() if "bias" not in name)


# Training


@pytest.mark.parametrize("way", ["dense", "factored"])
def test_gradients_under_inference_and_checkpointing(device: torch.device, way: str) -> None:
    """Inference mode, then a pass that is computed again in the backward pass: once counted."""
    pkm = build(experts=True, values_grad=way).to(device)
    x, mask = tokens(device)
    lists = [collect_factors(table) for table in pkm.values.parameters()]
    with torch.inference_mode():
        expected = pkm(x, mask)
    out = torch.utils.checkpoint.checkpoint(pkm, x, mask, use_reentrant=False)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert [len(factors) for factors in lists] == [way == "factored"] * 2
    assert all((p.grad is None) == (way == "factored") for p in pkm.values.parameters())


def test_learns_by_heart(device: torch.device) -> None:
    """Random facts, one a token, through padding: plain torch optimizers do."""
    pkm = build(dim_head=8, num_keys=16, query_norm="batch").to(device)
    x, mask = tokens(device, n=40)
    target = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(2)).to(device)
    target = target * mask[..., None]
    optimizer = torch.optim.Adam(pkm.parameters(), lr=2e-2)
    for _ in range(150):
        loss = F.mse_loss(pkm(x, mask), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * target.square().mean()


def build_everything() -> nn.Module:
    torch.manual_seed(0)
    options = {"key_norm": True, "pre_layernorm": True, "norm_output": True, "gated_output": True}
    return nn.Sequential(build(experts=True, **options), build(concat_values_and_combine=True))


def build_shared() -> nn.Module:
    torch.manual_seed(0)
    pool = MemoryPool(49, 12)
    return nn.Sequential(build(pool=pool), build(pool=pool, heads=4))


@pytest.mark.parametrize(
    ("builder", "blocks"),
    [
        pytest.param(build_everything, ("0.values", "0", "1"), id="blocks"),
        pytest.param(build_everything, (), id="whole", marks=pytest.mark.slow),
        # A table that two blocks share belongs to neither.
        pytest.param(build_shared, (), id="shared", marks=pytest.mark.slow),
    ],
)
def test_data_parallel(builder: Any, blocks: tuple[str, ...]) -> None:
    """Over gloo, so on the CPU whatever the device of the other tests."""
    assert_data_parallel(builder, tokens(torch.device("cpu"), n=6, b=4)[:1], blocks=blocks)
