"""What the model promises of masks, memory and options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memformer import Decoder, Encoder, Memformer, TransformerWrapper
from shared_core.testing import (
    Randn,
    assert_causal,
    assert_masked_ignored,
    assert_prefix_consistent,
)

if TYPE_CHECKING:
    from conftest import MakeModel, Tokens


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-10)


# --- Masks --------------------------------------------------------------------------------------


def test_masked_source_has_no_influence(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    model = make_model(writer=writer)
    tgt = tokens(2, 6, seed=3)
    mask = torch.tensor([[True] * 5 + [False] * 3, [False, True] * 4], device=tgt.device)

    def run(src: Tensor, mask: Tensor) -> Tensor:
        out = model(src, tgt, src_mask=mask)
        # One row of numbers for each token that counts, so that all outputs are compared.
        rest = torch.cat((out.mem.flatten(1), out.dec_out.expand(2, 1)), 1)
        return torch.cat((out.enc_out, rest[:, None].expand(-1, src.shape[1], -1)), 2)

    assert_masked_ignored(run, tokens(2, 8), mask, parameters=list(model.parameters()))


def test_masked_embeddings_have_no_influence_nan_included(
    make_model: MakeModel, randn: Randn, tokens: Tokens, writer: str
) -> None:
    model = make_model(writer=writer)
    tgt = tokens(2, 6)
    mask = torch.tensor([[True] * 5 + [False] * 3, [False] * 8], device=tgt.device)

    def run(embeds: Tensor, mask: Tensor) -> Any:
        out = model(None, tgt, src_mask=mask, inputs_embeds=embeds)
        return out.mem, out.dec_out[None].expand(2)

    rows = torch.ones(2, dtype=torch.bool, device=tgt.device)
    parameters = [p for n, p in model.named_parameters() if n != "encoder.token_emb.weight"]
    assert_masked_ignored(run, randn(2, 8, 12), mask, output_mask=rows, parameters=parameters)


def test_masked_target_has_no_influence(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    src = tokens(2, 8)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False, True] * 3], device=src.device)

    def run(tgt: Tensor, mask: Tensor) -> Any:
        logits = model(src, tgt, tgt_mask=mask, return_logits=True).dec_out
        loss = model(src, tgt, tgt_mask=mask).dec_out
        return torch.cat((logits, loss.expand(2, 6, 1)), 2)

    assert_masked_ignored(run, tokens(2, 6, seed=2), mask, parameters=list(model.parameters()))


def test_the_loss_counts_what_the_mask_keeps(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    src, tgt = tokens(2, 8), tokens(2, 6, seed=2)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6], device=src.device)
    out = model(src, tgt, tgt_mask=mask)
    logits = model(src, tgt[:, :-1], tgt_mask=mask[:, :-1], return_logits=True).dec_out
    each = F.cross_entropy(logits.transpose(1, 2), tgt[:, 1:], reduction="none")
    torch.testing.assert_close(out.dec_out, each[mask[:, 1:]].mean())
    # A mask that is one short is about the inputs: the last token counts as the one before.
    torch.testing.assert_close(model(src, tgt, tgt_mask=mask[:, :-1]).dec_out, out.dec_out)
    nothing = model(src, tgt, tgt_mask=torch.zeros_like(mask)).dec_out
    assert nothing.item() == 0.0


@pytest.mark.parametrize("where", ["end", "front"])
def test_a_padded_batch_equals_rows_alone(
    make_model: MakeModel, tokens: Tokens, writer: str, where: str
) -> None:
    model = make_model(writer=writer)
    src, tgt = tokens(3, 8), tokens(3, 7, seed=2)
    lengths, tgt_lengths = (8, 3, 5), (4, 7, 2)

    def mask_of(lengths: tuple[int, ...], n: int) -> Tensor:
        mask = (
            torch.arange(n, device=src.device) < torch.tensor(lengths, device=src.device)[:, None]
        )
        return mask if where == "end" else mask.flip(1)

    mask, tgt_mask = mask_of(lengths, 8), mask_of(tgt_lengths, 7)
    out = model(src, tgt, src_mask=mask, tgt_mask=tgt_mask, return_logits=True)
    for i in range(3):
        row = model(src[i, mask[i]][None], tgt[i, tgt_mask[i]][None], return_logits=True)
        assert close(out.enc_out[i, mask[i]], row.enc_out[0])
        assert close(out.mem[i], row.mem[0])
        assert close(out.dec_out[i, tgt_mask[i]], row.dec_out[0])


def test_targets_may_be_a_list(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    src, tgt = tokens(2, 8), tokens(2, 6, seed=2)
    mask = torch.arange(6, device=src.device) < torch.tensor([[6], [4]], device=src.device)
    expected = model(src, tgt, tgt_mask=mask).dec_out
    torch.testing.assert_close(model(src, [tgt[0], tgt[1, :4]]).dec_out, expected)


# --- Causality ----------------------------------------------------------------------------------


def test_the_decoder_is_causal(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    src = tokens(2, 8)

    def logits(tgt: Tensor) -> Tensor:
        return model(src, tgt, return_logits=True).dec_out

    assert_causal(logits, tokens(2, 7, seed=2))
    assert_prefix_consistent(logits, tokens(2, 7, seed=2))
    # Without a context, too, where the reference's sees everything.
    decoder = Decoder(12, 2, heads=3).to(src.device, torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64, device=src.device)
    assert_causal(decoder, x)


def test_the_encoder_tells_order_in_both_directions(device: torch.device) -> None:
    """One layer: a change of order behind a token changes it, as one before it does."""
    encoder = Encoder(12, 1, heads=2).to(device, torch.float64)
    x = torch.randn(1, 9, 12, dtype=torch.float64, device=device)
    for swapped, seen in (([0, 1, 2, 3, 4, 7, 6, 5, 8], 2), ([2, 1, 0, 3, 4, 5, 6, 7, 8], 6)):
        moved = (encoder(x[:, swapped]) - encoder(x))[0, seen].abs().max()
        assert moved > 1e-3


# --- Memory -------------------------------------------------------------------------------------


def test_a_padded_segment_leaves_the_memory_alone(
    make_model: MakeModel, tokens: Tokens, randn: Randn, writer: str
) -> None:
    model = make_model(writer=writer)
    src, mems = tokens(3, 5), randn(3, 3, 12)
    mask = torch.ones(3, 5, dtype=torch.bool, device=src.device)
    mask[1] = False
    out = model(src, mems=mems, src_mask=mask)
    assert torch.equal(out.mem[1], mems[1])
    assert (out.mem[[0, 2]] != mems[[0, 2]]).all()
    assert close(out.mem[[0, 2]], model(src[[0, 2]], mems=mems[[0, 2]]).mem)
    # Its gradient passes as it is.
    mems.requires_grad_()
    model(src, mems=mems, src_mask=mask).mem[1].sum().backward()
    assert torch.equal(
        mems.grad,
        torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=src.device)[
            :, None, None
        ].expand_as(mems),
    )


def test_a_row_is_reset_alone(
    make_model: MakeModel, tokens: Tokens, randn: Randn, writer: str
) -> None:
    model = make_model(writer=writer)
    src, mems = tokens(3, 5), randn(3, 3, 12)
    reset = torch.tensor([False, True, False], device=src.device)
    out = model(src, mems=mems, reset=reset)
    assert close(out.mem[[0, 2]], model(src, mems=mems).mem[[0, 2]])
    assert close(out.mem[1], model(src).mem[1])
    # Not even NaN is left of what was there.
    mems[1] = torch.nan
    again = model(src, mems=mems, reset=reset).mem
    assert close(again, out.mem)
    model.zero_grad()
    again.sum().backward()
    assert model.memory_slots.grad.isfinite().all()


def test_nan_in_what_is_masked_is_not_written(
    make_model: MakeModel, randn: Randn, writer: str
) -> None:
    model = make_model(writer=writer)
    segment, mems = randn(2, 5, 12), randn(2, 3, 12, seed=2)
    mask = torch.tensor([[True] * 5, [True, False] * 2 + [True]], device=mems.device)
    expected = model.write(mems, segment, mask)
    assert close(
        model.write(mems, segment.masked_fill(~mask[..., None], torch.nan), mask), expected
    )


def test_no_weights_of_a_slot_are_kept(make_model: MakeModel, randn: Randn, writer: str) -> None:
    """Of 40 tokens, 3 slots and 3 heads; and the gradient is what it is with them."""
    model = make_model(writer=writer)
    segment = randn(1, 40, 12).requires_grad_()
    kept: list[tuple[int, ...]] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model.write(randn(1, 3, 12), segment)
    assert kept
    assert not any(40 in shape[-1:] or 41 in shape[-1:] for shape in kept if len(shape) == 4)
    (found,) = torch.autograd.grad(out.square().sum(), segment)
    numbers = torch.func.grad(lambda x: model.write(randn(1, 3, 12), x).square().sum())
    assert close(numbers(segment.detach()), found)


def test_slots_in_half_precision(make_model: MakeModel, tokens: Tokens) -> None:
    """The squares of what a slot of a wide model begins with are 0 in float16."""
    model = make_model(writer="bmn", encoder_only=True, dim=510).float()
    with torch.no_grad():
        model.memory_slots.normal_(std=4e-5)
    expected = model.get_initial_mem(1)
    found = model.half().get_initial_mem(1)
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert model(tokens(1, 6)).mem.isfinite().all()


def test_slots_never_see_each_other(make_model: MakeModel, randn: Randn, writer: str) -> None:
    model = make_model(writer=writer, num_mem_updates=2)
    segment, mems = randn(2, 5, 12), randn(2, 3, 12, seed=2).requires_grad_()
    for slot in range(3):
        (gradient,) = torch.autograd.grad(model.write(mems, segment)[:, slot].sum(), mems)
        others = [i for i in range(3) if i != slot]
        assert (gradient[:, others] == 0).all()
        assert (gradient[:, slot] != 0).any()


def test_rows_of_a_batch_are_apart(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    model = make_model(writer=writer)
    src = tokens(2, 5)
    assert close(model(src).mem[:1], model(src[:1]).mem)


def test_memory_stays_bounded(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    """Over hundreds of segments, with the GRU's gate forced to keep everything."""
    model = make_model(writer=writer)
    if model.gru is not None:
        with torch.no_grad():
            model.gru.bias_hh[12:24] += 100.0
    mem = None
    with torch.no_grad():
        for i in range(300):
            mem = model(tokens(1, 5, seed=i), mems=mem).mem
            norms = mem.norm(dim=-1)
            assert (norms <= 12**0.5 + 1e-9).all()
            if writer == "bmn":
                torch.testing.assert_close(norms, torch.ones_like(norms))


