"""Memory replay back-propagation: gradients through all segments, one segment's graph at a time.

Wu et al. 2020, arXiv 2010.06891, algorithm 1. A first pass without a graph stores the memory
before each segment. Then segments are run again, from the last to the first, each with a graph of
its own, which passes the gradient of its memory on to the segment before it.

Shapes: as in `model`; s segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from memformer.model import EncOnlyResults, Memformer, Results
from memformer.segments import Context, Segment
from shared_core.checks import check_at_least, check_mask

Loss = Callable[[Results | EncOnlyResults, int], Tensor | None]


class Replay(NamedTuple):
    """What is left of a replay, all without a graph.

    Attributes:
        loss: the sum of the losses.
        losses: of each segment, (s,); 0 where there is none.
        mem: (b, m, d), the memory after the last segment.
    """

    loss: Tensor
    losses: Tensor
    mem: Tensor


class _Step(NamedTuple):
    """A segment and what belongs to it, as arguments of the model.

    `looks_back`: a target is of a row that has no token in this segment.
    """

    src: Tensor
    tgt: Tensor | None
    src_mask: Tensor | None
    tgt_mask: Tensor | None
    reset: Tensor | None
    looks_back: bool

    def run(
        self,
        model: Memformer,
        mems: Tensor | None,
        *,
        decode: bool,
        earlier: Context | None = None,
    ) -> Results | EncOnlyResults:
        tgt, tgt_mask = (self.tgt, self.tgt_mask) if decode else (None, None)
        more: dict[str, Any] = {} if earlier is None else {"earlier": earlier}
        out: Results | EncOnlyResults = model(
            self.src, tgt, mems, self.src_mask, tgt_mask, reset=self.reset, **more
        )
        return out

    def context(self, enc_out: Tensor, earlier: Context | None) -> Context:
        """What the decoder attends to after this segment."""
        return Context(enc_out, self.src_mask).after(earlier, self.reset)


def memory_replay_backprop(
    model: nn.Module,
    src: Tensor | Sequence[Tensor],
    tgt: Tensor | Sequence[Tensor | None] | None,
    src_mask: Tensor | Sequence[Tensor | None] | None = None,
    tgt_mask: Tensor | Sequence[Tensor | None] | None = None,
    *,
    mems: Tensor | None = None,
    resets: Tensor | None = None,
    loss_fn: Loss | None = None,
    truncation: int | None = None,
    scaler: GradScaler | None = None,
) -> Replay:
    """Adds to the parameters' gradients those of the sum of all segments' losses.

    They are those of back-propagation through all segments at once, for the memory of one segment's
    graph and of the slots that each segment began with. For a row that is masked whole in a segment
    with a target, the decoder attends to the row's last segment that is not; what it attends to is
    then kept, too.

    Args:
        model: a `Memformer`, or `DistributedDataParallel` of one: gradients are then averaged over
            its ranks once, at the end, unless in its `no_sync`; by no hook of its own.
        src: (b, s n) tokens, which are split after every `enc_max_seq_len`, or a list of segments.
        tgt: the target of the last segment, or a list with one or None for each segment.
        src_mask: as `src`.
        tgt_mask: as `tgt`.
        mems: (b, m, d), the memory before the first segment; the initial one by default. Gets a
            gradient if it wants one. It is all that comes from an earlier call: a row whose tokens
            ended there has nothing that the decoder attends to here, so its loss is another than
            in one call.
        resets: (b, s) boolean, rows that begin a segment with the initial memory.
        loss_fn: called as loss_fn(results, i) for segment i, from the last to the first, returns
            its loss or None; by default `dec_out` where there is a target. For `encoder_only`, or
            losses of one's own.
        truncation: segments that a gradient goes back: the memory counts as detached before every
            so many, counted from the last.
        scaler: of the losses; what is returned is not scaled.

    Returns:
        The losses, and the memory to begin the next call with.

    Raises:
        TypeError, ValueError: as the model's `forward`; lists are not of one length; there is
            neither a target nor a `loss_fn`; `truncation` is below 1. Of what `loss_fn` returns,
            when it does: the losses of later segments have then been differentiated.
    """
    inner = _memformer(model)
    steps = _steps(inner, src, tgt, src_mask, tgt_mask, resets, mems)
    if tgt is None and loss_fn is None:
        raise ValueError("give a tgt, a loss_fn, or both, got neither")
    if truncation is not None:
        check_at_least(1, truncation=truncation)
    count = len(steps)
    losing = [loss_fn is not None or step.tgt is not None for step in steps]
    reached = _reached(losing, truncation or count)
    last = max((i for i in range(count) if reached[i]), default=-1)

    # The decoder may draw random numbers before the next segment does.
    draws = any(isinstance(x, nn.Dropout) and x.p > 0.0 and x.training for x in inner.modules())
    last_back = max((i for i in range(1, count) if reached[i] and steps[i].looks_back), default=0)
    stored: dict[int, _Start] = {}
    mem, context = mems, None
    random_state = _RandomState(steps[0].src)
    with torch.no_grad():
        for i, step in enumerate(steps):
            if reached[i]:
                wanted = context if step.looks_back else None
                # One for all segments where nothing is drawn.
                random_state = random_state.now(step.src)
                stored[i] = _Start(mem, wanted, random_state)
            if i < count - 1 or i != last:
                out = step.run(inner, mem, decode=draws)
                mem = out.mem
                context = step.context(out.enc_out, context) if i < last_back else None
                del out
    # What autocast has cast without a graph must not be found by the passes with one.
    torch.clear_autocast_cache()

    losses: dict[int, Tensor] = {}
    grad: Tensor | None = None
    grad_context: Tensor | None = None
    while stored:
        i, start = stored.popitem()
        given = mems if i == 0 or start.mem is None else start.mem.detach().requires_grad_()
        earlier = _leaf(start.context, grad_context, steps[:i])
        with start.random_state.restored(i != count - 1):
            results = steps[i].run(inner, given, decode=True, earlier=earlier)
        loss = _loss(results, i, losing[i], loss_fn)
        if i == count - 1:
            mem = results.mem.detach()
        roots: list[tuple[Tensor, Tensor | None]] = [(results.mem, grad)]
        if grad_context is not None:
            roots.append((steps[i].context(results.enc_out, earlier).enc_out, grad_context))
        if loss is not None:
            losses[i] = loss.detach()
            scaled = loss if scaler is None else scaler.scale(loss)
            roots.append((scaled, torch.ones_like(scaled)))
        # No graph outlives its segment.
        del results, loss, start
        # Where only the decoder learns, nothing leads back through the memory.
        roots = [(x, y) for x, y in roots if y is not None and x.requires_grad]
        if roots:
            # The dtypes of the graph decide.
            with torch.autocast(steps[i].src.device.type, enabled=False):
                torch.autograd.backward([x for x, _ in roots], [y for _, y in roots])
        cut = (count - i) % (truncation or count) == 0
        grad = None if cut or i == 0 or given is None else given.grad
        grad_context = None if cut or earlier is None else earlier.enc_out.grad
        del roots, given, earlier

    if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
        _average_gradients(model)
    if mem is None:
        raise RuntimeError("no segment was run")
    zero = next(iter(losses.values()), mem).new_zeros(())
    each = torch.stack([losses.get(i, zero).to(zero) for i in range(count)])
    return Replay(each.sum(), each, mem)


def _memformer(model: nn.Module) -> Memformer:
    if isinstance(getattr(model, "_orig_mod", None), DistributedDataParallel):
        raise TypeError("compile the model, then wrap it in DistributedDataParallel")
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    # What torch.compile returns holds the model as `_orig_mod`.
    if not isinstance(getattr(inner, "_orig_mod", inner), Memformer):
        raise TypeError(f"model must be a Memformer, got {type(inner).__name__}")
    return inner  # type: ignore[return-value]


def _steps(
    model: Memformer,
    src: Tensor | Sequence[Tensor],
    tgt: Tensor | Sequence[Tensor | None] | None,
    src_mask: Tensor | Sequence[Tensor | None] | None,
    tgt_mask: Tensor | Sequence[Tensor | None] | None,
    resets: Tensor | None,
    mems: Tensor | None,
) -> list[_Step]:
    """All arguments by segments, checked."""
    segments = model.segments(src, mems, src_mask)
    count = len(segments)
    tgts, tgt_masks = _spread("tgt", tgt, count), _spread("tgt_mask", tgt_mask, count)
    check_mask("resets", resets, (segments[0].src.shape[0], count))
    rows = [None] * count if resets is None else resets.unbind(1)
    for segment, one, mask, reset in zip(segments, tgts, tgt_masks, rows, strict=True):
        model.check(segment.src, one, mems, segment.mask, mask, reset=reset)
    looking = _looking_back(model, segments, tgts)
    return [
        _Step(segment.src, one, segment.mask, mask, reset, back)
        for segment, one, mask, reset, back in zip(
            segments, tgts, tgt_masks, rows, looking, strict=True
        )
    ]


def _looking_back(
    model: Memformer, segments: Sequence[Segment], tgts: Sequence[Tensor | None]
) -> list[bool]:
    """Which segments have a target of a row that has no token there.

    The device is waited for once, for all segments. In the reference such a row is like others.
    """
    found = [False] * len(segments)
    if model.legacy or model.decoder is None:
        return found
    masks = {
        i: segment.mask
        for i, (segment, tgt) in enumerate(zip(segments, tgts, strict=True))
        if tgt is not None and segment.mask is not None
    }
    if masks:
        full = torch.stack([mask.any(1).all() for mask in masks.values()]).tolist()
        for i, every_row in zip(masks, full, strict=True):
            found[i] = not every_row
    return found


def _spread(
    name: str, given: Tensor | Sequence[Tensor | None] | None, count: int
) -> Sequence[Tensor | None]:
    """One for each segment: what is not a list belongs to the last."""
    if given is None or isinstance(given, Tensor):
        return [*[None] * (count - 1), given]
    if len(given) != count:
        raise ValueError(f"{name} must be a list of {count} segments, got {len(given)}")
    return given


def _reached(losing: Sequence[bool], truncation: int) -> list[bool]:
    """Which segments a gradient comes to: of a loss of their own, or through the memory."""
    found, carried = [], False
    count = len(losing)
    for i in reversed(range(count)):
        carried = carried or losing[i]
        found.append(carried)
        if (count - i) % truncation == 0:
            carried = False
    return found[::-1]


def _leaf(stored: Context | None, grad: Tensor | None, before: Sequence[_Step]) -> Context | None:
    """What the decoder attended to before a segment, to take its gradient: None if nothing asks.

    Where only a later segment asks for it, its values are of no account, and may be zeros.
    """
    if stored is not None:
        return Context(stored.enc_out.detach().requires_grad_(), stored.mask)
    if grad is None or not before:
        return None
    n = 0
    for step in before:
        own = step.src.shape[1]
        n = own if step.src_mask is None else max(n, own)
    return Context(grad.new_zeros(len(grad), n, grad.shape[2]).requires_grad_(), None)


def _loss(
    results: Results | EncOnlyResults, i: int, losing: bool, loss_fn: Loss | None
) -> Tensor | None:
    if loss_fn is None:
        return results.dec_out if losing and isinstance(results, Results) else None
    loss = loss_fn(results, i)
    if loss is None:
        return None
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor or None, got {type(loss).__name__}")
    if loss.ndim != 0:
        shape = tuple(loss.shape)
        raise ValueError(f"loss_fn must return one number, got shape {shape} for segment {i}")
    return loss


class _Start(NamedTuple):
    """What a segment is run with again: the memory, what its decoder attends to of earlier ones."""

    mem: Tensor | None
    context: Context | None
    random_state: _RandomState


class _RandomState:
    """The state of the random generators, of the CPU and of a tensor's device."""

    def __init__(self, like: Tensor) -> None:
        self.kind: str = like.device.type
        self.cpu: Tensor = torch.get_rng_state()
        self.devices, self.states = get_device_states(like)

    def now(self, like: Tensor) -> _RandomState:
        """The state as it is; this one, if it has not changed."""
        now = _RandomState(like)
        pairs = zip((self.cpu, *self.states), (now.cpu, *now.states), strict=True)
        return self if all(torch.equal(x, y) for x, y in pairs) else now

    @contextmanager
    def restored(self, really: bool) -> Iterator[None]:
        """In a `with` block, if `really`; then the state is what it was before."""
        if not really:
            yield
            return
        kind = "cuda" if self.kind == "cpu" else self.kind
        with torch.random.fork_rng(self.devices, device_type=kind):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def _average_gradients(model: DistributedDataParallel) -> None:
    """Over the ranks of the model, as one backward pass would at its end."""
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    group = model.process_group
    # A parameter without a gradient on every rank keeps none.
    have = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    have = have.int()
    dist.all_reduce(have, op=dist.ReduceOp.MAX, group=group)
    work = []
    for parameter, some in zip(parameters, have.tolist(), strict=True):
        if some:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(dist.get_world_size(group))
            work.append(dist.all_reduce(parameter.grad, group=group, async_op=True))
    for one in work:
        one.wait()
