"""The model: against the oracle, causality, masks, pieces against the whole, and its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from h_transformer_1d import (
    CausalHAttention1D,
    HAttention1D,
    HTransformer1D,
    ReversibleSequence,
    SequentialSequence,
)
from h_transformer_1d.attention import rotary_angles
from h_transformer_1d.oracle import h_attention_oracle
from shared_core.testing import (
    assert_causal,
    assert_masked_ignored,
    assert_pieces_equal_whole,
    displace,
    normal,
)

VARIANTS = {
    "sibling": {},
    "neighbor": {"scheme": "neighbor"},
    "reversible": {"reversible": True},
    "shifted": {"shift_tokens": True},
    "shifted neighbor": {"shift_tokens": True, "scheme": "neighbor"},
    "grouped": {"heads": 4, "kv_heads": 2},
    "biased": {"level_bias": True},
    "everything": {
        "scheme": "neighbor",
        "reversible": True,
        "shift_tokens": True,
        "heads": 4,
        "kv_heads": 1,
        "level_bias": True,
    },
}
BIDIRECTIONAL = {
    "sibling": {},
    "neighbor": {"scheme": "neighbor"},
    "coarse": {"query_resolution": "coarse"},
    "coarse neighbor": {"query_resolution": "coarse", "scheme": "neighbor"},
    "reversible": {"reversible": True},
    "shifted": {"shift_tokens": True},
    "everything": {
        "scheme": "neighbor",
        "query_resolution": "coarse",
        "reversible": True,
        "shift_tokens": True,
        "heads": 4,
        "kv_heads": 2,
        "level_bias": True,
    },
}
CAUSAL_MODELS = [pytest.param(changes, id=name) for name, changes in VARIANTS.items()]
BIDIRECTIONAL_MODELS = [
    pytest.param({"causal": False, **changes}, id=f"bidirectional {name}")
    for name, changes in BIDIRECTIONAL.items()
]
ALL_MODELS = CAUSAL_MODELS + BIDIRECTIONAL_MODELS


def projections(dim: int, inner: int, seed: int = 0) -> dict[str, Tensor]:
    """Attention parameters under the reference's names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * dim**-0.5

    return {
        "to_qkv.weight": normal(3 * inner, dim),
        "to_out.weight": normal(dim, inner),
        "to_out.bias": normal(dim),
    }


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("causal", "options"),
    [
        (True, {"scheme": "sibling"}),
        (True, {"scheme": "neighbor"}),
        (False, {"scheme": "sibling"}),
        (False, {"scheme": "neighbor"}),
        (False, {"scheme": "sibling", "query_resolution": "coarse"}),
        (False, {"scheme": "neighbor", "query_resolution": "coarse"}),
    ],
)
def test_attention_module_equals_oracle(
    device: torch.device, causal: bool, options: dict[str, Any], masked: bool, rotary: bool
) -> None:
    dim, heads, d, n = 12, 3, 8, 37
    pos_emb = RotaryEmbedding(dim=d).double() if rotary else None
    settings = {"heads": heads, "dim_head": d, "block_size": 4, "pos_emb": pos_emb, **options}
    attention: nn.Module
    if causal:
        attention = CausalHAttention1D(dim, max_seq_len=64, **settings)
    else:
        attention = HAttention1D(dim, **settings)
    attention = attention.to(device, torch.float64)
    weights = {name: x.to(device) for name, x in projections(dim, heads * d).items()}
    if rotary:
        weights["pos_emb.freqs"] = pos_emb.freqs.detach().to(device)
    attention.load_state_dict(weights)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, n, dim, generator=generator, dtype=torch.float64).to(device)
    mask = (torch.rand(2, n, generator=generator) < 0.7).to(device) if masked else None
    grad = torch.randn(2, n, dim, generator=generator, dtype=torch.float64).to(device)
    rows = torch.ones(2, n, dtype=torch.bool, device=device) if mask is None else mask

    x = x.requires_grad_()
    out = attention(x, mask=mask)
    (actual,) = torch.autograd.grad((out * grad)[rows].sum(), x)

    q, k, v = (
        y.unflatten(-1, (heads, d)).transpose(1, 2)
        for y in (x @ weights["to_qkv.weight"].T).chunk(3, dim=-1)
    )
    if rotary:
        q, k = (pos_emb.rotate_queries_or_keys(y) for y in (q, k))
    y = h_attention_oracle(q, k, v, causal=causal, mask=mask, block_size=4, **options)
    y = y.transpose(1, 2).flatten(2) @ weights["to_out.weight"].T + weights["to_out.bias"]
    (expected,) = torch.autograd.grad((y * grad)[rows].sum(), x)
    torch.testing.assert_close(out[rows], y[rows], atol=1e-10, rtol=0)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def reference_weights(
    *, num_tokens: int, dim: int, depth: int, inner: int, mult: int, freqs: Tensor
) -> dict[str, Tensor]:
    """A sequential, bidirectional model's parameters under the reference's names."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    weights = {"token_emb.weight": normal(num_tokens, dim), "pos_emb.freqs": freqs}
    for layer in range(depth):
        attn, ff = f"layers.layers.{layer}.0.", f"layers.layers.{layer}.1."
        weights |= {
            attn + "fn.pos_emb.freqs": freqs,
            **{f"{attn}fn.{k}": x for k, x in projections(dim, inner, seed=layer).items()},
            attn + "norm.weight": 1 + normal(dim),
            attn + "norm.bias": normal(dim),
            ff + "fn.net.0.weight": normal(mult * dim, dim),
            ff + "fn.net.0.bias": normal(mult * dim),
            ff + "fn.net.2.weight": normal(dim, mult * dim),
            ff + "fn.net.2.bias": normal(dim),
            ff + "norm.weight": 1 + normal(dim),
            ff + "norm.bias": normal(dim),
        }
    return weights | {
        "to_logits.0.weight": 1 + normal(dim),
        "to_logits.0.bias": normal(dim),
        "to_logits.1.weight": normal(num_tokens, dim),
        "to_logits.1.bias": normal(num_tokens),
    }


def shifted(x: Tensor, shifts: tuple[int, ...] | None) -> Tensor:
    """Features in len(shifts) equal parts, part i from the token shifts[i] before."""
    if shifts is None:
        return x
    n = x.shape[1]
    width = x.shape[2] // len(shifts)
    out = x.clone()
    for part, shift in enumerate(shifts):
        features = slice(part * width, (part + 1) * width)
        for t in range(n):
            source = t - shift
            out[:, t, features] = x[:, source, features] if 0 <= source < n else 0.0
    return out


def model_oracle(
    weights: dict[str, Tensor],
    x: Tensor,
    *,
    depth: int,
    heads: int,
    d: int,
    block_size: int,
    causal: bool,
    reversible: bool,
    shifts: tuple[int, ...] | None,
) -> Tensor:
    """The whole model from the reference's parameters, with the oracle as its attention."""
    pos_emb = RotaryEmbedding(dim=d).double()
    pos_emb.freqs.data.copy_(weights["pos_emb.freqs"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])

    def attend(x: Tensor, layer: int) -> Tensor:
        name = f"layers.layers.{layer}.0."
        y = shifted(norm(x, name + "norm"), shifts) @ weights[name + "fn.to_qkv.weight"].T
        q, k, v = (z.unflatten(-1, (heads, d)).transpose(1, 2) for z in y.chunk(3, dim=-1))
        q, k = (pos_emb.rotate_queries_or_keys(z) for z in (q, k))
        y = h_attention_oracle(q, k, v, causal=causal, block_size=block_size)
        y = y.transpose(1, 2).flatten(2)
        return F.linear(y, weights[name + "fn.to_out.weight"], weights[name + "fn.to_out.bias"])

    def feed(x: Tensor, layer: int) -> Tensor:
        name = f"layers.layers.{layer}.1."
        net = name + "fn.net."
        y = shifted(norm(x, name + "norm"), shifts)
        y = F.gelu(F.linear(y, weights[net + "0.weight"], weights[net + "0.bias"]))
        return F.linear(y, weights[net + "2.weight"], weights[net + "2.bias"])

    x = F.embedding(x, weights["token_emb.weight"])
    if reversible:
        left = right = x
        for layer in range(depth):
            left = left + attend(right, layer)
            right = right + feed(left, layer)
        x = left + right
    else:
        for layer in range(depth):
            x = x + attend(x, layer)
            x = x + feed(x, layer)
    x = norm(x, "to_logits.0")
    return F.linear(x, weights["to_logits.1.weight"], weights["to_logits.1.bias"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("shift_tokens", [True, False])
def test_model_equals_oracle(
    device: torch.device, causal: bool, reversible: bool, shift_tokens: bool, tokens: Any
) -> None:
    size = {"dim": 13, "depth": 2}
    model = HTransformer1D(
        num_tokens=20,
        max_seq_len=64,
        causal=causal,
        heads=2,
        dim_head=8,
        ff_mult=2,
        block_size=4,
        reversible=reversible,
        shift_tokens=shift_tokens,
        **size,
    ).to(device, torch.float64)
    freqs = RotaryEmbedding(dim=8).freqs.detach().double()
    weights = reference_weights(num_tokens=20, inner=16, mult=2, freqs=freqs, **size)
    model.load_state_dict(weights)
    weights = {name: w.to(device) for name, w in weights.items()}
    shifts = ((0, 1) if causal else (-1, 0, 1)) if shift_tokens else None
    for n in (1, 4, 23, 45):
        x = tokens(2, n)
        expected = model_oracle(
            weights,
            x,
            depth=2,
            heads=2,
            d=8,
            block_size=4,
            causal=causal,
            reversible=reversible,
            shifts=shifts,
        )
        torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_every_length_runs(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    model = make_model(max_seq_len=37, **changes)
    for n in range(1, 38):
        out = model(tokens(2, n))
        assert out.shape == (2, n, 20)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_empty_batch(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    assert make_model(**changes)(tokens(0, 13)).shape == (0, 13, 20)


@pytest.mark.parametrize("max_seq_len", [1, 3, 50, 100])
@pytest.mark.parametrize("block_size", [2, 128])
def test_max_seq_len_may_be_anything(
    make_model: Any, tokens: Any, max_seq_len: int, block_size: int
) -> None:
    for causal in (True, False):
        model = make_model(max_seq_len=max_seq_len, block_size=block_size, causal=causal)
        assert model(tokens(1, max_seq_len)).shape == (1, max_seq_len, 20)


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_causal_at_every_token(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    model = displace(make_model(**changes).double())
    x = tokens(1, 41)
    assert_causal(model, x, atol=0.0)
    # And nothing before is out of sight.
    with torch.no_grad():
        out = model(x)
        for t in range(41):
            other = x.clone()
            other[0, t] = x[0, t] % 19 + 1
            assert (model(other) != out)[0, t:].any(dim=-1).all(), t


@pytest.mark.parametrize("changes", BIDIRECTIONAL_MODELS)
def test_bidirectional_sees_everything(
    make_model: Any, tokens: Any, changes: dict[str, Any]
) -> None:
    model = displace(make_model(**changes).double())
    x = tokens(1, 41)
    with torch.no_grad():
        out = model(x)
        for t in range(41):
            other = x.clone()
            other[0, t] = x[0, t] % 19 + 1
            assert (model(other) != out)[0].any(dim=-1).all(), t


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_masked_tail_equals_trimmed(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    model = displace(make_model(**changes).double())
    x = tokens(2, 45)
    for length in (1, 5, 8, 30, 44):
        mask = torch.arange(45, device=x.device)[None].expand(2, 45) < length
        torch.testing.assert_close(
            model(x, mask=mask)[:, :length], model(x[:, :length]), atol=1e-11, rtol=0
        )


def awkward_mask(device: torch.device) -> Tensor:
    """Three rows of 45: scattered places, whole blocks as well, and a row without a token."""
    mask = torch.rand(3, 45, generator=torch.Generator().manual_seed(2)).to(device) < 0.6
    mask[1, 12:28] = False
    mask[2] = False
    return mask


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_masked_tokens_have_no_influence(
    make_model: Any, tokens: Any, changes: dict[str, Any]
) -> None:
    """On no output and on no gradient, the embedding's included."""
    model = displace(make_model(**changes).double())
    x = tokens(3, 45)
    mask = awkward_mask(x.device)
    assert_masked_ignored(model, x, mask, parameters=list(model.parameters()))
    out = model(x, mask=mask)
    assert out.isfinite().all()
    assert not torch.equal(out, model(x))


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_nan_in_masked_embeddings(
    device: torch.device, make_model: Any, changes: dict[str, Any]
) -> None:
    model = displace(make_model(num_tokens=None, **changes).double())
    x = normal(3, 45, 16, device=device, seed=0)
    assert_masked_ignored(model, x, awkward_mask(device), parameters=list(model.parameters()))


@pytest.mark.parametrize("causal", [True, False])
def test_nan_in_masked_attention_inputs(device: torch.device, causal: bool) -> None:
    settings = {"heads": 2, "dim_head": 8, "block_size": 4, "level_bias": True}
    attention: nn.Module
    if causal:
        attention = CausalHAttention1D(16, max_seq_len=64, **settings)
    else:
        attention = HAttention1D(16, **settings)
    attention = displace(attention.to(device, torch.float64))
    x = normal(3, 45, 16, device=device, seed=0)
    mask = awkward_mask(device)
    assert_masked_ignored(attention, x, mask, parameters=list(attention.parameters()))


@pytest.mark.parametrize("changes", ALL_MODELS)
def test_left_padding(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    """Masked tokens before the first: the others see each other, and only each other."""
    model = displace(make_model(**changes).double())
    x = tokens(1, 40)
    mask = torch.arange(40, device=x.device)[None] >= 7
    out = model(x, mask=mask)
    assert out.isfinite().all()
    other = x.clone()
    other[:, :7] = 3
    torch.testing.assert_close(model(other, mask=mask)[:, 7:], out[:, 7:], atol=0, rtol=0)
    changed = x.clone()
    changed[:, 7] = x[:, 7] % 19 + 1
    assert (model(changed, mask=mask) != out)[0, 7:].any(dim=-1).all()


def pieces(model: HTransformer1D, x: Tensor, cuts: list[int]) -> Tensor:
    state = model.init_state(x.shape[0])
    outputs = []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        logits, state = model.step(x[:, start:end], state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_pieces_equal_whole(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    model = displace(make_model(**changes).double()).eval()
    x = tokens(2, 37)
    state = model.init_state(2)
    assert_pieces_equal_whole(model, model.step, x, state=state)
    equal = [[size] * (37 // size) + [37 % size] for size in (2, 3, 4, 5, 7, 8, 16)]
    assert_pieces_equal_whole(model, model.step, x, equal, state=state)


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_token_by_token_equals_whole(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    model = displace(make_model(**changes).double()).eval()
    one_by_one = [[1] * 64]
    assert_pieces_equal_whole(
        model, model.step, tokens(2, 64), one_by_one, state=model.init_state(2)
    )


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_prefill_then_steps_equal_whole(
    make_model: Any, tokens: Any, changes: dict[str, Any]
) -> None:
    model = displace(make_model(**changes).double()).eval()
    x = tokens(2, 45)
    with torch.no_grad():
        whole = model(x)
        for cut in range(1, 45):
            logits, state = model(x[:, :cut], return_state=True)
            torch.testing.assert_close(logits, whole[:, :cut], atol=1e-10, rtol=0)
            for t in range(cut, min(cut + 6, 45)):
                logits, state = model.step(x[:, t : t + 1], state)
                torch.testing.assert_close(logits, whole[:, t : t + 1], atol=1e-10, rtol=0)
            if cut + 6 < 45:
                logits, _ = model.step(x[:, cut + 6 :], state)
                torch.testing.assert_close(logits, whole[:, cut + 6 :], atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_prefill_with_a_mask(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    """Prompts of unequal lengths, padded on the left or with gaps, go on as the whole does."""
    model = displace(make_model(**changes).double()).eval()
    x = tokens(3, 50)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :7] = mask[1, :13] = mask[2, 3:9] = False
    with torch.no_grad():
        whole = model(x, mask=mask)
        for cut in (14, 16, 21, 24, 32, 33):
            shown = torch.where(mask[:, :cut], x[:, :cut], 3)
            logits, state = model(shown, mask=mask[:, :cut], return_state=True)
            rows = mask[:, :cut]
            torch.testing.assert_close(logits[rows], whole[:, :cut][rows], atol=1e-10, rtol=0)
            for end in range(cut, 50, 5):
                logits, state = model.step(x[:, end : end + 5], state)
                torch.testing.assert_close(logits, whole[:, end : end + 5], atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_gradient_through_the_state(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    model = displace(make_model(**changes).double()).eval()
    x = tokens(2, 27)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    actual = torch.autograd.grad(pieces(model, x, [5, 6, 13]).square().sum(), parameters)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_steps_continue_past_max_seq_len(
    make_model: Any, tokens: Any, changes: dict[str, Any]
) -> None:
    short = displace(make_model(max_seq_len=20, **changes).double()).eval()
    long = make_model(max_seq_len=90, **changes).double().eval()
    long.load_state_dict(short.state_dict())
    x = tokens(1, 90)
    with torch.no_grad():
        stepped = pieces(short, x, [20, *range(21, 90)])
        torch.testing.assert_close(stepped, long(x), atol=1e-10, rtol=0)


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [x for value in state.values() for x in tensors_of(value)]
    if isinstance(state, (tuple, list)):
        return [x for value in state for x in tensors_of(value)]
    return []


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_a_state_may_be_used_twice(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    """Stepping makes a new state and leaves the old one, so that one prefix has many ends."""
    model = make_model(**changes).eval()
    x = tokens(2, 32)
    with torch.no_grad():
        for cut in (3, 4, 7, 8, 16):
            _, state = model(x[:, :cut], return_state=True)
            before = [y.clone() for y in tensors_of(state)]
            for end in (cut + 1, cut + 5, 32):
                logits, _ = model.step(x[:, cut:end], state)
                again, _ = model.step(x[:, cut:end], state)
                assert torch.equal(logits, again)
            for a, e in zip(tensors_of(state), before, strict=True):
                torch.testing.assert_close(a, e, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("changes", CAUSAL_MODELS)
def test_reorder_a_state(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    """Beam search takes rows of a state, some twice."""
    model = make_model(**changes).double().eval()
    x = tokens(3, 30)
    index = torch.tensor([2, 0, 0, 1], device=x.device)
    with torch.no_grad():
        for cut in (3, 4, 17):
            _, state = model(x[:, :cut], return_state=True)
            logits, _ = model.step(x[index, cut:], state.reorder(index))
            torch.testing.assert_close(logits, model(x)[index, cut:], atol=1e-10, rtol=0)


def test_detach_and_move_a_state(make_model: Any, tokens: Any, device: torch.device) -> None:
    model = make_model(shift_tokens=True).eval()
    x = tokens(2, 20)
    _, state = model(x[:, :13], return_state=True)
    assert any(y.requires_grad for y in tensors_of(state))
    detached = state.detach()
    assert not any(y.requires_grad for y in tensors_of(detached))
    for a, e in zip(tensors_of(detached), tensors_of(state), strict=True):
        assert torch.equal(a, e)
    there = state.to("meta")
    assert all(y.device.type == "meta" for y in tensors_of(there))
    back = detached.to("cpu").to(device)
    assert torch.equal(model.step(x[:, 13:], back)[0], model.step(x[:, 13:], state)[0])


def test_a_state_of_no_sequence(make_model: Any, tokens: Any) -> None:
    model = make_model().eval()
    state = model.init_state(0)
    for end in (1, 4, 9, 20):
        logits, state = model.step(tokens(0, end), state)
        assert logits.shape == (0, end, 20)


@pytest.mark.parametrize("scheme", ["sibling", "neighbor"])
def test_state_stays_small(make_model: Any, tokens: Any, scheme: str) -> None:
    """Fine keys and values of the open block and one or two closed blocks a level."""
    c = 8
    model = make_model(
        block_size=c, scheme=scheme, max_seq_len=2**15, depth=1, heads=2, dim_head=8
    ).eval()
    sizes = []
    with torch.no_grad():
        for n in (2**9, 2**12, 2**15):
            _, state = model(tokens(1, n), return_state=True)
            # Not numel: a view would hold on to all that it was cut from.
            size = sum(x.untyped_storage().nbytes() // x.itemsize for x in tensors_of(state))
            levels = n.bit_length() - c.bit_length() + 1
            blocks = 1 + (1 if scheme == "sibling" else 2) * levels
            # Keys and values of 2 heads x 8, and a little for counters and open sums.
            assert size <= 2 * 16 * c * blocks + 2 * 16 * 2 * levels + 64, (n, size)
            sizes.append(size)
    assert sizes[-1] < 3 * sizes[0]


@pytest.mark.slow
def test_state_is_a_fiftieth_of_a_cache(make_model: Any, tokens: Any) -> None:
    model = make_model(block_size=128, max_seq_len=65536, depth=1, heads=1, dim_head=64).eval()
    with torch.no_grad():
        _, state = model(tokens(1, 65536), return_state=True)
    size = sum(x.untyped_storage().nbytes() for x in tensors_of(state))
    assert size <= 2 * 65536 * 64 * 4 / 50


def test_state_follows_the_parameters(make_model: Any, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = make_model().to(dtype).init_state(3)
        assert all(x.device.type == device.type for x in tensors_of(state))
        assert tensors_of(state.layers)
        assert all(x.dtype == dtype for x in tensors_of(state.layers))


def test_a_state_holds_no_prompt(make_model: Any, tokens: Any) -> None:
    model = make_model(shift_tokens=True).eval()
    for n in (32, 35):
        with torch.no_grad():
            _, state = model(tokens(2, n), return_state=True)
        for x in tensors_of(state):
            assert x.untyped_storage().nbytes() == x.numel() * x.itemsize


def test_step_after_a_prefill_under_autocast(
    device: torch.device, make_model: Any, tokens: Any
) -> None:
    model = make_model().eval()
    x = tokens(2, 31)
    with torch.no_grad():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            _, state = model(x[:, :20], return_state=True)
            inside, _ = model.step(x[:, 20:], state)
        outside, _ = model.step(x[:, 20:], state)
        expected = model(x)[:, 20:]
    for out in (inside, outside):
        torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_step_drops_weights_while_training(make_model: Any, tokens: Any) -> None:
    model = make_model(attn_dropout=0.5)
    x = tokens(2, 9)
    state = model.init_state(2)
    torch.manual_seed(0)
    first, second = (model.step(x, state)[0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model.step(x, state)[0], model.step(x, state)[0])


def test_positions_stay_apart_in_bfloat16(device: torch.device) -> None:
    """Where the frequencies are rounded by somebody else, positions are not."""
    rotary = RotaryEmbedding(8).to(device).bfloat16()
    angles = rotary_angles(rotary, 0, 2000, device)
    assert angles.dtype == torch.float32
    assert len(angles.unique(dim=0)) == 2000


def test_step_in_bfloat16(make_model: Any, tokens: Any) -> None:
    model = make_model().bfloat16().eval()
    x = tokens(2, 30)
    with torch.no_grad():
        stepped = pieces(model, x, list(range(1, 30)))
        assert stepped.dtype == torch.bfloat16
        torch.testing.assert_close(stepped, model(x), atol=0.05, rtol=0.05)


def test_embeddings_step_too(device: torch.device, make_model: Any) -> None:
    model = make_model(num_tokens=None).double().eval()
    x = normal(2, 30, 16, device=device, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(pieces(model, x, [1, 9, 12]), model(x), atol=1e-10, rtol=0)


def test_int32_tokens_and_inference_mode(make_model: Any, tokens: Any) -> None:
    model = make_model().eval()
    x = tokens(2, 30)
    with torch.inference_mode():
        out = model(x)
        assert torch.equal(model(x.int()), out)
        torch.testing.assert_close(pieces(model, x, [5, 9]), out, atol=1e-5, rtol=0)
        assert model.generate(x, 5).shape == (2, 5)


def test_positions_in_bfloat16(make_model: Any, tokens: Any) -> None:
    """Rotary angles of far positions are as good as those of near ones in a rounded model."""
    model = make_model(max_seq_len=4096, block_size=16, depth=1).bfloat16().eval()
    exact = make_model(max_seq_len=4096, block_size=16, depth=1).double().eval()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    x = tokens(1, 4096)
    with torch.no_grad():
        error = (model(x).double() - exact(x)).abs().mean(dim=(0, 2))
    assert error[2048:].mean() < 1.5 * error[16:512].mean()
    for dtype in (torch.float16, torch.float64, torch.float32):
        assert model.to(dtype)(x[:, :20]).dtype == dtype


def test_embeddings_in_and_out(device: torch.device, make_model: Any) -> None:
    """Without tokens the model maps embeddings to embeddings, and ends with its norm."""
    for causal in (True, False):
        model = make_model(num_tokens=None, causal=causal)
        x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(0)).to(device)
        out = model(x)
        assert out.shape == (2, 21, 16)
        torch.testing.assert_close(
            out.mean(dim=-1), torch.zeros(2, 21, device=device), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            out.std(dim=-1, correction=0), torch.ones(2, 21, device=device), atol=1e-2, rtol=0
        )
        assert not any(isinstance(module, nn.Embedding) for module in model.modules())


def test_level_bias_starts_at_zero_and_learns(make_model: Any, tokens: Any) -> None:
    plain, biased = make_model(), make_model(level_bias=True)
    extra = sum(p.numel() for p in biased.parameters()) - sum(p.numel() for p in plain.parameters())
    # Two layers, two heads, and enough levels for any length.
    assert extra == 2 * 2 * 32
    x = tokens(2, 64)
    biased.load_state_dict(biased.state_dict() | plain.state_dict())
    torch.testing.assert_close(biased(x), plain(x), atol=1e-6, rtol=0)
    names = {name for name, _ in biased.named_parameters()} - {
        name for name, _ in plain.named_parameters()
    }
    biased(x).square().sum().backward()
    for name, parameter in biased.named_parameters():
        if name in names:
            # 64 tokens in blocks of 4 have the levels 0 to 3.
            assert parameter.shape == (32, 2)
            assert (parameter.grad[:4] != 0).all(), name
            assert (parameter.grad[4:] == 0).all(), name


def test_grouped_heads_have_fewer_parameters(make_model: Any, tokens: Any) -> None:
    full, grouped = make_model(heads=4, kv_heads=4), make_model(heads=4, kv_heads=1)
    saved = sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in grouped.parameters())
    # Keys and values of three heads of 8 from 16 features in two layers.
    assert saved == 2 * (2 * 3 * 8 * 16)
    assert make_model(heads=4)(tokens(1, 20)).equal(full(tokens(1, 20)))


def test_pos_emb_is_used(make_model: Any, tokens: Any) -> None:
    x = tokens(1, 40)
    default = make_model()(x)
    torch.testing.assert_close(make_model(pos_emb=RotaryEmbedding(dim=8))(x), default)
    assert not torch.equal(make_model(pos_emb=RotaryEmbedding(dim=8, theta=50))(x), default)
    # Half of each head rotated.
    assert not torch.equal(make_model(pos_emb=RotaryEmbedding(dim=4))(x), default)


def test_positions_may_be_interpolated(make_model: Any, tokens: Any) -> None:
    """Positions divided by a factor: the outputs of other positions, in step and in one piece."""
    x = tokens(1, 40)
    model = make_model(pos_emb=RotaryEmbedding(dim=8, interpolate_factor=2.0)).double().eval()
    assert not torch.equal(model(x), make_model().double()(x))
    with torch.no_grad():
        assert_pieces_equal_whole(model, model.step, x, [[7, 33]], state=model.init_state(1))


@pytest.mark.parametrize("changes", [{}, {"reversible": True}, {"causal": False}])
def test_learned_frequencies_learn(make_model: Any, tokens: Any, changes: dict[str, Any]) -> None:
    pos_emb = RotaryEmbedding(dim=8, learned_freq=True)
    model = make_model(pos_emb=pos_emb, **changes).double()
    x = tokens(2, 29)
    (slope,) = torch.autograd.grad(model(x).square().mean(), pos_emb.freqs)
    step = 1e-6
    for i in range(len(slope)):
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                pos_emb.freqs[i] += sign * step
                values.append(model(x).square().mean())
        with torch.no_grad():
            pos_emb.freqs[i] += step
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(slope[i], difference, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_angles_take_the_place_of_positions(device: torch.device, causal: bool) -> None:
    settings = {"heads": 2, "dim_head": 8, "block_size": 4}
    attention: nn.Module
    torch.manual_seed(0)
    if causal:
        attention = CausalHAttention1D(16, max_seq_len=64, **settings)
    else:
        attention = HAttention1D(16, **settings)
    attention = attention.to(device)
    pos_emb = RotaryEmbedding(dim=8).to(device)
    x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(0)).to(device)
    angles = pos_emb(torch.arange(21, device=device))
    without = attention(x)
    assert torch.equal(attention(x, angles=torch.zeros_like(angles)), without)
    rotated = attention(x, angles=angles)
    assert not torch.allclose(rotated, without)
    attention.pos_emb = pos_emb
    torch.testing.assert_close(attention(x), rotated)
    # Within a block only distances count; over blocks the means of rotated keys know more.
    short = x[:, :4]
    torch.testing.assert_close(
        attention(short, angles=angles[5:9]), attention(short), atol=1e-5, rtol=0
    )


def test_position_is_relative(make_model: Any, device: torch.device) -> None:
    """In one block rotary embedding knows distances only: a masked start moves nothing."""
    model = displace(make_model(num_tokens=None, block_size=64).double())
    x = normal(1, 20, 16, device=device, seed=0)
    later = F.pad(x, (0, 0, 9, 0))
    mask = torch.arange(29, device=device)[None] >= 9
    torch.testing.assert_close(model(later, mask=mask)[:, 9:], model(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("option", ["attn_dropout", "ff_dropout"])
@pytest.mark.parametrize("reversible", [False, True])
def test_dropout_acts_in_training_only(
    make_model: Any, tokens: Any, option: str, reversible: bool
) -> None:
    plain = make_model(reversible=reversible)
    model = make_model(reversible=reversible, **{option: 0.5})
    x = tokens(2, 30)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), plain.eval()(x), atol=1e-6, rtol=0)


def test_ff_mult(make_model: Any) -> None:
    sizes = [sum(p.numel() for p in make_model(ff_mult=mult).parameters()) for mult in (1, 2, 4)]
    # Two layers: two matrices of 16 x 16 and an inner bias of 16 for each unit.
    assert sizes[1] - sizes[0] == 2 * (2 * 16 * 16 + 16)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_constructors_start_like_the_reference() -> None:
    """The reference's initial distributions: normal embedding, uniform linear maps."""
    torch.manual_seed(0)
    model = HTransformer1D(num_tokens=500, dim=64, depth=1, max_seq_len=64)
    (embedding,) = (m for m in model.modules() if isinstance(m, nn.Embedding))
    assert abs(embedding.weight.std().item() - 1) < 0.02
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert abs(module.weight.std().item() - bound / 3**0.5) < 0.1 * bound
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def layers(depth: int, dim: int, dropout: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)

    def function() -> nn.Module:
        return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout))

    return nn.ModuleList([nn.ModuleList([function(), function()]) for _ in range(depth)])


def test_sequential_sequence(device: torch.device) -> None:
    blocks = layers(3, 6).to(device)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(device)
    expected = x
    for f, g in blocks:
        expected = expected + f(expected)
        expected = expected + g(expected)
    torch.testing.assert_close(SequentialSequence(blocks)(x), expected)


def test_reversible_sequence(device: torch.device) -> None:
    blocks = layers(3, 6).to(device)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(device)
    left = right = x
    for f, g in blocks:
        left = left + f(right)
        right = right + g(left)
    torch.testing.assert_close(ReversibleSequence(blocks)(x), left + right)


class Masked(nn.Module):
    """Needs a keyword that only its route brings."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.module(x) * mask[..., None]


@pytest.mark.parametrize("sequence", [SequentialSequence, ReversibleSequence])
def test_arguments_are_routed(device: torch.device, sequence: Any) -> None:
    blocks = layers(2, 6)
    for pair in blocks:
        pair[0] = Masked(pair[0])
    blocks = blocks.to(device)
    route = {"mask": ((True, False),) * 2}
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(device)
    ones = torch.ones(2, 5, device=device)
    module = sequence(blocks, args_route=route)
    assert not torch.equal(module(x, mask=ones), module(x, mask=ones * 0))
    with pytest.raises(ValueError, match="2"):
        sequence(blocks, args_route={"mask": ((True, False),) * 3})
    with pytest.raises(TypeError):
        sequence(blocks)(x)


@pytest.mark.parametrize("sequence", [SequentialSequence, ReversibleSequence])
def test_layer_dropout(device: torch.device, sequence: Any) -> None:
    """In training whole layers are left out, at least one stays; in eval mode none is."""
    blocks = layers(6, 6).to(device)
    x = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0)).to(device)
    whole = sequence(blocks)(x)
    dropping = sequence(blocks, layer_dropout=0.5)
    torch.manual_seed(0)
    outs = {tuple(dropping.train()(x).flatten().tolist()) for _ in range(20)}
    assert len(outs) > 5
    torch.testing.assert_close(dropping.eval()(x), whole)
    always = sequence(blocks, layer_dropout=1.0).train()
    one = sequence(blocks[:1])(x)
    torch.testing.assert_close(always(x), one)


def test_interpolated_positions(device: torch.device) -> None:
    """Twice the length at half the step is what `interpolate_factor` asks for."""
    torch.manual_seed(0)
    plain = CausalHAttention1D(8, max_seq_len=64, heads=2, dim_head=8, block_size=4)
    plain.to(device)
    x = torch.randn(1, 20, 8, device=device)
    half = RotaryEmbedding(8).to(device)
    half.freqs.data /= 2
    outs = []
    for pos_emb in (RotaryEmbedding(8, interpolate_factor=2.0).to(device), half):
        plain.pos_emb = pos_emb
        outs.append(plain(x))
    torch.testing.assert_close(outs[0], outs[1])
