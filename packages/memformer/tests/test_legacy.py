"""The reference's numbers and checkpoints."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from memformer import Decoder, Encoder, Memformer
from shared_core.testing import Randn

if TYPE_CHECKING:
    from conftest import MakeModel, Tokens

TINY: dict[str, Any] = {
    "dim": 8,
    "num_memory_slots": 2,
    "mem_update_attn_heads": 2,
    "enc_num_tokens": 7,
    "enc_depth": 1,
    "enc_heads": 2,
    "enc_max_seq_len": 12,
    "dec_num_tokens": 7,
    "dec_depth": 1,
    "dec_heads": 2,
    "dec_max_seq_len": 12,
    "num_mem_updates": 2,
    "legacy": True,
}
# What memformer 0.3.1 gave, without masks and with them: squared sums of encoder output and memory,
# the loss, one number of the output, and the sum of all gradients' magnitudes.
EXPECTED = (
    (52.6443232425, 702.4404095097, 2.0339580524, 0.9384083784, 34813.6515752071),
    (52.6335667382, 698.2567053823, 2.0340655739, 0.9399229845, 34830.7203045007),
)


def reference_key(key: str) -> str:
    """How the reference calls a parameter of ours."""
    for number, name in enumerate(("self_attn", "cross_attn", "feed_forward")):
        key = re.sub(rf"(layers\.\d+)\.{name}\.norm", rf"\1.{number}.fn.norm", key)
        key = re.sub(rf"(layers\.\d+)\.{name}\.body", rf"\1.{number}.fn.fn", key)
    key = re.sub(r"mem_ff\.norm", "mem_ff.fn.norm", key)
    key = re.sub(r"mem_ff\.body", "mem_ff.fn.fn", key)
    return key.replace("fn.fn.inner", "fn.fn.net.0").replace("fn.fn.outer", "fn.fn.net.2")


def as_reference(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {reference_key(key): x for key, x in state.items()}


def tiny(device: torch.device) -> Memformer:
    """With weights that a formula gives, in the order in which the reference has them."""
    model = Memformer(**TINY).to(device, torch.float64)
    state = as_reference(model.state_dict())
    for i, name in enumerate(sorted(state, key=place)):
        shape = state[name].shape
        numbers = torch.arange(shape.numel(), dtype=torch.float64, device=device)
        state[name] = (numbers * 0.7 + i).sin().view(shape) * 0.5
    model.load_state_dict(state)
    return model


def place(key: str) -> tuple[int, ...]:
    """Where the reference's state dict has a key: norms come behind what they are before."""
    heads = ("memory_slots", "encoder", "decoder", "mem_updater", "gru", "mem_ff")
    parts = ("token_emb", "rel_pos_emb", "layers.0.0", "layers.0.1", "layers.0.2", "norm", "to_log")
    inner = ("to_q", "to_kv", "to_out", "net.0", "net.2", "fn.norm")
    gru = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def rank(names: tuple[str, ...], text: str) -> int:
        return next((i for i, name in enumerate(names) if name in text), len(names))

    head = rank(heads, key.split(".")[0])
    rest = key.replace("decoder.net.", "").replace("encoder.", "")
    part = rank(parts, rest) if "coder" in key else 0
    return head, part, rank(inner, rest), rank(gru, rest), int("bias" in key[-5:])


@pytest.mark.parametrize("masked", [False, True])
def test_numbers_of_the_reference(device: torch.device, masked: bool) -> None:
    model = tiny(device)
    src = torch.arange(24, device=device).view(2, 12) * 3 % 7
    tgt = torch.arange(20, device=device).view(2, 10) * 5 % 7
    masks: tuple[Tensor | None, ...] = (None, None)
    if masked:
        src_mask = torch.arange(24, device=device).view(2, 12) % 5 != 1
        masks = src_mask, torch.arange(20, device=device).view(2, 10) % 4 != 3
    out = model(src, tgt, None, *masks)
    (out.enc_out.square().sum() + out.mem.square().sum() + out.dec_out).backward()
    found = (
        out.enc_out.square().sum().item(),
        out.mem.square().sum().item(),
        out.dec_out.item(),
        out.enc_out[1, 6, 3].item(),
        sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None),
    )
    assert found == pytest.approx(EXPECTED[masked], rel=1e-9)


def test_the_numbers_differ_without_it(device: torch.device) -> None:
    model = tiny(device)
    other = Memformer(**{**TINY, "legacy": False}).to(device, torch.float64)
    other.load_state_dict(model.state_dict())
    src = torch.arange(24, device=device).view(2, 12) % 7
    a, b = model(src, src), other(src, src)
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("encoder_only", [False, True])
def test_checkpoints_of_the_reference_load(
    make_model: MakeModel, legacy: bool, encoder_only: bool
) -> None:
    model = make_model(legacy=legacy, encoder_only=encoder_only)
    state = copy.deepcopy(model.state_dict())
    given = as_reference(state)
    assert given.keys() != state.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = model.load_state_dict(given)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for key, x in model.state_dict().items():
        assert torch.equal(x, state[key]), key


@pytest.mark.parametrize("kind", [Encoder, Decoder])
def test_parts_load_by_themselves(kind: type[Encoder] | type[Decoder]) -> None:
    part = kind(8, 2, heads=2)
    state = {k: x.clone() for k, x in part.state_dict().items()}
    other = kind(8, 2, heads=2)
    other.load_state_dict(as_reference(state))
    assert all(torch.equal(x, state[key]) for key, x in other.state_dict().items())


def test_a_part_of_a_checkpoint_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    given = as_reference(model.state_dict())
    del given["encoder.layer_blocks.layers.1.0.fn.norm.bias"]
    with pytest.raises(ValueError, match="1 missing"):
        model.load_state_dict(given)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: x for k, x in model.state_dict().items() if "gru" not in k})


def test_what_the_reference_accepts_is_accepted(
    make_model: MakeModel, tokens: Tokens, randn: Randn
) -> None:
    """Sequences over the lengths, targets without a decoder, no update at all."""
    model = make_model(legacy=True, num_mem_updates=0)
    out = model(tokens(2, 30), tokens(2, 30))
    assert out.dec_out.isfinite()
    assert torch.equal(out.mem, model.get_initial_mem(2))
    alone = make_model(legacy=True, encoder_only=True)
    assert alone(tokens(2, 5), tokens(2, 5)).enc_out.shape == (2, 5, 12)
    rows = [tokens(6), tokens(4, seed=2)]
    padded = torch.stack((rows[0], torch.cat((rows[1], rows[1].new_zeros(2)))))
    # What pads a list counts like any token.
    listed = model(tokens(2, 5), rows).dec_out
    targets = padded.clone()
    whole = model(tokens(2, 5), targets, return_logits=True).dec_out
    assert listed.isfinite()
    assert whole.shape == (2, 6, 11)
    decoder = model.decoder.net.layer_blocks
    x = randn(2, 4, 12)
    assert decoder(x).shape == x.shape
    assert decoder(x, tgt_mask=torch.ones(2, 4, dtype=torch.bool, device=x.device)).shape == x.shape
