"""Checkpoints of the reference, and the switch to its numbers, which are compared elsewhere."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from h_transformer_1d import (
    AutoregressiveWrapper,
    CausalHAttention1D,
    HAttention1D,
    HTransformer1D,
)
from shared_core.testing import wave

SHAPES = list(itertools.product([False, True], repeat=3))
KINDS = pytest.mark.parametrize(("reversible", "causal", "shift_tokens"), SHAPES)


def reference_state(
    *,
    reversible: bool,
    causal: bool,
    shift_tokens: bool,
    depth: int = 2,
    max_seq_len: int = 64,
) -> dict[str, Tensor]:
    """state_dict() of a reference model: 20 tokens, dim 16, 2 heads of 8, blocks of 4."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_emb.weight": (20, 16),
        "to_logits.0.weight": (16,),
        "to_logits.0.bias": (16,),
        "to_logits.1.weight": (20, 16),
        "to_logits.1.bias": (20,),
    }
    for layer in range(depth):
        attn, ff = f"layers.layers.{layer}.0.", f"layers.layers.{layer}.1."
        shapes |= {
            attn + "fn.to_qkv.weight": (48, 16),
            attn + "fn.to_out.weight": (16, 16),
            attn + "fn.to_out.bias": (16,),
            attn + "norm.weight": (16,),
            attn + "norm.bias": (16,),
            ff + "fn.net.0.weight": (64, 16),
            ff + "fn.net.0.bias": (64,),
            ff + "fn.net.2.weight": (16, 64),
            ff + "fn.net.2.bias": (16,),
            ff + "norm.weight": (16,),
            ff + "norm.bias": (16,),
        }
    state = {name: wave(shapes[name], phase) for phase, name in enumerate(sorted(shapes))}
    for name in shapes:
        if name.endswith(("norm.weight", "to_logits.0.weight")):
            state[name] += 1
    freqs = RotaryEmbedding(dim=8).freqs.detach().double()
    state["pos_emb.freqs"] = freqs
    for layer in range(depth):
        name = f"layers.layers.{layer}.0.fn."
        state[name + "pos_emb.freqs"] = freqs
        if causal:
            levels = (max_seq_len // 4).bit_length() - 1
            state[name + "mask"] = torch.zeros(levels, max_seq_len, dtype=torch.bool)
    if shift_tokens:
        state = {name.replace(".fn.", ".fn.fn."): x for name, x in state.items()}
    if reversible:
        pair = (("0", "f"), ("1", "g"))
        for number, letter in pair:
            state = {
                re.sub(
                    rf"^layers\.layers\.(\d+)\.{number}\.", rf"layers.blocks.\1.{letter}.net.", name
                ): x
                for name, x in state.items()
            }
    return state


@KINDS
@pytest.mark.parametrize("legacy", [False, True])
def test_a_reference_checkpoint_loads_strictly(
    make_model: Any, reversible: bool, causal: bool, shift_tokens: bool, legacy: bool
) -> None:
    kind = {"reversible": reversible, "causal": causal, "shift_tokens": shift_tokens}
    model = make_model(**kind, legacy=legacy)
    state = reference_state(**kind)
    given = copy.copy(state)
    result = model.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert given.keys() == state.keys(), "the caller's dictionary was changed"
    # Every number of the checkpoint arrived, and every parameter came from it.
    arrived = sorted(float(p.detach().double().sum()) for p in model.parameters())
    sent = [x for name, x in state.items() if "mask" not in name and ".pos_emb" not in name]
    total = sum(float(x.double().sum()) for x in sent)
    own = sum(float(x.double().sum()) for x in model.state_dict().values())
    assert abs(total - own) < 1e-4 * len(arrived)
    assert sum(x.numel() for x in sent) == sum(x.numel() for x in model.state_dict().values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift_tokens", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_reversible_and_sequential_checkpoints_are_one(
    make_model: Any, tokens: Any, causal: bool, shift_tokens: bool, legacy: bool
) -> None:
    """The same numbers under either naming make the same model, whichever kind it is."""
    kind = {"causal": causal, "shift_tokens": shift_tokens}
    x = tokens(2, 64)
    for reversible in (False, True):
        outputs = []
        for saved in (False, True):
            model = make_model(reversible=reversible, legacy=legacy, **kind)
            model.load_state_dict(reference_state(reversible=saved, **kind))
            outputs.append(model(x))
        assert torch.equal(*outputs)


@KINDS
def test_our_checkpoints_load_untouched(
    make_model: Any, tokens: Any, reversible: bool, causal: bool, shift_tokens: bool
) -> None:
    kind = {"causal": causal, "shift_tokens": shift_tokens}
    model = make_model(reversible=reversible, **kind)
    model.load_state_dict(reference_state(reversible=reversible, **kind))
    x = tokens(2, 64)
    for other in (False, True):
        for max_seq_len in (64, 100, 512):
            loaded = make_model(reversible=other, max_seq_len=max_seq_len, **kind)
            loaded.load_state_dict(model.state_dict())
            if other == reversible:
                assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("max_seq_len", [16, 256, 1024])
def test_a_reference_checkpoint_of_another_max_seq_len(
    make_model: Any, tokens: Any, max_seq_len: int
) -> None:
    kind = {"reversible": False, "causal": True, "shift_tokens": False}
    model = make_model(**kind)
    model.load_state_dict(reference_state(max_seq_len=max_seq_len, **kind))
    same = make_model(**kind)
    same.load_state_dict(reference_state(**kind))
    assert torch.equal(model(tokens(1, 33)), same(tokens(1, 33)))


@KINDS
def test_a_checkpoint_inside_a_larger_module(
    make_model: Any, reversible: bool, causal: bool, shift_tokens: bool
) -> None:
    """Only the keys under the model's own prefix are looked at."""
    kind = {"reversible": reversible, "causal": causal, "shift_tokens": shift_tokens}
    whole = nn.ModuleDict({"net": make_model(**kind), "head": nn.Linear(3, 3)})
    state = {f"net.{name}": x for name, x in reference_state(**kind).items()}
    state |= {"head.weight": torch.zeros(3, 3), "head.bias": torch.ones(3)}
    whole.load_state_dict(state)
    alone = make_model(**kind)
    alone.load_state_dict(reference_state(**kind))
    for name, x in alone.state_dict().items():
        assert torch.equal(whole.state_dict()[f"net.{name}"], x)


@KINDS
def test_a_half_matching_checkpoint_is_refused(
    make_model: Any, reversible: bool, causal: bool, shift_tokens: bool
) -> None:
    kind = {"reversible": reversible, "causal": causal, "shift_tokens": shift_tokens}
    model = make_model(**kind)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = reference_state(**kind)
    qkv = next(name for name in state if name.endswith("to_qkv.weight"))
    wrong = [
        {name: x for name, x in state.items() if name != qkv},
        {name: x for name, x in state.items() if name != "to_logits.1.bias"},
        state | {"surplus.weight": torch.zeros(1)},
        state | model.state_dict(),
        reference_state(**kind, depth=1),
        reference_state(**kind, depth=3),
    ]
    for given in wrong:
        for strict in (True, False):
            with pytest.raises(ValueError, match="key"):
                model.load_state_dict(given, strict=strict)
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name])


