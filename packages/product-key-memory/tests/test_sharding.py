"""Tables spread over processes against the same table in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from product_key_memory import PKM, ColumnwiseValues, MemoryPool, PKMOptimizer, RowwiseValues
from product_key_memory.factors import collect_factors
from product_key_memory.operators import write
from shared_core.testing import run_ranks

STYLES: dict[str, Callable[[], Any]] = {
    "rows": RowwiseValues,
    "rows, own tokens": lambda: RowwiseValues(input_layouts=Shard(0)),
    "columns": ColumnwiseValues,
    "columns, same tokens": lambda: ColumnwiseValues(input_layouts=Replicate()),
}
# Tokens of each rank where they have their own, and nothing that 2 or 4 divides: 13 slots, width 7.
COUNTS = [3, 0, 5, 1]
SLOTS, WIDTH, READS = 13, 7, 6
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "experts": {"experts": True},
    "concatenated": {"concat_values_and_combine": True},
}


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def close(ours: Tensor, single: Tensor) -> None:
    whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
    torch.testing.assert_close(whole, single, rtol=1e-12, atol=1e-12)


def own_tokens(style: Any) -> tuple[int, slice]:
    """How many tokens all ranks have, and which this one has."""
    counts, rank = COUNTS[: dist.get_world_size()], dist.get_rank()
    if style.input_layouts == Replicate():
        return sum(counts), slice(None)
    return sum(counts), slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and weights of n tokens, and what multiplies the result."""
    indices = torch.randint(SLOTS, (n, READS))
    weights = torch.randn(n, READS, dtype=torch.float64)
    return indices, weights, torch.randn(n, WIDTH, dtype=torch.float64)


def pools(style: Any, **options: Any) -> tuple[MemoryPool, MemoryPool]:
    """A pool, whole and sharded."""
    single = MemoryPool(SLOTS, WIDTH, dtype=torch.float64, **options)
    sharded = copy.deepcopy(single)
    parallelize_module(sharded, mesh_of_all(), style)
    return single, sharded


def check_pool(style: Any, trainable: Tensor | None = None) -> None:
    """Result, gradients of values and weights, and those of a second backward pass."""
    single, sharded = pools(style)
    n, mine = own_tokens(style)
    indices, weights, scale = draw(n)
    found = []
    for pool, part in ((single, slice(None)), (sharded, mine)):
        w = weights[part].clone().requires_grad_()
        out = pool(indices[part], w, trainable)
        loss = (out * scale[part]).sum() + (out**3).sum()
        grads = torch.autograd.grad(loss, (w, pool.weight), create_graph=True)
        loss = (grads[0] ** 2 * weights[part]).sum()
        second = torch.autograd.grad(loss, (w, pool.weight))
        found.append((out, grads[0], second[0], grads[1], second[1]))
    for i, (one, ours) in enumerate(zip(*found, strict=True)):
        close(ours, one[mine] if i < 3 else one)
    assert found[1][3].placements == sharded.weight.placements
    if trainable is not None:
        assert not found[1][3].full_tensor()[~trainable].any()


def check_trainable(style: Any) -> None:
    check_pool(style, torch.arange(SLOTS) % 3 > 0)


def check_layer(style: Any) -> None:
    """Every gradient of a whole PKM, of all kinds, with tokens and a mask of slots."""
    for options in KINDS.values():
        torch.manual_seed(1)
        single = PKM(7, heads=2, num_keys=(3, 5), topk=3, dim_head=7, **options).double()
        sharded = copy.deepcopy(single)
        parallelize_module(sharded, mesh_of_all(), {"values": style})
        n, mine = own_tokens(style)
        x = torch.randn(n, 7, dtype=torch.float64)
        trainable = torch.rand(15) < 0.7
        found = []
        for layer, part in ((single, slice(None)), (sharded, mine)):
            tokens = x[part].clone().requires_grad_()
            out = layer(tokens, mem_trainable_mask=trainable)
            (out**3).sum().backward()
            found.append((out, tokens.grad))
        for one, ours in zip(*found, strict=True):
            close(ours, one[mine])
        for (name, one), ours in zip(single.named_parameters(), sharded.parameters(), strict=True):
            assert one.grad.any(), name
            if not isinstance(ours, DTensor) and mine != slice(None):
                dist.all_reduce(ours.grad)
            close(ours.grad, one.grad)


