"""The small language model: against the oracle, causality, its state, generation, and graphs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from product_key_memory import (
    PKM,
    MemoryPool,
    PKMOptimizer,
    Transformer,
    fetch_pkm_value_parameters,
    oracle,
)
from product_key_memory.state import State
from shared_core.testing import (
    assert_causal,
    assert_compiles,
    assert_data_parallel,
    assert_exports,
    assert_hub_round_trip,
    assert_pieces_equal_whole,
    assert_portable,
    assert_prefix_consistent,
    assert_same_gradients,
)

MEMORY: dict[str, Any] = {"heads": 2, "num_keys": 6, "topk": 4, "dim_head": 8}
SETTINGS: dict[str, Any] = {
    "dim": 16,
    "num_tokens": 20,
    "depth": 2,
    "seq_len": 24,
    "heads": 2,
    "dim_head": 8,
    "pkm_kwargs": MEMORY,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "legacy": {"legacy": True},
    "two memories": {"pkm_layers": (1, 2)},
    "no memory": {"pkm_layers": ()},
    "concatenated": {"pkm_kwargs": {**MEMORY, "concat_values_and_combine": True}},
    "experts": {"pkm_kwargs": {**MEMORY, "experts": True, "gated_output": True}},
    "batch norm": {"pkm_kwargs": {**MEMORY, "use_layernorm": False}},
}
KINDS = [pytest.param(changes, id=name) for name, changes in VARIANTS.items()]


def build(**changes: Any) -> Transformer:
    """Always the same weights, away from where norms start."""
    torch.manual_seed(0)
    model = Transformer(**(SETTINGS | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(device: torch.device, *shape: int, seed: int = 1) -> Tensor:
    """From 1 to 19, so that 0 is free for padding."""
    return torch.randint(1, 20, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def logits_of(model: Transformer) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x, return_loss=False)


# --- What it computes ---------------------------------------------------------------------------


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def attend(x: Tensor, w_qkv: Tensor, w_out: Tensor, heads: int, dim_head: int) -> Tensor:
    """Causal attention of tokens (n, d), head by head and token by token."""
    q, k, v = ((x @ w.T).split(dim_head, 1) for w in w_qkv.chunk(3))
    rows = []
    for t in range(len(x)):
        parts = []
        for h in range(heads):
            scores = k[h][: t + 1] @ q[h][t] / dim_head**0.5
            parts.append(scores.softmax(0) @ v[h][: t + 1])
        rows.append(torch.cat(parts) @ w_out.T)
    return torch.stack(rows)


def remember(x: Tensor, weights: dict[str, Tensor], name: str, k: int) -> Tensor:
    """A memory's answers to tokens (n, d)."""
    keys = weights[f"{name}.keys"]
    heads, _, _, width = keys.shape
    rows = []
    for token in x:
        queries = (weights[f"{name}.to_queries.weight"] @ token).view(2, heads, width)
        queries = norm(queries, weights, f"{name}.norm")
        table = weights[f"{name}.values.weight"]
        rows.append(oracle.memory(queries, keys[:, :, 0], keys[:, :, 1], table, k))
    return torch.stack(rows)


