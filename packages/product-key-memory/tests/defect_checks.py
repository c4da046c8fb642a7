"""One check for each known defect of the reference: raises where the defect is present.

Every check takes a library: a namespace with PKM, Transformer, MaskedBatchNorm1D,
fetch_pkm_value_parameters and, where there is one, sparse_finetune. Nothing but torch is imported,
so that the same checks run where the reference is installed and nothing else, and show there that
each of them can fail.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Library = Any
Check = Callable[[Library, torch.device], None]

NAMES = (
    "PKM",
    "Transformer",
    "MaskedBatchNorm1D",
    "fetch_pkm_value_parameters",
    "sparse_finetune",
)
SLOTS = 36


def library(package: str = "product_key_memory") -> SimpleNamespace:
    """The installed package's names, wherever in it they are defined."""
    found: dict[str, Any] = {}
    for module_name in ("", ".product_key_memory", ".transformer"):
        try:
            module = importlib.import_module(package + module_name)
        except ModuleNotFoundError:
            continue
        found = {name: getattr(module, name) for name in NAMES if hasattr(module, name)} | found
    return SimpleNamespace(**found)


def make_pkm(lib: Library, device: torch.device, **changes: Any) -> nn.Module:
    settings = {"dim": 16, "heads": 2, "num_keys": 6, "topk": 4, "dim_head": 8}
    torch.manual_seed(0)
    return lib.PKM(**(settings | changes)).to(device)


def make_model(lib: Library, device: torch.device, **changes: Any) -> nn.Module:
    settings = {
        "dim": 16,
        "num_tokens": 20,
        "depth": 2,
        "seq_len": 64,
        "heads": 2,
        "dim_head": 8,
        "pkm_kwargs": {"heads": 2, "num_keys": 6, "topk": 4, "dim_head": 8},
    }
    torch.manual_seed(0)
    with redirect_stdout(io.StringIO()):
        return lib.Transformer(**(settings | changes)).to(device)


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)


def tokens(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(1)).to(device)


def some_slots(device: torch.device) -> Tensor:
    """Two slots of three."""
    return torch.arange(SLOTS, device=device) % 3 != 0


