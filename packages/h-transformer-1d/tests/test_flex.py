"""The flex_attention path: one kernel over the concatenated pyramid."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from h_transformer_1d import attention, flex, h_attention
from h_transformer_1d.oracle import h_attention_oracle
from h_transformer_1d.pyramid import count_levels

MODES = [
    pytest.param({"causal": True, "scheme": "sibling"}, id="causal-sibling"),
    pytest.param({"causal": True, "scheme": "neighbor"}, id="causal-neighbor"),
    pytest.param({"causal": False, "scheme": "sibling"}, id="bidirectional-sibling"),
    pytest.param({"causal": False, "scheme": "neighbor"}, id="bidirectional-neighbor"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 33, 100])
@pytest.mark.parametrize("options", ["plain", "mask", "everything"])
def test_flex_forward_equals_oracle(
    device: torch.device, mode: dict[str, Any], n: int, options: str
) -> None:
    generator = torch.Generator().manual_seed(n)
    heads = 2 if options == "everything" else 4
    q = torch.randn(2, 4, n, 16, generator=generator).to(device)
    k, v = torch.randn(2, 2, heads, n, 16, generator=generator).to(device)
    mask = bias = None
    if options in ("mask", "everything"):
        mask = (torch.rand(2, n, generator=generator) < 0.6).to(device)
        mask[1, n // 2 :] = False
    if options == "everything":
        bias = torch.randn(3, 4, generator=generator).to(device)
    settings = {**mode, "block_size": 8, "mask": mask}
    with torch.no_grad():
        out = h_attention(q, k, v, level_bias=bias, impl="flex", **settings)
        expected = h_attention_oracle(
            q.double(),
            k.double(),
            v.double(),
            level_bias=None if bias is None else bias.double(),
            **settings,
        )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def level_sizes(n: int, block_size: int, counted: bool) -> tuple[int, ...]:
    """Slots of each level; a last single slot counts where tokens are counted."""
    sizes = [n]
    for _ in range(1, count_levels(n, block_size)):
        sizes.append((sizes[-1] + counted) // 2)
    return tuple(sizes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", [8, 128])
@pytest.mark.parametrize("block_size", [2, 4, 6, 16, 48, 128])
def test_tiles_are_those_of_the_mask(
    monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any], tile: int, block_size: int
) -> None:
    """What is seen of each tile, nothing, something or all, as found entry by entry."""
    monkeypatch.setattr(flex, "TILE", tile)
    causal, scheme = mode["causal"], mode["scheme"]
    for n in [1, 7, 8, 9, 31, 64, 100] if tile == 8 else [1, 128, 129, 300]:
        for counted in (True, False) if causal else (True,):
            sizes = level_sizes(n, block_size, counted)
            actual, _ = flex._visible_slots.__wrapped__(
                n, sizes, block_size, causal, scheme, torch.device("cpu")
            )
            expected = create_block_mask(
                actual.mask_mod, None, None, n, sum(sizes), device="cpu", BLOCK_SIZE=tile
            )
            assert actual.shape == expected.shape
            for kind in ("kv", "full_kv", "q", "full_q"):
                assert tiles(actual, kind) == tiles(expected, kind), (n, counted, kind)


def tiles(mask: Any, kind: str) -> list[list[int]]:
    numbers = getattr(mask, f"{kind}_num_blocks")[0, 0].tolist()
    lists = getattr(mask, f"{kind}_indices")[0, 0].tolist()
    return [row[:number] for number, row in zip(numbers, lists, strict=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [4, 128])
def test_the_mask_needs_little_memory(mode: dict[str, Any], block_size: int) -> None:
    """No tensor with an entry for each row and slot, or near."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            out = func(*args, **kwargs or {})
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    n = 8192
    sizes = level_sizes(n, block_size, True)
    with Largest() as largest:
        flex._visible_slots.__wrapped__(
            n, sizes, block_size, mode["causal"], mode["scheme"], torch.device("cpu")
        )
    assert sum(sizes) <= largest.numel <= 4 * sum(sizes)


@pytest.mark.parametrize(
    ("kind", "device_type", "dtype", "width", "serves"),
    [
        ("widths", "cuda", torch.float32, 16, True),
        ("widths", "cuda", torch.bfloat16, 64, True),
        ("widths", "cuda", torch.float32, 8, False),
        ("widths", "cuda", torch.float32, 48, False),
        ("type", "cuda", torch.float64, 64, False),
        ("device", "cpu", torch.float32, 64, False),
        ("triton", "cuda", torch.float32, 64, False),
        ("tracing", "cuda", torch.float32, 64, False),
    ],
)
def test_where_flex_serves(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    device_type: str,
    dtype: torch.dtype,
    width: int,
    serves: bool,
) -> None:
    monkeypatch.setattr(flex, "_has_triton", lambda _: kind != "triton")
    monkeypatch.setattr(flex, "_holds_numbers", lambda _: kind != "tracing")
    q: Any = SimpleNamespace(device=torch.device(device_type), dtype=dtype, shape=(1, 2, 3, width))
    assert flex.flex_serves(q) is serves


