"""Checkpoints of the reference, and the switch to its numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from product_key_memory import PKM, MemoryPool
from product_key_memory.transformer import Transformer
from shared_core.testing import wave

SMALL: dict[str, Any] = {"heads": 2, "num_keys": 6, "topk": 4, "dim_head": 8}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"pre_layernorm": True, "norm_output": True},
    "gated": {"non_competitive_gates": True},
    "concatenated": {"concat_values_and_combine": True},
    "batch": {"use_layernorm": False},
    "batch concatenated": {"use_layernorm": False, "concat_values_and_combine": True},
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_VERSION = pytest.mark.parametrize("version", ["0.2", "0.3"])


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict: norms around 1, and where features were counted, variances and a count."""
    state = {name: wave(shape, phase) for phase, (name, shape) in enumerate(shapes.items())}
    for name in state:
        if name.endswith(("norm.weight", "norm.fn.weight", ".0.weight", "_var")) and (
            state[name].ndim == 1
        ):
            state[name] += 1
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
    return state


def layer_shapes(kind: str, version: str) -> dict[str, tuple[int, ...]]:
    """Of a layer of width 12."""
    options = KINDS[kind]
    shapes: dict[str, tuple[int, ...]] = {"keys": (2, 6, 2, 8), "to_queries.weight": (32, 12)}
    if options.get("use_layernorm", True):
        shapes |= {"norm.weight": (8,), "norm.bias": (8,)}
    else:
        names = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"norm.fn.{name}": (8,) for name in names}
        shapes["norm.fn.num_batches_tracked"] = ()
    if "concat_values_and_combine" not in options:
        shapes["values.weight"] = (36, 12)
    elif version == "0.2":
        shapes |= {"values.0.weight": (36, 8), "values.3.weight": (12, 16)}
    else:
        shapes |= {"values.weight": (36, 8), "maybe_concat_combine.2.weight": (12, 16)}
    for option, name in (("pre_layernorm", "pre_layernorm"), ("norm_output", "output_norm")):
        if options.get(option):
            shapes |= {f"{name}.weight": (12,), f"{name}.bias": (12,)}
    return shapes


def layer_state(kind: str, version: str = "0.3") -> dict[str, Tensor]:
    """state_dict() of a reference layer."""
    return filled(layer_shapes(kind, version))


def model_state(kind: str, version: str = "0.3") -> dict[str, Tensor]:
    """state_dict() of a reference model: a layer with a memory, one without."""
    shapes: dict[str, tuple[int, ...]] = {"token_emb.weight": (20, 12), "pos_emb.weight": (16, 12)}
    for layer in range(2):
        shapes[f"layers.{layer}.0.to_qkv.weight"] = (48, 12)
        shapes[f"layers.{layer}.0.to_out.weight"] = (12, 16)
    shapes |= {f"layers.0.1.{name}": shape for name, shape in layer_shapes(kind, version).items()}
    for name, out, inner in (("1", 48, 12), ("3", 12, 48)):
        shapes[f"layers.1.1.{name}.weight"] = (out, inner)
        shapes[f"layers.1.1.{name}.bias"] = (out,)
    for name in ("layers.1.1.0", "to_logits.0"):
        shapes |= {f"{name}.weight": (12,), f"{name}.bias": (12,)}
    return filled(shapes | {"to_logits.1.weight": (20, 12), "to_logits.1.bias": (20,)})


def make_layer(kind: str, **changes: Any) -> PKM:
    torch.manual_seed(0)
    return PKM(12, **(SMALL | KINDS[kind] | changes)).double()


def make_model(kind: str, **changes: Any) -> Transformer:
    settings = {"dim": 12, "num_tokens": 20, "depth": 2, "seq_len": 16, "heads": 2, "dim_head": 8}
    torch.manual_seed(0)
    return Transformer(**settings, pkm_kwargs=SMALL | KINDS[kind], **changes).double()


BOTH = pytest.mark.parametrize(
    ("make", "state_of"), [(make_layer, layer_state), (make_model, model_state)]
)


# --- Checkpoints --------------------------------------------------------------------------------


@BOTH
@EACH_KIND
@EACH_VERSION
@pytest.mark.parametrize("legacy", [False, True])
def test_a_reference_checkpoint_loads_strictly(
    make: Any, state_of: Any, kind: str, version: str, legacy: bool
) -> None:
    module = make(kind, legacy=legacy)
    state = state_of(kind, version)
    given = dict(state)
    result = module.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert given.keys() == state.keys(), "the caller's dictionary was changed"
    # Every number of the checkpoint arrived; features of a batch norm count for all halves.
    repeats = 1 if legacy else 4
    sent = sorted(
        (x.sum().item() * (repeats if "norm.fn" in name and x.ndim else 1))
        for name, x in state.items()
    )
    arrived = sorted(x.sum().item() for x in module.state_dict().values())
    assert arrived == pytest.approx(sent, abs=1e-9)


@BOTH
@EACH_KIND
def test_our_checkpoints_load_untouched(make: Any, state_of: Any, kind: str) -> None:
    module = make(kind)
    module.load_state_dict(state_of(kind))
    again = make(kind)
    again.load_state_dict(module.state_dict())
    for name, x in again.state_dict().items():
        assert torch.equal(x, module.state_dict()[name]), name


