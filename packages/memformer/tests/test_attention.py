"""The blocked operator against plain operations, for every kind of block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memformer import attention, blocks
from shared_core.testing import assert_compiles, assert_same_gradients

SIZES = st.integers(1, 6)


def inputs(b: int, h: int, n: int, m: int, device: torch.device) -> list[Tensor]:
    q, k, v = (torch.randn(b, h, j, 2, device=device, dtype=torch.float64) for j in (n, m, m))
    return [q, k, v, torch.randn(h, n + m - 1, device=device, dtype=torch.float64)]


def plain(mask: Tensor | None, causal: bool) -> Callable[..., Tensor]:
    """Softmax of what takes part alone, token by token."""

    def run(q: Tensor, k: Tensor, v: Tensor, by_distance: Tensor | None = None) -> Tensor:
        b, h, n, _ = q.shape
        m = k.shape[2]
        rows = []
        for row in range(b):
            for head in range(h):
                for i in range(n):
                    seen = [
                        j
                        for j in range(m)
                        if (mask is None or mask[row, j]) and (not causal or j <= m - n + i)
                    ]
                    if not seen:
                        rows.append(q[row, head, i] * 0.0)
                        continue
                    logits = k[row, head, seen] @ q[row, head, i]
                    if by_distance is not None:
                        logits = logits + by_distance[head, [j - i + n - 1 for j in seen]]
                    rows.append(logits.softmax(0) @ v[row, head, seen])
        return torch.stack(rows).view(b, h, n, -1)

    return run


def blocked(mask: Tensor | None, causal: bool) -> Callable[..., Tensor]:
    return lambda *x: attention.attend(*x, *([None] * (4 - len(x))), mask, causal=causal)


@given(
    b=SIZES, h=st.integers(1, 3), n=SIZES, more=st.integers(0, 3), causal=st.booleans(),
    masked=st.booleans(), biased=st.booleans(), room=st.sampled_from([1, 8, 40, 10**6]),
    kernel=st.booleans(), rows=st.sampled_from([1, 2, 256]),
)  # fmt: skip
def test_blocks_equal_loops(
    b: int,
    h: int,
    n: int,
    more: int,
    causal: bool,
    masked: bool,
    biased: bool,
    room: int,
    kernel: bool,
    rows: int,
) -> None:
    """And where there is no mask the kernel does, which a caller may have switched off."""
    device = torch.device("cpu")
    m = n + more if causal else max(1, n + more - 2)
    mask = torch.rand(b, m) < 0.6 if masked else None
    given = inputs(b, h, n, m, device)[: 4 if biased else 3]
    backend = SDPBackend.FLASH_ATTENTION if kernel else SDPBackend.EFFICIENT_ATTENTION
    before = blocks.WORKING_SET, blocks.CAUSAL_ROWS
    blocks.WORKING_SET, blocks.CAUSAL_ROWS = room, rows
    try:
        with sdpa_kernel(backend):
            assert_same_gradients(blocked(mask, causal), plain(mask, causal), given)
    finally:
        blocks.WORKING_SET, blocks.CAUSAL_ROWS = before


@pytest.mark.parametrize(
    ("n", "m", "causal"), [(150, 150, True), (70, 90, False), (130, 200, True)]
)
def test_many_blocks_of_queries(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, n: int, m: int, causal: bool
) -> None:
    monkeypatch.setattr(blocks, "WORKING_SET", 64 * m)
    monkeypatch.setattr(blocks, "ACCELERATOR_WORKING_SET", 64 * m)
    mask = torch.rand(2, m, device=device) < 0.8
    mask[:, 0] = True
    given = inputs(2, 3, n, m, device)

    def all_at_once(q: Tensor, k: Tensor, v: Tensor, by_distance: Tensor) -> Tensor:
        return attention.attend_plain(q, k, v, by_distance, mask, causal)

    assert_same_gradients(blocked(mask, causal), all_at_once, given)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_kernel_equals_loops(device: torch.device, n: int, causal: bool) -> None:
    mask = torch.tensor([[True, False, True, True, False], [False] * 5], device=device)
    q, k, v, by_distance = inputs(2, 2, n, 5, device)
    expected = plain(mask, causal)(q, k, v, by_distance)
    found = attention.attend_kernel(q, k, v, by_distance, mask, causal)
    some = mask.cumsum(1)[:, 5 - n :] > 0 if causal else mask.any(1, keepdim=True)
    torch.testing.assert_close(found.masked_fill(~some[:, None, :, None], 0.0), expected)
    with torch.no_grad():
        # One query takes this path by itself.
        torch.testing.assert_close(blocked(mask, causal)(q, k, v, by_distance), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_first_and_second_order(device: torch.device, causal: bool) -> None:
    mask = torch.tensor([[True, True, False, True]], device=device)
    given = [x.requires_grad_() for x in inputs(1, 2, 3, 4, device)]
    assert torch.autograd.gradcheck(blocked(mask, causal), given)
    assert torch.autograd.gradgradcheck(blocked(mask, causal), given)
    assert torch.autograd.gradgradcheck(blocked(None, causal), given[:3])


def test_a_row_of_nothing_gives_zero(device: torch.device) -> None:
    mask = torch.tensor([[False, False, True], [False, False, False]], device=device)
    q, k, v, by_distance = inputs(2, 1, 3, 3, device)
    out = blocked(mask, True)(q, k, v, by_distance)
    assert (out[0, :, :2] == 0).all()
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[0, :, 2], v[0, :, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(device: torch.device, dtype: torch.dtype, causal: bool) -> None:
    given = inputs(2, 2, 70, 70, device)
    mask = torch.rand(2, 70, device=device) < 0.8
    results = []
    for kind in (torch.float64, dtype):
        leaves = [x.to(kind).requires_grad_() for x in given]
        out = blocked(mask, causal)(*leaves)
        assert out.dtype == kind
        results.append([out, *torch.autograd.grad(out.double().square().sum(), leaves)])
    for exact, near in zip(*results, strict=True):
        assert (near - exact).norm() < 0.03 * exact.norm()


def test_a_mask_of_another_dtype_than_the_queries_is_not_handed_on(device: torch.device) -> None:
    """What the CPU's kernel does with float64 queries and a float32 bias is wrong, silently."""
    mask = torch.tensor([[True, False, True]], device=device)
    q, k, v, by_distance = inputs(1, 2, 3, 3, device)
    bias = attention.full_bias(q, k, by_distance.float().to(q.dtype), mask, False)
    assert bias is not None
    assert bias.dtype == q.dtype
    with torch.no_grad():
        out = blocked(mask, False)(q[:, :, :1], k, v, by_distance[:, 2:].float())
    expected = plain(mask, False)(q[:, :, :1], k, v, by_distance[:, 2:].float().double())
    torch.testing.assert_close(out, expected)


