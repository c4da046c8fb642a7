"""One check for each known defect of the reference: raises where the defect is present.

Every check takes a library: a namespace with HTransformer1D, HAttention1D, CausalHAttention1D and
AutoregressiveWrapper. Nothing but torch is imported, so that the same checks run where the
reference is installed and nothing else, and show there that each of them can fail.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Library = Any
Check = Callable[[Library, torch.device], None]

NAMES = ("HTransformer1D", "HAttention1D", "CausalHAttention1D", "AutoregressiveWrapper")


def library(package: str = "h_transformer_1d") -> SimpleNamespace:
    """The installed package's classes, wherever in it they are defined."""
    found = {}
    for module_name in ("", ".model", ".h_transformer_1d", ".autoregressive_wrapper"):
        try:
            module = importlib.import_module(package + module_name)
        except ModuleNotFoundError:
            continue
        for name in NAMES:
            if hasattr(module, name):
                found.setdefault(name, getattr(module, name))
    return SimpleNamespace(**found)


def probe(attention: nn.Module, *, query: Tensor, key: Tensor, value: Tensor) -> nn.Module:
    """Give an attention module of one head these projections, and the identity at its end."""
    d = value.shape[0]
    weights = {
        "to_qkv.weight": torch.cat((query, key, value)),
        "to_out.weight": torch.eye(d, dtype=value.dtype),
        "to_out.bias": torch.zeros(d, dtype=value.dtype),
    }
    own = attention.state_dict()
    if "to_qkv.weight" in own:
        weights = own | weights
    attention.load_state_dict(weights)
    return attention


def make_attention(
    lib: Library, *, causal: bool, dim: int, n: int, block_size: int, device: torch.device
) -> nn.Module:
    settings = {"heads": 1, "dim_head": dim, "block_size": block_size}
    if causal:
        settings["max_seq_len"] = n
    attention = (lib.CausalHAttention1D if causal else lib.HAttention1D)(dim, **settings)
    return attention.to(device, torch.float64)


def weight_matrix(
    lib: Library,
    *,
    causal: bool,
    n: int,
    block_size: int,
    device: torch.device,
    max_seq_len: int | None = None,
) -> Tensor:
    """The weights (n, n) of every token for every token when all queries and keys are zero."""
    attention = make_attention(
        lib, causal=causal, dim=n, n=max_seq_len or n, block_size=block_size, device=device
    )
    zero = torch.zeros(n, n, dtype=torch.float64)
    one = torch.eye(n, dtype=torch.float64)
    probe(attention, query=zero, key=zero, value=one)
    with torch.no_grad():
        return attention(one[None].to(device))[0]


def make_model(lib: Library, device: torch.device, **changes: Any) -> nn.Module:
    settings = {
        "num_tokens": 32,
        "dim": 16,
        "depth": 1,
        "max_seq_len": 128,
        "heads": 2,
        "dim_head": 8,
        "block_size": 8,
    }
    torch.manual_seed(0)
    return lib.HTransformer1D(**(settings | changes)).to(device)


def tokens(*shape: int, device: torch.device, num_tokens: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, num_tokens, shape, generator=generator).to(device)