@BOTH
@EACH_KIND
@EACH_VERSION
def test_a_checkpoint_inside_a_larger_module(
    make: Any, state_of: Any, kind: str, version: str
) -> None:
    """Only keys under the module's own prefix are looked at."""
    other = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Linear(3, 3)])
    whole = nn.ModuleDict({"net": make(kind), "maybe_concat_combine": other})
    state = {f"net.{name}": x for name, x in state_of(kind, version).items()}
    state |= {f"maybe_concat_combine.2.{n}": x for n, x in nn.Linear(3, 3).state_dict().items()}
    whole.load_state_dict(state)
    alone = make(kind)
    alone.load_state_dict(state_of(kind, version))
    for name, x in alone.state_dict().items():
        assert torch.equal(whole.state_dict()[f"net.{name}"], x)


@BOTH
@EACH_VERSION
def test_a_half_matching_checkpoint_is_refused(make: Any, state_of: Any, version: str) -> None:
    module = make("concatenated")
    before = {name: x.clone() for name, x in module.state_dict().items()}
    state = state_of("concatenated", version)
    keys = next(name for name in state if name.endswith("keys"))
    for given in (
        {name: x for name, x in state.items() if name != keys},
        state | {"surplus.weight": torch.zeros(1)},
        state | module.state_dict(),
    ):
        for strict in (True, False):
            with pytest.raises(ValueError, match="cannot translate"):
                module.load_state_dict(given, strict=strict)
        for name, x in module.state_dict().items():
            assert torch.equal(x, before[name])


@BOTH
def test_wrong_checkpoints_are_refused(make: Any, state_of: Any) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        make("plain", legacy=True).load_state_dict(
            {name: x.repeat(2) if x.ndim == 1 else x for name, x in state_of("plain").items()}
        )
    with pytest.raises((RuntimeError, ValueError), match=r"values|norm"):
        make("plain").load_state_dict(state_of("batch"))
    with pytest.raises(RuntimeError, match=r"decoder\.weight"):
        make("plain").load_state_dict({"decoder.weight": torch.zeros(2)})


def test_statistics_of_another_width_are_refused() -> None:
    state = layer_state("batch")
    state["norm.fn.running_mean"] = torch.zeros(16)
    with pytest.raises(RuntimeError, match="running_mean"):
        make_layer("batch").load_state_dict(state)


@BOTH
@EACH_VERSION
def test_loading_hooks_travel(make: Any, state_of: Any, version: str) -> None:
    """Copies and pickles still read the reference's checkpoints."""
    module = make("batch concatenated")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.load_state_dict(state_of("batch concatenated", version))


@BOTH
def test_numbers_never_come_from_a_checkpoint(make: Any, state_of: Any) -> None:
    """Names of parameters and of all that is saved are the same, legacy or not."""
    del state_of
    for kind in KINDS:
        default, legacy = (make(kind, legacy=flag) for flag in (False, True))
        assert default.state_dict().keys() == legacy.state_dict().keys()


# --- Numbers ------------------------------------------------------------------------------------


def layer_numbers(layer: Any, kind: str, version: str) -> list[float]:
    """In training: three outputs, the norm of all, and of gradients, 0 where there is none."""
    layer.load_state_dict(layer_state(kind, version))
    x = wave((2, 8, 12), 3).to(layer.keys.device).requires_grad_()
    out = layer(x)
    out.square().mean().backward()
    gradients = (layer.values, layer.to_queries, layer.keys, x)
    found = [y.grad if isinstance(y, Tensor) else next(y.parameters()).grad for y in gradients]
    norms = [0.0 if grad is None else grad.norm().item() for grad in found]
    return [*out[0, -1, :3].tolist(), out.norm().item(), *norms]


