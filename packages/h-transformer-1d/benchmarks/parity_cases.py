"""What h-transformer-1d and its reference must have in common; tools/parity.py reads this file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity_case import Comparison, Initial, Side, Signature, Tensors

MODULES = {
    "HTransformer1D": "h_transformer_1d",
    "HAttention1D": "h_transformer_1d",
    "CausalHAttention1D": "h_transformer_1d",
    "AutoregressiveWrapper": "autoregressive_wrapper",
    "ReversibleSequence": "reversible",
    "SequentialSequence": "reversible",
}
"""Where in the reference each class lies."""

SMALL = {"num_tokens": 40, "dim": 24, "depth": 2, "heads": 3, "dim_head": 8}
Settings = dict[str, Any]


def our_class(name: str) -> Any:
    import h_transformer_1d

    return getattr(h_transformer_1d, name)


def find(side: Side, name: str) -> Any:
    """A class of either side."""
    if side == "ours":
        return our_class(name)
    import importlib

    return getattr(importlib.import_module(f"h_transformer_1d.{MODULES[name]}"), name)


def numerics(side: Side, legacy: bool) -> Settings:
    return {"legacy": legacy} if side == "ours" else {}


# --- Models -------------------------------------------------------------------------------------


def model(settings: Settings, side: Side, legacy: bool) -> nn.Module:
    settings = {**SMALL, **settings}
    dtype = settings.pop("dtype", "float32")
    module: nn.Module = find(side, "HTransformer1D")(**settings, **numerics(side, legacy))
    return module.to(getattr(torch, dtype))


def wrapper(settings: Settings, side: Side, legacy: bool) -> nn.Module:
    module: nn.Module = find(side, "AutoregressiveWrapper")(model(settings, side, legacy))
    return module


def tokens(shape: tuple[int, int], masked: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    inputs = {"x": torch.randint(SMALL["num_tokens"], shape, generator=generator)}
    if masked:
        inputs["mask"] = holes(shape, generator)
    return inputs


def holes(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random masked tokens, a masked stretch in the first row, and a last row without any token."""
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0, shape[1] // 4 : shape[1] // 2] = False
    mask[-1] = False
    return mask


def call(module: nn.Module, inputs: Tensors) -> Tensors:
    return {"out": module(**inputs)}


def models() -> Iterator[Comparison]:
    """Settings, batch and length, mask: kinds of lengths that the reference accepts."""
    long = {"max_seq_len": 64, "block_size": 4}
    causal = {**long, "causal": True}
    for settings, shape, masked in (
        (causal, (2, 64), False),
        (causal, (2, 64), True),
        (causal, (3, 33), False),
        (causal, (2, 4), False),
        (causal, (2, 3), False),
        (causal, (2, 5), False),
        (causal, (1, 7), True),
        ({**causal, "max_seq_len": 128, "block_size": 16}, (2, 100), False),
        ({**causal, "max_seq_len": 128, "block_size": 1}, (2, 37), False),
        ({**causal, "max_seq_len": 256, "block_size": 2}, (1, 129), False),
        ({**causal, "max_seq_len": 512, "block_size": 128}, (2, 300), False),
        (long, (2, 64), False),
        (long, (3, 64), True),
        (long, (3, 41), False),
        (long, (3, 41), True),
        (long, (3, 16), True),
        (long, (2, 9), False),
        ({**long, "block_size": 16}, (2, 50), True),
        ({**long, "max_seq_len": 128, "block_size": 1}, (2, 90), True),
        ({**long, "max_seq_len": 512, "block_size": 2}, (2, 257), True),
        ({**long, "max_seq_len": 1024, "block_size": 128}, (2, 700), True),
        ({**causal, "reversible": True}, (2, 64), False),
        ({**causal, "reversible": True}, (2, 50), True),
        ({**long, "reversible": True}, (3, 64), True),
        ({**causal, "shift_tokens": True}, (2, 64), False),
        ({**causal, "shift_tokens": True}, (3, 50), True),
        ({**long, "shift_tokens": True}, (3, 64), True),
        ({**long, "shift_tokens": True}, (2, 35), False),
        ({**causal, "shift_tokens": True, "reversible": True}, (3, 40), True),
        ({**long, "shift_tokens": True, "reversible": True}, (3, 40), True),
        # Features that cannot be halved.
        ({**long, "shift_tokens": True, "dim": 25}, (3, 50), True),
        ({**causal, "ff_mult": 2}, (2, 64), False),
        ({**causal, "dtype": "float64"}, (2, 50), False),
        ({**long, "dtype": "float64"}, (3, 50), True),
    ):
        yield Comparison(
            title("model", settings, shape, masked),
            partial(model, settings),
            partial(tokens, shape, masked),
            call,
        )


