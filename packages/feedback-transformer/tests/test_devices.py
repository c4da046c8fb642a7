"""Where the model has to go: graphs, precisions, files, processes, other people's mixins."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feedback_transformer import FeedbackTransformer, Memory
from feedback_transformer.window import Window
from shared_core.testing import (
    assert_compiles,
    assert_data_parallel,
    assert_exports,
    assert_hub_round_trip,
    assert_portable,
)

SLOW = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "num_tokens": 13,
    "dim": 12,
    "depth": 2,
    "mem_len": 5,
    "heads": 2,
    "dim_head": 6,
}


def build(**changes: Any) -> FeedbackTransformer:
    torch.manual_seed(0)
    return FeedbackTransformer(**(SETTINGS | changes))


def tokens(n: int, device: torch.device, b: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(13, (b, n), generator=generator).to(device)


def pair(m: int, device: torch.device, width: int = 12, b: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    both = torch.randn(2, b, m, width, generator=generator).to(device)
    return both[0], both[1]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2])
def test_portable(device: torch.device, seq_len: int, legacy: bool) -> None:
    x = tokens(6, device)
    assert_portable(lambda: build(seq_len=seq_len, legacy=legacy), (x,), device)
    memory = pair(3, device)
    assert_portable(lambda: build(seq_len=seq_len, legacy=legacy), (x, memory), device)


def test_portable_with_every_option(device: torch.device, changes: dict[str, Any]) -> None:
    settings = {k: v for k, v in changes.items() if k != "mem_len"}
    assert_portable(lambda: build(**settings), (tokens(7, device),), device)


def test_autocast_is_near_and_as_fast_a_way(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices in half precision, on both ways; states and gradients stay in float32."""
    model = build(seq_len=2).to(device)
    x = tokens(8, device)
    expected = model(x)
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("feedback_transformer.sequence.can_fuse", lambda *_: False)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = model(x, return_embeddings=True)
        assert out.dtype == torch.float32
        assert 0 < (model.to_logits(out) - expected).norm() < 0.05 * expected.norm()
        found.append(torch.autograd.grad(out.square().sum(), model.layers[0].ff.inner.weight)[0])
    assert found[0].dtype == torch.float32
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(device: torch.device, dtype: torch.dtype) -> None:
    model = build().to(device, dtype)
    assert model.generate(tokens(5, device), 6).shape == (2, 6)


def test_half_precision_attends_in_full_where_that_is_faster(device: torch.device) -> None:
    x = torch.zeros(2, 3, 12, dtype=torch.bfloat16, device=device)
    sizes = build()._sizes()
    window = Window.of(None, x, 2, sizes)
    expected = torch.float32 if device.type == "cpu" else torch.bfloat16
    assert window.wide().keys.dtype == window.wide().layer_values.dtype == expected
    mask = torch.ones(2, 0, dtype=torch.bool, device=device)
    assert window._replace(mask=mask).wide().mask is mask
    assert Window.of(None, x.double(), 2, sizes).wide().keys.dtype == torch.float64


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build()
        x = torch.zeros(2, 7, dtype=torch.int64)
        out, memory = model(x, None, True)
    assert out.shape == (2, 7, 13)
    assert memory.keys.shape == (2, 6, 12)
    out.sum().backward()


# Graphs: of the segment, not of the sequence


