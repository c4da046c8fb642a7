"""Cached decoding against full passes, and what generation promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from memformer import AutoregressiveWrapper, Memformer, TransformerWrapper
from memformer.autoregressive_wrapper import top_k, top_p
from shared_core.testing import Randn, assert_pieces_equal_whole

if TYPE_CHECKING:
    from conftest import MakeModel, Tokens


def greedy(model: Memformer, context: Tensor | None, start: Tensor, length: int) -> Tensor:
    """The likeliest tokens by full passes."""
    whole = start
    for _ in range(length):
        given = {} if context is None else {"context": context}
        best = model.decoder(whole, **given)[:, -1].argmax(-1, keepdim=True)
        whole = torch.cat((whole, best), 1)
    return whole[:, start.shape[1] :]


@pytest.mark.parametrize("legacy", [False, True])
def test_pieces_equal_the_whole(
    make_model: MakeModel, tokens: Tokens, randn: Randn, legacy: bool
) -> None:
    model = make_model(legacy=legacy)
    net, context = model.decoder.net, randn(2, 5, 12)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]], device=context.device)

    def whole(x: Tensor) -> Tensor:
        return net(x, context=context, tgt_mask=mask)

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = net.layer_blocks.init_state(2, 8, context, mask) if state is None else state
        hidden, state = net.layer_blocks.step(net.embed(x), state)
        return net.read(hidden), state

    assert_pieces_equal_whole(whole, step, tokens(2, 8))


def test_pieces_without_a_context_and_with_padding_in_front(
    make_model: MakeModel, tokens: Tokens
) -> None:
    model = make_model()
    net, x = model.decoder.net, tokens(2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool, device=x.device)
    mask[1, :3] = False
    expected = net(x, src_mask=mask)
    for first in (4, 2):
        state = net.layer_blocks.init_state(2, 8)
        pieces = []
        for part in (slice(0, first), slice(first, first + 1), slice(first + 1, 8)):
            # A mask is needed as long as there is padding in it.
            some = None if bool(mask[:, part].all()) else mask[:, part]
            hidden, state = net.layer_blocks.step(net.embed(x[:, part]), state, some)
            pieces.append(net.read(hidden))
        torch.testing.assert_close(torch.cat(pieces, 1)[mask], expected[mask])


def test_a_state_can_be_branched(make_model: MakeModel, tokens: Tokens, randn: Randn) -> None:
    model = make_model()
    net, x, context = model.decoder.net, tokens(2, 6), randn(2, 4, 12)
    mask = torch.tensor([[True, True, True], [False, True, True]], device=x.device)
    start = net.layer_blocks.init_state(2, 6, context, torch.ones_like(context[..., 0]).bool())
    _, state = net.layer_blocks.step(net.embed(x[:, :3]), start, mask)
    rows = torch.tensor([1, 0, 1], device=x.device)
    branch = state.reorder(rows)
    found, _ = net.layer_blocks.step(net.embed(x[rows, 3:5]), branch)
    again, _ = net.layer_blocks.step(net.embed(x[:, 3:5]), state)
    torch.testing.assert_close(found, again[rows])
    assert branch.length == 3


def test_greedy_generation_is_that_of_full_passes(
    make_model: MakeModel, tokens: Tokens, randn: Randn
) -> None:
    model = make_model()
    for context in (randn(2, 5, 12), None):
        start = tokens(2, 3)
        found = model.decoder.generate(start, 6, temperature=0.0, context=context)
        assert torch.equal(found, greedy(model, context, start, 6))
        one = model.decoder.generate(
            start[0], 6, temperature=0.0, context=None if context is None else context[:1]
        )
        assert torch.equal(one, found[0])


def test_padding_in_front_of_a_prompt_changes_nothing(
    make_model: MakeModel, tokens: Tokens, randn: Randn
) -> None:
    model = make_model()
    start, context = tokens(2, 5), randn(2, 4, 12)
    mask = torch.ones(2, 5, dtype=torch.bool, device=start.device)
    mask[1, :3] = False
    context_mask = torch.tensor([[True] * 4, [True, False] * 2], device=start.device)
    options: dict[str, Any] = {"temperature": 0.0}
    found = model.decoder.generate(
        start, 4, context=context, input_mask=mask, tgt_mask=context_mask, **options
    )
    kept = context[1:, context_mask[1]]
    alone = model.decoder.generate(start[1:, 3:], 4, context=kept, **options)
    assert torch.equal(found[1:], alone)


def test_the_model_reads_segments_and_answers(
    make_model: MakeModel, tokens: Tokens, randn: Randn, writer: str
) -> None:
    model = make_model(writer=writer, dropout=0.3)
    src, mems, prompt = tokens(2, 21), randn(2, 3, 12), tokens(2, 2, seed=4)
    mask = torch.rand(2, 21, device=src.device) < 0.8
    out = model.generate(
        src, 5, prompt=prompt, mems=mems, src_mask=mask, temperature=0.0, return_mem=True
    )
    assert model.training
    model.eval()
    read, mem = model.encode(src, mems, mask)
    torch.testing.assert_close(out.mem, mem)
    expected = model.decoder.generate(
        prompt, 5, temperature=0.0, context=read.enc_out, tgt_mask=read.mask
    )
    assert torch.equal(out.tokens, expected)
    streamed = model.stream(src, 5, prompt=prompt, mems=mems, src_mask=mask, temperature=0.0)
    assert torch.equal(torch.stack(list(streamed), 1), expected)
    # By default an answer begins behind a 0.
    zeros = torch.zeros_like(prompt[:, :1])
    assert torch.equal(
        model.generate(src, 5, temperature=0.0),
        model.generate(src, 5, prompt=zeros, temperature=0.0),
    )


def test_rows_that_end_before_others_answer_as_they_do_alone(
    make_model: MakeModel, tokens: Tokens, writer: str
) -> None:
    model = make_model(writer=writer)
    lengths = (25, 9, 4, 20)
    src, prompt = tokens(4, 25), tokens(4, 2, seed=4)
    mask = torch.arange(25, device=src.device) < torch.tensor(lengths, device=src.device)[:, None]
    options: dict[str, Any] = {"temperature": 0.0}
    found = model.generate(src, 6, prompt=prompt, src_mask=mask, return_mem=True, **options)
    streamed = torch.stack(list(model.stream(src, 6, prompt=prompt, src_mask=mask, **options)), 1)
    assert torch.equal(streamed, found.tokens)
    for i, n in enumerate(lengths):
        one = prompt[i : i + 1]
        alone = model.generate(src[i : i + 1, :n], 6, prompt=one, return_mem=True, **options)
        assert torch.equal(found.tokens[i], alone.tokens[0])
        torch.testing.assert_close(found.mem[i], alone.mem[0])
    read, _ = model.encode(src, None, mask)
    for i, n in enumerate(lengths):
        alone, _ = model.encode(src[i : i + 1, :n])
        torch.testing.assert_close(read.enc_out[i, read.mask[i]], alone.enc_out[0])
    # Where no segment has a token, there is nothing to attend to.
    nothing = model.generate(src, 6, prompt=prompt, src_mask=mask & (mask[:, -1:]), **options)
    expected = model.decoder.generate(
        prompt, 6, **options, context=src.new_zeros(4, 1, 12).double(),
        tgt_mask=torch.zeros_like(prompt[:, :1]).bool(),
    )  # fmt: skip
    assert torch.equal(nothing[1:], expected[1:])


def test_the_keys_kept_have_the_dtype_of_autocast(
    make_model: MakeModel, tokens: Tokens, randn: Randn
) -> None:
    net = make_model().float().decoder.net
    x, context = tokens(2, 4), randn(2, 5, 12).float()
    for given in (context, None):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            state = net.layer_blocks.init_state(2, 6, given)
            hidden, state = net.layer_blocks.step(net.embed(x), state)
        kept = (*state.keys, *state.values, *state.cross_keys, *state.cross_values)
        assert {part.dtype for part in kept} == {torch.bfloat16}
        expected, _ = net.layer_blocks.step(net.embed(x), net.layer_blocks.init_state(2, 6, given))
        assert (hidden - expected).norm() < 0.05 * expected.norm()


def test_a_legacy_decoder_without_a_context_reads_everything_anew(
    make_model: MakeModel, tokens: Tokens
) -> None:
    """There the reference attends to all tokens, later ones included."""
    model, start = make_model(legacy=True), tokens(2, 3)
    found = model.decoder.generate(start, 5, temperature=0.0)
    assert torch.equal(found, greedy(model, None, start, 5))


def test_a_state_is_detached_and_moved(make_model: MakeModel, tokens: Tokens, randn: Randn) -> None:
    net, x = make_model().decoder.net, tokens(2, 4)
    state = net.layer_blocks.init_state(2, 4, randn(2, 3, 12))
    hidden, state = net.layer_blocks.step(net.embed(x[:, :3]), state, torch.ones(2, 3) > 0)
    # Whoever steps by hand with gradients on gets none, and no graph over what is overwritten.
    assert not hidden.requires_grad
    for other in (state.detach(), state.to(x.device), state.to("cpu").to(x.device)):
        copy = other.reorder(torch.arange(2, device=x.device))
        found, _ = net.layer_blocks.step(net.embed(x[:, 3:]), copy)
        expected, _ = net.layer_blocks.step(net.embed(x[:, 3:]), state)
        assert torch.equal(found, expected)
        assert other.length == 3
    assert state.to("meta").keys[0].device.type == "meta"
    graph = state._replace(by_distance=state.by_distance.clone().requires_grad_())
    assert not graph.detach().by_distance.requires_grad


def test_segments_are_read_once_and_tokens_too(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    read: list[int] = []
    keys: list[int] = []
    model.decoder.net.token_emb.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[1]))
    cross = model.decoder.net.layer_blocks.layers[0].cross_attn.body
    cross.to_kv.register_forward_pre_hook(lambda _, x: keys.append(x[0].shape[1]))
    model.generate(tokens(2, 9), 6, prompt=tokens(2, 3))
    assert read == [3, 1, 1, 1, 1, 1]
    assert keys == [9]


def test_each_row_ends_for_itself(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    src = tokens(3, 9)
    free = model.generate(src, 8, temperature=0.0)
    eos = int(free[0, 2])
    found = model.generate(src, 8, temperature=0.0, eos_token=eos, pad_value=10)
    for i in range(3):
        row = free[i].tolist()
        end = row.index(eos) + 1 if eos in row else 8
        assert found[i].tolist() == row[:end] + [10] * (8 - end)
    start, context = torch.zeros_like(src[:, :1]), model.encode(src)[0].enc_out
    wrapped = model.decoder.generate(start, 8, eos, 0.0, context=context)
    assert torch.equal(wrapped, model.generate(src, 8, temperature=0.0, eos_token=eos))


def test_sampling_options_have_an_effect(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    src = tokens(8, 9)
    best = model.generate(src, 5, temperature=0.0)
    for options in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert torch.equal(model.generate(src, 5, **options), best)
        assert torch.equal(torch.stack(list(model.stream(src, 5, **options)), 1), best)
    seeded = [
        model.generate(src, 5, generator=torch.Generator(src.device).manual_seed(i))
        for i in (1, 1, 2)
    ]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


def test_the_filter_of_the_reference(device: torch.device) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], device=device).log()
    assert top_p(logits, 0.9).isfinite().tolist() == [[True, True, True, False]]
    assert top_k(logits).isfinite().tolist() == [[True, False, False, False]]


def test_any_other_net_is_read_anew(device: torch.device) -> None:
    class Net(nn.Module):
        max_seq_len = 6

        def forward(self, x: Tensor, src_mask: Tensor | None = None) -> Tensor:
            total = x if src_mask is None else x * src_mask
            return nn.functional.one_hot(total.cumsum(1) % 5, 5).float()

    wrapper = AutoregressiveWrapper(Net())
    start = torch.tensor([[3, 1]], device=device)
    assert wrapper.generate(start, 3, temperature=0.0).tolist() == [[4, 3, 1]]
    mask = torch.tensor([[False, True]], device=device)
    assert wrapper.generate(start, 3, temperature=0.0, input_mask=mask).tolist() == [[1, 2, 4]]


def test_generation_reaches_the_last_place(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    assert model.generate(tokens(1, 4), 8).shape == (1, 8)
    assert model.generate(tokens(1, 4), 0).shape == (1, 0)


def test_the_wrapper_gives_logits(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model()
    x = tokens(2, 5)
    padded = model.decoder([x[0], x[1, :3]])
    assert padded.shape == (2, 5, 11)
    torch.testing.assert_close(padded[0], model.decoder(x)[0])
    assert isinstance(model.decoder.net, TransformerWrapper)