def title(kind: str, settings: Settings, shape: tuple[int, ...], masked: bool) -> str:
    parts = ["causal" if settings.get("causal") else "both ways"]
    parts += [
        f"{key} {value}" if value is not True else key
        for key, value in settings.items()
        if key != "causal"
    ]
    return f"{kind}, {', '.join(parts)}, x {shape}{', mask' if masked else ''}".replace("_", " ")


# --- Wrapper ------------------------------------------------------------------------------------


def loss(module: nn.Module, inputs: Tensors) -> Tensors:
    return {"loss": module(inputs["x"], **({"mask": inputs["mask"]} if "mask" in inputs else {}))}


def generated(module: Any, inputs: Tensors) -> Tensors:
    """One token is kept by the filter, so nothing is left to chance."""
    return {"tokens": module.generate(inputs["x"], 20, filter_thres=0.97)}


def generated_from_1d(module: Any, inputs: Tensors) -> Tensors:
    return {"tokens": module.generate(inputs["x"][0], 20, filter_thres=0.97)}


def loss_inputs(shape: tuple[int, int], ignored: bool, masked: bool) -> Tensors:
    inputs = dict(tokens(shape))
    if ignored:
        # The wrapper's default ignore_index; as an input token it would have no embedding.
        inputs["x"][:, -1] = -100
    if masked:
        inputs["mask"] = holes((shape[0], shape[1] - 1), torch.Generator().manual_seed(4))
    return inputs


def wrappers() -> Iterator[Comparison]:
    causal = {"max_seq_len": 64, "block_size": 4, "causal": True}
    yield Comparison(
        "wrapper, loss", partial(wrapper, causal), partial(loss_inputs, (2, 65), False, False), loss
    )
    yield Comparison(
        "wrapper, loss with ignored targets",
        partial(wrapper, causal),
        partial(loss_inputs, (3, 50), True, False),
        loss,
    )
    shifted = {**causal, "shift_tokens": True}
    yield Comparison(
        "wrapper, loss with a mask of one column less",
        partial(wrapper, shifted),
        partial(loss_inputs, (3, 40), False, True),
        loss,
    )
    for name, run, shape in (
        ("1-D prompt", generated_from_1d, (1, 30)),
        ("2-D prompt", generated, (2, 30)),
        ("prompt that fills max_seq_len", generated, (2, 64)),
    ):
        yield Comparison(
            f"wrapper, generate, {name}",
            partial(wrapper, causal),
            partial(tokens, shape),
            run,
            gradients=False,
        )


# --- Attention alone ----------------------------------------------------------------------------


def attention(settings: Settings, rotary: Settings | None, side: Side, legacy: bool) -> nn.Module:
    name = "CausalHAttention1D" if "max_seq_len" in settings else "HAttention1D"
    pos_emb = None
    if rotary is not None:
        from rotary_embedding_torch import RotaryEmbedding

        pos_emb = RotaryEmbedding(**rotary)
    module: nn.Module = find(side, name)(20, pos_emb=pos_emb, **settings, **numerics(side, legacy))
    return module