class Segment(nn.Module):
    """One segment with a memory as plain tensors, as a serving graph has it."""

    def __init__(self, model: FeedbackTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, memory = self.model(x, (keys, values), True)
        return out, memory.keys, memory.values


@pytest.mark.parametrize("seq_len", [1, 2])
def test_a_segment_compiles(device: torch.device, seq_len: int) -> None:
    model = Segment(build(seq_len=seq_len).to(device))
    x = model.model.token_emb(tokens(seq_len, device)).detach()
    assert_compiles(model, (x, *pair(4, device)))


def test_a_segment_compiles_with_inductor(device: torch.device) -> None:
    """As it is served: without gradients, which would take twice as long."""
    model = build(depth=1).to(device).requires_grad_(False)
    memory = pair(4, device)
    assert_compiles(lambda x: model(x, memory, True), (tokens(2, device),), backend="inductor")


@SLOW
def test_a_segment_compiles_for_any_memory(device: torch.device) -> None:
    """Without a recompilation, until it is full."""
    torch.compiler.reset()
    model = Segment(build(mem_len=50).to(device))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (4, 8, 20, 40):
            x = tokens(2, device)
            expected = model(x, *pair(m, device))
            torch.testing.assert_close(
                compiled(x, *pair(m, device)), expected, atol=1e-5, rtol=1e-4
            )
    torch.compiler.reset()


def test_an_open_segment_compiles(device: torch.device) -> None:
    model = build(seq_len=4).to(device)
    _, memory = model(tokens(9, device), None, True)

    def run(x: Tensor, memory: Memory) -> Any:
        return model(x, memory, True)

    assert_compiles(run, (tokens(1, device), memory.detach()))


def test_a_short_sequence_compiles_whole(device: torch.device) -> None:
    model = build().to(device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[0, 2] = False

    def run(x: Tensor) -> Tensor:
        out: Tensor = model(x, mask=mask)
        return out

    assert_compiles(run, (model.token_emb(tokens(5, device)).detach(),))


@pytest.mark.parametrize("seq_len", [1, 2])
def test_a_segment_exports(device: torch.device, seq_len: int) -> None:
    """With any memory that is not full, and with any that is too long."""
    m = torch.export.Dim("m", min=2, max=40)
    model = Segment(build(seq_len=seq_len, mem_len=50).to(device).eval())
    shapes = (None, {1: m}, {1: m})
    x = tokens(seq_len, device)
    assert_exports(model, (x, *pair(4, device)), shapes, (x, *pair(33, device)))


def test_a_full_memory_exports(device: torch.device) -> None:
    model = Segment(build(mem_len=5).to(device).eval())
    x = tokens(2, device)
    program = torch.export.export(model, (x, *pair(5, device)))
    torch.testing.assert_close(program.module()(x, *pair(5, device)), model(x, *pair(5, device)))


# Files


@pytest.mark.parametrize("changes", [{}, {"seq_len": 1, "legacy": True}, {"dim_context": None}])
def test_hub(tmp_path: Path, changes: dict[str, Any]) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(FeedbackTransformer).parameters.items()
        if parameter.default is not parameter.empty
    }
    x = tokens(5, torch.device("cpu"))
    assert_hub_round_trip(FeedbackTransformer, defaults | SETTINGS | changes, (x,), tmp_path)


# Training


def test_no_gradients_where_none_are_wanted(device: torch.device) -> None:
    model = build().to(device)
    x = tokens(7, device)
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    model.requires_grad_(False)
    assert not model(x).requires_grad


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        pytest.param("build_pairs", ("layers.0", "layers.1", "to_kv"), id="blocks"),
        pytest.param("build_pairs", (), id="whole", marks=SLOW),
        pytest.param("build_last", (), id="last layer alone", marks=SLOW),
        pytest.param("build_singles", ("layers.0.ff", "layers.1"), id="singles", marks=SLOW),
    ],
)
def test_data_parallel(name: str, blocks: tuple[str, ...]) -> None:
    """Over gloo, so on the CPU whatever the device of the other tests."""
    assert_data_parallel(globals()[name], (tokens(6, torch.device("cpu"), b=4),), blocks=blocks)


@SLOW
def test_data_parallel_of_a_lone_token() -> None:
    """It attends to nothing, and the weights of attention have a gradient of 0 all the same."""
    assert_data_parallel(build_singles, (tokens(1, torch.device("cpu"), b=4),))