def model_oracle(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """One sequence (n,) -> logits (n, num_tokens), of SETTINGS: a memory, then a feed-forward."""
    width = (SETTINGS["dim"],)
    hidden = weights["token_emb.weight"][x] + weights["pos_emb.weight"][: len(x)]
    for number in range(2):
        name = f"layers.{number}"
        qkv, out = (weights[f"{name}.attention.{part}.weight"] for part in ("to_qkv", "to_out"))
        hidden = hidden + attend(F.layer_norm(hidden, width), qkv, out, 2, 8)
        if number == 0:
            hidden = hidden + remember(F.layer_norm(hidden, width), weights, f"{name}.body", 4)
            continue
        inner, outer = (
            (weights[f"{name}.body.{part}.weight"], weights[f"{name}.body.{part}.bias"])
            for part in ("inner", "outer")
        )
        normed = norm(hidden, weights, f"{name}.norm")
        hidden = hidden + F.linear(F.gelu(F.linear(normed, *inner)), *outer)
    hidden = norm(hidden, weights, "norm")
    return F.linear(hidden, weights["to_logits.weight"], weights["to_logits.bias"])


@pytest.mark.parametrize("n", [1, 7, 24])
def test_equals_the_oracle(device: torch.device, n: int) -> None:
    model = build().to(device)
    x = tokens(device, 2, n)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def ours(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        out: Tensor = torch.func.functional_call(model, given, (x, False))
        return out

    def plain(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.stack([model_oracle(given, row) for row in x])

    assert_same_gradients(ours, plain, parameters)


@pytest.mark.parametrize("changes", KINDS)
def test_the_loss_is_of_the_next_token(device: torch.device, changes: dict[str, Any]) -> None:
    model = build(**changes).to(device)
    x = tokens(device, 3, 25)
    chances = model(x[:, :-1], return_loss=False).log_softmax(-1)
    expected = -chances.gather(-1, x[:, 1:, None]).mean()
    torch.testing.assert_close(model(x), expected)
    assert model(x.int()) == model(x)


def test_the_loss_of_unequal_sequences(device: torch.device) -> None:
    """What fills the short ones has no influence, on the loss or on a gradient."""
    model = build().double().to(device)
    rows = [tokens(device, n, seed=n) for n in (5, 24, 2, 11)]
    loss = model(rows)
    # The mean over all predictions, which sequences of one batch share by their number.
    parts = torch.stack([model(row[None]) * (len(row) - 1) for row in rows])
    expected = parts.sum() / sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", KINDS)
def test_causal_and_prefix_consistent(device: torch.device, changes: dict[str, Any]) -> None:
    model = build(**changes).double().to(device)
    x = tokens(device, 2, 13)
    assert_causal(logits_of(model), x)
    assert_prefix_consistent(logits_of(model), x)


@pytest.mark.parametrize("legacy", [False, True])
def test_sublayers_see_normalised_inputs(device: torch.device, legacy: bool) -> None:
    """Attention and memory, unless the model is legacy."""
    model = build(legacy=legacy).to(device)
    seen: list[Tensor] = []
    for layer in model.layers:
        layer.attention.to_qkv.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        if isinstance(layer.body, PKM):
            layer.body.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(tokens(device, 2, 9), return_loss=False)
    assert len(seen) == 3
    for given in seen:
        off = max(given.mean(-1).abs().max(), (given.std(-1, correction=0) - 1).abs().max())
        assert (off < 1e-3) != legacy


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, {2}), (3, {3}), ((1, 4), {1, 4}), ([4, 1, 4], {1, 4}), ((), set()), ([], set())],
)
def test_layers_with_a_memory(
    given: Any, expected: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = Transformer(**(SETTINGS | {"depth": 4, "pkm_layers": given}))
    found = {n for n, layer in enumerate(model.layers, 1) if isinstance(layer.body, PKM)}
    assert found == expected
    assert capsys.readouterr() == ("", "")


def test_one_layer_has_no_memory_by_default() -> None:
    assert not any(isinstance(module, PKM) for module in build(depth=1).modules())


def test_arguments_reach_the_memory() -> None:
    given = {**MEMORY, "num_keys": 9, "topk": 3}
    model = Transformer(**(SETTINGS | {"pkm_kwargs": given}))
    memory = model.layers[0].body
    assert (memory.num_memories, memory.topk) == (81, 3)
    default = Transformer(dim=8, num_tokens=5, depth=2, seq_len=4, heads=1, dim_head=4)
    assert default.layers[0].body.num_memories == 128**2


@pytest.mark.parametrize("option", ["dim", "num_tokens", "seq_len", "heads", "dim_head"])
def test_sizes_change_the_model(option: str) -> None:
    shapes = [
        [p.shape for p in Transformer(**(SETTINGS | changes)).parameters()]
        for changes in ({}, {option: SETTINGS[option] * 2})
    ]
    assert shapes[0] != shapes[1]


def test_empty_batch(device: torch.device) -> None:
    model = build().to(device)
    logits, state = model.step(tokens(device, 0, 5))
    assert logits.shape == (0, 5, 20)
    assert model.step(tokens(device, 0, 2), state)[0].shape == (0, 2, 20)


# --- State --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_pieces_equal_whole(device: torch.device, changes: dict[str, Any]) -> None:
    model = build(**changes).double().to(device)
    x = tokens(device, 2, 24)
    splits = [(cut, 24 - cut) for cut in (1, 2, 11, 23)] + [(5, 6, 1, 2, 10), (1,) * 24]
    assert_pieces_equal_whole(logits_of(model), model.step, x, splits)


def test_gradient_through_the_state(device: torch.device) -> None:
    model = build().double().to(device)
    x = tokens(device, 2, 20)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x, return_loss=False).square().sum(), parameters)
    first, state = model.step(x[:, :7])
    second, _ = model.step(x[:, 7:], state)
    actual = torch.autograd.grad(torch.cat((first, second), 1).square().sum(), parameters)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-9)
    _, state = model.step(x[:, :7])
    assert all(y.requires_grad for y in state.keys + state.values)
    assert not any(y.requires_grad for y in state.detach().keys + state.detach().values)


