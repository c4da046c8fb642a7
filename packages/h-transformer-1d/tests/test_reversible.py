"""Reversible layers: the gradients of the formula, without its stored activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from h_transformer_1d import ReversibleSequence
from shared_core.testing import normal


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
    return normal(2, 5, 6, device=device, seed=seed)


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
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_backward_fills_grad(device: torch.device) -> None:
    blocks = make_blocks(device)
    sequence = ReversibleSequence(blocks)
    x = make_input(device).requires_grad_()
    sequence(x).pow(3).sum().backward()
    actual = [x.grad, *(p.grad for p in blocks.parameters())]
    expected = torch.autograd.grad(formula(blocks, x).pow(3).sum(), [x, *blocks.parameters()])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)
    # A second backward adds.
    sequence(x).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, 2 * expected[0], atol=1e-10, rtol=1e-10)


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
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)
    sequence(x).pow(3).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in blocks.parameters())
    # Only the input learns.
    blocks.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (actual,) = torch.autograd.grad(sequence(leaf).pow(3).sum(), leaf)
    (expected,) = torch.autograd.grad(formula(blocks, leaf).pow(3).sum(), leaf)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
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
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


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


def test_retained_graph(device: torch.device) -> None:
    blocks = make_blocks(device, dropout=0.3)
    x = make_input(device).requires_grad_()
    leaves = [x, *blocks.parameters()]
    results = []
    for run in (lambda x: formula(blocks, x), ReversibleSequence(blocks)):
        torch.manual_seed(3)
        loss = run(x).pow(3).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves, retain_graph=True)
        third = torch.autograd.grad(loss, leaves)
        results.append([*first, *second, *third])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("order", [range(4), range(3, -1, -1)], ids=["rising", "falling"])
def test_gradients_of_one_layer_at_a_time(device: torch.device, order: range) -> None:
    """Whatever part of the graph is asked for first, from the top, the bottom or the input."""
    blocks = make_blocks(device, dropout=0.3)
    x = make_input(device).requires_grad_()
    results = []
    for run in (lambda x: formula(blocks, x), ReversibleSequence(blocks)):
        torch.manual_seed(3)
        loss = run(x).pow(3).sum()
        gradients = []
        for layer in order:
            gradients += torch.autograd.grad(
                loss, list(blocks[layer].parameters()), retain_graph=True
            )
        results.append([*gradients, *torch.autograd.grad(loss, x)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_two_losses_of_one_output(device: torch.device) -> None:
    blocks = make_blocks(device, dropout=0.3)
    x = make_input(device).requires_grad_()
    results = []
    for run in (lambda x: formula(blocks, x), ReversibleSequence(blocks)):
        torch.manual_seed(3)
        out = run(x)
        first = torch.autograd.grad(out.sum(), x, retain_graph=True)
        second = torch.autograd.grad(out.square().sum(), list(blocks.parameters()))
        results.append([out.detach(), *first, *second])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_second_derivatives_are_right_or_refused(device: torch.device) -> None:
    """A gradient penalty through recomputed activations must not be silently wrong."""
    blocks = make_blocks(device)
    x = make_input(device).requires_grad_()

    def penalty(run: Any) -> tuple[Tensor, ...]:
        (gradient,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(blocks.parameters()))

    expected = penalty(lambda x: formula(blocks, x))
    try:
        actual = penalty(ReversibleSequence(blocks))
    except RuntimeError:
        return
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_the_input_and_output_stay_usable(device: torch.device) -> None:
    """What is freed inside is nobody else's: input, output and what they were made from."""
    blocks = make_blocks(device)
    leaf = make_input(device).requires_grad_()
    base = leaf * 1.0
    x = base[:, :]
    copies = base.detach().clone(), x.detach().clone()
    out = ReversibleSequence(blocks)(x)
    kept = out.detach().clone()
    (out.pow(3).sum() + base.sum() + x.sum()).backward()
    assert torch.equal(base, copies[0])
    assert torch.equal(x, copies[1])
    assert torch.equal(out, kept)
    expected = torch.autograd.grad(formula(blocks, leaf).pow(3).sum() + 2 * leaf.sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected[0], atol=1e-10, rtol=1e-10)


