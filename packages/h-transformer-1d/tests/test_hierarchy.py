"""The maths: every implementation against the oracle and against exact softmax attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from h_transformer_1d import fused, h_attention, kernels
from h_transformer_1d.oracle import h_attention_oracle, visible_slots

FINE_MODES = [
    pytest.param({"causal": True, "scheme": "sibling"}, id="causal-sibling"),
    pytest.param({"causal": True, "scheme": "neighbor"}, id="causal-neighbor"),
    pytest.param({"causal": False, "scheme": "sibling"}, id="bidirectional-sibling"),
    pytest.param({"causal": False, "scheme": "neighbor"}, id="bidirectional-neighbor"),
]
MODES = [
    *FINE_MODES,
    pytest.param(
        {"causal": False, "scheme": "sibling", "query_resolution": "coarse"}, id="coarse-sibling"
    ),
    pytest.param(
        {"causal": False, "scheme": "neighbor", "query_resolution": "coarse"}, id="coarse-neighbor"
    ),
]


class Case(NamedTuple):
    """One call of h_attention, small enough to be built from a seed."""

    b: int
    kv_heads: int
    groups: int
    n: int
    d: int
    block_size: int
    causal: bool
    scheme: str
    query_resolution: str
    masking: str
    bias_levels: int
    scale: float | None
    seed: int

    def build(self, device: torch.device) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

        heads = self.kv_heads * self.groups
        tensors = [
            normal(self.b, heads, self.n, self.d),
            normal(self.b, self.kv_heads, self.n, self.d),
            normal(self.b, self.kv_heads, self.n, self.d),
        ]
        if self.bias_levels:
            tensors.append(normal(self.bias_levels, heads))
        drawn = torch.rand(self.b, self.n, generator=generator).to(device)
        mask = {
            "none": None,
            "all": drawn < 2,
            "scattered": drawn < 0.6,
            "rare": drawn < 0.1,
            "no token": drawn < 0,
            # Whole blocks and slots without a token.
            "tail": torch.arange(self.n, device=device) < (drawn[:, :1] * self.n),
            "head": torch.arange(self.n, device=device) >= (drawn[:, :1] * self.n),
        }[self.masking]
        options = {
            "causal": self.causal,
            "block_size": self.block_size,
            "scheme": self.scheme,
            "query_resolution": self.query_resolution,
            "scale": self.scale,
        }
        return tensors, mask, options


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scheme = draw(st.sampled_from(["sibling", "neighbor"]))
    causal = draw(st.booleans())
    block_size = draw(st.sampled_from([2, 4, 6, 8] if scheme == "neighbor" else [1, 2, 3, 4, 7, 8]))
    return Case(
        b=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        # From one block to many levels of tiny blocks.
        n=draw(st.integers(1, 9 * block_size) | st.integers(1, 90)),
        d=draw(st.sampled_from([1, 2, 5, 8])),
        block_size=block_size,
        causal=causal,
        scheme=scheme,
        query_resolution="fine" if causal else draw(st.sampled_from(["fine", "coarse"])),
        masking=draw(
            st.sampled_from(
                ["none", "none", "all", "scattered", "rare", "no token", "tail", "head"]
            )
        ),
        bias_levels=draw(st.integers(0, 5)),
        scale=draw(st.sampled_from([None, None, 0.3, 2.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def outputs_and_gradients(
    attention: Any,
    tensors: list[Tensor],
    mask: Tensor | None,
    options: dict[str, Any],
    copy: bool = True,
) -> list[Tensor]:
    # A view keeps its strides unless it is copied.
    tensors = [(x.detach().clone() if copy else x.detach()).requires_grad_() for x in tensors]
    q, k, v, *bias = tensors
    out = attention(q, k, v, mask=mask, level_bias=bias[0] if bias else None, **options)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    gradients = torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True)
    return [out.detach()] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients, strict=True)
    ]


def inputs(
    *shape: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator, dtype=dtype).to(device)
    return q, k, v


@settings(max_examples=250)
@given(case=cases())
def test_every_implementation_equals_oracle(device: torch.device, case: Case) -> None:
    tensors, mask, options = case.build(device)
    expected = outputs_and_gradients(h_attention_oracle, tensors, mask, options)

    def compare(way: str, impl: str) -> None:
        actual = outputs_and_gradients(h_attention, tensors, mask, {**options, "impl": impl})
        names = ("out", "q", "k", "v", "level_bias")
        for name, a, e in zip(names, actual, expected, strict=False):
            torch.testing.assert_close(
                a, e, atol=1e-10, rtol=0, msg=lambda m, x=name: f"{way}, {x}: {m}"
            )

    compare("automatic", "auto")
    compare("plain", "plain")
    # As few heads at a time as a long input has.
    with patch.object(fused, "_WORKING_SET", 1):
        compare("head by head", "fused")
        # A release of PyTorch without the private kernels.
        with patch.object(kernels, "_FLASH", None):
            compare("without the kernel", "fused")


@settings(max_examples=100)
@given(case=cases())
def test_inference_equals_oracle(device: torch.device, case: Case) -> None:
    """Without gradients, up to two blocks take another way than longer sequences."""
    tensors, mask, options = case.build(device)
    bias = tensors[3] if len(tensors) > 3 else None
    with torch.no_grad():
        out = h_attention(*tensors[:3], mask=mask, level_bias=bias, **options)
    expected = h_attention_oracle(*tensors[:3], mask=mask, level_bias=bias, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_two_blocks_take_exact_attention_and_three_do_not(device: torch.device) -> None:
    q = torch.randn(1, 2, 24, 8, device=device)
    options: dict[str, Any] = {"causal": True, "block_size": 8}
    with (
        torch.no_grad(),
        patch.object(F, "scaled_dot_product_attention", side_effect=ZeroDivisionError),
    ):
        h_attention(q, q, q, **options)
        with pytest.raises(ZeroDivisionError):
            h_attention(q[:, :, :16], q[:, :, :16], q[:, :, :16], **options)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 12, 15, 16, 17, 23, 24, 31, 32, 33, 47, 64, 65])
@pytest.mark.parametrize("mode", MODES)
def test_every_length_equals_oracle(device: torch.device, mode: dict[str, Any], n: int) -> None:
    q, k, v = inputs(1, 2, n, 3, device=device, seed=n)
    expected = outputs_and_gradients(h_attention_oracle, [q, k, v], None, {**mode, "block_size": 4})
    actual = outputs_and_gradients(h_attention, [q, k, v], None, {**mode, "block_size": 4})
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("n", range(1, 150))
@pytest.mark.parametrize("mode", MODES)
def test_every_length_and_block_equals_oracle(
    device: torch.device, mode: dict[str, Any], n: int
) -> None:
    q, k, v = inputs(1, 1, n, 2, device=device, seed=n)
    for block_size in (2, 4, 6, 16):
        options = {**mode, "block_size": block_size}
        expected = outputs_and_gradients(h_attention_oracle, [q, k, v], None, options)
        for a, e in zip(
            outputs_and_gradients(h_attention, [q, k, v], None, options), expected, strict=True
        ):
            torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


@pytest.mark.parametrize("block_size", [1, 2, 4, 6, 16])
@pytest.mark.parametrize("scheme", ["sibling", "neighbor"])
@pytest.mark.parametrize("causal", [True, False])
def test_oracle_sees_every_token_once(causal: bool, scheme: str, block_size: int) -> None:
    if scheme == "neighbor" and block_size == 1:
        block_size = 8
    for n in [*range(1, 40), 63, 64, 65, 100, 129]:
        for t in range(n):
            slots = visible_slots(t, n, causal=causal, block_size=block_size, scheme=scheme)
            seen = [
                token
                for level, slot in slots
                for token in range(slot << level, min((slot + 1) << level, n))
            ]
            assert sorted(seen) == list(range(t + 1 if causal else n)), (n, t)


@pytest.mark.parametrize("mode", MODES)
def test_uniform_attention_gives_every_token_the_same_weight(
    device: torch.device, mode: dict[str, Any]
) -> None:
    """Equal logits and one-hot values: the output is each token's weight, 1 / (tokens seen)."""
    for n in (1, 5, 37, 64, 100):
        zero = torch.zeros(1, 1, n, n, dtype=torch.float64, device=device)
        one = torch.eye(n, dtype=torch.float64, device=device)[None, None]
        out = h_attention(zero, zero, one, block_size=4, **mode)[0, 0]
        seen = torch.ones_like(out)
        seen = seen.tril() if mode["causal"] else seen
        torch.testing.assert_close(out, seen / seen.sum(dim=-1, keepdim=True), atol=1e-12, rtol=0)
        # Coverage is exact, not approximate: no weight at all for a later token.
        assert ((out > 0) == (seen > 0)).all()