def test_a_state_may_be_used_twice_reordered_moved_and_stored(device: torch.device) -> None:
    model = build().double().to(device)
    x = tokens(device, 3, 20)
    _, state = model.step(x[:, :8])
    state = state.detach()
    whole = model(x, return_loss=False)[:, 8:]
    index = torch.tensor([2, 0, 0, 1], device=device)
    for other, rows in (
        (state, slice(None)),
        (state, slice(None)),
        (state.reorder(index), index),
        (state.to("cpu").to(device), slice(None)),
        (pickle.loads(pickle.dumps(state)), slice(None)),
    ):
        assert other.length == 8
        logits, after = model.step(x[rows, 8:], other)
        torch.testing.assert_close(logits, whole[rows], atol=1e-10, rtol=0)
        assert torch.equal(after.tokens, x[rows])
    there = state.to("meta")
    assert all(y.is_meta for y in (there.tokens, *there.keys, *there.values))


# --- Generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("length", [1, 20, 40])
def test_greedy_is_the_argmax_of_full_passes(
    device: torch.device, changes: dict[str, Any], length: int
) -> None:
    """Past the last position the window moves, as the reference's does."""
    model = build(**changes).double().to(device)
    prompt = tokens(device, 2, length)
    out = model.generate(prompt, 30, temperature=0.0)
    assert out.shape == (2, 30)
    assert out.dtype == torch.int64
    whole = torch.cat((prompt, out), 1)
    for t in range(length, length + 30):
        best = model(whole[:, max(0, t - 24) : t], return_loss=False)[:, -1].argmax(-1)
        assert torch.equal(whole[:, t], best), t


def test_each_token_is_read_once(device: torch.device) -> None:
    model = build().to(device)
    read: list[int] = []
    model.token_emb.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[1]))
    model.generate(tokens(device, 2, 9), 18)
    # The prompt and 15 tokens fit; then two windows are read anew.
    assert read == [9, *[1] * 15, 24, 24]


def test_stream_is_generate(device: torch.device) -> None:
    model = build().to(device).train()
    prompt = tokens(device, 3, 7)

    def draws(method: Any, **changes: Any) -> Any:
        generator = torch.Generator(device).manual_seed(4)
        return method(prompt, 30, generator=generator, **changes)

    for changes in ({}, {"temperature": 2.0, "top_p": 0.8}, {"filter_thres": 0.5}):
        whole = draws(model.generate, **changes)
        streamed = list(draws(model.stream, **changes))
        assert torch.equal(torch.stack(streamed, dim=1), whole)
        assert model.training
        assert torch.equal(whole, draws(model.generate, **changes))
    assert not torch.equal(whole, draws(model.generate, filter_thres=0.2))


def test_filters(device: torch.device) -> None:
    model = build().double().to(device)
    prompt = tokens(device, 64, 7)
    chances = model(prompt, return_loss=False)[:, -1]
    order = chances.argsort(-1, descending=True)

    def kept(**changes: Any) -> int:
        """How far down the order 64 draws go."""
        drawn = model.generate(prompt, 1, temperature=100.0, **changes)
        return int((order == drawn).int().argmax(-1).max()) + 1

    assert kept() == 2
    assert kept(filter_thres=0.75) == 5
    assert kept(filter_thres=1.0) == 1
    assert kept(filter_thres=0.0) > 15
    # Another filter takes its place.
    assert kept(top_k=7) == 7
    assert kept(top_p=1e-9) == 1
    assert kept(min_p=0.0) > 15
    assert kept(min_p=1.0) == 1
    assert kept(filter_thres=1.0, top_k=4) == 4


