"""What memformer and its reference have in common; tools/parity.py reads this file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity_case import Comparison, Initial, Side, Signature, Tensors

TOKENS = 20
SMALL: dict[str, Any] = {
    "dim": 24,
    "num_memory_slots": 5,
    "mem_update_attn_heads": 3,
    "enc_num_tokens": TOKENS,
    "enc_depth": 2,
    "enc_heads": 4,
    "enc_max_seq_len": 64,
    "dec_num_tokens": TOKENS,
    "dec_depth": 2,
    "dec_heads": 2,
    "dec_max_seq_len": 64,
}
Settings = dict[str, Any]


def find(side: Side, name: str) -> Any:
    module = "memformer" if side == "ours" else "memformer.memformer"
    return getattr(importlib.import_module(module), name)


def numerics(side: Side, legacy: bool) -> Settings:
    return {"legacy": legacy} if side == "ours" else {}


def title(kind: str, settings: Settings, *more: str) -> str:
    parts = [key if value is True else f"{key} {value}" for key, value in settings.items()]
    return ", ".join([kind, *parts, *more]).replace("_", " ")


# --- The model ----------------------------------------------------------------------------------


def memformer(settings: Settings, side: Side, legacy: bool) -> nn.Module:
    settings = {**SMALL, **settings}
    dtype = settings.pop("dtype", "float32")
    model: nn.Module = find(side, "Memformer")(**settings, **numerics(side, legacy))
    return model.to(getattr(torch, dtype))


def data(settings: Settings, shapes: tuple[int, int, int], names: str) -> Tensors:
    """Batch, source and target tokens; `names` are of what else there is, "padded" among them."""
    b, n, t = shapes
    generator = torch.Generator().manual_seed(3)
    settings = {**SMALL, **settings}
    inputs = {"src": torch.randint(TOKENS, (b, n), generator=generator)}
    if t and not settings.get("encoder_only"):
        inputs["tgt"] = torch.randint(TOKENS, (b, t), generator=generator)
    mems = torch.randn(b, settings["num_memory_slots"], settings["dim"], generator=generator)
    masks = {
        "src_mask": torch.rand(b, n, generator=generator) < 0.7,
        "tgt_mask": torch.rand(b, t, generator=generator) < 0.7,
    }
    if "mems" in names:
        inputs["mems"] = mems.to(getattr(torch, settings.get("dtype", "float32")))
    if "padded" in names:
        masks["src_mask"][0] = False
        masks["tgt_mask"][-1] = False
    return inputs | {name: mask for name, mask in masks.items() if name in names}


def call(model: nn.Module, inputs: Tensors) -> Tensors:
    out = model(**inputs)
    return {name: x for name, x in out._asdict().items() if x.requires_grad}


def segments(model: nn.Module, inputs: Tensors) -> Tensors:
    """Three of them, each with the memory that the one before it has left."""
    mems = inputs.get("mems")
    found: dict[str, Tensor] = {}
    for i, src in enumerate(inputs["src"].split(8, 1)):
        out = model(src, inputs["tgt"], mems)
        mems = out.mem
        found |= {f"mem {i}": mems, f"loss {i}": out.dec_out}
    return found


def listed(model: nn.Module, inputs: Tensors) -> Tensors:
    """Targets as a list of unequal sequences."""
    rows = [row[: len(row) - 2 * i] for i, row in enumerate(inputs["tgt"])]
    return {"loss": model(inputs["src"], rows).dec_out}


def short_mask(model: nn.Module, inputs: Tensors) -> Tensors:
    """A mask of the inputs alone."""
    mask = inputs["tgt_mask"][:, :-1]
    return {"loss": model(inputs["src"], inputs["tgt"], tgt_mask=mask).dec_out}


def replayed(model: Any, inputs: Tensors) -> Tensors:
    """The gradients that replay leaves, as an output: each side has its own parameters' sums."""
    module = importlib.import_module("memformer")
    model.zero_grad()
    mask = inputs.get("src_mask")
    model.encoder.max_seq_len = 8
    module.memory_replay_backprop(model, inputs["src"], inputs["tgt"], src_mask=mask)
    gradients = [p.grad.detach().flatten() for p in model.parameters() if p.grad is not None]
    magnitudes = torch.cat(gradients).abs()
    # In whatever order the parameters come.
    found = torch.stack((magnitudes.sum(), magnitudes.square().sum().sqrt(), magnitudes.max()))
    model.zero_grad()
    return {"magnitudes": found, "slots": model.get_initial_mem(1).detach()}