def near(actual: Tensor, expected: Tensor | float, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: off by {error}")


def check_bidirectional_rows_sum_to_one(lib: Library, device: torch.device) -> None:
    for n in (64, 1024):
        weights = weight_matrix(lib, causal=False, n=n, block_size=16, device=device)
        near(weights.sum(dim=-1), 1.0, 1e-7, f"row sums at n = {n}")


def check_bidirectional_equal_keys_have_equal_weights(lib: Library, device: torch.device) -> None:
    equal_weights(lib, device, causal=False)


def check_causal_equal_keys_have_equal_weights(lib: Library, device: torch.device) -> None:
    equal_weights(lib, device, causal=True)


def equal_weights(lib: Library, device: torch.device, *, causal: bool) -> None:
    weights = weight_matrix(lib, causal=causal, n=256, block_size=16, device=device)
    equal = torch.ones_like(weights).tril() if causal else torch.ones_like(weights)
    near(weights, equal / equal.sum(dim=-1, keepdim=True), 1e-7, "equal keys, unequal weights")


def check_bidirectional_levels_share_one_scale(lib: Library, device: torch.device) -> None:
    one_scale(lib, device, causal=False)


def check_causal_levels_share_one_scale(lib: Library, device: torch.device) -> None:
    one_scale(lib, device, causal=True)


def one_scale(lib: Library, device: torch.device, *, causal: bool) -> None:
    """A key whose exact weight is 1 gets it: its logit is compared with those of all levels."""
    n, block_size = 256, 16
    attention = make_attention(lib, causal=causal, dim=4, n=n, block_size=block_size, device=device)
    query, key, value = torch.zeros(3, 4, 4, dtype=torch.float64)
    # logit = x_i[0] * x_j[1] * dim_head ** -0.5; the value is x_j[2].
    query[0, 0] = key[0, 1] = value[2, 2] = 1.0
    probe(attention, query=query, key=key, value=value)
    x = torch.zeros(1, n, 4, dtype=torch.float64, device=device)
    x[:, :, 0] = 1.0
    # The first token of every block is what the others in that block look for.
    for start in range(0, n, block_size):
        marked = x.clone()
        marked[0, start, 1] = 200.0
        marked[0, start, 2] = 1.0
        with torch.no_grad():
            weight = attention(marked)[0, start : start + block_size, 2]
        near(weight, 1.0, 1e-6, f"weight of token {start}")


def check_bidirectional_covers_all(lib: Library, device: torch.device) -> None:
    weights = weight_matrix(lib, causal=False, n=256, block_size=16, device=device)
    share = (weights <= 0).double().mean().item()
    assert share == 0, f"{share:.1%} of the pairs have no weight"


def check_causal_covers_all(lib: Library, device: torch.device) -> None:
    for n, block_size in ((1024, 16), (1024, 128)):
        weights = weight_matrix(lib, causal=True, n=n, block_size=block_size, device=device)
        seen = torch.ones_like(weights).tril().bool()
        share = (weights[seen] <= 0).double().mean().item()
        assert share == 0, f"block {block_size}: {share:.1%} of the causal pairs have no weight"
        assert (weights[~seen] == 0).all(), f"block {block_size}: a later token has weight"


def check_bidirectional_close_to_exact_softmax(lib: Library, device: torch.device) -> None:
    close_to_exact(lib, device, causal=False)


def check_causal_close_to_exact_softmax(lib: Library, device: torch.device) -> None:
    close_to_exact(lib, device, causal=True)


def close_to_exact(lib: Library, device: torch.device, *, causal: bool) -> None:
    n, d = 512, 32
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    series = [noise[0]]
    for step in noise[1:]:
        series.append(0.95 * series[-1] + (1 - 0.95**2) ** 0.5 * step)
    x = torch.stack(series)[None].to(device)
    attention = make_attention(lib, causal=causal, dim=d, n=n, block_size=32, device=device)
    one = torch.eye(d, dtype=torch.float64)
    probe(attention, query=one, key=one, value=one)
    exact = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=causal)
    with torch.no_grad():
        error = ((attention(x) - exact).norm() / exact.norm()).item()
    assert error < 0.1, f"relative error {error}"


def check_short_causal_prompts_run(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, causal=True, max_seq_len=512, block_size=128)
    for n in (1, 2, 63, 64):
        assert model(tokens(1, n, device=device)).shape == (1, n, 32)


def check_short_causal_prompts_attend(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, causal=True, max_seq_len=512, block_size=128)
    for n in (65, 100, 128):
        x = tokens(1, n, device=device)
        changed = x.clone()
        changed[0, 0] = (x[0, 0] + 1) % 32
        assert not torch.equal(model(x)[0, -1], model(changed)[0, -1]), f"no attention at n = {n}"