def check_factored(style: Any) -> None:
    """Factors are those of the shard, and have weight on no row that no token reads."""
    single = MemoryPool(64, WIDTH, experts=True, dtype=torch.float64)
    sharded = MemoryPool(64, WIDTH, experts=True, values_grad="factored", dtype=torch.float64)
    sharded.load_state_dict(single.state_dict())
    parallelize_module(sharded, mesh_of_all(), style)
    n, mine = own_tokens(style)
    _, weights, x = draw(n)
    # Never a rank's first row.
    indices = 2 * torch.randint(32, weights.shape) + 1
    factors = [collect_factors(table) for table in sharded.parameters()]
    for pool, part in ((single, slice(None)), (sharded, mine)):
        out = pool(indices[part], weights[part] * pool.activations(indices[part], x[part]))
        (out**3).sum().backward()
    for table, one, found in zip(sharded.parameters(), single.parameters(), factors, strict=True):
        assert table.grad is None
        ((slots, scale, rows),) = found
        grad = distribute_tensor(one.grad, table.device_mesh, table.placements).to_local()
        assert rows.shape[1] == grad.shape[1]
        torch.testing.assert_close(write(slots, scale, rows, len(grad)), grad)
        touched = torch.zeros(len(grad), dtype=torch.bool)
        touched[slots[scale != 0]] = True
        assert torch.equal(touched, grad.any(1))


def check_optimizer(style: Any) -> None:
    """Steps of rows, by gradients of both kinds."""
    for rule in ("adagrad", "adam"):
        single = MemoryPool(SLOTS, WIDTH, dtype=torch.float64)
        found = [single]
        for values_grad in ("dense", "factored"):
            pool = MemoryPool(SLOTS, WIDTH, dtype=torch.float64, values_grad=values_grad)
            pool.load_state_dict(single.state_dict())
            found.append(parallelize_module(pool, mesh_of_all(), style))
        n, mine = own_tokens(style)
        batches = [draw(n) for _ in range(3)]
        for pool in found:
            part = slice(None) if pool is single else mine
            optimizer = PKMOptimizer(pool.parameters(), rule=rule, max_grad_norm=0.5)
            for indices, weights, scale in batches:
                optimizer.zero_grad()
                (pool(indices[part], weights[part]) * scale[part]).sum().backward()
                optimizer.step()
        for pool in found[1:]:
            close(pool.weight.detach(), single.weight.detach())


def check_no_tokens(style: Any) -> None:
    _, sharded = pools(style, experts=True)
    weights = torch.zeros(0, READS, dtype=torch.float64, requires_grad=True)
    indices = torch.zeros(0, READS, dtype=torch.int64)
    x = torch.zeros(0, WIDTH, dtype=torch.float64)
    out = sharded(indices, weights * sharded.activations(indices, x))
    out.sum().backward()
    assert out.shape == (0, WIDTH)
    assert weights.grad is not None
    for table in sharded.parameters():
        assert not table.grad.full_tensor().any()


def check_data_parallel(style: Any) -> None:
    """Beside FSDP2, which averages the gradients of the other parameters."""
    if style.input_layouts == Replicate():
        return
    single = PKM(7, heads=2, num_keys=4, topk=3, dim_head=5).double()
    sharded = copy.deepcopy(single)
    parallelize_module(sharded, mesh_of_all(), {"values": style})
    fully_shard(sharded, mesh=mesh_of_all(), ignored_params={sharded.values.weight})
    n, mine = own_tokens(style)
    x = torch.randn(n, 7, dtype=torch.float64)
    for layer, part in ((single, slice(None)), (sharded, mine)):
        (layer(x[part]) ** 3).sum().backward()
    for (name, one), ours in zip(single.named_parameters(), sharded.parameters(), strict=True):
        averaged = 1 if name == "values.weight" else dist.get_world_size()
        close(ours.grad.full_tensor() * averaged, one.grad)