def test_empty_batch_and_strided_inputs(device: torch.device) -> None:
    q, k, v, by_distance = inputs(2, 3, 4, 4, device)
    assert blocked(None, True)(q[:0], k[:0], v[:0], by_distance).shape == (0, 3, 4, 2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(
        blocked(None, True)(*strided, by_distance), blocked(None, True)(q, k, v, by_distance)
    )


def test_compiles_as_one_graph(device: torch.device) -> None:
    given = inputs(2, 2, 4, 4, device)
    assert_compiles(blocked(torch.ones(2, 4, device=device, dtype=torch.bool), True), given)


def test_the_operator_keeps_what_operators_promise(device: torch.device) -> None:
    q, k, v, by_distance = (x.requires_grad_() for x in inputs(1, 2, 3, 4, device))
    mask = torch.tensor([[True, False, True, True]], device=device)
    torch.library.opcheck(torch.ops.memformer.attend.default, (q, k, v, by_distance, mask, True))
    torch.library.opcheck(torch.ops.memformer.attend.default, (q, k, v, None, None, False))


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_changes_nothing_inside(device: torch.device, causal: bool) -> None:
    """The dtype of what comes in decides, in the backward pass too."""
    mask = torch.rand(2, 70, device=device) < 0.8
    given = [x.float() for x in inputs(2, 2, 70, 70, device)]

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        out = blocked(mask, causal)(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        return [out, *first, *second]

    expected = run()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = run()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_kind_of_derivative(device: torch.device, causal: bool, masked: bool) -> None:
    """Each is that of plain operations, or of the operator's own gradient."""
    mask = torch.tensor([[True, True, False, True]], device=device) if masked else None
    given, tangents = inputs(1, 2, 3, 4, device), inputs(1, 2, 3, 4, device)

    def exact(*x: Tensor) -> Tensor:
        return attention.attend_plain(*x, mask, causal)

    run = blocked(mask, causal)
    for names in (given, [*given[:3], given[3].new_zeros(given[3].shape)]):
        expected = torch.func.jvp(exact, tuple(names), tuple(tangents))
        found = torch.func.jvp(run, tuple(names), tuple(tangents))
        torch.testing.assert_close(found, expected)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        expected = transform(lambda *x: exact(*x).square().sum(), argnums=(0, 3))(*given)
        found = transform(lambda *x: run(*x).square().sum(), argnums=(0, 3))(*given)
        torch.testing.assert_close(found, expected)
    rows = [torch.stack((x, -x, 2 * x)) for x in given]
    each = torch.func.vmap(torch.func.grad(lambda *x: run(*x).square().sum()))
    expected = torch.func.vmap(torch.func.grad(lambda *x: exact(*x).square().sum()))(*rows)
    torch.testing.assert_close(each(*rows), expected)


def test_third_derivatives(device: torch.device) -> None:
    given = inputs(1, 2, 3, 4, device)
    directions = inputs(1, 2, 3, 4, device)

    def third(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in given]
        value = run(*leaves).pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((x * y).sum() for x, y in zip(grads, directions, strict=True))
        return torch.autograd.grad(value, leaves)

    def exact(*x: Tensor) -> Tensor:
        return attention.attend_plain(*x, None, True)

    torch.testing.assert_close(third(blocked(None, True)), third(exact))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_logits_that_float16_can_hardly_tell_from_nothing(
    device: torch.device, n: int, causal: bool
) -> None:
    """What is hidden stays so, however low the logits that take part and high those that do not."""
    q = torch.full((1, 1, n, 2), 200.0, device=device)
    k = torch.tensor([[-100.0, -90.0], [-100.0, -90.0], [80.0, 80.0]], device=device)[None, None]
    v = torch.tensor([[1.0, 1.0], [3.0, 3.0], [77.0, 77.0]], device=device)[None, None]
    mask = None if causal and n > 1 else torch.tensor([[True, True, False]], device=device)
    kinds = torch.float16, torch.float64
    found, expected = (blocked(mask, causal)(*(x.to(kind) for x in (q, k, v))) for kind in kinds)
    seen = slice(0, 2) if mask is None else slice(None)
    torch.testing.assert_close(found[:, :, seen].double(), expected[:, :, seen])
    with torch.no_grad():
        again = blocked(mask, causal)(q.half(), k.half(), v.half())
    torch.testing.assert_close(again[:, :, seen].double(), expected[:, :, seen])