def test_what_holds_no_numbers_is_not_cached() -> None:
    """Neither in fake modes nor in transformations, where the fused operator runs."""
    q = torch.randn(1, 2, 40, 16)
    options = {"causal": True, "block_size": 8, "impl": "flex"}
    flex._visible_slots.cache_clear()
    assert flex._holds_numbers(q)
    assert flex._holds_numbers(nn.Parameter(q))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(q)
        assert h_attention(fake, fake, fake, **options).shape == q.shape
        assert not flex._holds_numbers(q)

    def transformed(x: Tensor) -> Tensor:
        assert not flex._holds_numbers(x)
        return x.sum()

    torch.func.grad(transformed)(q)
    assert flex._visible_slots.cache_info().currsize == 0
    with torch.inference_mode():
        h_attention(q, q, q, **options)
    visible, level = flex._visible_slots(40, (40, 20, 10), 8, True, "sibling", q.device)
    assert flex._visible_slots.cache_info().hits == 1
    assert not level.is_inference()
    assert not visible.kv_indices.is_inference()
    assert not visible.q_indices.is_inference()


def test_each_variety_has_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the limit of recompilations raises, rather than to run without a kernel."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flex._compiled.cache_clear()

    def call(variety: int, dtype: torch.dtype) -> Tensor:
        q = torch.randn(1, 2, 40, 16, dtype=dtype)
        visible, _ = flex._visible_slots(40, (40,), 64, True, "sibling", q.device)
        attend = flex._compiled((variety,))
        return attend(q, q, q, lambda logit, *_: logit, visible, 1.0, False)

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for variety, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            assert call(variety, dtype).dtype == dtype
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            call(0, torch.bfloat16)
    flex._compiled.cache_clear()


MODELS = [
    pytest.param({}, id="causal"),
    pytest.param({"causal": False, "scheme": "neighbor"}, id="bidirectional"),
    pytest.param(
        {"scheme": "neighbor", "shift_tokens": True, "level_bias": True, "kv_heads": 1},
        id="everything",
    ),
    pytest.param({"reversible": True}, id="reversible"),
]


@pytest.fixture(params=MODELS)
def wide_model(request: pytest.FixtureRequest, make_model: Any) -> Any:
    """A model whose heads are wide enough, with a level bias that is not zero."""
    model = make_model(dim_head=16, **request.param).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("level_bias"):
            nn.init.normal_(parameter)
    return model


def through(monkeypatch: pytest.MonkeyPatch, impl: str, model: Any, *inputs: Any) -> Tensor:
    """The model's output with every attention computed by `impl`."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "h_attention", partial(h_attention, impl=impl))
        out: Tensor = model(*inputs)
    return out


@pytest.mark.parametrize("n", [5, 33, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_model_output_is_that_of_the_fused_path(
    monkeypatch: pytest.MonkeyPatch, wide_model: Any, tokens: Any, n: int, masked: bool
) -> None:
    x = tokens(3, n)
    mask = None
    if masked:
        mask = torch.rand(3, n, generator=torch.Generator().manual_seed(n)) < 0.6
        mask[1] = False
        mask = mask.to(x.device)
    out, expected = (through(monkeypatch, impl, wide_model, x, mask) for impl in ("flex", "fused"))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_model_takes_no_notice_of_masked_tokens(
    monkeypatch: pytest.MonkeyPatch, make_model: Any, device: torch.device, causal: bool
) -> None:
    model = make_model(num_tokens=None, dim_head=16, causal=causal).eval()
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.arange(40, device=device).expand(2, 40) % 3 != 1
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    out, expected = (through(monkeypatch, "flex", model, y, mask) for y in (poisoned, x))
    assert torch.equal(out[mask], expected[mask])


def test_model_is_causal(monkeypatch: pytest.MonkeyPatch, make_model: Any, tokens: Any) -> None:
    model = make_model(dim_head=16).eval()
    x = tokens(1, 37)
    whole = through(monkeypatch, "flex", model, x)
    for n in (1, 4, 5, 16, 36):
        changed = torch.cat((x[:, :n], 20 - x[:, n:]), 1)
        out = through(monkeypatch, "flex", model, changed)
        torch.testing.assert_close(out[:, :n], whole[:, :n], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(out[:, n:], whole[:, n:], atol=1e-3)


def test_model_under_autocast(
    monkeypatch: pytest.MonkeyPatch, wide_model: Any, tokens: Any, device: torch.device
) -> None:
    x = tokens(2, 40)
    expected = through(monkeypatch, "fused", wide_model, x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = through(monkeypatch, "flex", wide_model, x)
    assert (out.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("dynamic", [True, False])
def test_model_export(
    monkeypatch: pytest.MonkeyPatch, make_model: Any, tokens: Any, dynamic: bool
) -> None:
    """Takes the fused operator, and leaves nothing behind for later calls."""
    model = make_model(dim_head=16).eval()
    x, other = tokens(2, 40), tokens(2, 61)
    expected, second = (through(monkeypatch, "flex", model, y) for y in (x, other))
    flex._visible_slots.cache_clear()
    shapes = ({1: torch.export.Dim("n", min=33, max=64)},) if dynamic else None
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "h_attention", partial(h_attention, impl="flex"))
        exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-5)
        if dynamic:
            torch.testing.assert_close(exported(other), second, atol=1e-5, rtol=1e-5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(x), expected)