def test_whoever_holds_the_input_of_a_layer_may_read_it(device: torch.device) -> None:
    """Or its output, after the forward and the backward pass, and take gradients through it."""
    blocks = make_blocks(device, dropout=0.3)
    x = make_input(device).requires_grad_()
    leaves = [x, *blocks[0].parameters(), *blocks[1][0].parameters()]
    held: list[Tensor] = []

    def hold(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        held.extend((inputs[0], inputs[0][:, 1:], output))

    for f, g in blocks:
        f.register_forward_hook(hold)
        g.register_forward_hook(hold)
    results = []
    for run in (lambda x: formula(blocks, x), ReversibleSequence(blocks)):
        held.clear()
        torch.manual_seed(3)
        out = run(x)
        seen = held[:24]
        assert len(held) == len(seen)
        before = [y.detach().clone() for y in seen]
        # The output of the third function, which the result has no part in.
        gradients = torch.autograd.grad(seen[8].pow(3).sum(), leaves, retain_graph=True)
        gradients += torch.autograd.grad(out.pow(3).sum() + seen[9].sum(), leaves)
        results.append([*before, *(y.detach() for y in seen), *gradients])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_changing_the_input_in_place_is_refused(device: torch.device) -> None:
    x = make_input(device).requires_grad_() * 1.0
    out = ReversibleSequence(make_blocks(device))(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Sub(nn.Module):
    """Functions that hand on their input, keep no input, or nothing at all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        del mask
        if self.kind == "identity":
            return x
        if self.kind == "constant":
            return self.weight.expand_as(x)
        if self.kind == "nothing":
            return torch.zeros_like(x)
        if self.kind == "noise":
            return x + torch.randn_like(x)
        return x * self.weight + x.detach()


@pytest.mark.parametrize(
    "kinds",
    [
        ("identity", "scaled"),
        ("constant", "nothing"),
        ("scaled",) * 2,
        ("noise", "scaled"),
        ("scaled", "noise"),
        ("noise",) * 2,
    ],
)
def test_unusual_functions(device: torch.device, kinds: tuple[str, str]) -> None:
    blocks = nn.ModuleList([nn.ModuleList([Sub(kind) for kind in kinds]) for _ in range(3)])
    blocks = blocks.to(device, torch.float64)
    x = make_input(device).requires_grad_()
    leaves = [x, *blocks.parameters()]
    results = []
    for run in (lambda x: formula(blocks, x), ReversibleSequence(blocks)):
        torch.manual_seed(3)
        out = run(x)
        gradients = torch.autograd.grad(out.pow(3).sum(), leaves, allow_unused=True)
        zeros = [torch.zeros_like(x) for x in leaves]
        results.append(
            [out.detach()] + [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
        )
        # The backward pass draws no numbers of its own.
        results[-1] += [torch.rand(3), torch.rand(3, device=device)]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_a_stack_inside_a_checkpoint(device: torch.device) -> None:
    blocks = make_blocks(device, dropout=0.3)
    sequence = ReversibleSequence(blocks)
    x = make_input(device).requires_grad_()
    leaves = [x, *blocks.parameters()]
    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(3)
        if reentrant is None:
            out = formula(blocks, x)
        else:
            out = checkpoint(sequence, x, use_reentrant=reentrant)
        for leaf in leaves:
            leaf.grad = None
        out.pow(3).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_inner_stacks(device: torch.device) -> None:
    """A reversible stack as a function of a reversible stack."""

    class Inner(nn.Module):
        def __init__(self, stack: nn.Module) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            del mask
            return self.stack(x)

    inner = make_blocks(device, depth=2, dropout=0.3)
    plain, reversible = make_blocks(device, depth=2), make_blocks(device, depth=2)
    reversible[1][0] = Inner(ReversibleSequence(inner))
    plain[1][0] = Inner(_Formula(inner))
    x = make_input(device).requires_grad_()
    results = []
    for run in (lambda x: formula(plain, x), ReversibleSequence(reversible)):
        torch.manual_seed(3)
        out = run(x)
        results.append(
            [out.detach(), *torch.autograd.grad(out.pow(3).sum(), [x, *inner.parameters()])]
        )
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


class _Formula(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return formula(self.blocks, x)


@pytest.mark.parametrize("interrupted", [0, 3, 7])
def test_an_exception_in_backward_does_no_harm(device: torch.device, interrupted: int) -> None:
    """A graph that was left half way through does not disturb the next one."""
    blocks = make_blocks(device)
    sequence = ReversibleSequence(blocks)
    x = make_input(device).requires_grad_()
    expected = torch.autograd.grad(formula(blocks, x).pow(3).sum(), x)[0]
    functions = [f for pair in blocks for f in pair]

    def fail(*_: Any) -> None:
        raise ArithmeticError("planted")

    loss = sequence(x).pow(3).sum()
    hook = functions[interrupted].register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        torch.autograd.grad(loss, x)
    hook.remove()
    (actual,) = torch.autograd.grad(sequence(x).pow(3).sum(), x)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


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


def held_bytes(model: nn.Module, x: Tensor) -> int:
    """Memory that a forward pass leaves allocated, its graph included."""
    model(x)
    if x.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        out = model(x)
        return torch.cuda.memory_allocated() - before - out.nbytes
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        out = model(x)
    return sum(event.self_cpu_memory_usage for event in profile.events()) - out.nbytes


def test_memory_does_not_grow_with_depth(make_model: Any, tokens: Any) -> None:
    x = tokens(16, 64)
    activation = 16 * 64 * 16 * 4
    sizes = {
        (reversible, depth): held_bytes(make_model(reversible=reversible, depth=depth), x)
        for reversible in (True, False)
        for depth in (2, 8)
    }
    # A state of the random generator for each function, and no activation.
    assert sizes[True, 8] - sizes[True, 2] < 6 * activation / 4
    assert sizes[False, 8] - sizes[False, 2] > 6 * 5 * activation


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