def check_short_bidirectional_inputs_run(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, max_seq_len=512, block_size=128)
    for n in (1, 65, 128, 256):
        assert model(tokens(1, n, device=device)).shape == (1, n, 32)


def check_causal_mask_is_used(lib: Library, device: torch.device) -> None:
    mask_leak(lib, device, causal=True)


def check_bidirectional_mask_does_not_leak(lib: Library, device: torch.device) -> None:
    mask_leak(lib, device, causal=False)


def mask_leak(lib: Library, device: torch.device, *, causal: bool) -> None:
    model = make_model(lib, device, causal=causal, depth=2).double()
    x = tokens(2, 128, device=device)
    generator = torch.Generator().manual_seed(2)
    mask = (torch.rand(2, 128, generator=generator) < 0.7).to(device)
    # A whole block without a token, and a whole half of the second row.
    mask[0, 24:32] = mask[1, 64:] = False
    other = torch.where(mask, x, (x + 7) % 32)
    near(model(x, mask=mask)[mask], model(other, mask=mask)[mask], 1e-12, "masked tokens leak")


def check_padding_behind_a_mask_is_trimmed(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, depth=2).double()
    x = tokens(1, 128, device=device)
    mask = torch.arange(128, device=device)[None] < 90
    near(model(x, mask=mask)[:, :90], model(x[:, :90]), 1e-12, "masked and trimmed differ")


def check_unmasked_padding_is_not_attended(lib: Library, device: torch.device) -> None:
    """A length that has to be padded: the padding weighs nothing, so the tokens weigh one."""
    weights = weight_matrix(lib, causal=False, n=65, block_size=8, device=device)
    near(weights.sum(dim=-1), 1.0, 1e-7, "row sums at n = 65, which is padded")


def check_mask_in_bfloat16(lib: Library, device: torch.device) -> None:
    half_with_mask(lib, device, torch.bfloat16)


def check_mask_in_float16(lib: Library, device: torch.device) -> None:
    half_with_mask(lib, device, torch.float16)


def half_with_mask(lib: Library, device: torch.device, dtype: torch.dtype) -> None:
    model = make_model(lib, device).to(dtype)
    mask = torch.arange(64, device=device)[None] < 50
    out = model(tokens(1, 64, device=device), mask=mask)
    assert out.dtype == dtype
    assert out.isfinite().all()


def check_attention_mask_in_bfloat16(lib: Library, device: torch.device) -> None:
    attention = lib.HAttention1D(16, heads=2, dim_head=8, block_size=4).to(device, torch.bfloat16)
    x = torch.ones(1, 32, 16, device=device, dtype=torch.bfloat16)
    out = attention(x, mask=torch.arange(32, device=device)[None] < 20)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def check_bidirectional_values_are_not_rotated(lib: Library, device: torch.device) -> None:
    same_everywhere(lib, device, causal=False)


def check_causal_values_are_not_rotated(lib: Library, device: torch.device) -> None:
    same_everywhere(lib, device, causal=True)


def same_everywhere(lib: Library, device: torch.device, *, causal: bool) -> None:
    """Equal tokens have equal values; every mean of them is the same at every position."""
    model = make_model(lib, device, causal=causal).double()
    out = model(torch.full((1, 128), 5, device=device))
    near(out, out[:, :1], 1e-12, "positions differ")


def check_bidirectional_shift_is_symmetric(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, shift_tokens=True)
    for module in model.modules():
        if isinstance(module, lib.HAttention1D):
            for parameter in module.parameters():
                # Without attention only the token shift carries anything between positions.
                parameter.data.zero_()
    x = tokens(1, 64, device=device)
    changed = x.clone()
    changed[0, 30] = (x[0, 30] + 1) % 32
    moved = (model(x) != model(changed)).any(dim=-1)[0].nonzero().flatten().tolist()
    assert moved == [29, 30, 31], f"token 30 reaches positions {moved}"