@pytest.mark.parametrize("mode", MODES)
def test_uniform_attention_over_a_mask(device: torch.device, mode: dict[str, Any]) -> None:
    n = 53
    zero = torch.zeros(1, 1, n, n, dtype=torch.float64, device=device)
    one = torch.eye(n, dtype=torch.float64, device=device)[None, None]
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(1, n, generator=generator) < 0.5).to(device)
    mask[0, 16:24] = False
    out = h_attention(zero, zero, one, mask=mask, block_size=4, **mode)[0, 0]
    seen = mask.to(out).expand(n, n)
    seen = seen.tril() if mode["causal"] else seen
    expected = seen / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert ((out > 0) == (seen > 0)).all()


@pytest.mark.parametrize("mode", MODES)
def test_rows_sum_to_one(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, _ = inputs(2, 3, 201, 8, device=device)
    bias = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = h_attention(
        3 * q, 3 * k, torch.ones_like(q), level_bias=bias.to(device), block_size=8, **mode
    )
    assert (out - 1).abs().max() <= 1e-14


@pytest.mark.parametrize("mode", MODES)
def test_exact_where_neighbouring_keys_are_equal(
    device: torch.device, mode: dict[str, Any]
) -> None:
    """Means of equal keys lose nothing: hierarchical attention is softmax attention then."""
    n, largest = 96, 16
    q, k, v = inputs(2, 2, n, 8, device=device)
    k, v = (x[:, :, ::largest].repeat_interleave(largest, dim=2) for x in (k, v))
    if mode.get("query_resolution") == "coarse":
        q = q[:, :, ::largest].repeat_interleave(largest, dim=2)
    out = h_attention(q, k, v, block_size=4, **mode)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=mode["causal"])
    torch.testing.assert_close(out, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_one_block_is_plain_attention(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, v = inputs(2, 3, 29, 8, device=device)
    mask = torch.arange(29, device=device)[None] % 5 != torch.tensor([[1], [2]], device=device)
    allowed = mask[:, None, None, :]
    if mode["causal"]:
        allowed = allowed & torch.ones(29, 29, dtype=torch.bool, device=device).tril()
    out = h_attention(q, k, v, block_size=32, **mode)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=mode["causal"])
    torch.testing.assert_close(out, exact, atol=1e-12, rtol=0)
    out = h_attention(q, k, v, mask=mask, block_size=32, **mode)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(
        out.transpose(1, 2)[mask], exact.transpose(1, 2)[mask], atol=1e-12, rtol=0
    )


def test_accuracy_on_correlated_inputs(device: torch.device) -> None:
    """The error that the hierarchy itself makes, on a series like text: neighbours are alike."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1024, 4, 32, generator=generator, dtype=torch.float64)
    series = [noise[0]]
    for step in noise[1:]:
        series.append(0.95 * series[-1] + math.sqrt(1 - 0.95**2) * step)
    x = torch.stack(series).movedim(0, 1)[None].to(device)
    exact = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    for scheme, bound in (("sibling", 0.042), ("neighbor", 0.032)):
        out = h_attention(x, x, x, causal=True, block_size=32, scheme=scheme)
        error = ((out - exact).norm() / exact.norm()).item()
        assert error <= bound, f"{scheme}: {error}"
        assert error > 1e-4, f"{scheme}: {error} is too good for a hierarchy"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", ["plain", "masked", "biased", "both"])
def test_gradcheck(device: torch.device, mode: dict[str, Any], options: str) -> None:
    """First and second derivatives; the second along random directions, which is faster."""
    n = 9
    leaves = [x.requires_grad_() for x in inputs(1, 2, n, 1, device=device)]
    mask = None
    if options in ("masked", "both"):
        mask = torch.arange(n, device=device)[None] % 4 != 1
    if options in ("biased", "both"):
        bias = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        leaves.append(bias.to(device).requires_grad_())

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return h_attention(q, k, v, mask=mask, level_bias=bias, block_size=2, **mode)

    assert torch.autograd.gradcheck(attention, leaves)
    assert torch.autograd.gradgradcheck(attention, leaves, fast_mode=True)
    forward_mode = {"check_forward_ad": True, "check_backward_ad": False}
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True, **forward_mode)


@pytest.mark.parametrize("mode", MODES)
def test_function_transforms_and_a_third_derivative(
    device: torch.device, mode: dict[str, Any]
) -> None:
    q, k, v = inputs(1, 2, 9, 1, device=device)

    def loss(q: Tensor, impl: str = "fused") -> Tensor:
        return h_attention(q, k, v, block_size=2, impl=impl, **mode).pow(2).sum()

    def gradients(impl: str) -> list[Tensor]:
        leaf, found = q.clone().requires_grad_(), []
        value = loss(leaf, impl)
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            found.append(grad.detach())
            value = grad.pow(2).sum()
        return found

    found = gradients("fused")
    torch.testing.assert_close(found, gradients("plain"))
    torch.testing.assert_close(torch.func.grad(loss)(q), found[0])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_some_inputs_only(device: torch.device, mode: dict[str, Any]) -> None:
    tensors = inputs(1, 2, 37, 4, device=device)
    everything = [x.clone().requires_grad_() for x in tensors]
    weight = inputs(1, 2, 37, 4, device=device, seed=9)[0]
    out = h_attention(*everything, block_size=4, **mode)
    expected = torch.autograd.grad((out * weight).sum(), everything)
    for chosen in range(3):
        some = [x.clone().requires_grad_(i == chosen) for i, x in enumerate(tensors)]
        out = h_attention(*some, block_size=4, **mode)
        (actual,) = torch.autograd.grad((out * weight).sum(), [some[chosen]])
        torch.testing.assert_close(actual, expected[chosen], atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_masked_keys_and_values(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, v = inputs(2, 2, 43, 4, device=device)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(2, 43, generator=generator) < 0.6).to(device)
    mask[1, 8:16] = False
    hidden = ~mask[:, None, :, None]
    options = {**mode, "block_size": 4}
    clean = outputs_and_gradients(h_attention, [q, k, v], mask, options)
    poisoned = [q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf)]
    for a, e in zip(
        outputs_and_gradients(h_attention, poisoned, mask, options), clean, strict=True
    ):
        assert torch.equal(a, e)


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_masked_queries(device: torch.device, mode: dict[str, Any]) -> None:
    """Nobody looks at a masked row: NaN in its query reaches no other row and no gradient."""
    n = 43
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, n, 4, device=device))
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(2, n, generator=generator) < 0.6).to(device)
    mask[1, 8:16] = False
    hidden = ~mask[:, None, :, None]
    clean = h_attention(q, k, v, mask=mask, block_size=4, **mode).transpose(1, 2)[mask]
    expected = torch.autograd.grad(clean.square().sum(), (q, k, v))
    poisoned = q.detach().masked_fill(hidden, math.nan).requires_grad_()
    out = h_attention(poisoned, k, v, mask=mask, block_size=4, **mode).transpose(1, 2)[mask]
    actual = torch.autograd.grad(out.square().sum(), (poisoned, k, v))
    assert torch.equal(out, clean)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("mode", MODES)
def test_masked_equals_trimmed(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, v = inputs(1, 2, 61, 4, device=device)
    for length in (1, 7, 8, 9, 33, 60):
        mask = torch.arange(61, device=device)[None] < length
        whole = h_attention(q, k, v, mask=mask, block_size=4, **mode)[:, :, :length]
        short = h_attention(*(x[:, :, :length] for x in (q, k, v)), block_size=4, **mode)
        torch.testing.assert_close(whole, short, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_to_attend_to_gives_zero(
    device: torch.device, mode: dict[str, Any], dtype: torch.dtype
) -> None:
    tensors = [x.to(dtype).requires_grad_() for x in inputs(2, 2, 21, 4, device=device)]
    mask = torch.zeros(2, 21, dtype=torch.bool, device=device)
    # The first row of the batch has nothing; the second nothing before token 13.
    mask[1, 13:] = True
    out = h_attention(*tensors, mask=mask, block_size=4, **mode)
    assert (out[0] == 0).all()
    if mode["causal"]:
        assert (out[1, :, :13] == 0).all()
    assert (out[1, :, 13:] != 0).all()
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_causal_means_no_influence_from_later(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, v = inputs(1, 1, 40, 4, device=device)
    out = h_attention(q, k, v, block_size=4, **mode)
    for t in range(40):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, t] += 1.0
        moved = (h_attention(*other, block_size=4, **mode) - out).abs().amax(dim=(0, 1, 3)) > 0
        if mode["causal"]:
            assert not moved[:t].any(), t
            assert moved[t:].all(), t
        else:
            assert moved.all(), t


@pytest.mark.parametrize("mode", MODES)
def test_level_bias_acts_on_its_level(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, v = inputs(1, 2, 64, 4, device=device)
    options = {**mode, "block_size": 4}
    plain = h_attention(q, k, v, **options)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(3, 2, generator=generator, dtype=torch.float64).to(device)
    biased = h_attention(q, k, v, level_bias=bias, **options)
    # The last row serves all higher levels; the same number on all levels changes nothing.
    longer = torch.cat((bias, bias[-1:], bias[-1:]))
    torch.testing.assert_close(
        h_attention(q, k, v, level_bias=longer, **options), biased, atol=1e-13, rtol=0
    )
    torch.testing.assert_close(
        h_attention(q, k, v, level_bias=torch.full_like(bias, 3.0), **options),
        plain,
        atol=1e-13,
        rtol=0,
    )
    for level in range(3):
        for head in range(2):
            changed = bias.clone()
            changed[level, head] += 1.0
            other = h_attention(q, k, v, level_bias=changed, **options)
            moved = (other - biased).abs().amax(dim=(0, 2, 3)) > 1e-9
            assert moved.tolist() == [h == head for h in range(2)]


def test_scale(device: torch.device) -> None:
    q, k, v = inputs(1, 2, 33, 4, device=device)
    out = h_attention(q, k, v, causal=True, block_size=4)
    torch.testing.assert_close(
        out, h_attention(q, k, v, causal=True, block_size=4, scale=0.5), atol=1e-14, rtol=0
    )
    torch.testing.assert_close(
        h_attention(q, k, v, causal=True, block_size=4, scale=1.5),
        h_attention(3 * q, k, v, causal=True, block_size=4),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("mode", MODES)
def test_grouped_heads_are_repeated_heads(device: torch.device, mode: dict[str, Any]) -> None:
    q, _, _ = inputs(2, 6, 45, 4, device=device)
    _, k, v = inputs(2, 2, 45, 4, device=device, seed=1)
    repeated = (x.repeat_interleave(3, dim=1) for x in (k, v))
    torch.testing.assert_close(
        h_attention(q, k, v, block_size=4, **mode),
        h_attention(q, *repeated, block_size=4, **mode),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("mode", MODES)
def test_large_logits_are_stable(device: torch.device, mode: dict[str, Any]) -> None:
    """Logits of tens of thousands in single precision: finite, and the oracle's in double."""
    q, k, v = inputs(1, 2, 70, 8, device=device)
    tensors = [(100 * q).float(), (100 * k).float(), v.float()]
    wide = [x.double() for x in tensors]
    actual = outputs_and_gradients(h_attention, tensors, None, {**mode, "block_size": 8})
    expected = outputs_and_gradients(h_attention_oracle, wide, None, {**mode, "block_size": 8})
    assert all(x.isfinite().all() for x in actual)
    torch.testing.assert_close(actual[0].double(), expected[0], atol=2e-2, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_very_negative_logits_count_like_any(device: torch.device, mode: dict[str, Any]) -> None:
    """Adding a constant to all logits of a row changes nothing, however low it brings them."""
    q, k, v = (x.float() for x in inputs(1, 1, 70, 8, device=device))
    q[..., 0] = 1.0
    k = k.clone()
    k[..., 0] = 0.0
    expected = h_attention(q, k, v, scale=1.0, block_size=8, **mode)
    k[..., 0] = -1e5
    low = h_attention(q, k, v, scale=1.0, block_size=8, **mode)
    torch.testing.assert_close(low, expected, atol=0.05, rtol=0)
    sums = h_attention(q, k, torch.ones_like(v), scale=1.0, block_size=8, **mode)
    torch.testing.assert_close(sums, torch.ones_like(v), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", FINE_MODES)
def test_one_large_query_leaves_other_rows_alone(
    device: torch.device, mode: dict[str, Any]
) -> None:
    q, k, v = (x.float() for x in inputs(1, 1, 100, 8, device=device))
    out = h_attention(q, k, v, block_size=8, **mode)
    q[:, :, 50] *= 1e4
    other = h_attention(q, k, v, block_size=8, **mode)
    rest = torch.arange(100, device=device) != 50
    torch.testing.assert_close(other[:, :, rest], out[:, :, rest], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_lower_precision(
    device: torch.device,
    mode: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    masked: bool,
) -> None:
    tensors = [x.to(dtype) for x in inputs(2, 2, 75, 16, device=device)]
    mask = (torch.arange(75, device=device)[None] % 3 != 0).expand(2, 75) if masked else None
    options = {**mode, "block_size": 8}
    actual = outputs_and_gradients(h_attention, tensors, mask, options)
    expected = outputs_and_gradients(
        h_attention_oracle, [x.double() for x in tensors], mask, options
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), e, atol=tolerance * e.abs().max().item(), rtol=tolerance
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_in_lower_precision(
    device: torch.device, mode: dict[str, Any], dtype: torch.dtype
) -> None:
    """Logits of a standard deviation of 30: rounded ones would be wrong by a factor of 1.1."""
    q, k, v = inputs(1, 2, 75, 16, device=device)
    tensors = [(q * 5.5).to(dtype), (k * 5.5).to(dtype), v.to(dtype)]
    options = {**mode, "block_size": 8}
    actual = outputs_and_gradients(h_attention, tensors, None, options)
    expected = outputs_and_gradients(
        h_attention_oracle, [x.double() for x in tensors], None, options
    )
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() < 0.03 * e.norm()


@pytest.mark.parametrize("n", [16, 17])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_leaves_the_type(device: torch.device, n: int, grad: bool) -> None:
    q = torch.randn(1, 2, n, 16, device=device, requires_grad=grad)
    options: dict[str, Any] = {"causal": True, "block_size": 8}
    expected = h_attention(q, q, q, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = h_attention(q, q, q, **options)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_as_declared(
    device: torch.device, mode: dict[str, Any], transposed: bool
) -> None:
    """Schemas, fake kernels and strides, as the compiler relies on them."""
    x = torch.randn(3, 1, 2, 16, 21, device=device)
    q, k, v = x.mT if transposed else x.mT.contiguous()
    coarse = mode.get("query_resolution") == "coarse"
    rule = (4, mode["causal"], mode["scheme"], coarse, 0.5)
    out, lse = fused.attend_fused(q, k, v, None, None, *rule)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.h_transformer_1d.attend.default, (q, k, v, None, None, *rule), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.h_transformer_1d.attend_backward.default,
        (out, q, k, v, None, None, out, lse, *rule),
        test_utils=tests,
    )


@pytest.mark.parametrize("mode", MODES)
def test_no_width(device: torch.device, mode: dict[str, Any]) -> None:
    q = torch.zeros(1, 2, 21, 0, device=device)
    assert h_attention(q, q, q, block_size=4, **mode).shape == q.shape


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(device: torch.device, mode: dict[str, Any]) -> None:
    tensors = [x.requires_grad_() for x in inputs(0, 2, 21, 4, device=device)]
    out = h_attention(*tensors, block_size=4, **mode)
    assert out.shape == (0, 2, 21, 4)
    out.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_strides_do_not_matter(device: torch.device, mode: dict[str, Any]) -> None:
    packed = torch.randn(
        2, 37, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(device)
    views = [x.transpose(1, 2) for x in packed.unbind(dim=2)]
    copies = [x.contiguous() for x in views]
    options = {**mode, "block_size": 4}
    for a, e in zip(
        outputs_and_gradients(h_attention, views, None, options),
        outputs_and_gradients(h_attention, copies, None, options),
        strict=True,
    ):
        torch.testing.assert_close(a, e, atol=1e-13, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("view", ["expanded", "stepped", "transposed"])
def test_unusual_strides_do_not_matter(
    device: torch.device, mode: dict[str, Any], position: int, view: str
) -> None:
    tensors = list(inputs(2, 2, 37, 4, device=device))
    x = tensors[position]
    tensors[position] = {
        "expanded": x[:1, :1].expand(2, 2, 37, 4),
        "stepped": x.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": x.transpose(-1, -2).contiguous().transpose(-1, -2),
    }[view]
    options = {**mode, "block_size": 4}
    for a, e in zip(
        outputs_and_gradients(h_attention, tensors, None, options, copy=False),
        outputs_and_gradients(h_attention, [x.contiguous() for x in tensors], None, options),
        strict=True,
    ):
        torch.testing.assert_close(a, e, atol=1e-13, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("view", ["expanded", "stepped", "transposed"])
def test_unusual_strides_of_the_gradient_do_not_matter(
    device: torch.device, mode: dict[str, Any], view: str
) -> None:
    """The sum of an output hands back one number for all of it, other operations views."""
    tensors = [x.requires_grad_() for x in inputs(2, 2, 37, 4, device=device)]
    out = h_attention(*tensors, block_size=4, **mode)
    grad = inputs(2, 2, 37, 4, device=device, seed=1)[0]
    grad = {
        "expanded": grad[:1, :1, :1, :1].expand(2, 2, 37, 4),
        "stepped": grad.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": grad.transpose(-1, -2).contiguous().transpose(-1, -2),
    }[view]
    actual = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    expected = torch.autograd.grad(out, tensors, grad.contiguous())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-13, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_not_written_to(device: torch.device, mode: dict[str, Any]) -> None:
    tensors = inputs(2, 2, 37, 4, device=device)
    copies = [x.clone() for x in tensors]
    mask = torch.arange(37, device=device)[None].expand(2, 37) % 3 != 0
    copied_mask = mask.clone()
    h_attention(*tensors, mask=mask, block_size=4, **mode)
    h_attention(*tensors, block_size=4, **mode)
    assert all(torch.equal(a, e) for a, e in zip(tensors, copies, strict=True))
    assert torch.equal(mask, copied_mask)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_keeps_the_mean(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, v = inputs(1, 1, 24, 4, device=device)
    draws = 4000
    many = [x.expand(draws, 1, 24, 4) for x in (q, k, v)]
    torch.manual_seed(0)
    out = h_attention(*many, dropout=0.3, block_size=4, **mode)
    exact = h_attention(q, k, v, block_size=4, **mode)
    spread = out.std(dim=0)
    assert (spread[0] > 1e-3).all()
    # Five standard errors of the mean of the draws.
    assert ((out.mean(dim=0) - exact[0]).abs() <= 5 * spread / draws**0.5).all()


@pytest.mark.parametrize("mode", MODES)
def test_dropout_gradient(device: torch.device, mode: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 11, 2, device=device))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(0)
        return h_attention(q, k, v, dropout=0.4, block_size=2, **mode)

    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_large_blocks_and_many_levels(device: torch.device) -> None:
    """One long sequence in single precision, where sums over many levels would show."""
    q, k, _ = (x.float() for x in inputs(1, 1, 5000, 4, device=device))
    for scheme in ("sibling", "neighbor"):
        for causal in (True, False):
            out = h_attention(q, k, torch.ones_like(q), causal=causal, block_size=16, scheme=scheme)
            assert (out - 1).abs().max() < 1e-5
