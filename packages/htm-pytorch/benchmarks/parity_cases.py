"""What htm-pytorch and its reference have in common; tools/parity.py reads this file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from parity_case import Comparison, Initial, Side, Signature, Tensors

Settings = dict[str, Any]
Shape = tuple[int, int, int]

SMALL: Settings = {"dim": 16, "heads": 2, "topk_mems": 2, "mem_chunk_size": 4, "dim_head": 8}


def find(name: str) -> Any:
    """A class of the package that is installed, whichever side's it is."""
    package = importlib.import_module("htm_pytorch")
    if hasattr(package, name):
        return getattr(package, name)
    return getattr(importlib.import_module("htm_pytorch.htm_pytorch"), name)


def build(kind: str, settings: Settings, side: Side, legacy: bool) -> nn.Module:
    settings = SMALL | settings
    dtype = settings.pop("dtype", "float32")
    own = settings.pop("ours", {})
    options = own | {"legacy": legacy} if side == "ours" else {}
    module: nn.Module = find(kind)(**settings, **options)
    return module.to(getattr(torch, dtype))


def modern(settings: Settings, side: Side, legacy: bool) -> nn.Module:  # noqa: ARG001
    """Ours as it is by default, where the reference computes what the paper says."""
    return build("HTMAttention", settings, side, False)


def draw(settings: Settings, shape: Shape, *, masks: str = "") -> Tensors:
    """Queries and memories of (b, n, m), and masks.

    "tokens" leaves some out, "row" a whole row, "front" the first tokens; "chunks" and "causal" are
    of chunks, "query" bans all chunks for one query.
    """
    b, n, m = shape
    settings = SMALL | settings
    generator = torch.Generator().manual_seed(3)
    dtype = getattr(torch, settings.get("dtype", "float32"))

    def normal(length: int) -> torch.Tensor:
        return torch.randn(b, length, settings["dim"], generator=generator).to(dtype)

    inputs = {"queries": normal(n), "memories": normal(m)}
    chunks = -(-m // settings["mem_chunk_size"])
    mask = torch.rand(b, m, generator=generator) < 0.6
    chunk_mask = torch.rand(b, n, chunks, generator=generator) < 0.6
    if "front" in masks:
        mask = (torch.arange(m) >= 5).expand(b, m).clone()
    if "row" in masks:
        mask[0] = False
    if "causal" in masks:
        chunk_mask = (torch.arange(chunks) < torch.arange(n)[:, None]).expand(b, n, chunks).clone()
    if "query" in masks:
        chunk_mask[:, 1] = False
    if any(word in masks for word in ("tokens", "row", "front")):
        inputs["mask"] = mask
    if any(word in masks for word in ("chunks", "causal", "query")):
        inputs["chunk_attn_mask"] = chunk_mask
    return inputs


def call(module: nn.Module, inputs: Tensors) -> Tensors:
    return {"out": module(**inputs)}


def positions(settings: Settings, side: Side, legacy: bool) -> nn.Module:  # noqa: ARG001
    module: nn.Module = find("SinusoidalPosition")(**settings)
    return module


def tokens(dim: int) -> Tensors:
    return {"x": torch.zeros(2, 7, dim)}


def title(kind: str, settings: Settings, shape: Shape, masks: str) -> str:
    parts = [f"{key} {value}".replace("_", " ") for key, value in settings.items()]
    return ", ".join([kind, *parts, "b {}, n {}, m {}".format(*shape), *masks.split()])


def modules() -> Iterator[Comparison]:
    cases: tuple[tuple[Settings, Shape, str], ...] = (
        ({}, (2, 5, 24), ""),
        # Lengths that are padded, with zeros that are attended to.
        ({}, (2, 5, 21), ""),
        ({}, (2, 5, 6), ""),
        ({"topk_mems": 1}, (1, 1, 3), ""),
        ({"dtype": "float64"}, (3, 1, 22), ""),
        ({"topk_mems": 6}, (2, 5, 24), ""),
        ({"heads": 1, "topk_mems": 1}, (2, 5, 24), ""),
        ({"mem_chunk_size": 1}, (2, 5, 11), ""),
        ({"mem_chunk_size": 32, "dim": 64, "heads": 8, "dim_head": 64}, (2, 20, 200), ""),
        ({"add_pos_enc": False}, (2, 5, 21), ""),
        ({"eps": 0.3}, (2, 5, 21), "tokens"),
        ({}, (2, 5, 24), "tokens"),
        ({}, (2, 5, 21), "tokens"),
        ({}, (2, 5, 22), "front"),
        ({}, (2, 5, 21), "row"),
        ({"topk_mems": 6}, (2, 5, 24), "tokens row"),
        ({}, (2, 5, 21), "chunks"),
        ({}, (2, 5, 21), "causal"),
        ({}, (2, 5, 21), "tokens chunks"),
        ({"topk_mems": 6}, (2, 5, 22), "tokens chunks query"),
        ({"add_pos_enc": False, "topk_mems": 3}, (2, 5, 21), "row query"),
        ({"dtype": "float64"}, (2, 5, 21), "tokens chunks"),
    )
    for settings, shape, masks in cases:
        for kind in ("HTMAttention", "HTMBlock"):
            yield Comparison(
                title(kind, settings, shape, masks),
                partial(build, kind, settings),
                partial(draw, settings, shape, masks=masks),
                call,
            )


def defaults() -> Iterator[Comparison]:
    """Without legacy=True, where there is neither padding nor a query without chunks.

    In float64: the gradient of a bias that has no effect is exactly 0 here, and noise there.
    """
    large: Settings = {"dim": 64, "heads": 8, "mem_chunk_size": 32, "dim_head": 64}
    cases: tuple[tuple[Settings, Shape, str], ...] = (
        ({}, (2, 5, 24), ""),
        ({"topk_mems": 6, "add_pos_enc": False}, (2, 5, 24), ""),
        (large, (2, 20, 256), ""),
        # So little keeps the reference from 0 / 0 that it is no part of a mean.
        ({"eps": 1e-30}, (2, 5, 24), "tokens"),
        ({"eps": 1e-30, "topk_mems": 4}, (2, 5, 24), "tokens chunks"),
    )
    for impl in ("absorbed", "projected"):
        for changes, shape, masks in cases:
            settings = changes | {"dtype": "float64"}
            yield Comparison(
                title(f"by default, {impl}", settings, shape, masks),
                partial(modern, settings | {"ours": {"impl": impl}}),
                partial(draw, settings, shape, masks=masks),
                call,
            )


def places() -> Iterator[Comparison]:
    for dim, scales in ((16, {}), (6, {"min_timescale": 2.0, "max_timescale": 50.0})):
        yield Comparison(
            ", ".join(["positions", f"dim {dim}", *(f"{k} {x:g}" for k, x in scales.items())]),
            partial(positions, {"dim": dim, **scales}),
            partial(tokens, dim),
            call,
            gradients=False,
        )


COMPARISONS = [*modules(), *defaults(), *places()]

SIGNATURES = [
    Signature(f"htm_pytorch.htm_pytorch:{name}", f"htm_pytorch:{name}")
    for name in (
        "HTMAttention",
        "HTMAttention.forward",
        "HTMBlock",
        "HTMBlock.forward",
        "SinusoidalPosition",
        "SinusoidalPosition.forward",
    )
]

INITIAL = [
    Initial("attention", partial(build, "HTMAttention", {"dim": 32, "dim_head": 16})),
    Initial("block", partial(build, "HTMBlock", {"dim": 32, "dim_head": 16})),
]
