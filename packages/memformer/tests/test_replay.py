"""Replay against back-propagation through all segments at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from memformer import Context, Memformer, memory_replay_backprop
from shared_core.testing import Randn, run_ranks

if TYPE_CHECKING:
    from conftest import MakeModel, Tokens

SEGMENTS = 5
N = 9
Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def at_once(
    model: Memformer,
    src: Tensor,
    tgts: list[Tensor | None],
    mask: Tensor | None = None,
    tgt_masks: list[Tensor | None] | None = None,
    *,
    mems: Tensor | None = None,
    resets: Tensor | None = None,
    loss_fn: Callable[..., Tensor | None] | None = None,
    truncation: int | None = None,
) -> Outcome:
    """One graph of all segments."""
    count = len(tgts)
    losses, mem = [], mems
    context: Context | None = None
    for i in range(count):
        if truncation and i and (count - i) % truncation == 0:
            mem = mem.detach()
            context = context and Context(context.enc_out.detach(), context.mask)
        part = slice(N * i, N * (i + 1))
        out = model(
            src[:, part],
            tgts[i],
            mem,
            None if mask is None else mask[:, part],
            None if tgt_masks is None else tgt_masks[i],
            reset=None if resets is None else resets[:, i],
            earlier=context,
        )
        if mask is not None and not model.legacy and model.decoder is not None:
            own_reset = None if resets is None else resets[:, i]
            context = Context(out.enc_out, mask[:, part]).after(context, own_reset)
        loss = loss_fn(out, i) if loss_fn else out.dec_out if tgts[i] is not None else None
        losses.append(out.mem.new_zeros(()) if loss is None else loss)
        mem = out.mem
    each = torch.stack(losses)
    each.sum().backward()
    return each.detach(), mem.detach(), gradients(model)


def assert_equal(found: Any, model: nn.Module, expected: Outcome) -> None:
    losses, mem, grads = expected
    torch.testing.assert_close(found.losses, losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.loss, losses.sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mem, mem, rtol=0, atol=1e-12)
    assert not found.mem.requires_grad
    mine = gradients(model)
    assert mine.keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in grads.values())


def inputs(tokens: Tokens, which: str) -> tuple[Tensor, list[Tensor | None]]:
    src = tokens(2, SEGMENTS * N - 2)
    tgts: list[Tensor | None] = [tokens(2, 7, seed=i) for i in range(SEGMENTS)]
    if which == "some":
        tgts[1] = tgts[4] = None
    elif which == "last":
        tgts[:-1] = [None] * (SEGMENTS - 1)
    return src, tgts


@pytest.mark.parametrize("which", ["all", "some", "last"])
@pytest.mark.parametrize("truncation", [None, 1, 2, 5, 9])
def test_gradients_are_those_of_one_graph(
    make_model: MakeModel, tokens: Tokens, which: str, truncation: int | None, writer: str
) -> None:
    src, tgts = inputs(tokens, which)
    model = make_model(writer=writer)
    expected = at_once(model, src, tgts, truncation=truncation)
    model.zero_grad()
    given = tgts[-1] if which == "last" else tgts
    found = memory_replay_backprop(model, src, given, truncation=truncation)
    assert_equal(found, model, expected)


def test_masks_resets_and_a_start_that_wants_a_gradient(
    make_model: MakeModel, tokens: Tokens, randn: Randn, writer: str
) -> None:
    src, tgts = inputs(tokens, "all")
    mask = torch.rand(src.shape, device=src.device) < 0.7
    mask[0, N : 2 * N] = False
    tgt_masks = [torch.rand(2, 7, device=src.device) < 0.8 for _ in tgts]
    resets = torch.zeros(2, SEGMENTS, dtype=torch.bool, device=src.device)
    resets[1, 2] = True
    starts = [randn(2, 3, 12).requires_grad_() for _ in range(2)]
    model = make_model(writer=writer)
    expected = at_once(model, src, tgts, mask, tgt_masks, mems=starts[0], resets=resets)
    model.zero_grad()
    found = memory_replay_backprop(model, src, tgts, mask, tgt_masks, mems=starts[1], resets=resets)
    assert_equal(found, model, expected)
    torch.testing.assert_close(starts[1].grad, starts[0].grad)


@pytest.mark.parametrize("truncation", [None, 2])
def test_rows_that_end_before_others(
    make_model: MakeModel, tokens: Tokens, writer: str, truncation: int | None
) -> None:
    """Their last segments are masked whole, and have targets all the same."""
    src, tgts = inputs(tokens, "all")
    mask = torch.rand(src.shape, device=src.device) < 0.7
    mask[0, N:] = False
    mask[1, 3 * N :] = False
    resets = torch.zeros(2, SEGMENTS, dtype=torch.bool, device=src.device)
    resets[1, 3] = True
    model = make_model(writer=writer)
    options = {"truncation": truncation, "resets": resets}
    expected = at_once(model, src, tgts, mask, **options)
    model.zero_grad()
    assert_equal(memory_replay_backprop(model, src, tgts, mask, **options), model, expected)
    # What the encoder learns from a later target is not nothing.
    model.zero_grad()
    memory_replay_backprop(model, src, tgts[-1], mask)
    assert gradients(model)["encoder.norm.weight"].abs().max() > 1e-3


def test_a_row_that_ends_early_learns_as_it_does_alone(
    make_model: MakeModel, tokens: Tokens, writer: str
) -> None:
    model = make_model(writer=writer)
    tgt, lengths = tokens(3, 7), (4 * N - 2, N, 2 * N - 4)
    src = tokens(3, lengths[0])
    mask = torch.arange(lengths[0], device=src.device) < torch.tensor(
        lengths, device=src.device
    ).unsqueeze(1)
    alone = [
        memory_replay_backprop(model, src[i : i + 1, :n], tgt[i : i + 1]).loss
        for i, n in enumerate(lengths)
    ]
    expected = {name: x / 3 for name, x in gradients(model).items()}
    model.zero_grad()
    together = memory_replay_backprop(model, src, tgt, mask)
    torch.testing.assert_close(together.loss, torch.stack(alone).mean())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients(model)[name], gradient, msg=name)


def test_no_segment_goes_from_call_to_call(make_model: MakeModel, tokens: Tokens) -> None:
    """A row that ended before attends to nothing; one that goes on is as it is in one call."""
    model, tgts = make_model(), [tokens(2, 7, seed=i) for i in range(4)]
    src = tokens(2, 4 * N)
    mask = torch.ones_like(src, dtype=torch.bool)
    mask[1, 2 * N :] = False
    first, second = slice(0, 2 * N), slice(2 * N, None)

    def replay(rows: slice) -> tuple[Tensor, Tensor]:
        """The losses of one call and of two."""
        x, y, targets = src[rows], mask[rows], [tgt[rows] for tgt in tgts]
        one = memory_replay_backprop(model, x, targets, y)
        before = memory_replay_backprop(model, x[:, first], targets[:2], y[:, first])
        after = memory_replay_backprop(
            model, x[:, second], targets[2:], y[:, second], mems=before.mem
        )
        torch.testing.assert_close(after.mem, one.mem)
        return one.losses, torch.cat((before.losses, after.losses))

    goes_on, ends = replay(slice(0, 1)), replay(slice(1, 2))
    torch.testing.assert_close(*goes_on)
    torch.testing.assert_close(ends[0][:2], ends[1][:2])
    hidden = {"context": ends[0].new_zeros(1, 1, 12), "tgt_mask": mask[1:, -1:]}
    alone = [model.decoder(tgt[1:], return_loss=True, **hidden) for tgt in tgts[2:]]
    torch.testing.assert_close(ends[1][2:], torch.stack(alone).detach())
    assert (ends[1][2:] - ends[0][2:]).abs().min() > 1e-3


@pytest.mark.parametrize("encoder_only", [False, True])
def test_a_legacy_row_that_ends_early_reads_its_padding(
    make_model: MakeModel, tokens: Tokens, encoder_only: bool
) -> None:
    """As in the reference, to which a segment that is masked whole is one like others."""
    src, tgts = inputs(tokens, "all")
    mask = torch.ones_like(src, dtype=torch.bool)
    mask[0, N:] = False
    model = make_model(legacy=True, encoder_only=encoder_only)

    def square(results: Any, _: int) -> Tensor:
        return results.enc_out.square().mean()

    loss_fn = square if encoder_only else None
    expected = at_once(model, src, tgts, mask, loss_fn=loss_fn)
    model.zero_grad()
    assert_equal(memory_replay_backprop(model, src, tgts, mask, loss_fn=loss_fn), model, expected)


def test_masks_are_read_back_once_for_all_segments(make_model: MakeModel, tokens: Tokens) -> None:
    """Each number that Python asks a device for is waited for."""
    model, tgt = make_model(), tokens(2, 5)
    counts = []
    for segments in (2, 5):
        src = tokens(2, N * segments)
        mask = torch.ones_like(src, dtype=torch.bool)
        mask[0, N:] = False
        with Waits() as waits:
            memory_replay_backprop(model, src, [tgt] * segments, mask)
        counts.append(waits.count)
    assert counts[0] == counts[1]


class Waits(TorchDispatchMode):
    """Counts the numbers that are taken out of tensors one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_masks_of_some_segments_alone(make_model: MakeModel, tokens: Tokens) -> None:
    """Between a segment and the target that asks for it is a shorter one, another has no mask."""
    model = make_model()
    srcs = [tokens(2, n, seed=n) for n in (9, 4, 6, 3)]
    hidden = torch.tensor([[True], [False]], device=srcs[0].device)
    masks = [None, None, hidden.expand(2, 6), hidden.expand(2, 3)]
    tgts = [tokens(2, 5, seed=0), None, None, tokens(2, 5, seed=3)]
    context, mem, total = None, None, torch.zeros((), dtype=torch.float64, device=hidden.device)
    for src, tgt, mask in zip(srcs, tgts, masks, strict=True):
        out = model(src, tgt, mem, mask, earlier=context)
        context, mem = Context(out.enc_out, mask).after(context), out.mem
        total = total + out.dec_out
    total.backward()
    expected = gradients(model)
    model.zero_grad()
    found = memory_replay_backprop(model, srcs, tgts, masks)
    torch.testing.assert_close(found.loss, total.detach())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients(model)[name], gradient, msg=name)


