"""What product-key-memory and its reference have in common; tools/parity.py reads this file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from parity_case import Comparison, Initial, Side, Signature, Tensors

SMALL = {"heads": 2, "num_keys": 8, "topk": 4, "dim_head": 8}
LANGUAGE = {"dim": 16, "num_tokens": 40, "depth": 2, "seq_len": 32, "heads": 2, "dim_head": 8}
Settings = dict[str, Any]


def find(name: str) -> Any:
    """A class of the package that is installed, whichever side's it is."""
    import importlib

    for module in ("product_key_memory", "product_key_memory.transformer"):
        if hasattr(importlib.import_module(module), name):
            return getattr(importlib.import_module(module), name)
    return getattr(importlib.import_module("product_key_memory.product_key_memory"), name)


def numerics(side: Side, legacy: bool) -> Settings:
    return {"legacy": legacy} if side == "ours" else {}


def title(kind: str, settings: Settings, shape: tuple[int, ...], *more: str) -> str:
    parts = [key if value is True else f"{key} {value}" for key, value in settings.items()]
    return ", ".join([kind, *parts, f"x {shape}", *more]).replace("_", " ")


# --- The layer ----------------------------------------------------------------------------------


def pkm(settings: Settings, side: Side, legacy: bool) -> nn.Module:
    settings = {"dim": 24, **SMALL, **settings}
    dtype = settings.pop("dtype", "float32")
    training = settings.pop("training", True)
    module: nn.Module = find("PKM")(**settings, **numerics(side, legacy))
    return module.to(getattr(torch, dtype)).train(training)


def embeddings(settings: Settings, shape: tuple[int, ...], *, slots: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, settings.get("dim", 24), generator=generator)
    inputs = {"x": x.to(getattr(torch, settings.get("dtype", "float32")))}
    if slots:
        inputs["mem_trainable_mask"] = torch.rand(slots, generator=generator) < 0.6
    return inputs


def call(module: nn.Module, inputs: Tensors, **arguments: Any) -> Tensors:
    return {"out": module(**inputs, **arguments)}


def noisy(module: nn.Module, inputs: Tensors) -> Tensors:
    """Each side gets the same uniform numbers, by whichever function it asks for them."""

    def uniform(*shape: int, **_: object) -> Tensor:
        generator = torch.Generator().manual_seed(6)
        return torch.empty(math.prod(shape)).uniform_(generator=generator).view(shape)

    def fill(x: Tensor, *limits: float, generator: torch.Generator | None = None) -> Tensor:
        drawn = own(x, *limits, generator=generator)
        return drawn if generator is not None else drawn.copy_(uniform(*x.shape))

    own = torch.Tensor.uniform_
    with patch.object(torch, "rand", uniform), patch.object(torch.Tensor, "uniform_", fill):
        return call(module, inputs, gumbel_noise_scale=0.7)


def masked(module: nn.Module, inputs: Tensors) -> Tensors:
    mask = torch.arange(inputs["x"].shape[1])[None].expand(inputs["x"].shape[:2]) < 3
    return call(module, inputs, input_mask=mask)


def twice(module: nn.Module, inputs: Tensors) -> Tensors:
    """The second time with the statistics that the first has left behind."""
    first = module(inputs["x"])
    return {"first": first, "second": module.eval()(inputs["x"] * 1.5)}


def layers() -> Iterator[Comparison]:
    concat = {"concat_values_and_combine": True}
    for settings, shape in (
        ({}, (2, 10)),
        ({}, (1, 1)),
        ({"heads": 1}, (3, 7)),
        ({"heads": 4, "num_keys": 13, "topk": 7, "dim_head": 6}, (2, 10)),
        ({"num_keys": 40, "topk": 32, "dim_head": 16, "dim": 32}, (2, 20)),
        ({"topk": 1}, (2, 10)),
        ({"topk": 8}, (2, 10)),
        ({"num_keys": 1, "topk": 1}, (2, 10)),
        ({"pre_layernorm": True}, (2, 10)),
        ({"norm_output": True}, (2, 10)),
        ({"non_competitive_gates": True}, (2, 10)),
        ({"dtype": "float64"}, (2, 10)),
        ({"training": False, "input_dropout": 0.3, "query_dropout": 0.3}, (2, 10)),
        ({"training": False, "value_dropout": 0.3, "attn_dropout": 0.3}, (2, 10)),
        ({"pre_layernorm": True, "norm_output": True, "non_competitive_gates": True}, (2, 10)),
        (concat, (2, 10)),
        ({**concat, "heads": 4, "non_competitive_gates": True}, (2, 10)),
        ({**concat, "pre_layernorm": True, "norm_output": True}, (2, 10)),
        ({**concat, "dtype": "float64"}, (2, 10)),
        ({"differentiable_topk": True}, (2, 10)),
        ({"differentiable_topk": True, "topk": 8}, (2, 10)),
        ({"differentiable_topk": True, **concat}, (2, 10)),
        ({"differentiable_topk": True, "non_competitive_gates": True}, (2, 10)),
        # The sequence is as long as a head is wide.
        ({"use_layernorm": False}, (3, 8)),
        ({"use_layernorm": False, "training": False}, (3, 8)),
        ({"use_layernorm": False, **concat}, (3, 8)),
        ({"use_layernorm": False, "differentiable_topk": True, "norm_output": True}, (3, 8)),
    ):
        yield Comparison(
            title("layer", settings, shape),
            partial(pkm, settings),
            partial(embeddings, settings, shape),
            call,
        )
    for name, settings, run, slots in (
        ("noise", {}, noisy, 0),
        ("noise in evaluation", {"training": False}, noisy, 0),
        ("noise, coordinate descent", {"differentiable_topk": True}, noisy, 0),
        ("noise, concatenated", concat, noisy, 0),
        ("input mask", {}, masked, 0),
        ("input mask, concatenated", concat, masked, 0),
        ("trainable slots", concat, call, 64),
        ("trainable slots, input mask", concat, masked, 64),
        ("running statistics", {"use_layernorm": False}, twice, 0),
    ):
        yield Comparison(
            f"layer, {name}",
            partial(pkm, settings),
            partial(embeddings, settings, (2, 8), slots=slots),
            run,
        )