def near(actual: Tensor, expected: Tensor | float, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: off by {error}")


# --- The layer ----------------------------------------------------------------------------------


def check_concatenation_trains_its_router(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device, concat_values_and_combine=True)
    pkm(normal(2, 5, 16, device=device)).square().sum().backward()
    for name in ("keys", "to_queries.weight"):
        gradient = pkm.get_parameter(name).grad
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.any(), f"the gradient of {name} is zero"


def check_concatenation_weighs_values(lib: Library, device: torch.device) -> None:
    """Of one slot a head, a softmax weighs 1; a ReLU of scores twice as high weighs twice."""
    pkm = make_pkm(lib, device, concat_values_and_combine=True, topk=1, non_competitive_gates=True)
    x = normal(2, 5, 16, device=device)
    with torch.no_grad():
        once = pkm(x)
        pkm.keys.mul_(2)
        near(pkm(x), 2 * once, 1e-4, "twice the score")


def check_batch_norm_takes_any_length(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device, use_layernorm=False)
    for n in (1, 5, 8, 30):
        assert pkm(normal(2, n, 16, device=device)).isfinite().all()


def check_batch_norm_treats_positions_alike(lib: Library, device: torch.device) -> None:
    """Statistics are of features, whatever a position used to hold."""
    pkm = make_pkm(lib, device, use_layernorm=False)
    x = normal(2, 8, 16, device=device)
    for _ in range(20):
        pkm(x * torch.linspace(0.1, 10, 8, device=device)[:, None])
    out = pkm.eval()(x[:, :1].expand(2, 8, 16))
    near(out, out[:, :1], 1e-5, "a token at another position")


def check_batch_norm_with_a_mask(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device, use_layernorm=False)
    mask = torch.arange(8, device=device)[None].expand(2, 8) < 5
    x = normal(2, 8, 16, device=device)
    out = pkm(x, input_mask=mask)
    near(out[mask], pkm(torch.where(mask[..., None], x, 7.0), input_mask=mask)[mask], 1e-5, "leak")


def check_masked_batch_norm_leaves_its_input(lib: Library, device: torch.device) -> None:
    norm = lib.MaskedBatchNorm1D(nn.BatchNorm1d(4)).to(device)
    x = normal(6, 4, device=device)
    given = x.clone()
    norm(given, torch.arange(6, device=device) < 4)
    assert torch.equal(given, x), "the input was written to"


def check_trainable_mask(lib: Library, device: torch.device) -> None:
    """The default mode; other slots get a gradient of exactly zero."""
    pkm = make_pkm(lib, device)
    mask = some_slots(device)
    x = normal(4, 10, 16, device=device)
    out = pkm(x, mem_trainable_mask=mask)
    near(out, pkm(x), 1e-5, "the mask changed the result")
    out.square().sum().backward()
    gradient = pkm.values.weight.grad
    assert (gradient[~mask] == 0).all(), "a frozen slot has a gradient"
    assert gradient[mask].any(), "a free slot has no gradient"


def check_weight_decay_spares_frozen_slots(lib: Library, device: torch.device) -> None:
    """In the mode where the reference's mask works."""
    pkm = make_pkm(lib, device, concat_values_and_combine=True)
    mask = some_slots(device)
    before = pkm.values.weight.detach().clone()

    def train(parameters: Any) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            pkm(normal(4, 10, 16, device=device), mem_trainable_mask=mask).sum().backward()
            optimizer.step()

    if hasattr(lib, "sparse_finetune"):
        with lib.sparse_finetune(pkm, mask) as session:
            train(session.parameters())
    else:
        train(pkm.parameters())
    after = pkm.values.weight.detach()
    assert torch.equal(after[~mask], before[~mask]), "weight decay moved a frozen slot"
    assert not torch.equal(after[mask], before[mask])


def check_autocast(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = pkm(normal(2, 5, 16, device=device))
    out.float().sum().backward()
    assert pkm.values.weight.grad.isfinite().all()


def check_masked_tokens_give_zero(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device)
    mask = torch.arange(5, device=device)[None].expand(2, 5) < 3
    out = pkm(normal(2, 5, 16, device=device), input_mask=mask)
    assert (out[~mask] == 0).all(), "a masked token has a result"


def check_masked_tokens_train_nothing(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device)
    x = normal(2, 5, 16, device=device).requires_grad_()
    mask = torch.zeros(2, 5, dtype=torch.bool, device=device)
    pkm(x, input_mask=mask).sum().backward()
    for name, tensor in (("x", x), *pkm.named_parameters()):
        assert tensor.grad is None or not tensor.grad.any(), f"{name} has a gradient"


def check_unknown_forward_keywords_are_refused(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device)
    try:
        pkm(normal(2, 5, 16, device=device), no_such_option=1)
    except TypeError:
        return
    raise AssertionError("an unknown keyword was swallowed")


def check_no_noise_in_evaluation(lib: Library, device: torch.device) -> None:
    pkm = make_pkm(lib, device).eval()
    x = normal(2, 5, 16, device=device)
    near(pkm(x, gumbel_noise_scale=1.0), pkm(x), 0.0, "noise")


def check_noise_in_float16(lib: Library, device: torch.device) -> None:
    """With one slot, whose weight is then 1 whatever the noise, unless that is infinite."""
    pkm = make_pkm(lib, device, num_keys=1, topk=1).half()
    out = pkm(normal(40, 100, 16, device=device).half(), gumbel_noise_scale=1.0)
    assert out.isfinite().all(), f"{(~out.isfinite()).sum().item()} results are not finite"


def check_too_many_slots_are_refused_at_once(lib: Library, device: torch.device) -> None:
    try:
        make_pkm(lib, device, topk=7)
    except ValueError:
        return
    raise AssertionError("topk=7 of 6 sub-keys was accepted")


def check_two_dimensions(lib: Library, device: torch.device) -> None:
    other_dimensions(lib, device, (10, 16))


def check_four_dimensions(lib: Library, device: torch.device) -> None:
    other_dimensions(lib, device, (2, 1, 5, 16))


def other_dimensions(lib: Library, device: torch.device, shape: tuple[int, ...]) -> None:
    pkm = make_pkm(lib, device)
    x = normal(2, 5, 16, device=device)
    near(pkm(x.reshape(shape)), pkm(x).reshape(shape), 1e-6, f"x of shape {shape}")


def check_empty_batch(lib: Library, device: torch.device) -> None:
    out = make_pkm(lib, device)(torch.zeros(0, 5, 16, device=device))
    assert out.shape == (0, 5, 16)


def check_shared_tables_are_listed_once(lib: Library, device: torch.device) -> None:
    layers = nn.ModuleList([make_pkm(lib, device) for _ in range(2)])
    layers[1].values = layers[0].values
    values, rest = lib.fetch_pkm_value_parameters(layers)
    assert len(values) == 1, f"one table is listed {len(values)} times"
    assert len(rest) == len(list(layers.parameters())) - 1


# --- The transformer ----------------------------------------------------------------------------


def check_a_list_of_layers(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, pkm_layers=[1, 2])
    assert sum(isinstance(module, lib.PKM) for module in model.modules()) == 2


def check_constructor_is_silent(lib: Library, device: torch.device) -> None:
    del device
    with redirect_stdout(io.StringIO()) as printed:
        lib.Transformer(dim=8, num_tokens=5, depth=2, seq_len=4, pkm_kwargs={"num_keys": 32})
    assert not printed.getvalue(), f"printed {printed.getvalue()!r}"


def check_attention_input_is_normalised(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device)
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("to_qkv"):
            module.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(tokens(2, 9, device=device), return_loss=False)
    assert len(seen) == 2
    for x in seen:
        near(x.mean(-1), 0.0, 1e-4, "mean of a token")
        near(x.std(-1, correction=0), 1.0, 1e-2, "deviation of a token")


def check_generate_at_temperature_zero(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device).eval()
    prompt = tokens(2, 9, device=device)
    whole = torch.cat((prompt, model.generate(prompt, 5, temperature=0.0)), 1)
    with torch.no_grad():
        for t in range(9, 14):
            best = model(whole[:, :t], return_loss=False)[:, -1].argmax(-1)
            assert torch.equal(whole[:, t], best), f"token {t} is not the most likely one"


def check_generate_reads_each_token_once(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device)
    read: list[int] = []
    model.token_emb.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[1]))
    model.generate(tokens(2, 10, device=device), 20)
    assert sum(read) <= 30, f"{sum(read)} tokens were read to continue 10 by 20"


def check_generate_from_a_small_vocabulary(lib: Library, device: torch.device) -> None:
    """A tenth of 5 tokens is less than one; the most likely one stays."""
    model = make_model(lib, device, num_tokens=5)
    to_logits = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.constant_(to_logits.bias[3:4], 100.0)
    out = model.generate(tokens(2, 9, device=device) % 5, 10)
    assert (out == 3).all(), "tokens were drawn that have no chance"


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
