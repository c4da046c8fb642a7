"""One check for each known defect of the reference: raises where the defect is present.

Every check takes a library: a namespace with Memformer, memory_replay_backprop and top_p. Nothing
but torch is imported, so that the same checks run where the reference is installed and nothing
else, and show there that each of them can fail.
"""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Library = Any
Check = Callable[[Library, torch.device], None]

NAMES = ("Memformer", "memory_replay_backprop", "top_p")


def library(package: str = "memformer") -> SimpleNamespace:
    """The installed package's names, wherever in it they are defined."""
    modules = [importlib.import_module(package + x) for x in ("", ".autoregressive_wrapper")]
    return SimpleNamespace(
        **{name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in NAMES}
    )


def make(lib: Library, device: torch.device, **changes: Any) -> Any:
    settings = {
        "dim": 16,
        "num_memory_slots": 4,
        "mem_update_attn_heads": 2,
        "enc_num_tokens": 20,
        "enc_depth": 1,
        "enc_heads": 2,
        "enc_max_seq_len": 8,
        "dec_num_tokens": 20,
        "dec_depth": 1,
        "dec_heads": 2,
        "dec_max_seq_len": 12,
    }
    torch.manual_seed(0)
    return lib.Memformer(**(settings | changes)).to(device)


def tokens(*shape: int, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def raises(error: type[Exception], call: Callable[[], Any]) -> bool:
    try:
        call()
    except error:
        return True
    return False


# --- Positions ----------------------------------------------------------------------------------


def check_encoder_tells_the_order_of_what_follows(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    src = tokens(1, 8, device=device)
    swapped = src[:, [0, 1, 2, 7, 4, 5, 6, 3]]
    moved = apart(model(src).enc_out[:, 1], model(swapped).enc_out[:, 1])
    assert moved > 1e-4, f"the order of later tokens moves a token by {moved}"


def check_decoder_has_all_buckets_for_the_past(lib: Library, device: torch.device) -> None:
    """T5, one-sided: a distance of 15 has another bucket than one of 8."""
    model = make(lib, device, dec_max_seq_len=40, enc_max_seq_len=40)
    model.decoder(
        tokens(1, 33, device=device), return_loss=True, context=normal(1, 4, 16, device=device)
    ).backward()
    name = "relative_attention_bias.weight"
    (weight,) = [p for n, p in model.decoder.named_parameters() if n.endswith(name)]
    used = int(weight.grad.abs().sum(1).count_nonzero())
    assert used > 16, f"only {used} of 32 buckets are for tokens of the past"


def check_max_distance_has_an_effect(lib: Library, device: torch.device) -> None:
    near, far = (make(lib, device, enc_max_seq_len=90, max_distance=x) for x in (20, 128))
    far.load_state_dict(near.state_dict())
    src = tokens(1, 90, device=device)
    assert apart(near(src).enc_out, far(src).enc_out) > 0.0, "it is swallowed"


# --- Generation ---------------------------------------------------------------------------------


def check_generation_works(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    start, context = tokens(2, 3, device=device), normal(2, 5, 16, device=device)
    out = model.decoder.generate(start, 4, context=context)
    assert out.shape == (2, 4)


def check_top_k_of_a_small_vocabulary(lib: Library, device: torch.device) -> None:
    module = importlib.import_module(
        lib.Memformer.__module__.split(".")[0] + ".autoregressive_wrapper"
    )
    kept = module.top_k(normal(2, 5, device=device)).isfinite().sum(-1)
    assert (kept == 1).all(), f"{kept.tolist()} of 5 tokens are kept"


def check_top_p_keeps_what_it_says(lib: Library, device: torch.device) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], device=device).log()
    kept = lib.top_p(logits, thres=0.9).isfinite().tolist()
    assert kept == [[True, True, True, False]], f"of p = .5, .3, .15, .05 it keeps {kept[0]}"


def check_each_row_ends_for_itself(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    with torch.no_grad():
        model.decoder.net.to_logits.weight.zero_()
        model.decoder.net.to_logits.bias.zero_()
        model.decoder.net.to_logits.bias[:2] = 50.0
    start, context = tokens(8, 3, device=device), normal(8, 5, 16, device=device)
    out = model.decoder.generate(start, 8, eos_token=1, filter_thres=0.5, context=context)
    for row in out.tolist():
        end = row.index(1) if 1 in row else 8
        assert not any(row[end + 1 :]), f"a row goes on behind its end: {row}"


def check_generating_past_the_end_is_refused(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    start, context = tokens(1, 5, device=device), normal(1, 5, 16, device=device)
    assert raises(ValueError, lambda: model.decoder.generate(start, 9, context=context))


# --- Masks --------------------------------------------------------------------------------------


def check_masked_targets_do_not_count(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    src, tgt = tokens(1, 8, device=device), tokens(1, 9, device=device)
    mask = torch.arange(9, device=device)[None] < 6
    other = torch.where(mask, tgt, (tgt + 3) % 20)
    moved = apart(model(src, tgt, tgt_mask=mask).dec_out, model(src, other, tgt_mask=mask).dec_out)
    assert moved < 1e-6, f"masked targets move the loss by {moved}"


def check_a_mask_of_the_inputs_alone_is_not_dropped(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    src, tgt = tokens(1, 8, device=device), tokens(1, 9, device=device)
    mask = torch.arange(8, device=device)[None] < 4
    losses = [model(src, tgt, tgt_mask=x).dec_out for x in (mask, torch.ones_like(mask))]
    assert apart(*losses) > 0.0, "a mask that is one token short has no effect"


def check_masked_rows_see_no_future(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    x, context = tokens(1, 8, device=device), normal(1, 5, 16, device=device)
    mask = torch.arange(8, device=device)[None] != 2
    other = x.clone()
    other[:, 6] = (x[:, 6] + 1) % 20
    a, b = (model.decoder(y, context=context, src_mask=mask)[:, 2] for y in (x, other))
    assert apart(a, b) < 1e-6, f"a masked token sees a later one: {apart(a, b)}"


def check_a_padded_segment_keeps_the_memory(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    mems = normal(2, 4, 16, device=device)
    mask = torch.tensor([[True] * 8, [False] * 8], device=device)
    out = model(tokens(2, 8, device=device), mems=mems, src_mask=mask)
    share = float((out.mem[1] - mems[1]).detach().norm() / mems[1].norm())
    assert share == 0.0, f"a padded segment changes the memory by {share:.0%}"


# --- Replay -------------------------------------------------------------------------------------


def check_replay_returns_the_loss(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    found = lib.memory_replay_backprop(
        model, tokens(2, 24, device=device), tokens(2, 6, device=device)
    )
    assert found is not None, "nothing is returned"
    assert float(found[0]) > 0.0


def check_replay_takes_a_target_a_segment(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    targets = [tokens(2, 6, device=device, seed=i) for i in range(3)]
    lib.memory_replay_backprop(model, tokens(2, 24, device=device), targets)
    assert model.decoder.net.to_logits.weight.grad is not None


def check_replay_without_a_decoder(lib: Library, device: torch.device) -> None:
    model = make(lib, device, encoder_only=True)
    options = {"loss_fn": lambda out, _: out.enc_out.square().mean()}
    lib.memory_replay_backprop(model, tokens(2, 24, device=device), None, **options)


def check_replay_of_a_wrapped_model(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        lib.memory_replay_backprop(
            wrapped, tokens(2, 24, device=device), tokens(2, 6, device=device)
        )
    finally:
        dist.destroy_process_group()


def check_replay_holds_one_graph(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    graphs: list[weakref.ref[Tensor]] = []
    alive = []

    def before(*_: Any) -> None:
        gc.collect()
        alive.append(sum(graph() is not None for graph in graphs))

    def after(_: Any, __: Any, out: Any) -> None:
        if torch.is_grad_enabled():
            graphs.append(weakref.ref(out.enc_out))

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)
    lib.memory_replay_backprop(model, tokens(2, 24, device=device), tokens(2, 6, device=device))
    assert max(alive) == 0, f"{max(alive)} graph is held while the next is made"


# --- The rest -----------------------------------------------------------------------------------


def check_slots_stay_bounded(lib: Library, device: torch.device) -> None:
    """With the GRU's gate forced to keep all."""
    model = make(lib, device)
    mem = None
    with torch.no_grad():
        model.gru.bias_hh[16:32] += 100.0
        for i in range(200):
            mem = model(tokens(1, 8, device=device, seed=i), mems=mem).mem
    largest = float(mem.detach().norm(dim=-1).max())
    assert largest < 10.0, f"a slot of width 16 has a norm of {largest}"


def check_unknown_keywords_are_refused(lib: Library, device: torch.device) -> None:
    assert raises(TypeError, lambda: make(lib, device, no_such_option=1))


def check_lengths_are_enforced(lib: Library, device: torch.device) -> None:
    model = make(lib, device)
    assert raises(ValueError, lambda: model(tokens(1, 9, device=device)))


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