def generation(lib: Library, device: torch.device) -> tuple[nn.Module, Tensor]:
    model = make_model(lib, device, causal=True)
    return lib.AutoregressiveWrapper(model), tokens(2, 64, device=device)


def keep_only(*kept: int) -> Callable[..., Tensor]:
    def filter_logits(logits: Tensor, thres: float) -> Tensor:  # noqa: ARG001
        at = torch.tensor(kept, device=logits.device)
        return torch.full_like(logits, float("-inf")).index_copy_(1, at, logits[:, at])

    return filter_logits


def check_generate_stops_at_eos(lib: Library, device: torch.device) -> None:
    wrapper, prompt = generation(lib, device)
    torch.manual_seed(0)
    prompt = prompt.masked_fill(prompt == 3, 4)
    out = wrapper.generate(prompt, 60, eos_token=3, filter_logits_fn=keep_only(3, 9))
    for row in out.tolist():
        assert 3 in row, "no end token was drawn"
        end = row.index(3)
        assert set(row[:end]) <= {9}, f"{row[:end]} before the end token"
        assert set(row[end + 1 :]) <= {0}, f"{row[end + 1 :]} after the end token"


def check_generate_uses_its_filter(lib: Library, device: torch.device) -> None:
    wrapper, prompt = generation(lib, device)
    out = wrapper.generate(prompt, 4, filter_logits_fn=keep_only(7))
    assert (out == 7).all(), "the filter given was not used"


def check_generate_at_temperature_zero(lib: Library, device: torch.device) -> None:
    wrapper, prompt = generation(lib, device)
    out = wrapper.generate(prompt, 3, temperature=0.0)
    with torch.no_grad():
        for t in range(3):
            best = wrapper.net(torch.cat((prompt, out[:, :t]), dim=1))[:, -1].argmax(dim=-1)
            assert torch.equal(out[:, t], best), f"token {t} is not the most likely one"


def check_reversible_backward_in_eval_mode(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, reversible=True, causal=True, depth=2).eval()
    model(tokens(1, 128, device=device)).sum().backward()
    assert any_gradient(model)


def check_reversible_with_frozen_embedding(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, reversible=True, causal=True, depth=2)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    out = model(tokens(1, 128, device=device))
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"


def check_reversible_autograd_grad(lib: Library, device: torch.device) -> None:
    model = make_model(lib, device, reversible=True, causal=True, depth=2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(tokens(1, 128, device=device)).square().sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    missing = sum(gradient is None for gradient in gradients)
    assert missing == 0, f"{missing} of {len(parameters)} gradients are None"


def any_gradient(model: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def check_checkpoint_is_free_of_max_seq_len(lib: Library, device: torch.device) -> None:
    short = make_model(lib, device, causal=True, max_seq_len=128)
    long = make_model(lib, device, causal=True, max_seq_len=256)
    long.load_state_dict(short.state_dict())


def check_reversible_checkpoint_loads_into_sequential(lib: Library, device: torch.device) -> None:
    reversible = make_model(lib, device, causal=True, reversible=True)
    sequential = make_model(lib, device, causal=True, reversible=False)
    sequential.load_state_dict(reversible.state_dict())


def check_unknown_constructor_keywords_are_refused(lib: Library, device: torch.device) -> None:
    try:
        lib.HAttention1D(16, no_such_option=1).to(device)
    except TypeError:
        return
    raise AssertionError("an unknown keyword was swallowed")


def check_unknown_forward_keywords_are_refused(lib: Library, device: torch.device) -> None:
    attention = lib.CausalHAttention1D(16, max_seq_len=128, block_size=8).to(device)
    try:
        attention(torch.randn(1, 128, 16, device=device), no_such_option=1)
    except TypeError:
        return
    raise AssertionError("an unknown keyword was swallowed")


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