def test_ended_rows_are_padded(device: torch.device) -> None:
    prompt = tokens(device, 6, 7)
    free = build().to(device).generate(prompt, 20, temperature=0.0)
    eos = int(free[0, 3])
    for pad_value in (0, 17, -1):
        model = build(pad_value=pad_value).to(device)
        out = model.generate(prompt, 20, temperature=0.0, eos_token=eos)
        for row, expected in zip(out.tolist(), free.tolist(), strict=True):
            end = expected.index(eos) if eos in expected else 19
            assert row == expected[: end + 1] + [pad_value] * (19 - end)


def test_dropout_is_off_and_comes_back(device: torch.device) -> None:
    model = build(pkm_kwargs={**MEMORY, "value_dropout": 0.5}).to(device)
    prompt = tokens(device, 2, 7)
    expected = model.generate(prompt, 10, temperature=0.0)
    model.layers.train()
    assert torch.equal(model.generate(prompt, 10, temperature=0.0), expected)
    model.train()
    model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    assert torch.equal(model.generate(prompt, 10, temperature=0.0), expected)
    streamed = list(model.stream(prompt, 10, temperature=0.0))
    assert torch.equal(torch.stack(streamed, 1), expected)
    assert [module.training for module in model.modules()] == flags


# --- A shared table -----------------------------------------------------------------------------


def build_shared() -> Transformer:
    pool = MemoryPool(36, 16)
    return build(pkm_layers=(1, 2), pkm_kwargs={**MEMORY, "pool": pool})


def test_one_table_for_all_memories(device: torch.device, tmp_path: Path) -> None:
    model = build_shared().to(device)
    apart = build(pkm_layers=(1, 2)).to(device)
    apart.load_state_dict(model.state_dict())
    x = tokens(device, 2, 9)
    for each in (model, apart):
        each(x).backward()
    shared, second = (layer.body.values.weight for layer in model.layers)
    assert shared is second
    parts = [layer.body.values.weight.grad for layer in apart.layers]
    assert all(part.any() for part in parts)
    torch.testing.assert_close(shared.grad, parts[0] + parts[1])
    save_model(model, str(tmp_path / "weights.safetensors"))
    again = build_shared()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_model(again, str(tmp_path / "weights.safetensors"))
    assert torch.equal(again.to(device)(x), model(x))


# --- Where it goes ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_portable(device: torch.device, changes: dict[str, Any]) -> None:
    assert_portable(lambda: build(**changes), (tokens(device, 2, 13), False), device)


def test_the_loss_is_portable(device: torch.device) -> None:
    assert_portable(build, (tokens(device, 2, 13),), device)


@pytest.mark.parametrize("name", ["default", "experts"])
def test_compiles(device: torch.device, name: str) -> None:
    assert_compiles(build(**VARIANTS[name]).to(device), (tokens(device, 2, 13),))


@pytest.mark.slow
def test_compiles_with_inductor(device: torch.device) -> None:
    assert_compiles(build().to(device), (tokens(device, 2, 13),), backend="inductor")


@pytest.mark.slow
def test_a_step_compiles(device: torch.device) -> None:
    model = build().to(device)
    _, state = model.step(tokens(device, 2, 9))
    state = state.detach()

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, *flat: Tensor) -> Tensor:
            logits: Tensor = self.model.step(x, State(x.new_ones(2, 9), flat[:2], flat[2:]))[0]
            return logits

    assert_compiles(Step(), (tokens(device, 2, 1), *state.keys, *state.values))


@pytest.mark.parametrize("name", ["default", "batch norm"])
def test_exports(device: torch.device, name: str) -> None:
    shapes = ({0: torch.export.Dim("b", min=1), 1: torch.export.Dim("n", min=2, max=24)}, None)
    given = [(tokens(device, *shape), False) for shape in ((2, 13), (3, 24))]
    assert_exports(build(**VARIANTS[name]).to(device), given[0], shapes, given[1])


def build_two() -> Transformer:
    return build(pkm_layers=(1,))


