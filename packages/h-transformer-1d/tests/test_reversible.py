"""Reversible layers: the gradients of the formula, without its stored activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from h_transformer_1d import ReversibleSequence


class Function(nn.Module):
    """A sub-layer with dropout and a keyword."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y = self.dropout(self.linear(x).tanh())
        return y if mask is None else y * mask[..., None]


def make_blocks(device: torch.device, *, depth: int = 4, dropout: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = [nn.ModuleList([Function(6, dropout), Function(6, dropout)]) for _ in range(depth)]
    return nn.ModuleList(blocks).to(device, torch.float64)


def formula(blocks: nn.ModuleList, x: Tensor, mask: Tensor | None = None) -> Tensor:
    left = right = x
    for f, g in blocks:
        left = left + f(right, mask=mask)
        right = right + g(left)
    return left + right


def make_input(device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).to(device)


def make_sequence(blocks: nn.ModuleList) -> ReversibleSequence:
    return ReversibleSequence(blocks, args_route={"mask": ((True, False),) * len(blocks)})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_are_those_of_the_formula(
    device: torch.device, dropout: float, training: bool, masked: bool
) -> None:
    blocks = make_blocks(device, dropout=dropout).train(training)
    sequence = make_sequence(blocks).train(training)
    mask = torch.arange(5, device=device).expand(2, 5) < 3 if masked else None
    leaves = [make_input(device).requires_grad_(), *blocks.parameters()]
    results = []
    for run in (lambda x: formula(blocks, x, mask), lambda x: sequence(x, mask=mask)):
        torch.manual_seed(1)
        out = run(leaves[0])
        # Other draws between forward and backward must not matter.
        torch.rand(7, device=device)
        gradients = torch.autograd.grad(out.pow(3).sum(), leaves)
        results.append([out.detach(), *gradients])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


def test_backward_fills_grad(device: torch.device) -> None:
    blocks = make_blocks(device)
    sequence = ReversibleSequence(blocks)
    x = make_input(device).requires_grad_()
    sequence(x).pow(3).sum().backward()
    actual = [x.grad, *(p.grad for p in blocks.parameters())]
    expected = torch.autograd.grad(formula(blocks, x).pow(3).sum(), [x, *blocks.parameters()])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)
    # A second backward adds.
    sequence(x).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, 2 * expected[0], atol=1e-10, rtol=0)


def test_frozen_parts(device: torch.device) -> None:
    """Neither a frozen input nor frozen layers take the gradient of the rest away."""
    blocks = make_blocks(device)
    sequence = ReversibleSequence(blocks)
    blocks[1].requires_grad_(False)
    blocks[3][0].requires_grad_(False)
    trained = [p for p in blocks.parameters() if p.requires_grad]
    x = make_input(device)
    actual = torch.autograd.grad(sequence(x).pow(3).sum(), trained)
    expected = torch.autograd.grad(formula(blocks, x).pow(3).sum(), trained)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)
    sequence(x).pow(3).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in blocks.parameters())
    # Only the input learns.
    blocks.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (actual,) = torch.autograd.grad(sequence(leaf).pow(3).sum(), leaf)
    (expected,) = torch.autograd.grad(formula(blocks, leaf).pow(3).sum(), leaf)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    assert not sequence(x).requires_grad


def test_two_forwards_before_one_backward(device: torch.device) -> None:
    """Each forward keeps its own random state."""
    blocks = make_blocks(device, dropout=0.4)
    sequence = ReversibleSequence(blocks)
    first, second = make_input(device, 0), make_input(device, 1)
    results = []
    for run in (lambda x: formula(blocks, x), sequence):
        torch.manual_seed(3)
        loss = run(first).pow(3).sum() + run(second).pow(2).sum()
        results.append(torch.autograd.grad(loss, list(blocks.parameters())))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


def test_backward_leaves_the_random_state_alone(device: torch.device) -> None:
    sequence = ReversibleSequence(make_blocks(device, dropout=0.4))
    drawn = []
    for backward in (True, False):
        torch.manual_seed(3)
        out = sequence(make_input(device))
        if backward:
            out.sum().backward()
        drawn.append(torch.rand(5, device=device))
    assert torch.equal(*drawn)


def test_retained_graph_and_some_leaves(device: torch.device) -> None:
    blocks = make_blocks(device)
    x = make_input(device).requires_grad_()
    loss = ReversibleSequence(blocks)(x).pow(3).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x)[0]
    assert torch.equal(first, second)


def test_autocast_is_replayed(device: torch.device) -> None:
    """The layers run again in backward in the precision of the forward pass."""
    blocks = make_blocks(device).float()
    sequence = ReversibleSequence(blocks)
    x = make_input(device).float()
    results = []
    for run in (lambda x: formula(blocks, x), sequence):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = run(x)
        results.append(torch.autograd.grad(out.pow(2).sum(), list(blocks.parameters())))
    for a, e in zip(*results, strict=True):
        assert (a - e).norm() <= 0.02 * e.norm()


def test_no_gradient_wanted(device: torch.device) -> None:
    blocks = make_blocks(device)
    with torch.no_grad():
        out = ReversibleSequence(blocks)(make_input(device))
    assert not out.requires_grad
    torch.testing.assert_close(out, formula(blocks, make_input(device)))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct memory that the graph of a forward pass keeps alive."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(x)
    assert out.requires_grad
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in saved)}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_memory_does_not_grow_with_depth(make_model: Any, tokens: Any) -> None:
    x = tokens(2, 64)
    sizes = {
        (reversible, depth): saved_bytes(make_model(reversible=reversible, depth=depth), x)
        for reversible in (True, False)
        for depth in (2, 8)
    }
    assert sizes[True, 8] == sizes[True, 2]
    assert sizes[False, 8] > 3 * sizes[False, 2]
    assert sizes[True, 2] < sizes[False, 2]


CHANGES = [
    pytest.param({}, id="causal"),
    pytest.param({"causal": False}, id="bidirectional"),
    pytest.param(
        {"scheme": "neighbor", "shift_tokens": True, "level_bias": True, "kv_heads": 1},
        id="everything",
    ),
    pytest.param({"attn_dropout": 0.2, "ff_dropout": 0.3}, id="dropout"),
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_model_gradients_equal_finite_differences(
    make_model: Any,
    tokens: Any,
    changes: dict[str, Any],
    training: bool,
    frozen: bool,
    masked: bool,
) -> None:
    """Along a random direction of all trained parameters, in every mode, by autograd.grad."""
    model = make_model(reversible=True, **changes).double().train(training)
    if frozen:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    x = tokens(2, 29)
    mask = torch.arange(29, device=x.device).expand(2, 29) % 5 != 2 if masked else None

    def loss() -> Tensor:
        torch.manual_seed(6)
        return model(x, mask=mask).tanh().square().mean()

    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in parameters
    ]
    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step = 1e-5
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * step * d)
            values.append(loss())
    difference = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(slope, difference, atol=1e-8, rtol=1e-6)