def check_elsewhere(style: Any) -> None:
    """From the meta device, from each rank's own table, in copies, frozen, shared."""
    single, sharded = pools(style)
    n, mine = own_tokens(style)
    indices, weights, _ = draw(n)
    expected = single(indices, weights)[mine]
    with torch.device("meta"):
        late = MemoryPool(SLOTS, WIDTH, dtype=torch.float64)
    late.weight.requires_grad_(False)
    parallelize_module(late, mesh_of_all(), style)
    assert late.weight.is_meta
    assert not late.weight.requires_grad
    late.to_empty(device="cpu").load_state_dict(sharded.state_dict())
    own = copy.deepcopy(single)
    with torch.no_grad():
        own.weight += dist.get_rank()
    parallelize_module(own, mesh_of_all(), style, src_data_rank=None)
    close(own.weight.to_local(), sharded.weight.to_local() + dist.get_rank())
    for pool in (late, copy.deepcopy(sharded)):
        close(pool(indices[mine], weights[mine]), expected)
    weight = sharded.weight
    assert parallelize_module(sharded, mesh_of_all(), style).weight is weight


def check_refusals(style: Any) -> None:
    mesh, rank, ranks = mesh_of_all(), dist.get_rank(), dist.get_world_size()
    single, sharded = pools(style)
    with pytest.raises(TypeError, match="shards a MemoryPool, got Linear"):
        parallelize_module(nn.Linear(4, 4), mesh, style)
    with pytest.raises(ValueError, match="one dimension, got 2"):
        style._apply(single, init_device_mesh("cpu", (1, ranks)))
    with pytest.raises(ValueError, match=rf"1 (rows|columns) leave a rank of {ranks} without"):
        parallelize_module(MemoryPool(1, 1), mesh, style)
    other = type(style)(input_layouts=Replicate() if style.input_layouts == Shard(0) else Shard(0))
    with pytest.raises(ValueError, match=r"is read by a .*Reader from a .* already"):
        parallelize_module(sharded, mesh, other)
    reads = READS + rank
    with pytest.raises(ValueError, match=r"one number of slots on all ranks, got \[6, 7"):
        sharded(torch.zeros(2, reads, dtype=torch.int64), torch.zeros(2, reads))
    if style.input_layouts == Replicate():
        with pytest.raises(ValueError, match=r"the same tokens on all ranks, got \[2, 3"):
            sharded(torch.zeros(2 + rank, 6, dtype=torch.int64), torch.zeros(2 + rank, 6))
    sharded.weight = nn.Parameter(single.weight.detach())
    with pytest.raises(TypeError, match="was sharded, but has become a Parameter"):
        sharded(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6))


CHECKS: dict[str, Callable[[Any], None]] = {
    "pool": check_pool,
    "trainable": check_trainable,
    "layer": check_layer,
    "factored": check_factored,
    "optimizer": check_optimizer,
    "no tokens": check_no_tokens,
    "data parallel": check_data_parallel,
    "elsewhere": check_elsewhere,
    "refusals": check_refusals,
}


CHECKPOINTS = ("rows", "columns")


def table_of(style: str, mesh: DeviceMesh | None, seed: int = 0) -> MemoryPool:
    """A pool with the values that checkpoints have, unless the seed is another one."""
    torch.manual_seed(seed)
    pool = MemoryPool(SLOTS, WIDTH)
    if mesh is not None:
        parallelize_module(pool, mesh, STYLES[style]())
    return pool