def test_data_parallel() -> None:
    """Over gloo, so on the CPU whatever the device of the other tests."""
    x = tokens(torch.device("cpu"), 4, 13)
    assert_data_parallel(build_two, (x, False), blocks=("layers.0", "layers.1"))


@pytest.mark.parametrize("changes", [{}, {"pkm_layers": [1, 2], "legacy": True, "pad_value": 3}])
def test_hub(tmp_path: Path, changes: dict[str, Any]) -> None:
    x = tokens(torch.device("cpu"), 2, 13)
    assert_hub_round_trip(Transformer, SETTINGS | changes, (x, False), tmp_path)


@pytest.mark.parametrize("values_grad", ["dense", "factored"])
def test_training_lowers_the_loss(device: torch.device, values_grad: str) -> None:
    """Four random sequences are learnt by heart: guessing costs 3.0."""
    torch.manual_seed(0)
    pool = MemoryPool(36, 16, values_grad=values_grad)
    settings = SETTINGS | {"pkm_layers": [1, 2], "pkm_kwargs": {**MEMORY, "pool": pool}}
    model = Transformer(**settings).to(device)
    values, rest = fetch_pkm_value_parameters(model)
    optimizers = [torch.optim.Adam(rest, lr=1e-2), PKMOptimizer(values, lr=1e-2)]
    x = tokens(device, 4, 20)
    before = pool.weight.detach().clone()
    for _ in range(60):
        loss = model(x)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.5
    assert not torch.equal(pool.weight, before)


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"num_tokens": -1}, ValueError, "num_tokens must be at least 1, got -1"),
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1, got 0"),
        ({"heads": 1.5}, TypeError, "heads must be an integer, got 1.5"),
        ({"pad_value": 0.0}, TypeError, "pad_value must be an integer, got 0.0"),
        ({"pkm_layers": 0}, ValueError, r"from 1 to depth=2, got \[0\]"),
        ({"pkm_layers": (3, 1, -1)}, ValueError, r"from 1 to depth=2, got \[-1, 3\]"),
        ({"pkm_layers": (1.0,)}, TypeError, "pkm_layers must be integers, got 1.0"),
        ({"pkm_layers": True}, TypeError, "pkm_layers must be integers, got True"),
        ({"pkm_kwargs": {"no_such": 1}}, TypeError, "no_such"),
        ({"pkm_kwargs": {"topk": 999}}, ValueError, "topk=999"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_settings(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Transformer(**(SETTINGS | changes))


def test_bad_inputs(device: torch.device) -> None:
    model = build().to(device)
    x = tokens(device, 2, 24)
    _, state = model.step(x[:, :20])
    foreign = state._replace(keys=state.keys[:1])
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: model(x.float(), return_loss=False), TypeError, "torch.float32"),
        (lambda: model(x > 3, return_loss=False), TypeError, "torch.bool"),
        (lambda: model(x[0], return_loss=False), ValueError, r"got shape \(24,\)"),
        (lambda: model(x[:, :0], return_loss=False), ValueError, r"got shape \(2, 0\)"),
        (lambda: model([x[0]], return_loss=False), TypeError, "list"),
        (lambda: model(x[:, :1]), ValueError, r"\(2, 1\)"),
        (lambda: model(x.repeat(1, 2), return_loss=False), ValueError, "48 new .* seq_len=24"),
        (lambda: model(x.repeat(1, 2)), ValueError, "47 new .* seq_len=24"),
        (lambda: model.step(x[:, :5], state), ValueError, "20 tokens before and 5 new"),
        (lambda: model.step(x[:1, :2], state), ValueError, "2 sequences.* 1 sequences"),
        (lambda: model.step(x[:, :2], foreign), ValueError, "1 layers.* 2 layers"),
        (lambda: model.generate(x, 3, filter_thres=1.5), ValueError, "1.5"),
        (lambda: model.stream(x, 3, filter_thres=-0.1), ValueError, "-0.1"),
        (lambda: model.generate(x, -1), ValueError, "-1"),
        (lambda: model.stream(x, 3, temperature=-1.0), ValueError, "-1.0"),
        (lambda: model.generate(x[:, :0], 3), ValueError, r"\(2, 0\)"),
        (lambda: model.generate(x, 3, top_k=0), ValueError, "0"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