def model_numbers(model: Any, kind: str, version: str) -> list[float]:
    """In training: the loss, three logits, and the norm of the embedding's gradient."""
    model.load_state_dict(model_state(kind, version))
    # With as many inputs as a head is wide.
    place = torch.arange(18, device=model.token_emb.weight.device).view(2, 9)
    x = (place * 7 + place // 3) % 20
    loss = model(x)
    loss.backward()
    logits = model(x[:, :-1], return_loss=False)[0, -1, :3]
    return [loss.item(), *logits.tolist(), model.token_emb.weight.grad.norm().item()]


# What product-key-memory 0.3.0 and 0.2.11 give.
LAYER_NUMBERS = {
    "plain": [
        0.082496998,
        -0.552624867,
        0.103624237,
        2.580217592,
        0.046973846,
        0.009794922,
        0.039611766,
        0.004946485,
    ],
    "normed": [
        0.645418827,
        -1.946713533,
        0.099596574,
        15.735569122,
        1.764448021,
        0.045078091,
        0.091793082,
        0.003554246,
    ],
    "gated": [
        0.052175482,
        -1.815635849,
        0.559321404,
        14.326095985,
        1.486245311,
        1.580321363,
        3.395716166,
        0.374359762,
    ],
    "concatenated": [
        -1.009520776,
        1.576397286,
        0.244392255,
        17.135830302,
        1.869766027,
        0.0,
        0.0,
        0.0,
    ],
    "batch": [
        -0.07777565,
        0.062348538,
        0.018079849,
        3.062212946,
        0.048773876,
        0.011760039,
        0.051264021,
        0.003525112,
    ],
    "batch concatenated": [
        0.29158422,
        -0.741544218,
        1.115054149,
        9.638314899,
        0.858897468,
        0.0,
        0.0,
        0.0,
    ],
}
MODEL_NUMBERS = {
    "plain": [3.369462034, 0.080453227, 0.035806714, -0.191592663, 0.767107018],
    "normed": [3.72325613, -0.67245693, -2.387000854, 2.482566075, 7.064549621],
    "gated": [3.379054364, 0.071201292, 0.046667582, -0.203782575, 0.843963967],
    "concatenated": [3.564625304, 0.940543746, 0.045752974, -0.780516091, 0.246237726],
    "batch": [3.340722109, 0.169701594, 1.015402351, 0.196537977, 0.889489019],
    "batch concatenated": [3.062460042, -0.893266042, -0.275915651, 1.0323654, 0.188439957],
}


@EACH_KIND
@EACH_VERSION
def test_legacy_numbers_of_the_layer(device: torch.device, kind: str, version: str) -> None:
    actual = layer_numbers(make_layer(kind, legacy=True).to(device), kind, version)
    assert actual == pytest.approx(LAYER_NUMBERS[kind], abs=1e-7, rel=1e-6)


@EACH_KIND
@EACH_VERSION
def test_legacy_numbers_of_the_transformer(device: torch.device, kind: str, version: str) -> None:
    actual = model_numbers(make_model(kind, legacy=True).to(device), kind, version)
    assert actual == pytest.approx(MODEL_NUMBERS[kind], abs=1e-7, rel=1e-6)


@EACH_KIND
def test_where_legacy_has_other_numbers(device: torch.device, kind: str) -> None:
    x = wave((2, 8, 12), 3).to(device)
    outputs = []
    for legacy in (False, True):
        layer = make_layer(kind, legacy=legacy).to(device)
        layer.load_state_dict(layer_state(kind))
        outputs.append(layer(x))
    departs = "batch" in kind or "concatenated" in kind
    assert ((outputs[0] - outputs[1]).abs().max() > 1e-3) == departs
    if not departs:
        torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)
    losses = []
    for legacy in (False, True):
        model = make_model(kind, legacy=legacy).to(device)
        model.load_state_dict(model_state(kind))
        losses.append(model(torch.arange(9, device=device)[None]))
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_legacy_ignores_an_input_mask(device: torch.device) -> None:
    x = wave((2, 8, 12), 3).to(device)
    mask = torch.arange(8, device=device)[None].expand(2, 8) < 3
    layer = make_layer("plain", legacy=True).to(device)
    assert torch.equal(layer(x, input_mask=mask), layer(x))
    layer = make_layer("plain").to(device)
    assert not torch.equal(layer(x, input_mask=mask), layer(x))


def test_legacy_has_noise_in_evaluation(device: torch.device) -> None:
    x = wave((2, 8, 12), 3).to(device)
    for legacy in (False, True):
        layer = make_layer("plain", legacy=legacy).to(device).eval()
        assert torch.equal(layer(x, gumbel_noise_scale=1.0), layer(x)) != legacy


def test_legacy_concatenation_has_no_gradient_of_its_router(device: torch.device) -> None:
    for legacy in (False, True):
        layer = make_layer("concatenated", legacy=legacy).to(device)
        layer(wave((2, 8, 12), 3).to(device)).square().sum().backward()
        trained = layer.keys.grad is not None and bool(layer.keys.grad.any())
        assert trained != legacy


def test_legacy_batch_norm_is_over_time(device: torch.device) -> None:
    layer = make_layer("batch", legacy=True).to(device)
    for shape in ((2, 7, 12), (2, 9, 12), (8, 12), (1, 2, 8, 12)):
        with pytest.raises(ValueError, match=str(shape[:-1]).replace("(", r"\(")[:-1]):
            layer(torch.zeros(shape, dtype=torch.float64, device=device))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_keys", (6, 7)),
        ("query_norm", "none"),
        ("key_norm", True),
        ("gate", "sigmoid"),
        ("pool", MemoryPool(36, 12)),
        ("values_grad", "factored"),
        ("values_dtype", torch.bfloat16),
        ("gated_output", True),
        ("experts", True),
    ],
)
def test_legacy_has_no_new_options(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"legacy=True has no {name}: "):
        PKM(12, **(SMALL | {name: value}), legacy=True)
    with pytest.raises(ValueError, match=f"legacy=True has no {name}: "):
        Transformer(dim=12, num_tokens=5, depth=2, seq_len=4, pkm_kwargs={name: value}, legacy=True)


def test_legacy_is_a_keyword_with_a_default() -> None:
    for cls in (PKM, Transformer):
        assert cls.__init__.__kwdefaults__["legacy"] is False