def test_bmn_begins_with_its_bias(make_model: MakeModel) -> None:
    model = make_model(writer="bmn")
    initial = model.get_initial_mem(2)
    expected = model.memory_slots / model.memory_slots.norm(dim=1, keepdim=True)
    assert close(initial, expected.expand(2, -1, -1))


def test_the_temperature_sharpens_what_a_slot_keeps(make_model: MakeModel, randn: Randn) -> None:
    segment, mems = randn(2, 5, 12), randn(2, 3, 12, seed=2)
    found = [make_model(writer="bmn", temperature=t).write(mems, segment) for t in (0.25, 1.0)]
    assert not close(*found)


def test_a_cold_slot_that_matches_itself_is_kept(device: torch.device) -> None:
    """The limit of tau to 0: all weight on the own key; then only the bias moves it."""
    model = Memformer(
        dim=4, num_memory_slots=1, mem_update_attn_heads=1, encoder_only=True, enc_num_tokens=3,
        enc_depth=1, enc_heads=1, enc_max_seq_len=4, writer="bmn", temperature=1e-6,
    ).to(device, torch.float64)  # fmt: skip
    with torch.no_grad():
        model.mem_updater.to_q.weight.copy_(torch.eye(4))
        model.mem_updater.to_kv.weight[:4].copy_(torch.eye(4))
        model.mem_updater.to_q.bias.zero_()
        model.mem_updater.to_kv.bias.zero_()
    m = torch.tensor([[[0.6, 0.8, 0.0, 0.0]]], dtype=torch.float64, device=device)
    segment = torch.tensor([[[0.1, 0.1, 2.0, 0.0]]], dtype=torch.float64, device=device)
    expected = m + model.memory_slots
    assert close(model.write(m, segment), expected / expected.norm())