def reload(folder: str, saved: str) -> None:
    """In each process: either style loads what one style has saved."""
    expected = table_of(saved, None).weight
    for style in CHECKPOINTS:
        pool = table_of(style, mesh_of_all() if dist.is_initialized() else None, seed=1)
        state = pool.state_dict()
        dcp.load(state, checkpoint_id=Path(folder) / saved, no_dist=not dist.is_initialized())
        pool.load_state_dict(state)
        weight = pool.weight
        assert torch.equal(
            weight.full_tensor() if isinstance(weight, DTensor) else weight, expected
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


def run_checks(folder: str) -> None:
    """In each process: all checks, and a checkpoint of each style."""
    for name, style in STYLES.items():
        for what, check in CHECKS.items():
            torch.manual_seed(0)
            try:
                check(style())
            except Exception as error:
                # Ends the other processes, which wait for this one.
                raise AssertionError(f"{name}: {what}") from error
    for name in CHECKPOINTS:
        dcp.save(table_of(name, mesh_of_all()).state_dict(), checkpoint_id=Path(folder) / name)


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """The checkpoints of two processes that have passed all checks."""
    run_ranks(run_checks, 2, str(folder / "2"), timeout=100)
    return folder / "2"


@pytest.fixture(scope="module")
def four(folder: Path) -> Path:
    run_ranks(run_checks, 4, str(folder / "4"), timeout=200)
    return folder / "4"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes_then_one(two: Path) -> None:
    for saved in CHECKPOINTS:
        reload(str(two), saved)


def load_and_train(folder: str) -> None:
    """In each of four processes: checkpoints of two, and what takes long."""
    for saved in CHECKPOINTS:
        reload(folder, saved)
    for style in STYLES.values():
        check_two_dimensions(style())
        check_compiled(style())


def check_two_dimensions(style: Any) -> None:
    """Two replicas of two shards: FSDP2 averages over the replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "table"))
    replica, rank = mesh["data"].get_local_rank(), mesh["table"].get_local_rank()
    torch.manual_seed(0)
    single = PKM(7, heads=2, num_keys=4, topk=3, dim_head=5).double()
    sharded = copy.deepcopy(single)
    parallelize_module(sharded, mesh["table"], {"values": style})
    fully_shard(sharded, mesh=mesh["data"])
    x = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    (single(x) ** 3).sum().backward()
    mine = x[replica] if style.input_layouts == Replicate() else x[replica, rank]
    (sharded(mine) ** 3).sum().backward()
    close(2 * sharded.values.weight.grad.full_tensor(), single.values.weight.grad)


def check_compiled(style: Any) -> None:
    """The graph breaks where ranks meet."""
    torch.manual_seed(0)
    layer = PKM(7, heads=2, num_keys=4, topk=3, dim_head=5).double()
    parallelize_module(layer, mesh_of_all(), {"values": style})
    n, mine = own_tokens(style)
    x = torch.randn(n, 7, dtype=torch.float64)[mine]
    found = []
    for model in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        out = model(x)
        (out**3).sum().backward()
        found.append((out, *(p.grad for p in layer.parameters())))
    for ours, eager in zip(*found, strict=True):
        close(ours, eager.full_tensor() if isinstance(eager, DTensor) else eager)


@pytest.mark.slow
def test_two_processes_then_four(two: Path) -> None:
    run_ranks(load_and_train, 4, str(two), timeout=300)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_four_processes_then_two_then_one(four: Path) -> None:
    for saved in CHECKPOINTS:
        run_ranks(reload, 2, str(four), saved, timeout=100)
        reload(str(four), saved)


@pytest.mark.parametrize("style", [RowwiseValues, ColumnwiseValues])
def test_layouts(style: type[RowwiseValues | ColumnwiseValues]) -> None:
    assert "Shard(dim=0)" in repr(style(input_layouts=Shard(0)))
    assert "Replicate()" in repr(style(input_layouts=Replicate()))
    with pytest.raises(ValueError, match=r"Replicate\(\) or Shard\(0\), got .*Shard\(dim=1\)"):
        style(input_layouts=Shard(1))