def test_wrong_shapes_are_refused(make_model: Any) -> None:
    kind = {"reversible": False, "causal": True, "shift_tokens": False}
    state = reference_state(**kind)
    state["layers.layers.1.0.fn.to_qkv.weight"] = torch.zeros(48, 17)
    with pytest.raises(RuntimeError, match="17"):
        make_model(**kind).load_state_dict(state)


def test_foreign_checkpoints_are_left_to_strict_loading(make_model: Any) -> None:
    with pytest.raises(RuntimeError, match=r"decoder\.weight"):
        make_model().load_state_dict({"decoder.weight": torch.zeros(2)})


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_attention_checkpoints(device: torch.device, rotary: bool, legacy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "to_qkv.weight": torch.randn(48, 16, generator=generator),
        "to_out.weight": torch.randn(16, 16, generator=generator),
        "to_out.bias": torch.randn(16, generator=generator),
    }
    for causal in (False, True):
        pos_emb = RotaryEmbedding(dim=8) if rotary else None
        settings = {"heads": 2, "dim_head": 8, "block_size": 4, "pos_emb": pos_emb}
        attention: nn.Module
        given = dict(state)
        if rotary:
            given["pos_emb.freqs"] = RotaryEmbedding(dim=8).freqs.detach()
        if causal:
            attention = CausalHAttention1D(16, max_seq_len=64, legacy=legacy, **settings)
            given["mask"] = torch.zeros(4, 64, dtype=torch.bool)
        else:
            attention = HAttention1D(16, legacy=legacy, **settings)
        attention.to(device).load_state_dict(given)
        x = torch.randn(1, 64, 16, generator=generator).to(device)
        again = copy.deepcopy(attention)
        again.load_state_dict(attention.state_dict())
        assert torch.equal(again(x), attention(x))