def embeddings(shape: tuple[int, int], width: int, masked: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    inputs = {"x": torch.randn(*shape, width, generator=generator)}
    if masked:
        inputs["mask"] = holes(shape, generator)
    return inputs


def attentions() -> Iterator[Comparison]:
    small = {"heads": 2, "dim_head": 8, "block_size": 4}
    causal = {**small, "max_seq_len": 64}
    for settings, rotary, shape, masked in (
        (small, None, (2, 64), False),
        (small, None, (3, 50), True),
        (small, {"dim": 8}, (2, 64), False),
        (small, {"dim": 8}, (3, 50), True),
        (small, {"dim": 4}, (2, 40), False),
        (small, {"dim": 8, "theta": 500.0}, (2, 40), False),
        (small, {"dim": 8, "learned_freq": True}, (2, 40), True),
        (small, {"dim": 8, "freqs_for": "pixel"}, (2, 40), False),
        # The reference takes no notice of this one.
        (small, {"dim": 8, "interpolate_factor": 2.0}, (2, 40), False),
        ({**small, "eps": 0.1}, None, (3, 40), True),
        ({}, None, (1, 200), True),
        (causal, None, (2, 64), False),
        (causal, None, (2, 50), False),
        (causal, {"dim": 8}, (2, 64), False),
        (causal, {"dim": 8}, (3, 45), True),
        (causal, {"dim": 4}, (2, 40), False),
        (causal, {"dim": 8, "learned_freq": True}, (2, 40), False),
        ({**causal, "eps": 0.1}, None, (2, 40), False),
        ({**causal, "max_seq_len": 96, "block_size": 16}, None, (2, 60), False),
        ({"max_seq_len": 256}, None, (1, 200), False),
    ):
        kind = "attention" + (f", rotary {rotary}" if rotary is not None else "")
        yield Comparison(
            title(kind, {**settings, "causal": "max_seq_len" in settings}, shape, masked),
            partial(attention, settings, rotary),
            partial(embeddings, shape, 20, masked),
            call,
        )


# --- Sequences of layers ------------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer with something to learn, and a mask where it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.inner(x).tanh()
        return out if mask is None else out.masked_fill(~mask[..., None], 0.0)


def sequence(
    kind: str,
    routed: bool,
    layer_dropout: float,
    side: Side,
    legacy: bool,  # noqa: ARG001
) -> nn.Module:
    layers = nn.ModuleList([nn.ModuleList([Scaled(), Scaled()]) for _ in range(3)])
    route = {"mask": ((True, False), (False, True), (True, True))} if routed else {}
    module: nn.Module = find(side, kind)(layers, args_route=route, layer_dropout=layer_dropout)
    return module


def sequences() -> Iterator[Comparison]:
    for kind in ("SequentialSequence", "ReversibleSequence"):
        for routed, layer_dropout, masked in (
            (False, 0.0, False),
            (True, 0.0, True),
            (True, 0.0, False),
            # Where all layers are dropped, and here they are, the first one is kept.
            (True, 0.9999, True),
        ):
            name = f"{kind}, {'mask routed' if routed else 'nothing routed'}"
            name += f", layer_dropout {layer_dropout}" + (", mask" if masked else "")
            yield Comparison(
                name,
                partial(sequence, kind, routed, layer_dropout),
                partial(embeddings, (2, 10), 12, masked),
                call,
                loads_by_default=False,
            )


COMPARISONS = [*models(), *wrappers(), *attentions(), *sequences()]

SIGNATURES = [
    Signature(
        f"h_transformer_1d.{module}:{name}{method}",
        f"h_transformer_1d:{name}{method}",
        # They route keywords to their layers.
        any_keyword=module == "reversible" and method == ".forward",
    )
    for name, module in MODULES.items()
    for method in ("", ".forward")
] + [
    Signature(
        "h_transformer_1d.autoregressive_wrapper:AutoregressiveWrapper.generate",
        "h_transformer_1d:AutoregressiveWrapper.generate",
    ),
    # Modules that people import from.
    Signature(
        "h_transformer_1d.autoregressive_wrapper:AutoregressiveWrapper",
        "h_transformer_1d.autoregressive_wrapper:AutoregressiveWrapper",
    ),
    Signature(
        "h_transformer_1d.autoregressive_wrapper:top_k",
        "h_transformer_1d.autoregressive_wrapper:top_k",
    ),
    Signature(
        "h_transformer_1d.reversible:ReversibleSequence",
        "h_transformer_1d.reversible:ReversibleSequence",
    ),
    Signature(
        "h_transformer_1d.reversible:SequentialSequence",
        "h_transformer_1d.reversible:SequentialSequence",
    ),
]

INITIAL = [
    Initial(
        f"model{', causal' if causal else ''}{', reversible' if reversible else ''}",
        partial(
            model,
            {
                "max_seq_len": 64,
                "block_size": 4,
                "causal": causal,
                "reversible": reversible,
                "ff_mult": 3,
            },
        ),
    )
    for causal, reversible in ((True, False), (False, False), (True, True))
] + [
    Initial("attention", partial(attention, {}, None)),
    Initial("causal attention", partial(attention, {"max_seq_len": 64}, None)),
]
