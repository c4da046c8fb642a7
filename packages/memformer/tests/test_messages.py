"""Every refusal: before any work, of the right type, with the numbers that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from memformer import (
    AutoregressiveWrapper,
    Context,
    Decoder,
    Encoder,
    Memformer,
    TransformerWrapper,
    memory_replay_backprop,
)

if TYPE_CHECKING:
    from conftest import MakeModel

SRC = torch.zeros(2, 5, dtype=torch.int64)
TGT = torch.zeros(2, 4, dtype=torch.int64)
LONG = torch.zeros(2, 11, dtype=torch.int64)


def mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


BUILD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_memory_slots": 0}, ValueError, "num_memory_slots must be at least 1, got 0"),
    ({"num_memory_slots": 2.0}, TypeError, "num_memory_slots must be an integer, got 2.0"),
    ({"num_mem_updates": 0}, ValueError, "num_mem_updates must be at least 1, got 0"),
    ({"num_mem_updates": True}, TypeError, "num_mem_updates must be an integer, got True"),
    ({"num_mem_updates": "2"}, TypeError, "num_mem_updates must be an integer, got '2'"),
    ({"num_mem_updates": -1, "legacy": True}, ValueError, "must be at least 0, got -1"),
    ({"mem_update_attn_heads": 5}, ValueError, "dim=12 and mem_update_attn_heads=5"),
    ({"enc_heads": 5}, ValueError, "dim=12 and heads=5"),
    ({"enc_depth": 0}, ValueError, "depth must be at least 1, got 0"),
    ({"enc_num_tokens": 0}, ValueError, "num_tokens must be at least 1, got 0"),
    ({"dec_max_seq_len": -1}, ValueError, "max_seq_len must be at least 1, got -1"),
    ({"dec_depth": None}, TypeError, "got 11, None and 9"),
    ({"writer": "lstm"}, ValueError, "writer must be one of gru, bmn, got 'lstm'"),
    ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"max_distance": 8}, ValueError, "max_distance must be above 8, got 8"),
    ({"legacy": True, "writer": "bmn"}, ValueError, "legacy=True has no writer"),
    ({"legacy": True, "temperature": 1.0}, ValueError, "legacy=True has no temperature"),
    ({"legacy": True, "tie_embeddings": True}, ValueError, "legacy=True has no tie_embeddings"),
    ({"legacy": True, "max_distance": 64}, ValueError, "legacy=True has no max_distance"),
    ({"legacy": True, "dropout": 0.1}, ValueError, "legacy=True has no dropout"),
    ({"enc_dim": 12}, TypeError, "enc_dim"),
    ({"nonsense": 1}, TypeError, "nonsense"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BUILD)
def test_constructor(
    make_model: MakeModel, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_model(**changes)


FORWARD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"src": LONG}, ValueError, "src has 11 tokens, more than max_seq_len=9"),
    ({"src": SRC.float()}, TypeError, "src must hold int64 or int32 tokens, got torch.float32"),
    ({"src": SRC[0]}, ValueError, r"src must be \(b, n\) with n >= 1, got shape \(5,\)"),
    ({"src": SRC[:, :0]}, ValueError, r"got shape \(2, 0\)"),
    ({"src": None}, ValueError, "either tokens or inputs_embeds, got neither"),
    ({"inputs_embeds": torch.zeros(2, 5, 12)}, ValueError, "inputs_embeds, got both"),
    ({"src": None, "inputs_embeds": torch.zeros(2, 5, 11)}, ValueError, r"\(b, n, 12\).*2, 5, 11"),
    ({"src": None, "inputs_embeds": SRC}, TypeError, "inputs_embeds must be floating point"),
    ({"src": None, "inputs_embeds": torch.zeros(2, 10, 12).double()}, ValueError, "10 tokens"),
    ({"tgt": LONG}, ValueError, "tgt has 10 tokens, more than max_seq_len=9"),
    ({"tgt": TGT[:1]}, ValueError, "tgt must have 2 rows, got 1"),
    ({"tgt": TGT[:, :1]}, ValueError, r"t >= 2, got shape \(2, 1\)"),
    ({"tgt": TGT.bool()}, TypeError, "integer tokens, got torch.bool"),
    ({"tgt": list(TGT), "return_logits": True}, TypeError, "tgt as a tensor, got list"),
    ({"tgt": list(TGT), "tgt_mask": mask(2, 4)}, ValueError, "mask must be None for a list"),
    ({"return_logits": True}, ValueError, "tgt_mask and return_logits need a tgt, got None"),
    ({"tgt_mask": mask(2, 4)}, ValueError, "tgt_mask and return_logits need a tgt, got None"),
    (
        {"mems": torch.zeros(1, 3, 12)},
        ValueError,
        r"mems must be \(2, n, 12\) with n >= 1, got shape \(1, 3, 12\)",
    ),
    ({"mems": torch.zeros(2, 3, 13)}, ValueError, r"mems must be \(2, n, 12\).*\(2, 3, 13\)"),
    ({"mems": torch.zeros(2, 4, 12)}, ValueError, "mems must have 3 slots, got 4"),
    ({"mems": torch.zeros(2, 3, 12).int()}, TypeError, "mems must be floating point"),
    ({"mems": torch.zeros(2, 3, 12)}, TypeError, "mems must be torch.float64 as the model is, got"),
    (
        {"src": None, "inputs_embeds": torch.zeros(2, 5, 12)},
        TypeError,
        "embeds must be torch.float64",
    ),
    ({"src_mask": [[True] * 5] * 2}, TypeError, "src_mask must be a boolean tensor, got list"),
    ({"earlier": torch.zeros(2, 4, 12)}, TypeError, "earlier must be a Context, got Tensor"),
    ({"earlier": (torch.zeros(2, 4, 12), None)}, TypeError, "must be a Context, got tuple"),
    (
        {"earlier": Context(torch.zeros(2, 4, 11), None)},
        ValueError,
        r"enc_out must be \(2, n, 12\)",
    ),
    ({"earlier": Context(torch.zeros(2, 4, 12), mask(2, 5))}, ValueError, r"earlier.mask must be"),
    ({"src_mask": mask(2, 6)}, ValueError, r"src_mask must be \(2, 5\), got shape \(2, 6\)"),
    ({"src_mask": SRC}, TypeError, "src_mask must be boolean, got torch.int64"),
    ({"tgt": TGT, "tgt_mask": mask(2, 6)}, ValueError, r"\(2, 4\) or \(2, 3\), got \(2, 6\)"),
    ({"tgt": TGT, "tgt_mask": TGT}, TypeError, "must be boolean, got torch.int64"),
    ({"reset": mask(3)}, ValueError, r"reset must be \(2,\), got shape \(3,\)"),
    ({"nonsense": 1}, TypeError, "nonsense"),
]


@pytest.fixture
def lazy(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Memformer]:
    """A model that fails if it is made to work."""

    def make(**changes: Any) -> Memformer:
        model = make_model(**changes).cpu()

        def work(*_: Any) -> None:
            raise AssertionError("it worked")

        for part in model.modules():
            if isinstance(part, (nn.Embedding, nn.Linear)):
                monkeypatch.setattr(part, "forward", work)
        return model

    return make


@pytest.mark.parametrize(("changes", "error", "words"), FORWARD)
def test_forward(
    lazy: Callable[..., Memformer], changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        lazy()(**{"src": SRC, **changes})


def test_a_target_without_a_decoder(lazy: Callable[..., Memformer]) -> None:
    model = lazy(encoder_only=True)
    for given in ({"tgt": TGT}, {"tgt_mask": mask(2, 4)}, {"return_logits": True}):
        with pytest.raises(ValueError, match="encoder_only=True takes no tgt, tgt_mask or logits"):
            model(SRC, **given)
    with pytest.raises(ValueError, match="earlier is for a decoder"):
        model(SRC, earlier=Context(torch.zeros(2, 5, 12), None))
    with pytest.raises(ValueError, match="earlier is for a decoder, and not for a legacy one"):
        lazy(legacy=True)(SRC, earlier=Context(torch.zeros(2, 5, 12), None))
    with pytest.raises(ValueError, match="can generate, got encoder_only=True"):
        model.generate(SRC, 3)


def test_generation(lazy: Callable[..., Memformer]) -> None:
    model = lazy()
    context = torch.zeros(2, 5, 12, dtype=torch.float64)
    for call in (
        lambda: model.generate(SRC, 9),
        lambda: model.stream(SRC, 9),
        lambda: model.decoder.generate(SRC[:, :1], 9),
    ):
        with pytest.raises(ValueError, match=r"1 start tokens and 9 new ones.*max_seq_len=9"):
            call()
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        model.generate(SRC, -1)
    with pytest.raises(ValueError, match="temperature must be finite"):
        model.generate(SRC, 3, temperature=-1.0)
    with pytest.raises(ValueError, match=r"prompt must be \(2, n\) with n >= 1, got shape \(1, "):
        model.generate(SRC, 3, prompt=SRC[:1])
    with pytest.raises(ValueError, match=r"src must be \(2, n\) with n >= 1, got shape \(1, "):
        model.generate([SRC, SRC[:1]], 3)
    with pytest.raises(ValueError, match="got 2 and 1 masks"):
        model.generate([SRC, SRC], 3, src_mask=[None])
    with pytest.raises(ValueError, match="got 0 and 0 masks"):
        model.encode([])
    with pytest.raises(ValueError, match="more than max_seq_len=9"):
        model.encode([LONG])
    with pytest.raises(ValueError, match=r"mems must be \(2, n, .*got shape \(1, "):
        model.encode(SRC, torch.zeros(1, 3, 12))
    with pytest.raises(ValueError, match=r"input_mask must be \(2, 5\), got shape \(2, 4\)"):
        model.decoder.generate(SRC, 2, input_mask=mask(2, 4))
    with pytest.raises(ValueError, match=r"context must be \(2, n, .*got shape \(1, "):
        model.decoder.generate(SRC, 2, context=context[:1])
    with pytest.raises(ValueError, match=r"context must be \(2, n, 12\)"):
        model.decoder.generate(SRC, 2, context=context[..., :4])
    with pytest.raises(ValueError, match=r"tgt_mask must be \(2, 5\), got shape \(2, 4\)"):
        model.decoder.generate(SRC, 2, context=context, tgt_mask=mask(2, 4))
    with pytest.raises(ValueError, match="about the context, and there is none"):
        model.decoder.generate(SRC, 2, tgt_mask=mask(2, 4))
    with pytest.raises(TypeError, match="nonsense"):
        model.decoder.generate(SRC, 2, nonsense=1)


def test_states(make_model: MakeModel) -> None:
    decoder = make_model().cpu().decoder.net.layer_blocks
    x = torch.zeros(2, 3, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="room must be at least 1, got 0"):
        decoder.init_state(2, 0)
    with pytest.raises(ValueError, match="about the context, and there is none"):
        decoder.init_state(2, 4, None, mask(2, 5))
    legacy = make_model(legacy=True).cpu().decoder.net.layer_blocks
    with pytest.raises(ValueError, match="without a context attends to all tokens at once"):
        legacy.init_state(2, 4)
    state = decoder.init_state(2, 4)
    _, state = decoder.step(x, state)
    with pytest.raises(ValueError, match="state has room for 4 tokens, got 6"):
        decoder.step(x, state)
    with pytest.raises(ValueError, match=r"x must be \(2, n, .*got shape \(1, "):
        decoder.step(x[:1], state)
    with pytest.raises(ValueError, match=r"mask must be \(2, 1\), got shape \(2, 3\)"):
        decoder.step(x[:, :1], state, mask(2, 3))


def test_blocks() -> None:
    x = torch.zeros(2, 3, 8)
    for blocks in (Encoder(8, 1, heads=2), Decoder(8, 1, heads=2)):
        with pytest.raises(ValueError, match=r"x must be \(b, n, 8\) with n >= 1.*\(2, 3, 4\)"):
            blocks(x[..., :4])
        with pytest.raises(ValueError, match=r"src_mask must be \(2, 3\), got shape \(2, 4\)"):
            blocks(x, src_mask=mask(2, 4))
        with pytest.raises(ValueError, match=r"context must be \(2, n, .*got shape \(1, "):
            blocks(x, context=x[:1])
    with pytest.raises(ValueError, match="about the context, and there is none"):
        Decoder(8, 1, heads=2)(x, tgt_mask=mask(2, 3))
    with pytest.raises(TypeError, match="tgt_mask"):
        Encoder(8, 1, heads=2)(x, tgt_mask=mask(2, 3))
    with pytest.raises(TypeError, match="heads must be an integer, got True"):
        Encoder(8, 1, heads=True)


def test_wrappers() -> None:
    blocks = Encoder(8, 1, heads=2)
    with pytest.raises(ValueError, match="needs return_logits=True, got return_logits=False"):
        TransformerWrapper(
            num_tokens=5, max_seq_len=4, dim=8, layer_blocks=blocks, return_logits=False,
            tie_embeddings=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="dim must be that of layer_blocks, got 6 and 8"):
        TransformerWrapper(num_tokens=5, max_seq_len=4, dim=6, layer_blocks=blocks)
    legacy = Encoder(8, 1, heads=2, legacy=True)
    for name, option in (("tie_embeddings", True), ("dropout", 0.1)):
        with pytest.raises(ValueError, match=f"legacy=True has no {name}"):
            TransformerWrapper(
                num_tokens=5, max_seq_len=4, dim=8, layer_blocks=legacy, **{name: option}
            )
    net = TransformerWrapper(num_tokens=5, max_seq_len=4, dim=8, layer_blocks=blocks)
    with pytest.raises(ValueError, match="x has 5 tokens, more than max_seq_len=4"):
        net(SRC)
    with pytest.raises(TypeError, match="integer max_seq_len, Linear has none"):
        AutoregressiveWrapper(nn.Linear(2, 2))


def test_replay(lazy: Callable[..., Memformer]) -> None:
    model = lazy()
    long = torch.zeros(2, 20, dtype=torch.int64)
    with pytest.raises(ValueError, match="give a tgt, a loss_fn, or both, got neither"):
        memory_replay_backprop(model, long, None)
    with pytest.raises(ValueError, match="tgt must be a list of 3 segments, got 2"):
        memory_replay_backprop(model, long, [TGT, TGT])
    with pytest.raises(ValueError, match="tgt_mask must be a list of 3 segments, got 1"):
        memory_replay_backprop(model, long, TGT, None, [mask(2, 4)])
    with pytest.raises(ValueError, match="got 3 and 1 masks"):
        memory_replay_backprop(model, long, TGT, [mask(2, 9)])
    with pytest.raises(ValueError, match=r"src_mask must be \(2, 20\), got shape \(2, 19\)"):
        memory_replay_backprop(model, long, TGT, mask(2, 19))
    with pytest.raises(TypeError, match="src_mask must be a list as src is, got a tensor"):
        memory_replay_backprop(model, list(long.split(9, 1)), TGT, mask(2, 20))
    with pytest.raises(TypeError, match="resets must be a boolean tensor, got list"):
        memory_replay_backprop(model, long, TGT, resets=[[True] * 3] * 2)
    with pytest.raises(ValueError, match="truncation must be at least 1, got 0"):
        memory_replay_backprop(model, long, TGT, truncation=0)
    with pytest.raises(ValueError, match=r"resets must be \(2, 3\), got shape \(2, 2\)"):
        memory_replay_backprop(model, long, TGT, resets=mask(2, 2))
    with pytest.raises(ValueError, match="mems must have 3 slots, got 4"):
        memory_replay_backprop(model, long, TGT, mems=torch.zeros(2, 4, 12))
    with pytest.raises(TypeError, match="model must be a Memformer, got Linear"):
        memory_replay_backprop(nn.Linear(2, 2), long, TGT)
    with pytest.raises(ValueError, match="encoder_only=True takes no tgt"):
        memory_replay_backprop(lazy(encoder_only=True), long, TGT)
    with pytest.raises(TypeError, match="nonsense"):
        memory_replay_backprop(model, long, TGT, nonsense=1)


def test_what_a_loss_function_returns(make_model: MakeModel) -> None:
    """Refused while no gradient has been added, where the last segment's is wrong already."""
    model = make_model().cpu()
    long = torch.zeros(2, 20, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"one number, got shape \(2,\) for segment 2"):
        memory_replay_backprop(model, long, TGT, loss_fn=lambda out, _: out.mem[:, 0, 0])
    with pytest.raises(TypeError, match="a tensor or None, got float"):
        memory_replay_backprop(model, long, TGT, loss_fn=lambda *_: 0.0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiler_around_data_parallel(make_model: MakeModel) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(make_model().cpu()))
        with pytest.raises(TypeError, match="compile the model, then wrap it"):
            memory_replay_backprop(wrapped, SRC, TGT)
    finally:
        dist.destroy_process_group()