@KINDS
def test_legacy_has_other_numbers(
    make_model: Any, tokens: Any, reversible: bool, causal: bool, shift_tokens: bool
) -> None:
    kind = {"reversible": reversible, "causal": causal, "shift_tokens": shift_tokens}
    x = tokens(2, 64)
    models = [make_model(legacy=legacy, **kind) for legacy in (False, True)]
    for model in models:
        model.load_state_dict(reference_state(**kind))
    default, legacy = (model(x) for model in models)
    assert legacy.shape == default.shape
    assert legacy.isfinite().all()
    assert (legacy - default).abs().max() > 1e-3
    # Numbers come from the argument alone, never from the checkpoint: the keys are the same.
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


# What h-transformer-1d 0.1.9 gives for these weights and tokens, in float64, in training mode:
# three logits of the last token of the first row, the norm of all logits that count, and the norm
# of the embedding's gradient for the mean square of those.
REFERENCE_NUMBERS = {
    # Whether it is reversible, causal, shifts tokens; how many tokens; whether some are masked.
    (False, False, False, 64, False): [
        2.14943609,
        -0.03002072,
        -2.20780898,
        89.30688351,
        2.72758034,
    ],
    (False, False, False, 64, True): [
        2.28356823,
        -0.65548783,
        -1.85785869,
        61.17874062,
        2.74426456,
    ],
    (False, False, False, 40, False): [
        -1.60028578,
        -0.77219431,
        2.11632069,
        61.7841765,
        3.58842751,
    ],
    (False, False, False, 40, True): [-1.44905581, -0.88567354, 2.05291837, 51.05072462, 3.6643843],
    (False, False, True, 64, False): [1.80229521, 0.52978794, -2.29393394, 87.99605965, 2.50764073],
    (False, False, True, 64, True): [2.18338961, -0.33397345, -2.00651723, 59.1987614, 2.88369118],
    (False, False, True, 40, False): [
        -1.68223323,
        -0.61988648,
        2.08038898,
        59.64083581,
        3.24915791,
    ],
    (False, False, True, 40, True): [-1.49662799, -0.75213966, 1.99714154, 47.79400859, 3.27056797],
    (False, True, False, 64, False): [
        1.20755171,
        -0.02436374,
        -1.27030284,
        88.32604809,
        2.00961997,
    ],
    (False, True, False, 40, False): [-0.6753766, -0.62673697, 1.0788343, 63.79046427, 1.69820853],
    (False, True, True, 64, False): [-0.25697176, 0.76573982, -0.41728274, 78.68173029, 1.35937917],
    (False, True, True, 40, False): [0.55676164, -1.87241235, 0.81079081, 62.19556661, 2.06169395],
    (True, False, False, 64, False): [-0.72448747, -1.53244579, 1.82892163, 64.01714626, 2.2928511],
    (True, False, False, 64, True): [-0.93849378, -1.21488759, 1.79715268, 43.74164164, 2.10770497],
    (True, False, False, 40, False): [
        -1.13633429,
        -1.72046593,
        2.38628728,
        48.00578757,
        1.51922918,
    ],
    (True, False, False, 40, True): [-1.13910744, -1.77035602, 2.42767305, 36.90683782, 1.53443148],
    (True, False, True, 64, False): [-0.69945523, -1.56686083, 1.83052503, 61.57649702, 2.00024215],
    (True, False, True, 64, True): [-1.08740884, -1.07672782, 1.83913851, 43.61037958, 1.91153029],
    (True, False, True, 40, False): [-1.18617761, -1.52751001, 2.28679172, 46.23387145, 1.28267879],
    (True, False, True, 40, True): [-1.11164318, -1.61824248, 2.28247999, 36.17082683, 1.49364541],
    (True, True, False, 64, False): [-0.86779331, -0.32949078, 1.0411963, 76.88256614, 1.67004628],
    (True, True, False, 40, False): [-0.59881297, -0.14488364, 0.62933863, 51.99287031, 1.94382641],
    (True, True, True, 64, False): [-0.87158564, -0.3035837, 1.02493776, 73.1554042, 1.49159723],
    (True, True, True, 40, False): [-0.57852391, -0.08332572, 0.56140661, 49.23355347, 1.60901756],
}


