"""One check for each known defect of the reference: raises where the defect is present.

Every check takes a library: a namespace with FeedbackTransformer. Nothing but torch is imported, so
that the same checks run where the reference is installed and nothing else, and show there that each
of them can fail.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Library = Any
Check = Callable[[Library, torch.device], None]

NAMES = ("FeedbackTransformer",)


def library(package: str = "feedback_transformer") -> SimpleNamespace:
    """The installed package's names: ours, or else the reference's."""
    for name in (package, f"{package}_pytorch"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return SimpleNamespace(**{one: getattr(module, one) for one in NAMES})
    raise ModuleNotFoundError(f"neither {package} nor {package}_pytorch is installed")


def build(lib: Library, device: torch.device, **changes: Any) -> nn.Module:
    settings = {"num_tokens": 11, "dim": 16, "depth": 2, "mem_len": 8, "heads": 2, "dim_head": 8}
    torch.manual_seed(0)
    return lib.FeedbackTransformer(**(settings | changes)).to(device)


def tokens(n: int, device: torch.device, b: int = 2) -> Tensor:
    return torch.randint(11, (b, n), generator=torch.Generator().manual_seed(1)).to(device)


def near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: off by {error}")


# --- Places ---------------------------------------------------------------------------------------


def check_places_in_the_memory_count(lib: Library, device: torch.device) -> None:
    """Where a slot is, is seen: the first token of a segment minds the order of the memory."""
    model = build(lib, device, mem_len=20)
    with torch.no_grad():
        model.pos_emb.relative_attention_bias.weight *= 10.0
    x = tokens(24, device)
    _, memory = model(x[:, :20], return_memory=True)
    keys, values = memory[0], memory[1]
    before = model(x[:, 20:], memory=(keys, values))[:, 0]
    after = model(x[:, 20:], memory=(keys.flip(1), values.flip(1)))[:, 0]
    difference = (before - after).abs().max().item()
    if difference < 1e-3:
        raise AssertionError(f"a memory in reverse order changes outputs by {difference} only")


# --- Splits ---------------------------------------------------------------------------------------


def check_a_lone_last_token_sees_itself(lib: Library, device: torch.device) -> None:
    """It gives what it gives where another token follows."""
    model, x = build(lib, device), tokens(8, device)
    near(model(x[:, :7]), model(x)[:, :7], 1e-5, "seven of eight tokens")


def check_a_lone_token_without_a_memory(lib: Library, device: torch.device) -> None:
    model, x = build(lib, device), tokens(2, device)
    near(model(x[:, :1]), model(x)[:, :1], 1e-5, "one of two tokens")


def check_splits_change_nothing(lib: Library, device: torch.device) -> None:
    model, x = build(lib, device, seq_len=4), tokens(12, device)
    whole = model(x)
    for stop in range(2, 11):
        first, memory = model(x[:, :stop], return_memory=True)
        found = torch.cat((first, model(x[:, stop:], memory=memory)), 1)
        near(found, whole, 1e-5, f"split after {stop} of 12 tokens")


# --- Options --------------------------------------------------------------------------------------


def check_no_memory_is_none(lib: Library, device: torch.device) -> None:
    model = build(lib, device, mem_len=0)
    x, other = tokens(8, device), tokens(8, device).flip(1)
    mixed = torch.cat((other[:, :6], x[:, 6:]), 1)
    near(model(x)[:, 6:], model(mixed)[:, 6:], 1e-6, "a segment without a memory")


def check_every_parameter_has_a_gradient(lib: Library, device: torch.device) -> None:
    """As data parallelism demands, also where only the last layer is kept."""
    model = build(lib, device, keep_last_hidden=True)
    model(tokens(6, device)).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if missing:
        raise AssertionError(f"no gradient of {', '.join(missing)}")


def check_a_token_alone_gives_every_parameter_a_gradient(
    lib: Library, device: torch.device
) -> None:
    model = build(lib, device, seq_len=1)
    model(tokens(1, device)).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if missing:
        raise AssertionError(f"no gradient of {', '.join(missing)}")


# --- Files ----------------------------------------------------------------------------------------


def check_segments_of_one_token_pickle(lib: Library, device: torch.device) -> None:
    model = build(lib, device, seq_len=1)
    again = pickle.loads(pickle.dumps(model))
    near(again(tokens(5, device)), model(tokens(5, device)), 0.0, "a pickled model")


def check_names_do_not_depend_on_the_segment(lib: Library, device: torch.device) -> None:
    names = [{*build(lib, device, seq_len=s).state_dict()} for s in (1, 2)]
    if names[0] != names[1]:
        raise AssertionError(f"{len(names[0] ^ names[1])} names differ between segments of 1 and 2")


def check_each_tensor_is_stored_once(lib: Library, device: torch.device) -> None:
    """As safetensors demands."""
    state = build(lib, device).state_dict()
    places = [value.data_ptr() for value in state.values()]
    if len({*places}) < len(places):
        raise AssertionError(f"{len(places)} names for {len({*places})} tensors")


def check_each_parameter_has_one_owner(lib: Library, device: torch.device) -> None:
    """As sharding of layers on their own demands."""
    names = [name for name, _ in build(lib, device).named_parameters(remove_duplicate=False)]
    if len(names) != len([*build(lib, device).parameters()]):
        raise AssertionError(f"{len(names)} owners of {len([*build(lib, device).parameters()])}")


# --- Costs ----------------------------------------------------------------------------------------


def check_saved_activations_are_linear(lib: Library, device: torch.device) -> None:
    """Twice as many tokens keep about twice as much, also while the memory grows."""
    model = build(lib, device, mem_len=256)
    sizes = []
    for n in (64, 128):
        kept: dict[int, tuple[int, Tensor]] = {}

        def note(y: Tensor, kept: dict[int, tuple[int, Tensor]] = kept) -> Tensor:
            # Kept, so that no place in memory is given twice.
            kept[y.untyped_storage().data_ptr()] = (y.untyped_storage().nbytes(), y.detach())
            return y

        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
            out = model(tokens(n, device, b=1))
        del out
        sizes.append(sum(size for size, _ in kept.values()))
    growth = sizes[1] / sizes[0]
    if growth > 2.5:
        raise AssertionError(f"{sizes[0]} and {sizes[1]} bytes, {growth:.2f} times as much")


# --- Bad input ------------------------------------------------------------------------------------


def check_a_memory_of_another_batch_is_refused(lib: Library, device: torch.device) -> None:
    model = build(lib, device)
    _, memory = model(tokens(6, device, b=1), return_memory=True)
    try:
        model(tokens(2, device, b=3), memory=memory)
    except ValueError:
        return
    raise AssertionError("a memory of one row was taken for three")


def check_a_negative_memory_is_refused(lib: Library, device: torch.device) -> None:
    try:
        build(lib, device, mem_len=-1)
    except ValueError:
        return
    raise AssertionError("mem_len=-1 was taken")


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