@pytest.mark.parametrize("blocks", [(), ("layers.0", "to_kv")])
def test_generates_while_it_is_sharded(blocks: tuple[str, ...]) -> None:
    """Fresh, and after each step of training, though nothing then calls the model as a whole."""
    from shared_core.testing import run_ranks

    x = tokens(6, torch.device("cpu"))
    for found, expected in run_ranks(_train_and_generate, 1, x, blocks, timeout=120.0)[0]:
        assert torch.equal(found, expected)


def _train_and_generate(x: Tensor, blocks: tuple[str, ...]) -> list[tuple[Tensor, Tensor]]:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded, plain = build(), build()
    for name in blocks:
        fully_shard(sharded.get_submodule(name), mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    models = (sharded, plain)
    optimizers = [torch.optim.SGD(model.parameters(), 0.5) for model in models]
    found = []
    for _ in range(3):
        found.append(tuple(model.generate(x, 8, temperature=0) for model in models))
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("blocks", [(), ("layers.0", "layers.1", "to_kv")])
def test_trains_on_after_a_look_without_gradients(blocks: tuple[str, ...]) -> None:
    """Between backward pass and step: what was gathered for it would be the weights ever after."""
    from shared_core.testing import run_ranks

    x = tokens(6, torch.device("cpu"))
    for name, found, expected in run_ranks(_look_and_train, 1, x, blocks, timeout=120.0)[0]:
        torch.testing.assert_close(found, expected, msg=lambda words, name=name: f"{name}: {words}")


def _look_and_train(x: Tensor, blocks: tuple[str, ...]) -> list[tuple[str, Tensor, Tensor]]:
    from torch.distributed.fsdp import fully_shard

    def closed_early(model: FeedbackTransformer) -> None:
        tokens = model.stream(x, 8, temperature=0)
        next(tokens)
        tokens.close()

    def never_begun(model: FeedbackTransformer) -> None:
        model.stream(x, 8, temperature=0)

    def failing(model: FeedbackTransformer) -> None:
        with pytest.raises(ValueError, match="temperature"):
            model.generate(x, 8, temperature=-1.0)

    def forward(model: FeedbackTransformer) -> None:
        with torch.no_grad():
            model(x)

    def two_at_once(model: FeedbackTransformer) -> None:
        expected = [*model.stream(x, 8, temperature=0)]
        short, long = model.stream(x, 3, temperature=0), model.stream(x, 8, temperature=0)
        found = [pair[1] for pair in itertools.zip_longest(short, long)]
        assert torch.equal(torch.stack(found), torch.stack(expected))

    looks: list[Callable[[FeedbackTransformer], Any]] = [
        lambda model: model.generate(x, 8, temperature=0),
        lambda model: [*model.stream(x, 8, temperature=0)],
        closed_early,
        two_at_once,
        never_begun,
        failing,
        forward,
    ]
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    found = []
    for look in looks:
        for before in (False, True):
            losses = []
            for sharded in (True, False):
                model = build()
                if sharded:
                    for name in blocks:
                        fully_shard(model.get_submodule(name), mesh=mesh)
                    # Of the root FSDP2 itself keeps the weights, if it is not told otherwise.
                    fully_shard(model, mesh=mesh, reshard_after_forward=True)
                optimizer = torch.optim.SGD(model.parameters(), 0.5)
                own = []
                for _ in range(3):
                    loss = model(x).square().mean()
                    if before:
                        look(model)
                    optimizer.zero_grad()
                    loss.backward()
                    look(model)
                    optimizer.step()
                    own.append(loss.detach())
                losses.append(torch.stack(own))
            found.append((f"{look.__name__}, {before}", *losses))
    return found


def test_embeddings_stay_on_their_device(device: torch.device) -> None:
    """The model casts them under autocast, and moves nothing unasked."""
    x = torch.zeros(1, 3, 12, dtype=torch.bfloat16, device=device)
    found = build().to("meta")._embed(x, None)
    assert (found.device, found.dtype) == (x.device, torch.float32)


def build_pairs() -> nn.Module:
    return build()


def build_singles() -> nn.Module:
    return build(seq_len=1)


def build_last() -> nn.Module:
    return build(keep_last_hidden=True)