def models() -> Iterator[Comparison]:
    masks = "src_mask tgt_mask"
    for settings, shapes, names in (
        ({}, (2, 20, 12), ""),
        ({}, (2, 20, 0), ""),
        ({}, (1, 1, 2), ""),
        ({}, (3, 64, 65), ""),
        ({}, (2, 20, 12), "mems"),
        ({}, (3, 20, 12), "src_mask"),
        ({}, (3, 20, 12), "tgt_mask"),
        ({}, (3, 20, 12), f"mems {masks}"),
        ({}, (3, 20, 12), f"mems {masks} padded"),
        ({}, (1, 200, 190), ""),
        ({"enc_max_seq_len": 8, "dec_max_seq_len": 8}, (2, 20, 12), ""),
        ({"num_mem_updates": 3}, (2, 20, 12), f"mems {masks}"),
        ({"num_mem_updates": 0}, (2, 20, 12), "mems"),
        ({"encoder_only": True}, (2, 20, 12), "mems src_mask"),
        ({"enc_depth": 1, "dec_depth": 3, "mem_update_attn_heads": 1}, (2, 20, 12), masks),
        ({"dtype": "float64"}, (2, 20, 12), f"mems {masks} padded"),
    ):
        yield Comparison(
            title("model", settings, f"{shapes} {names}".strip()),
            partial(memformer, settings),
            partial(data, settings, shapes, names),
            call,
            loads_by_default=settings.get("num_mem_updates") != 0,
        )
    for name, run, names in (
        ("three segments", segments, "mems"),
        ("targets in a list", listed, ""),
        ("a mask of the inputs", short_mask, "tgt_mask"),
    ):
        yield Comparison(
            f"model, {name}", partial(memformer, {}), partial(data, {}, (3, 24, 12), names), run
        )
    for names in ("", "src_mask"):
        yield Comparison(
            f"replay {names}".strip(),
            partial(memformer, {"dtype": "float64"}),
            partial(data, {}, (3, 24, 12), names),
            replayed,
            gradients=False,
        )


# --- The parts ----------------------------------------------------------------------------------


def blocks(name: str, side: Side, legacy: bool) -> nn.Module:
    module: nn.Module = find(side, name)(24, 2, heads=3, **numerics(side, legacy))
    return module


def wrapper(return_logits: bool, side: Side, legacy: bool) -> nn.Module:
    module: nn.Module = find(side, "TransformerWrapper")(
        num_tokens=TOKENS,
        max_seq_len=16,
        dim=24,
        layer_blocks=blocks("Decoder", side, legacy),
        return_logits=return_logits,
    )
    return module


def vectors(names: str, tokens: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    inputs: dict[str, Tensor] = {"x": torch.randn(2, 11, 24, generator=generator)}
    if tokens:
        inputs = {"x": torch.randint(TOKENS, (2, 11), generator=generator)}
    for name, n, kind in (("context", 7, "float"), ("src_mask", 11, ""), ("tgt_mask", 7, "")):
        if name in names:
            shape = (2, n, 24) if kind else (2, n)
            drawn = torch.randn(shape, generator=generator)
            inputs[name] = drawn if kind else drawn > -0.5
    return inputs


def part(module: nn.Module, inputs: Tensors) -> Tensors:
    return {"out": module(**inputs)}


def parts() -> Iterator[Comparison]:
    for name, all_names in (
        ("Encoder", ("", "context", "src_mask", "context src_mask")),
        (
            "Decoder",
            ("", "context", "src_mask", "context src_mask", "context src_mask tgt_mask"),
        ),
    ):
        for names in all_names:
            yield Comparison(
                f"{name} {names}".strip(), partial(blocks, name), partial(vectors, names), part
            )
    for return_logits in (True, False):
        yield Comparison(
            f"TransformerWrapper, return logits {return_logits}",
            partial(wrapper, return_logits),
            partial(vectors, "context src_mask tgt_mask", True),
            part,
        )


COMPARISONS = [*models(), *parts()]

# Not the model's constructor, which takes any keyword in the reference and names each here.
SIGNATURES = [
    *(
        Signature(f"memformer.memformer:{name}", f"memformer:{name}")
        for name in (
            "Memformer.forward",
            "Memformer.get_initial_mem",
            "Encoder",
            "Encoder.forward",
            "Decoder",
            "Decoder.forward",
            "TransformerWrapper",
            "TransformerWrapper.forward",
        )
    ),
    Signature("memformer.mrbp:memory_replay_backprop", "memformer.mrbp:memory_replay_backprop"),
    *(
        Signature(f"{module}:{name}", f"{module}:{name}")
        for module in ("memformer.autoregressive_wrapper",)
        for name in (
            "AutoregressiveWrapper",
            "AutoregressiveWrapper.forward",
            "AutoregressiveWrapper.generate",
            "top_k",
            "top_p",
        )
    ),
]

INITIAL = [
    Initial("model", partial(memformer, {})),
    Initial("model without a decoder", partial(memformer, {"encoder_only": True})),
    Initial("encoder", partial(blocks, "Encoder")),
    Initial("wrapper", partial(wrapper, True)),
]
