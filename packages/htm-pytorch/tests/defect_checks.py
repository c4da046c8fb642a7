"""One check for each known defect of the reference: raises where the defect is present.

Every check takes a library: a namespace with HTMAttention, HTMBlock and SinusoidalPosition. Nothing
but torch is imported, so that the same checks run where the reference is installed and nothing
else, and show there that each of them can fail.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Library = Any
Check = Callable[[Library, torch.device], None]

NAMES = ("HTMAttention", "HTMBlock", "SinusoidalPosition")


def library(package: str = "htm_pytorch") -> SimpleNamespace:
    """The installed package's names, wherever in it they are defined."""
    found: dict[str, Any] = {}
    for module_name in ("", ".htm_pytorch"):
        try:
            module = importlib.import_module(package + module_name)
        except ModuleNotFoundError:
            continue
        found = {name: getattr(module, name) for name in NAMES if hasattr(module, name)} | found
    return SimpleNamespace(**found)


def attention(lib: Library, device: torch.device, **changes: Any) -> nn.Module:
    settings = {"dim": 8, "heads": 2, "topk_mems": 2, "mem_chunk_size": 3, "dim_head": 4}
    torch.manual_seed(0)
    return lib.HTMAttention(**(settings | changes)).to(device)


def block(lib: Library, device: torch.device, **changes: Any) -> nn.Module:
    settings = {"dim": 8, "heads": 2, "mem_chunk_size": 3, "dim_head": 4}
    torch.manual_seed(0)
    return lib.HTMBlock(**(settings | changes)).to(device)