@pytest.mark.parametrize(
    ("reversible", "causal", "shift_tokens", "n", "masked"), list(REFERENCE_NUMBERS)
)
def test_legacy_numbers(
    make_model: Any, reversible: bool, causal: bool, shift_tokens: bool, n: int, masked: bool
) -> None:
    kind = {"reversible": reversible, "causal": causal, "shift_tokens": shift_tokens}
    model = make_model(**kind, legacy=True).double()
    model.load_state_dict(reference_state(**kind))
    place = torch.arange(2 * n, device=model.norm.weight.device).reshape(2, n)
    x = (place * 7 + place // 3) % 20
    rows = torch.ones_like(x, dtype=torch.bool)
    if masked:
        rows = (place[:1] % 5 != 2).repeat(2, 1)
        rows[1, 30:] = False
    out = model(x, mask=rows) if masked else model(x)
    (embedding,) = (m for m in model.modules() if isinstance(m, nn.Embedding))
    (gradient,) = torch.autograd.grad(out[rows].square().mean(), embedding.weight)
    actual = [*out[0, n - 1, :3].tolist(), out[rows].norm().item(), gradient.norm().item()]
    assert actual == pytest.approx(
        REFERENCE_NUMBERS[reversible, causal, shift_tokens, n, masked], abs=1e-5, rel=1e-5
    )


def test_legacy_rows_do_not_sum_to_one(device: torch.device) -> None:
    """The reference's row sum of 5.33 over 1024 equal tokens in blocks of 16."""
    n = 1024
    attention = HAttention1D(4, heads=1, dim_head=4, block_size=16, legacy=True).to(device)
    weight = torch.zeros(12, 4)
    weight[8:] = torch.eye(4)
    attention.load_state_dict(
        {"to_qkv.weight": weight, "to_out.weight": torch.eye(4), "to_out.bias": torch.zeros(4)}
    )
    out = attention(torch.ones(1, n, 4, device=device))
    torch.testing.assert_close(out, torch.full_like(out, 16 / 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_eps_is_the_legacy_denominators(device: torch.device, causal: bool) -> None:
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)).to(device)
    outputs = {}
    for legacy, eps in itertools.product([False, True], [1e-8, 1.0]):
        torch.manual_seed(0)
        settings = {"heads": 2, "dim_head": 8, "block_size": 4, "eps": eps, "legacy": legacy}
        attention = (
            CausalHAttention1D(16, max_seq_len=64, **settings)
            if causal
            else HAttention1D(16, **settings)
        )
        outputs[legacy, eps] = attention.to(device)(x)
    assert torch.equal(outputs[False, 1e-8], outputs[False, 1.0])
    assert not torch.equal(outputs[True, 1e-8], outputs[True, 1.0])


def test_legacy_causal_ignores_the_mask(make_model: Any, tokens: Any) -> None:
    model = make_model(legacy=True)
    x = tokens(1, 64)
    mask = torch.arange(64, device=x.device)[None] % 3 != 0
    assert torch.equal(model(x, mask=mask), model(x))


def test_legacy_gradients_exist(make_model: Any, tokens: Any) -> None:
    for causal, reversible in itertools.product([False, True], repeat=2):
        model = make_model(legacy=True, causal=causal, reversible=reversible)
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model(tokens(2, 64)).square().sum()
        for gradient in torch.autograd.grad(loss, parameters):
            assert gradient.isfinite().all()
            assert gradient.any()


def test_legacy_short_inputs_run(make_model: Any, tokens: Any) -> None:
    """The reference's crashes are not reproduced."""
    for causal in (False, True):
        model = make_model(legacy=True, causal=causal)
        for n in (1, 2, 3, 4, 5, 8, 9, 16, 33):
            assert model(tokens(1, n)).isfinite().all()


def test_legacy_has_no_state(make_model: Any, tokens: Any) -> None:
    """The reference's causal numbers do not come in pieces; its wrapper still generates."""
    model = make_model(legacy=True).eval()
    prompt = tokens(2, 7)
    for call in (
        lambda: model.init_state(2),
        lambda: model(prompt, return_state=True),
        lambda: model.generate(prompt, 3),
        lambda: model.stream(prompt, 3),
    ):
        with pytest.raises(ValueError, match="legacy"):
            call()
    out = AutoregressiveWrapper(model).generate(prompt, 70, temperature=0.0)
    whole = torch.cat((prompt, out), dim=1)
    with torch.no_grad():
        for t in range(70):
            # Past max_seq_len the window moves, as the reference's does.
            seen = whole[:, : 7 + t][:, -64:]
            assert torch.equal(out[:, t], model(seen)[:, -1].argmax(dim=-1))


def test_loading_hooks_travel(make_model: Any) -> None:
    """Copies and pickles of a model still read the reference's checkpoints."""
    kind = {"reversible": True, "causal": True, "shift_tokens": False}
    model = make_model(reversible=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(reference_state(**kind))


def test_legacy_is_a_keyword_with_a_default() -> None:
    for cls in (HTransformer1D, HAttention1D, CausalHAttention1D):
        assert not cls.__init__.__kwdefaults__["legacy"]
