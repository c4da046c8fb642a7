"""Where the model has to go: graphs, precisions, files, processes, other people's mixins."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from h_transformer_1d import (
    AutoregressiveWrapper,
    CausalHAttention1D,
    HAttention1D,
    HTransformer1D,
    h_attention,
)
from shared_core.testing import (
    assert_compiles,
    assert_data_parallel,
    assert_exports,
    assert_hub_round_trip,
    assert_portable,
)

SETTINGS: dict[str, Any] = {
    "num_tokens": 20,
    "dim": 16,
    "depth": 2,
    "max_seq_len": 64,
    "heads": 4,
    "dim_head": 8,
    "ff_mult": 2,
    "block_size": 4,
}
EVERYTHING = {
    "scheme": "neighbor",
    "shift_tokens": True,
    "kv_heads": 2,
    "level_bias": True,
}
KINDS = [
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"causal": False}, id="bidirectional"),
    pytest.param({"causal": False, "query_resolution": "coarse"}, id="coarse"),
    pytest.param({"causal": True, "reversible": True}, id="reversible"),
    pytest.param({"causal": True, **EVERYTHING}, id="everything"),
    pytest.param(
        {"causal": False, "query_resolution": "coarse", "reversible": True, **EVERYTHING},
        id="everything bidirectional",
    ),
]


def build(**changes: Any) -> HTransformer1D:
    torch.manual_seed(0)
    return HTransformer1D(**(SETTINGS | changes))


def sequences(device: torch.device, n: int, b: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(0, 20, (b, n), generator=generator)
    mask = torch.rand(b, n, generator=generator) < 0.8
    return x.to(device), mask.to(device)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_portable(device: torch.device, changes: dict[str, Any], masked: bool) -> None:
    x, mask = sequences(device, 45)
    assert_portable(lambda: build(**changes), (x, mask) if masked else (x,), device)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_wrapper_are_portable(device: torch.device, causal: bool) -> None:
    def attention() -> nn.Module:
        torch.manual_seed(0)
        options = {"heads": 2, "dim_head": 8, "block_size": 4, "level_bias": True}
        if causal:
            return CausalHAttention1D(16, max_seq_len=64, **options)
        return HAttention1D(16, **options)

    x = torch.randn(2, 45, 16, generator=torch.Generator().manual_seed(0))
    assert_portable(attention, (x, sequences(device, 45)[1]), device)
    if causal:
        assert_portable(
            lambda: AutoregressiveWrapper(build(causal=True)), sequences(device, 45), device
        )


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize(
    "masked", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True)]
)
def test_compiles(device: torch.device, changes: dict[str, Any], masked: bool) -> None:
    x, mask = sequences(device, 45)
    assert_compiles(build(depth=1, **changes).to(device), (x, mask) if masked else (x,))


@pytest.mark.slow
@pytest.mark.parametrize("changes", KINDS)
def test_compiles_for_any_length(device: torch.device, changes: dict[str, Any]) -> None:
    model = build(**changes).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (64, 40, 33, 9, 5):
        x, mask = sequences(device, n)
        torch.testing.assert_close(compiled(x, mask), model(x, mask), atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_compiles_with_inductor(device: torch.device) -> None:
    model = build(causal=True, depth=1).to(device)
    assert_compiles(model, sequences(device, 21), backend="inductor")


@pytest.mark.parametrize("mode", [{"causal": True}, {"causal": False, "scheme": "neighbor"}])
def test_function_compiles(device: torch.device, mode: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 45, 8, generator=generator).to(device)
    bias = torch.randn(3, 2, generator=generator).to(device)
    _, mask = sequences(device, 45)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return h_attention(q, k, v, mask=mask, level_bias=bias, block_size=4, **mode)

    assert_compiles(attention, (q, k, v, bias))


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_exports(device: torch.device, changes: dict[str, Any], masked: bool) -> None:
    """Dynamic within one number of levels: 33 to 64 tokens are 9 to 16 blocks of 4."""
    model = build(**changes).to(device).eval()
    n = torch.export.Dim("n", min=33, max=64)
    shapes: tuple[Any, ...] = ({1: n}, {1: n}) if masked else ({1: n},)
    given = [
        sequences(device, length) if masked else (sequences(device, length)[0],)
        for length in (40, 61)
    ]
    assert_exports(model, given[0], shapes, given[1])


def build_causal() -> nn.Module:
    return build(causal=True)


def build_reversible() -> nn.Module:
    # The bias of a level that 45 tokens do not reach has a zero gradient, not none.
    return build(causal=False, reversible=True, **EVERYTHING)


@pytest.mark.parametrize("builder", [build_causal, build_reversible])
def test_data_parallel(builder: Any) -> None:
    """Over gloo, so on the CPU whatever the device of the other tests."""
    attention = (HAttention1D, CausalHAttention1D)
    blocks = [name for name, module in builder().named_modules() if isinstance(module, attention)]
    assert len(blocks) == 2
    x, mask = sequences(torch.device("cpu"), 45, b=4)
    assert_data_parallel(builder, (x, mask), blocks=blocks)


@pytest.mark.parametrize("changes", KINDS)
def test_hub(tmp_path: Path, changes: dict[str, Any]) -> None:
    x, _ = sequences(torch.device("cpu"), 45)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(HTransformer1D).parameters.items()
    }
    assert_hub_round_trip(HTransformer1D, defaults | SETTINGS | changes, (x,), tmp_path)


@pytest.mark.parametrize("reversible", [False, True])
def test_training_lowers_the_loss(device: torch.device, reversible: bool) -> None:
    """Four random sequences are learnt by heart, through dropout: guessing costs 3.0."""
    model = build(causal=True, reversible=reversible, attn_dropout=0.05, ff_dropout=0.05)
    wrapper = AutoregressiveWrapper(model.to(device))
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=1e-2)
    x, _ = sequences(device, 40, b=4)
    for _ in range(50):
        loss = wrapper(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_a_copy_shares_nothing(device: torch.device) -> None:
    model = build(causal=True).to(device)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(bool(p.any()) for name, p in model.named_parameters() if "bias" not in name)


def test_a_state_can_be_stored(device: torch.device) -> None:
    model = build(causal=True, **EVERYTHING).to(device).eval()
    x, _ = sequences(device, 45)
    with torch.no_grad():
        _, state = model(x[:, :30], return_state=True)
        again = pickle.loads(pickle.dumps(state))
        assert torch.equal(model.step(x[:, 30:], again)[0], model.step(x[:, 30:], state)[0])


def test_no_buffer_depends_on_max_seq_len() -> None:
    sizes = [
        sum(x.numel() for x in [*model.parameters(), *model.buffers()])
        for model in (build(causal=True), build(causal=True, max_seq_len=2**20))
    ]
    assert sizes[0] == sizes[1]