def normal(*shape: int, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def sequences(m: int, *, device: torch.device, dim: int = 8, b: int = 2) -> tuple[Tensor, Tensor]:
    """Five queries and m memories."""
    return normal(b, 5, dim, device=device), normal(b, m, dim, device=device, seed=2)


def near(actual: Tensor, expected: Tensor | float, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: off by {error}")


# --- Padding, and nothing to attend to ----------------------------------------------------------


def check_padding_counts_for_nothing(lib: Library, device: torch.device) -> None:
    """Without a mask every token takes part, and nothing else does."""
    module = attention(lib, device)
    for m in (4, 7, 8):
        queries, memories = sequences(m, device=device)
        everything = torch.ones(2, m, dtype=torch.bool, device=device)
        expected = module(queries, memories, mask=everything)
        near(module(queries, memories), expected, 1e-4, f"{m} tokens without a mask")


def check_padding_is_at_the_end(lib: Library, device: torch.device) -> None:
    """The first chunk holds the first tokens, however many follow."""
    module = attention(lib, device)
    first = torch.tensor([True, False, False], device=device).expand(2, 5, 3)
    queries, memories = sequences(9, device=device)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    expected = module(queries, memories, mask=mask, chunk_attn_mask=first)
    found = module(queries, memories[:, :7], mask=mask[:, :7], chunk_attn_mask=first)
    near(found, expected, 1e-4, "7 of 9 tokens")


def check_more_chunks_wanted_than_there_are(lib: Library, device: torch.device) -> None:
    queries, memories = sequences(6, device=device)
    found = attention(lib, device, topk_mems=5)(queries, memories)
    near(found, attention(lib, device, topk_mems=2)(queries, memories), 1e-6, "5 of 2 chunks")


def check_empty_memory(lib: Library, device: torch.device) -> None:
    out = attention(lib, device)(*sequences(0, device=device))
    assert out.shape == (2, 5, 8)
    near(out, 0.0, 0.0, "nothing to attend to")


def check_a_query_without_chunks_sees_none(lib: Library, device: torch.device) -> None:
    """With a causal mask of chunks the first query does not see the future."""
    module = attention(lib, device)
    queries, memories = sequences(15, device=device)
    past = torch.ones(5, 5, dtype=torch.bool, device=device).tril(-1).expand(2, 5, 5)
    before = module(queries, memories, chunk_attn_mask=past)[:, 0]
    other = normal(2, 15, 8, device=device, seed=3)
    after = module(queries, other, chunk_attn_mask=past)[:, 0]
    near(after, before, 0.0, "the first query")
    near(after, 0.0, 0.0, "nothing to attend to")


def check_a_masked_row_gives_zero(lib: Library, device: torch.device) -> None:
    queries, memories = sequences(6, device=device)
    mask = torch.tensor([True, False], device=device)[:, None].expand(2, 6)
    out = attention(lib, device)(queries, memories, mask=mask)
    assert out[0].all(), "the other row sees nothing either"
    near(out[1], 0.0, 0.0, "nothing to attend to")


# --- Precisions, devices, widths ----------------------------------------------------------------


def check_bfloat16_with_positions(lib: Library, device: torch.device) -> None:
    halves(lib, device, torch.bfloat16, masked=False)


def check_bfloat16_with_a_mask(lib: Library, device: torch.device) -> None:
    halves(lib, device, torch.bfloat16, masked=True, add_pos_enc=False)


def check_float16_with_positions(lib: Library, device: torch.device) -> None:
    halves(lib, device, torch.float16, masked=False)


def check_float16_with_a_mask(lib: Library, device: torch.device) -> None:
    halves(lib, device, torch.float16, masked=True, add_pos_enc=False)


def halves(
    lib: Library, device: torch.device, dtype: torch.dtype, masked: bool, **changes: Any
) -> None:
    """Beside the same module in float32, to all chunks, so that the choice is the same."""
    module = attention(lib, device, topk_mems=3, **changes)
    queries, memories = sequences(9, device=device)
    mask = torch.arange(9, device=device).expand(2, 9) % 3 != 1 if masked else None
    expected = module(queries, memories, mask=mask)
    out = module.to(dtype)(queries.to(dtype), memories.to(dtype), mask=mask)
    assert out.dtype == dtype
    near(out.float(), expected, 0.05, str(dtype))


def check_positions_are_made_where_they_are_needed(lib: Library, device: torch.device) -> None:
    for place in ("meta", device):
        positions = lib.SinusoidalPosition(8).to(place)
        assert positions(torch.zeros(2, 3, 8, device=place)).device.type == torch.device(place).type
        module = attention(lib, torch.device(place))
        out = module(*(x.to(place) for x in sequences(6, device=device)))
        assert out.device.type == torch.device(place).type


def check_odd_width(lib: Library, device: torch.device) -> None:
    module = attention(lib, device, dim=7)
    out = module(*sequences(6, device=device, dim=7))
    assert out.shape == (2, 5, 7)
    assert out.isfinite().all()


# --- The block, its arguments, graphs -----------------------------------------------------------


def check_block_adds_its_input(lib: Library, device: torch.device) -> None:
    """Where there is nothing else to add, numbers of any size stay what they are."""
    module = block(lib, device)
    for parameter in module.attn.attn.to_out.parameters():
        nn.init.zeros_(parameter)
    queries, memories = sequences(9, device=device)
    near(module(10 * queries, memories), 10 * queries, 1e-5, "a block that finds nothing")


def check_block_needs_only_a_width(lib: Library, device: torch.device) -> None:
    module = lib.HTMBlock(dim=8, topk_mems=2, mem_chunk_size=3).to(device)
    assert module(*sequences(6, device=device)).shape == (2, 5, 8)


def check_chunk_masks_are_not_broadcast(lib: Library, device: torch.device) -> None:
    """Of one shape for every row: (b, j) with as many rows as queries could be both."""
    module = attention(lib, device)
    queries, memories = sequences(9, device=device, b=5)
    for shape in ((5, 3), (3,), (1, 5, 3), (5, 1, 3)):
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        try:
            module(queries, memories, chunk_attn_mask=mask)
        except ValueError:
            continue
        raise AssertionError(f"a mask of shape {shape} was accepted for 5 rows of 5 queries")


def check_export_with_any_length(lib: Library, device: torch.device) -> None:
    module = attention(lib, device, mem_chunk_size=4)
    n, m = torch.export.Dim("n", min=2, max=64), torch.export.Dim("m", min=8, max=640)
    program = torch.export.export(
        module, sequences(24, device=device), dynamic_shapes=({1: n}, {1: m})
    )
    for length in (24, 21, 50):
        given = sequences(length, device=device)
        near(program.module()(*given), module(*given), 1e-5, f"{length} tokens")


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