def test_a_list_of_segments(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")
    mask = torch.rand(src.shape, device=src.device) < 0.7
    model = make_model()
    expected = at_once(model, src, tgts, mask)
    model.zero_grad()
    found = memory_replay_backprop(model, list(src.split(N, 1)), tgts, list(mask.split(N, 1)))
    assert_equal(found, model, expected)


def test_a_loss_of_ones_own(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    src, _ = inputs(tokens, "all")
    nothing: list[Tensor | None] = [None] * SEGMENTS

    def loss_fn(out: Any, i: int) -> Tensor | None:
        return None if i == 3 else (i + 1) * out.enc_out.square().mean() + out.mem.square().mean()

    model = make_model(encoder_only=True, writer=writer)
    expected = at_once(model, src, nothing, loss_fn=loss_fn)
    model.zero_grad()
    assert_equal(memory_replay_backprop(model, src, None, loss_fn=loss_fn), model, expected)


def test_a_loss_function_beside_targets(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")

    def loss_fn(out: Any, i: int) -> Tensor:
        return out.dec_out * (i + 1)

    model = make_model()
    expected = at_once(model, src, tgts, loss_fn=loss_fn)
    model.zero_grad()
    assert_equal(memory_replay_backprop(model, src, tgts, loss_fn=loss_fn), model, expected)


def test_a_loss_without_a_graph_is_counted(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")

    def loss_fn(out: Any, i: int) -> Tensor:
        return out.dec_out if i != 3 else torch.full_like(out.dec_out.detach(), 2.0)

    model = make_model()
    expected = at_once(model, src, tgts, loss_fn=loss_fn)
    model.zero_grad()
    assert_equal(memory_replay_backprop(model, src, tgts, loss_fn=loss_fn), model, expected)


def test_what_a_loss_function_draws_is_another_for_each_segment(
    make_model: MakeModel, tokens: Tokens
) -> None:
    src, tgts = inputs(tokens, "all")
    drawn = []

    def loss_fn(out: Any, _: int) -> Tensor:
        drawn.append(float(torch.rand(())))
        return out.dec_out

    memory_replay_backprop(make_model(), src, tgts, loss_fn=loss_fn)
    assert len(set(drawn)) == SEGMENTS


@pytest.mark.parametrize("which", ["all", "last"])
def test_dropout_is_replayed(make_model: MakeModel, tokens: Tokens, which: str) -> None:
    src, tgts = inputs(tokens, which)
    model = make_model(dropout=0.3)
    torch.manual_seed(7)
    expected = at_once(model, src, tgts)
    after = torch.rand(1)
    model.zero_grad()
    torch.manual_seed(7)
    assert_equal(memory_replay_backprop(model, src, tgts), model, expected)
    # What is drawn next is what would have been.
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"writer": "bmn"}, {"legacy": True}])
def test_layers_that_are_run_again(
    make_model: MakeModel, tokens: Tokens, which: str, options: dict[str, Any]
) -> None:
    src, tgts = inputs(tokens, which)
    model = make_model(**options)
    torch.manual_seed(7)
    expected = at_once(model, src, tgts)
    after = torch.rand(1)
    model = make_model(checkpoint_layers=True, **options)
    for run in (at_once, memory_replay_backprop):
        model.zero_grad()
        torch.manual_seed(7)
        got = run(model, src, tgts)
        if run is memory_replay_backprop:
            assert_equal(got, model, expected)
        else:
            torch.testing.assert_close(got, expected)
        assert torch.equal(torch.rand(1), after)


def test_layers_that_are_run_again_keep_less(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgt = tokens(2, N), tokens(2, N, seed=2)
    kept = []
    for again in (False, True):
        model = make_model(checkpoint_layers=again)
        sizes: list[int] = []
        own = {p.data_ptr() for p in model.parameters()}

        def keep(x: Tensor, own: set[int] = own, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if x.data_ptr() in own else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(src, tgt)
        kept.append(sum(sizes))
        calls = []
        for layer in (*model.encoder.layer_blocks.layers, *model.decoder.net.layer_blocks.layers):
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out.dec_out.backward()
        # Each layer once more.
        assert len(calls) == (4 if again else 0)
        with torch.no_grad():
            model(src, tgt)
        assert len(calls) == (8 if again else 4)
    assert kept[1] < 0.5 * kept[0]


def test_gradients_are_added(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")
    model = make_model()
    at_once(model, src, tgts)
    losses, mem, grads = at_once(model, src, tgts)
    model.zero_grad()
    memory_replay_backprop(model, src, tgts)
    assert_equal(memory_replay_backprop(model, src, tgts), model, (losses, mem, grads))


def test_going_on_from_the_memory_that_is_returned(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")
    model = make_model()
    losses, mem, _ = at_once(model, src, tgts)
    first = memory_replay_backprop(model, src[:, : 2 * N], tgts[:2])
    second = memory_replay_backprop(model, src[:, 2 * N :], tgts[2:], mems=first.mem)
    torch.testing.assert_close(torch.cat((first.losses, second.losses)), losses)
    torch.testing.assert_close(second.mem, mem)


def test_a_scaler(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")
    model = make_model()
    expected = at_once(model, src, tgts)
    model.zero_grad()
    scaler = torch.amp.GradScaler(src.device.type, init_scale=1024.0)
    found = memory_replay_backprop(model, src, tgts, scaler=scaler)
    scaled = gradients(model)
    for name, gradient in expected[2].items():
        torch.testing.assert_close(scaled[name], 1024 * gradient)
    torch.testing.assert_close(found.losses, expected[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.unscale_(optimizer)
    assert_equal(found, model, expected)


def test_under_autocast(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")
    model = make_model().float()
    with torch.autocast(src.device.type, dtype=torch.bfloat16):
        expected = at_once(model, src, tgts)
    model.zero_grad()
    with torch.autocast(src.device.type, dtype=torch.bfloat16):
        found = memory_replay_backprop(model, src, tgts)
    torch.testing.assert_close(found.losses, expected[0], rtol=0.02, atol=0)
    mine = gradients(model)
    assert mine.keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert (mine[name] - gradient).norm() <= 0.1 * gradient.norm(), name


def test_only_the_decoder_learns(make_model: MakeModel, tokens: Tokens) -> None:
    """Nothing leads back through the memory, and every segment has its loss all the same."""
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("decoder."))
    src, tgts = inputs(tokens, "all")
    expected = at_once(model, src, tgts)
    model.zero_grad()
    assert_equal(memory_replay_backprop(model, src, tgts), model, expected)


def test_frozen_parameters_stay_without_a_gradient(make_model: MakeModel, tokens: Tokens) -> None:
    src, tgts = inputs(tokens, "all")
    model = make_model()
    model.encoder.requires_grad_(False)
    memory_replay_backprop(model, src, tgts)
    assert not any(name.startswith("encoder.") for name in gradients(model))
    assert "memory_slots" in gradients(model)


def test_no_two_graphs_are_held(
    make_model: MakeModel, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a segment is run with a graph, that of the segment run before it is gone."""
    src, tgts = inputs(tokens, "all")
    model = make_model()
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            counts.append(sum(one() is not None for one in alive))
        out = own(*args, **kwargs)
        if torch.is_grad_enabled():
            alive.append(weakref.ref(out.enc_out))
        return out

    monkeypatch.setattr(model, "forward", forward)
    memory_replay_backprop(model, src, tgts)
    assert counts == [0] * SEGMENTS


def test_segments_that_no_loss_reaches_get_no_graph(
    make_model: MakeModel, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, tgts = inputs(tokens, "last")
    model = make_model()
    graphs = []
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        graphs.append(torch.is_grad_enabled())
        return own(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    memory_replay_backprop(model, src, tgts, truncation=2)
    assert graphs == [False] * (SEGMENTS - 1) + [True] * 2


@pytest.mark.parametrize(("dropout", "states"), [(0.0, 1), (0.3, SEGMENTS)])
def test_what_is_kept_of_a_segment_are_its_slots(
    make_model: MakeModel,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
    states: int,
) -> None:
    """When the last segment is run with a graph, no other tensor of a segment is alive.

    But the state of the random generator, which is kept once where nothing is drawn.
    """
    model = make_model(dropout=dropout)
    alive: list[Tensor] = []
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        if torch.is_grad_enabled() and not alive:
            found = (x for x in gc.get_objects() if type(x) is Tensor)
            alive.extend(x for x in found if id(x) not in known)
        return own(*args, **kwargs)

    src, tgts = inputs(tokens, "all")
    monkeypatch.setattr(model, "forward", forward)
    gc.collect()
    known = {id(x) for x in gc.get_objects() if type(x) is Tensor}
    memory_replay_backprop(model, src, tgts)
    shapes = [tuple(x.shape) for x in alive if x.is_floating_point()]
    assert len(shapes) >= SEGMENTS - 1
    assert set(shapes) == {(2, 3, 12)}
    random_states = [x for x in alive if x.dtype == torch.uint8]
    assert len({x.data_ptr() for x in random_states}) == states


# --- Two processes ------------------------------------------------------------------------------


def ranked(
    settings: dict[str, Any], weights: dict[str, Tensor], src: Tensor, tgt: Tensor, way: str
) -> Any:
    """On each of two ranks, with its own half of the batch."""
    model = Memformer(**settings).double()
    model.load_state_dict(weights)
    wrapped = DistributedDataParallel(model, find_unused_parameters=way == "unused")
    src, tgt = (x.chunk(2)[dist.get_rank()] for x in (src, tgt))
    reduced = []
    own = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.numel())
        return own(tensor, *args, **kwargs)

    dist.all_reduce = counted
    if way == "accumulated":
        with wrapped.no_sync():
            memory_replay_backprop(wrapped, src, tgt)
        assert not reduced
    found = memory_replay_backprop(wrapped, src, tgt)
    dist.all_reduce = own
    synchronised = len(reduced)
    # The wrapper goes on working as any other.
    after = gradients(model)
    model.zero_grad()
    out = wrapped(src[:, :N], tgt)
    (out.dec_out + out.mem.square().mean()).backward()
    return found.losses, after, synchronised, gradients(model)


@pytest.mark.parametrize("way", ["plain", "unused", "accumulated"])
def test_data_parallel(
    make_model: MakeModel, settings: dict[str, Any], tokens: Tokens, way: str
) -> None:
    model = make_model().cpu()
    src, tgt = tokens(4, 3 * N).cpu(), tokens(4, 7, seed=2).cpu()
    ranks = run_ranks(ranked, 2, settings, model.state_dict(), src, tgt, way)
    losses, _, grads = at_once(model, src, [None, None, tgt])
    times = 2 if way == "accumulated" else 1
    model.zero_grad()
    out = model(src[:, :N], tgt)
    (out.dec_out + out.mem.square().mean()).backward()
    single = gradients(model)
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, losses)
    for _, synchronised, count, after in ranks:
        assert synchronised.keys() == grads.keys()
        # Each gradient once, and which there are.
        assert count == len(grads) + 1
        for name, gradient in grads.items():
            torch.testing.assert_close(synchronised[name], times * gradient, msg=name)
        for name, gradient in single.items():
            torch.testing.assert_close(after[name], gradient, msg=name)
