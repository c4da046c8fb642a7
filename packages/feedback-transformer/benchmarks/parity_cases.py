"""What feedback-transformer and its reference have in common; tools/parity.py reads this file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from parity_case import Comparison, Initial, Side, Signature, Tensors

Settings = dict[str, Any]

SMALL: Settings = {
    "num_tokens": 23,
    "dim": 16,
    "depth": 2,
    "mem_len": 6,
    "heads": 2,
    "dim_head": 8,
}


def build(settings: Settings, side: Side, legacy: bool) -> nn.Module:
    settings = SMALL | settings
    dtype = settings.pop("dtype", "float32")
    name = "feedback_transformer" if side == "ours" else "feedback_transformer_pytorch"
    options = {"legacy": legacy} if side == "ours" else {}
    module = importlib.import_module(name).FeedbackTransformer(**settings, **options)
    # As after training: layers do not weigh the same, and places count.
    with torch.no_grad():
        module.layer_weight.copy_(torch.linspace(0.5, 1.5, len(module.layer_weight)))
    found: nn.Module = module.to(getattr(torch, dtype))
    return found


def modern(settings: Settings, side: Side, legacy: bool) -> nn.Module:  # noqa: ARG001
    """Ours as it is by default, where the reference computes what the paper says."""
    return build(settings, side, False)


def draw(settings: Settings, b: int, n: int, slots: int) -> Tensors:
    """Tokens (b, n), and a memory of so many slots."""
    settings = SMALL | settings
    generator = torch.Generator().manual_seed(3)
    inputs = {"x": torch.randint(settings["num_tokens"], (b, n), generator=generator)}
    width = settings["heads"] * settings["dim_head"]
    dtype = getattr(torch, settings.get("dtype", "float32"))
    for name in ("keys", "values"):
        if slots:
            inputs[name] = torch.randn(b, slots, width, generator=generator).to(dtype)
    return inputs


def call(module: nn.Module, inputs: Tensors) -> Tensors:
    memory = (inputs["keys"], inputs["values"]) if "keys" in inputs else None
    out, left = module(inputs["x"], memory=memory, return_memory=True)
    return {"out": out, "keys": left.keys, "values": left.values}


def twice(module: nn.Module, inputs: Tensors) -> Tensors:
    """In two calls, with the memory of the first."""
    x = inputs["x"]
    first, memory = module(x[:, :6], return_memory=True)
    return {"first": first, "second": module(x[:, 6:], memory=memory)}


def logits(module: nn.Module, inputs: Tensors) -> Tensors:
    """Of the first segment alone, without a memory."""
    return {"out": module(inputs["x"])}


def title(settings: Settings, b: int, n: int, slots: int) -> str:
    parts = [f"{key} {value}".replace("_", " ") for key, value in settings.items()]
    return ", ".join([*parts, f"b {b}, n {n}, {slots} slots"])


def sequences() -> Iterator[Comparison]:
    cases: tuple[tuple[Settings, int, int, int], ...] = (
        ({}, 2, 2, 0),
        ({}, 2, 8, 0),
        ({}, 3, 9, 0),
        ({}, 1, 15, 0),
        ({}, 2, 7, 3),
        ({}, 2, 1, 3),
        ({}, 2, 8, 6),
        ({"mem_len": 0}, 2, 8, 0),
        ({"mem_len": 1}, 2, 7, 1),
        ({"mem_len": 100}, 2, 16, 0),
        ({"seq_len": 1}, 2, 1, 0),
        ({"seq_len": 1}, 2, 9, 0),
        ({"seq_len": 1}, 2, 9, 4),
        ({"seq_len": 1, "keep_last_hidden": True}, 2, 7, 0),
        ({"seq_len": 5}, 2, 13, 0),
        ({"seq_len": 5}, 2, 3, 2),
        ({"seq_len": 40, "mem_len": 60}, 1, 90, 0),
        ({"keep_last_hidden": True}, 2, 9, 0),
        ({"depth": 1}, 2, 8, 0),
        ({"depth": 4}, 2, 8, 0),
        ({"heads": 1, "dim_head": 5}, 2, 8, 0),
        ({"attn_dropout": 0.0, "ff_dropout": 0.0}, 2, 8, 0),
        ({"dtype": "float64"}, 2, 9, 2),
        ({"dim": 64, "heads": 8, "dim_head": 64, "mem_len": 32}, 2, 48, 0),
    )
    for settings, b, n, slots in cases:
        yield Comparison(
            title(settings, b, n, slots),
            partial(build, settings),
            partial(draw, settings, b, n, slots),
            call,
        )
    for settings in ({}, {"seq_len": 1}, {"seq_len": 3}, {"seq_len": 4}):
        yield Comparison(
            f"in two calls, {title(settings, 2, 11, 0)}",
            partial(build, settings),
            partial(draw, settings, 2, 11, 0),
            twice,
        )


def defaults() -> Iterator[Comparison]:
    """Without legacy=True, where the memory is empty and no token is left alone."""
    for settings, n in (({}, 2), ({"seq_len": 6}, 6), ({"seq_len": 20}, 17), ({"seq_len": 1}, 1)):
        yield Comparison(
            f"by default, {title(settings, 2, n, 0)}",
            partial(modern, settings),
            partial(draw, settings, 2, n, 0),
            logits,
        )


COMPARISONS = [*sequences(), *defaults()]

SIGNATURES = [
    Signature(f"feedback_transformer_pytorch:{name}", f"feedback_transformer:{name}")
    for name in ("FeedbackTransformer", "FeedbackTransformer.forward")
]

INITIAL = [
    Initial(f"segments of {seq_len}", partial(build, {"dim": 32, "seq_len": seq_len}))
    for seq_len in (1, 2)
]