def test_the_memory_keeps_its_dtype(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    model = make_model(writer=writer).float()
    src = tokens(2, 5)
    mem = model.get_initial_mem(2)
    with torch.autocast(src.device.type, dtype=torch.bfloat16):
        out = model(src, mems=mem)
    assert out.mem.dtype == torch.float32


# --- Derivatives


def test_transforms_of_a_whole_model(
    make_model: MakeModel, tokens: Tokens, randn: Randn, writer: str
) -> None:
    """Forward-mode derivatives and torch.func give what backward gives."""
    model = make_model(writer=writer)
    tgt, mask = tokens(2, 5), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    x, tangent = randn(2, 6, 12), randn(2, 6, 12, seed=2)

    def loss(x: Tensor) -> Tensor:
        out = model(None, tgt, src_mask=mask.to(x.device), inputs_embeds=x)
        return out.dec_out + out.mem.square().mean()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert close(torch.func.grad(loss)(x), expected)
    assert close(torch.func.jacrev(loss)(x), expected)
    _, found = torch.func.jvp(loss, (x,), (tangent,))
    assert close(found, (expected * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x, tangent))
        assert close(torch.autograd.forward_ad.unpack_dual(dual).tangent, found)
    weights = dict(model.named_parameters())

    def of_weights(weights: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(model, weights, (tokens(2, 6), tgt))
        return found.dec_out

    mine = torch.func.grad(of_weights)({name: p.detach() for name, p in weights.items()})
    model.zero_grad()
    model(tokens(2, 6), tgt).dec_out.backward()
    for name, parameter in weights.items():
        if parameter.grad is not None:
            assert close(mine[name], parameter.grad), name


# --- Options ------------------------------------------------------------------------------------


CHANGES: dict[str, dict[str, Any]] = {
    "num_mem_updates": {"num_mem_updates": 2},
    "heads of memory": {"mem_update_attn_heads": 2},
    "heads of the encoder": {"enc_heads": 3},
    "heads of the decoder": {"dec_heads": 2},
    "writer": {"writer": "bmn"},
    "dropout": {"dropout": 0.3},
    "tie_embeddings": {"tie_embeddings": True},
    "max_distance": {"max_distance": 17},
    "legacy": {"legacy": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_an_output(make_model: MakeModel, tokens: Tokens, name: str) -> None:
    models = [make_model(enc_max_seq_len=40, dec_max_seq_len=40, **c) for c in ({}, CHANGES[name])]
    src, tgt = tokens(2, 40), tokens(2, 40, seed=2)
    # Whatever weights they have in common are the same.
    own = models[1].state_dict()
    common = {
        k: x for k, x in models[0].state_dict().items() if k in own and x.shape == own[k].shape
    }
    models[1].load_state_dict(common, strict=False)
    a, b = (model(src, tgt) for model in models)
    assert any(not close(x, y) for x, y in zip(a, b, strict=True))


def test_every_argument_of_forward_changes_an_output(
    make_model: MakeModel, tokens: Tokens, randn: Randn
) -> None:
    model = make_model()
    src, tgt, mems = tokens(2, 6), tokens(2, 6, seed=2), randn(2, 3, 12)
    some = torch.arange(6, device=src.device) % 2 == 0
    base = model(src, tgt, mems)
    for change in (
        {"src": tokens(2, 6, seed=5)},
        {"tgt": tokens(2, 6, seed=5)},
        {"mems": randn(2, 3, 12, seed=5)},
        {"src_mask": some.expand(2, 6)},
        {"tgt_mask": some.expand(2, 6)},
        {"src": None, "inputs_embeds": randn(2, 6, 12, seed=6)},
        {"reset": torch.tensor([True, False], device=src.device)},
    ):
        out = model(**{"src": src, "tgt": tgt, "mems": mems, **change})
        assert not all(close(x, y) for x, y in zip(base, out, strict=True)), change.keys()
    logits = model(src, tgt, mems, return_logits=True).dec_out
    assert logits.shape == (2, 6, 11)


def test_embeddings_take_the_place_of_tokens(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    src = tokens(2, 6)
    out = model(None, inputs_embeds=model.encoder.token_emb(src))
    assert close(out.enc_out, model(src).enc_out)


def test_dropout_acts_in_training_alone(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model(dropout=0.4)
    src, tgt = tokens(2, 6), tokens(2, 6, seed=2)
    assert not close(model(src, tgt).mem, model(src, tgt).mem)
    model.eval()
    assert close(model(src, tgt).mem, make_model().eval()(src, tgt).mem)


def test_tied_embeddings(make_model: MakeModel) -> None:
    model = make_model(tie_embeddings=True)
    net = model.decoder.net
    assert net.to_logits is None
    hidden = torch.randn(2, 3, 12, dtype=torch.float64, device=net.norm.weight.device)
    expected = net.norm(hidden) @ net.token_emb.weight.t() / 12**0.5 + net.logits_bias
    assert close(net.read(hidden), expected)


def test_no_target_gives_a_zero_that_has_a_gradient(make_model: MakeModel, tokens: Tokens) -> None:
    out = make_model()(tokens(2, 6))
    assert out.dec_out.item() == 0.0
    out.dec_out.backward()


def test_without_a_decoder(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    model = make_model(encoder_only=True, writer=writer)
    assert model.decoder is None
    out = model(tokens(2, 6))
    assert out._fields == ("enc_out", "mem")
    whole = make_model(writer=writer)
    whole.load_state_dict(model.state_dict(), strict=False)
    assert close(out.mem, whole(tokens(2, 6)).mem)


def test_the_parts_can_be_called_alone(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    model = make_model(writer=writer)
    src, tgt = tokens(2, 6), tokens(2, 6, seed=2)
    mems = model.get_initial_mem(2)
    out = model(src, tgt, mems)
    assert close(model.encoder(src, context=mems), out.enc_out)
    loss = model.decoder(tgt, return_loss=True, context=out.enc_out)
    assert close(loss, out.dec_out)
    assert close(model.write(mems, out.enc_out), out.mem)


def test_segments_are_read_one_after_the_other(
    make_model: MakeModel, tokens: Tokens, randn: Randn, writer: str
) -> None:
    model = make_model(writer=writer)
    src, mems = tokens(2, 21), randn(2, 3, 12)
    mask = torch.rand(2, 21, device=src.device) < 0.7
    mem = mems
    for i in (0, 9, 18):
        out = model(src[:, i : i + 9], mems=mem, src_mask=mask[:, i : i + 9])
        mem = out.mem
    whole, whole_mem = model.encode(src, mems, mask)
    # As long as the longest segment.
    assert torch.equal(whole.enc_out[:, :3], out.enc_out)
    assert torch.equal(whole.mask, F.pad(mask[:, 18:], (0, 6)))
    assert torch.equal(whole_mem, mem)
    _, mem_of_list = model.encode(list(src.split(9, 1)), mems, list(mask.split(9, 1)))
    assert torch.equal(mem_of_list, mem)


def test_a_wrapper_around_any_layers(device: torch.device) -> None:
    net = TransformerWrapper(
        num_tokens=7, max_seq_len=5, dim=8, layer_blocks=Encoder(8, 1, heads=2), return_logits=False
    ).to(device)
    assert net(torch.zeros(2, 5, dtype=torch.int64, device=device)).shape == (2, 5, 8)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_length(make_model: MakeModel, tokens: Tokens, n: int) -> None:
    out = make_model()(tokens(2, n), tokens(2, max(n, 2)))
    assert out.enc_out.shape == (2, n, 12)
    assert out.dec_out.isfinite()


def test_an_empty_batch(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    out = make_model(writer=writer)(tokens(0, 4), tokens(0, 3))
    assert out.mem.shape == (0, 3, 12)
    assert out.dec_out.item() == 0.0