# --- The norm alone -----------------------------------------------------------------------------


def masked_norm(training: bool, side: Side, legacy: bool) -> nn.Module:  # noqa: ARG001
    norm: nn.Module = find("MaskedBatchNorm1D")(nn.BatchNorm1d(6))
    return norm.train(training)


def features(mask: bool) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    inputs: dict[str, Tensor] = {"x": torch.randn(12, 6, generator=generator)}
    if mask:
        inputs["mask"] = torch.arange(12) % 3 != 1
    return inputs


def normalise(module: nn.Module, inputs: Tensors) -> Tensors:
    """Of a copy, since the reference writes to its input."""
    return {"out": module(inputs["x"] * 1.0, *(inputs[key] for key in inputs if key == "mask"))}


def norms() -> Iterator[Comparison]:
    for training in (True, False):
        for mask in (True, False):
            name = f"norm, {'training' if training else 'evaluation'}{', mask' if mask else ''}"
            yield Comparison(
                name, partial(masked_norm, training), partial(features, mask), normalise
            )


# --- The transformer ----------------------------------------------------------------------------


def transformer(settings: Settings, side: Side, legacy: bool) -> nn.Module:
    settings = {**LANGUAGE, "pkm_kwargs": SMALL, **settings}
    dtype = settings.pop("dtype", "float32")
    module: nn.Module = find("Transformer")(**settings, **numerics(side, legacy))
    return module.to(getattr(torch, dtype))


def tokens(shape: tuple[int, int]) -> Tensors:
    return {"x": torch.randint(40, shape, generator=torch.Generator().manual_seed(5))}


def logits(module: nn.Module, inputs: Tensors) -> Tensors:
    return {"logits": module(inputs["x"], return_loss=False)}


def loss(module: nn.Module, inputs: Tensors) -> Tensors:
    return {"loss": module(inputs["x"])}


def generated(module: Any, inputs: Tensors) -> Tensors:
    """One token is kept by the filter, so nothing is left to chance."""
    return {"tokens": module.generate(inputs["x"], 20, filter_thres=0.97)}


def transformers() -> Iterator[Comparison]:
    for settings, shape in (
        ({}, (2, 20)),
        ({}, (3, 1)),
        ({}, (2, 32)),
        ({"depth": 1}, (2, 20)),
        ({"depth": 4}, (2, 20)),
        ({"pkm_layers": 2}, (2, 20)),
        ({"pkm_layers": (1, 2)}, (2, 20)),
        ({"pkm_layers": ()}, (2, 20)),
        ({"pad_value": 7}, (2, 20)),
        ({"dtype": "float64"}, (2, 20)),
        ({"pkm_kwargs": {**SMALL, "concat_values_and_combine": True}}, (2, 20)),
        ({"pkm_kwargs": {**SMALL, "pre_layernorm": True, "norm_output": True}}, (2, 20)),
        ({"pkm_kwargs": {**SMALL, "differentiable_topk": True}}, (2, 20)),
    ):
        yield Comparison(
            title("transformer", settings, shape),
            partial(transformer, settings),
            partial(tokens, shape),
            logits,
        )
    yield Comparison("transformer, loss", partial(transformer, {}), partial(tokens, (2, 33)), loss)
    for name, shape in (("a short prompt", (2, 5)), ("a prompt beyond seq_len", (2, 40))):
        yield Comparison(
            f"transformer, generate from {name}",
            partial(transformer, {}),
            partial(tokens, shape),
            generated,
            gradients=False,
        )


COMPARISONS = [*layers(), *norms(), *transformers()]

SIGNATURES = [
    *(
        Signature(f"product_key_memory.{where}{name}", f"product_key_memory:{name}")
        for where, name in (
            ("product_key_memory:", "PKM"),
            ("product_key_memory:", "PKM.forward"),
            ("product_key_memory:", "MaskedBatchNorm1D"),
            ("product_key_memory:", "MaskedBatchNorm1D.forward"),
            ("product_key_memory:", "fetch_pkm_value_parameters"),
            ("product_key_memory:", "fetch_optimizer_parameters"),
            ("transformer:", "Transformer"),
            ("transformer:", "Transformer.forward"),
            ("transformer:", "Transformer.generate"),
        )
    ),
    Signature("product_key_memory:ProductKeyMemory", "product_key_memory:ProductKeyMemory"),
    # A module that people import from.
    Signature(
        "product_key_memory.transformer:Transformer", "product_key_memory.transformer:Transformer"
    ),
    Signature("product_key_memory.transformer:top_k", "product_key_memory.transformer:top_k"),
]

INITIAL = [
    Initial("layer", partial(pkm, {})),
    Initial("layer, concatenated", partial(pkm, {"concat_values_and_combine": True})),
    Initial(
        "layer, all norms",
        partial(pkm, {"use_layernorm": False, "pre_layernorm": True, "norm_output": True}),
    ),
    Initial("transformer", partial(transformer, {"depth": 2})),
]
