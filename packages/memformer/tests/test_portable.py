"""Compilers, dtypes, files and processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from memformer import Decoder, Memformer
from shared_core.testing import (
    assert_compiles,
    assert_data_parallel,
    assert_exports,
    assert_hub_round_trip,
    assert_portable,
    run_ranks,
)

if TYPE_CHECKING:
    from conftest import MakeModel, Tokens


class Losses(nn.Module):
    """A model whose outputs all are floating-point and treat rows apart."""

    def __init__(self, model: Memformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        out = self.model(src, tgt, return_logits=True)
        return out.enc_out, out.mem, out.dec_out


def masks(src: Tensor) -> Tensor:
    return torch.arange(src.shape[1], device=src.device)[None] < torch.tensor(
        [[src.shape[1]], [2]], device=src.device
    )


def test_compiles(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model(enc_depth=1, dec_depth=1).float()
    src, tgt = tokens(2, 6), tokens(2, 5, seed=2)
    assert_compiles(model, (src, tgt, None, masks(src)))


def test_inductor(device: torch.device) -> None:
    """One layer: what inductor makes of a whole model takes it minutes."""
    decoder = Decoder(4, 1, heads=1).to(device)
    assert_compiles(decoder, (torch.randn(1, 3, 4, device=device),), "inductor")


@pytest.mark.slow
def test_inductor_of_a_whole_model(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    model = make_model(enc_depth=1, dec_depth=1, writer=writer).float()
    assert_compiles(model, (tokens(2, 6), tokens(2, 5, seed=2)), "inductor")


def test_compiles_the_other_writer(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model(enc_depth=1, dec_depth=1, writer="bmn").float()
    assert_compiles(model, (tokens(2, 6), tokens(2, 5, seed=2)))


def test_compiles_layers_that_are_run_again(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model(enc_depth=1, dec_depth=1, checkpoint_layers=True).float()
    assert_compiles(model, (tokens(2, 6), tokens(2, 5, seed=2)))


def test_exports_any_length(make_model: MakeModel, tokens: Tokens, writer: str) -> None:
    model = make_model(writer=writer).float().eval()
    n, t = torch.export.Dim("n", min=2, max=9), torch.export.Dim("t", min=3, max=9)
    shapes: dict[str, Any] = {
        "src": {1: n},
        "tgt": {1: t},
        "mems": None,
        "src_mask": {1: n},
    }
    src, other = tokens(2, 6), tokens(2, 9, seed=4)
    given = (src, tokens(2, 5), None, masks(src))
    assert_exports(model, given, shapes, (other, tokens(2, 7), None, masks(other)))


@pytest.mark.parametrize("legacy", [False, True])
def test_portable(
    settings: dict[str, Any], device: torch.device, tokens: Tokens, legacy: bool
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Losses(Memformer(**settings, legacy=legacy))

    assert_portable(build, (tokens(2, 6), tokens(2, 5, seed=2)), device)


def test_portable_with_the_other_writer(
    settings: dict[str, Any], device: torch.device, tokens: Tokens
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Losses(Memformer(**settings, writer="bmn", tie_embeddings=True))

    assert_portable(build, (tokens(2, 6), tokens(2, 5, seed=2)), device)


def build_losses() -> nn.Module:
    return Losses(build_model())


def build_model() -> Memformer:
    torch.manual_seed(0)
    return Memformer(
        dim=12,
        num_memory_slots=3,
        mem_update_attn_heads=3,
        enc_num_tokens=11,
        enc_depth=1,
        enc_heads=2,
        enc_max_seq_len=9,
        dec_num_tokens=11,
        dec_depth=1,
        dec_heads=3,
        dec_max_seq_len=9,
    )


LAYERS = ("encoder.layer_blocks.layers.0", "decoder.net.layer_blocks.layers.0")


def test_data_parallel() -> None:
    generator = torch.Generator().manual_seed(1)
    src, tgt = (torch.randint(11, (4, 6), generator=generator) for _ in range(2))
    blocks = ["model.decoder", *(f"model.{layer}" for layer in LAYERS)]
    assert_data_parallel(build_losses, (src, tgt), blocks=blocks[::-1])


def test_generates_while_it_is_sharded() -> None:
    """At each place of a training step, which goes on with the weights that it should."""
    for ways in run_ranks(_train_and_generate, 2, timeout=120.0):
        for parts, (found, expected) in ways.items():
            torch.testing.assert_close(found, expected, msg=lambda m, p=parts: f"{p}: {m}")


def _train_and_generate() -> dict[tuple[str, ...], list[list[Tensor]]]:
    """What models with these parts sharded give, and one that is not, in the same calls."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    found: dict[tuple[str, ...], list[list[Tensor]]] = {}
    for parts in ((), ("encoder", "decoder"), ("decoder.net",), LAYERS):
        sharded, plain = (build_model() for _ in range(2))
        for part in parts:
            fully_shard(sharded.get_submodule(part), mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        found[parts] = [_outputs(sharded), _outputs(plain)]
    return found


def _outputs(model: Memformer) -> list[Tensor]:
    src, tgt = torch.arange(24).view(2, 12) % 11, torch.arange(12).view(2, 6) % 11
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    # A rank takes more steps than the other: they do not wait for each other.
    length = 3 + torch.distributed.get_rank()
    found = [model.generate(src, length, temperature=0.0)]
    for i in range(3):
        loss = model(src[:, :9], tgt).dec_out
        found.append(loss.detach())
        tokens = model.stream(src, length, temperature=0.0)
        first = next(tokens)
        # A pass between two tokens leaves the weights of parts sharded.
        with torch.no_grad():
            model(src[:, :9], tgt)
        found.append(torch.stack((first, next(tokens)), 1))
        tokens.close()
        loss.backward()
        # Both leave weights whole, which are old after the step, if nobody sees to it.
        if i == 1:
            found.append(model.generate(src, length, temperature=0.0))
        else:
            with torch.no_grad():
                model.encode(src)
        optimizer.step()
        optimizer.zero_grad()
        if i != 1:
            found.append(model.generate(src, length, temperature=0.0))
    return found


def test_hub_round_trip(settings: dict[str, Any], tokens: Tokens, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    options = {**settings, "writer": "bmn", "dropout": 0.1}
    assert_hub_round_trip(Memformer, options, (tokens(2, 6).cpu(), tokens(2, 5).cpu()), tmp_path)
