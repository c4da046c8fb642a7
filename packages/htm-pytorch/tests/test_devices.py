"""Where the modules have to go: graphs, precisions, files, processes, other people's mixins."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htm_pytorch import HTMAttention, HTMBlock
from shared_core.testing import (
    assert_compiles,
    assert_data_parallel,
    assert_exports,
    assert_hub_round_trip,
    assert_portable,
)

SLOW = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "dim": 12,
    "heads": 2,
    "topk_mems": 3,
    "mem_chunk_size": 4,
    "dim_head": 6,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "absorbed": {"impl": "absorbed"},
    "projected": {"impl": "projected"},
    "memories": {"impl": "absorbed", "detach_memories": False},
    "memories, projected": {"impl": "projected", "detach_memories": False, "add_pos_enc": False},
    "legacy": {"legacy": True},
}
# With so many of the masks; others are slow.
EXPORTED = [(HTMBlock, "projected", 1), (HTMAttention, "absorbed", 2)]


@pytest.fixture(params=VARIANTS)
def changes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every way to compute it, as constructor arguments."""
    return dict(VARIANTS[request.param])


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in ("absorbed", "memories, projected") else SLOW)
        for name in VARIANTS
    ]
)
def graph_changes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The same, for tests that take seconds: two ways have all between them, others are slow."""
    return dict(VARIANTS[request.param])


def build(cls: type[nn.Module] = HTMBlock, **changes: Any) -> Any:
    torch.manual_seed(0)
    return cls(**(SETTINGS | changes))


def given(
    device: torch.device, n: int = 5, m: int = 15, b: int = 2, masked: bool = True
) -> tuple[Tensor, ...]:
    """Queries, memories, mask and mask of chunks, whose chunks are chosen by a wide margin."""
    generator = torch.Generator().manual_seed(n)
    queries = torch.randn(b, n, 12, generator=generator)
    memories = torch.randn(b, m, 12, generator=generator)
    mask = torch.rand(b, m, generator=generator) < 0.7
    chunk_mask = torch.rand(b, n, -(-m // 4), generator=generator) < 0.7
    # As many may be chosen as are asked for, or fewer.
    chunk_mask[..., 3:] = False
    tensors = (queries, memories, mask, chunk_mask) if masked else (queries, memories)
    return tuple(x.to(device) for x in tensors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cls", [HTMAttention, HTMBlock])
def test_portable(
    device: torch.device, cls: type[nn.Module], changes: dict[str, Any], masked: bool
) -> None:
    m = 15 if masked else 11
    assert_portable(lambda: build(cls, **changes), given(device, m=m, masked=masked), device)


def test_runs_on_the_meta_device(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = build(**changes)
    queries, *rest = given(torch.device("meta"))
    out = module(queries.requires_grad_(), *rest)
    assert out.shape == queries.shape
    out.sum().backward()
    assert queries.grad.shape == queries.shape


# Graphs


@pytest.mark.parametrize("masked", [pytest.param(False, marks=SLOW), True])
def test_compiles(device: torch.device, graph_changes: dict[str, Any], masked: bool) -> None:
    assert_compiles(build(**graph_changes).to(device), given(device, masked=masked))


def test_compiles_with_inductor(device: torch.device) -> None:
    assert_compiles(build().to(device), given(device), backend="inductor")


@SLOW
def test_every_way_compiles_with_inductor(device: torch.device, changes: dict[str, Any]) -> None:
    for masked in (False, True):
        module = build(**changes).to(device)
        assert_compiles(module, given(device, masked=masked), backend="inductor")


def test_compiles_under_autocast(device: torch.device) -> None:
    module = build(detach_memories=False).to(device)

    def run(*args: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out: Tensor = module(*args)
        return out

    assert_compiles(run, given(device), atol=1e-2, rtol=1e-2)


def test_compiles_what_it_found(device: torch.device) -> None:
    module = build().to(device)

    def run(*args: Tensor) -> Any:
        return module(*args, return_indices=True, return_weights=True)

    assert_compiles(run, given(device))


@SLOW
def test_compiles_for_any_length(device: torch.device, changes: dict[str, Any]) -> None:
    """Without a recompilation."""
    torch.compiler.reset()
    module = build(**changes).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, m, b in ((5, 15, 2), (9, 28, 2), (2, 18, 4), (33, 50, 3)):
            x = given(device, n, m, b)
            torch.testing.assert_close(compiled(*x), module(*x), atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("cls", "impl", "masks"),
    [
        pytest.param(cls, impl, masks, marks=() if (cls, impl, masks) in EXPORTED else SLOW)
        for cls in (HTMAttention, HTMBlock)
        for impl in ("auto", "absorbed", "projected")
        for masks in (0, 1, 2)
    ],
)
def test_exports(device: torch.device, cls: type[nn.Module], impl: str, masks: int) -> None:
    """With any batch, any number of queries, and of memories from as many chunks as asked for."""
    module = build(cls, impl=impl).to(device).eval()
    b, n = torch.export.Dim("b"), torch.export.Dim("n")
    # A mask of chunks goes with whole ones: the two numbers are one.
    j = torch.export.Dim("j", min=3)
    m = 4 * j if masks == 2 else torch.export.Dim("m", min=9)
    shapes = ({0: b, 1: n}, {0: b, 1: m}, {0: b, 1: m}, {0: b, 1: n, 2: j})
    traced, *others = (
        given(device, n, m)[: 2 + masks]
        for n, m in ((5, 12 if masks == 2 else 15), (9, 40), (7, 36))
    )
    for other in others:
        assert_exports(module, traced, shapes[: 2 + masks], other)


def test_an_export_is_not_bound_to_what_costs_less(device: torch.device) -> None:
    """Traced with few queries of a chunk, asked by very many."""
    module = HTMAttention(6, 2, 2, 3, 2).to(device, torch.float64)
    n, m = torch.export.Dim("n", min=2), torch.export.Dim("m", min=7)

    def sequences(n: int, m: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(n)
        draw = [torch.randn(2, size, 6, generator=generator) for size in (n, m)]
        return draw[0].to(device, torch.float64), draw[1].to(device, torch.float64)

    assert_exports(module, sequences(3, 40), ({1: n}, {1: m}), sequences(90, 8))


# Files


@pytest.mark.parametrize("cls", [HTMAttention, HTMBlock])
def test_hub(tmp_path: Path, cls: type[nn.Module], changes: dict[str, Any]) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    x = given(torch.device("cpu"))
    assert_hub_round_trip(cls, defaults | SETTINGS | changes, x, tmp_path)


# Training


def test_no_gradients_where_none_are_wanted(device: torch.device, changes: dict[str, Any]) -> None:
    """In inference mode, and with some parameters frozen."""
    module = build(**changes).to(device)
    x = given(device)
    expected = module(*x)
    with torch.inference_mode():
        torch.testing.assert_close(module(*x), expected)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("to_out" in name)
    module(*x).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == ("to_out" not in name)
    module.requires_grad_(False)
    assert not module(*x).requires_grad


def test_learns_where_to_look(device: torch.device) -> None:
    """Each query names a chunk, and is to give what that chunk says; others every time."""
    torch.manual_seed(0)
    module = HTMAttention(16, 2, 2, 2, 8).to(device)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    share, loss = 0.0, torch.tensor(1.0)
    for _ in range(200):
        names, answers = torch.randn(2, 32, 6, 8, generator=generator).to(device)
        chunks = torch.cat((names, answers), -1).repeat_interleave(2, 1)
        out, found = module(F.pad(names, (0, 8)), chunks, return_indices=True)
        loss = F.mse_loss(out, F.pad(answers, (8, 0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share = float((found[..., 0] == torch.arange(6, device=device)).float().mean())
    assert share > 0.85
    assert loss.item() < 0.1


class Reader(nn.Module):
    """Two blocks that read the same memories, each its way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([build(impl=impl) for impl in ("absorbed", "projected")])

    def forward(self, queries: Tensor, memories: Tensor, *masks: Tensor) -> Tensor:
        for block in self.blocks:
            queries = block(queries, memories, *masks)
        return queries


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(("blocks.0", "blocks.1.attn", "blocks.1"), id="blocks"),
        pytest.param((), id="whole", marks=SLOW),
    ],
)
def test_data_parallel(blocks: tuple[str, ...]) -> None:
    """Over gloo, so on the CPU whatever the device of the other tests."""
    assert_data_parallel(Reader, given(torch.device("cpu"), b=4), blocks=blocks)
