"""What a model computes: causality, masks, pieces and whole, gradients against an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trees import assert_close, fresh_leaves, random_sum, tensors, to_float


def assert_causal(fn: Callable[[Tensor], Tensor], x: Tensor, *, atol: float = 1e-10) -> None:
    """Changing token t, alone or with all that follow, changes no output before t, at every t.

    Args:
        fn: x -> (b, n, ...).
        x: (b, n, d) floats or (b, n) tokens, n >= 2; tokens are replaced by others up to the
            largest in `x`.
        atol: what counts as unchanged; floats are meant to be float64.

    Raises:
        AssertionError: an output sees a later token, or no output sees any token.
    """
    n = x.shape[1]
    if n < 2:
        raise ValueError(f"causality needs at least 2 tokens, got {n}")
    other = _other(x)
    with torch.no_grad():
        before = fn(x)
        seen = False
        for t in range(n):
            for stop in (t + 1, n):
                changed = x.clone()
                changed[:, t:stop] = other[:, t:stop]
                after = fn(changed)
                what = f"tokens {t} to {stop - 1} changed, outputs before {t}"
                assert_close(after[:, :t], before[:, :t], what, atol=atol)
                seen = seen or not torch.equal(after, before)
    if not seen:
        raise AssertionError("no change of any token changed any output")


def assert_prefix_consistent(
    fn: Callable[[Tensor], Tensor], x: Tensor, *, atol: float = 1e-10
) -> None:
    """The outputs of every prefix are the first outputs of the whole.

    Args:
        fn: x -> (b, n, ...).
        x: (b, n, d) or (b, n), n >= 2.
        atol: absolute tolerance; floats are meant to be float64.
    """
    n = x.shape[1]
    if n < 2:
        raise ValueError(f"a prefix needs at least 2 tokens, got {n}")
    with torch.no_grad():
        whole = fn(x)
        for t in range(1, n):
            assert_close(fn(x[:, :t]), whole[:, :t], f"prefix of {t} tokens", atol=atol)


def assert_pieces_equal_whole(
    whole: Callable[[Tensor], Tensor],
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    x: Tensor,
    splits: Sequence[Sequence[int]] | None = None,
    *,
    state: Any = None,
    atol: float = 1e-10,
) -> None:
    """Feeding a sequence in pieces with carried state equals feeding it whole.

    Args:
        whole: x -> (b, n, ...).
        step: (piece (b, t, ...), state) -> (output (b, t, ...), state).
        x: (b, n, d) or (b, n), n >= 2.
        splits: each the lengths of the pieces, together n. Default: two pieces at every place, and
            token by token.
        state: what the first step gets.
        atol: absolute tolerance; floats are meant to be float64.
    """
    n = x.shape[1]
    if splits is None:
        splits = [(t, n - t) for t in range(1, n)] + [(1,) * n]
    with torch.no_grad():
        expected = whole(x)
        for lengths in splits:
            if sum(lengths) != n or len(lengths) < 2:
                raise ValueError(f"a split needs 2 pieces or more of {n} tokens, got {lengths}")
            carried, outputs = state, []
            for piece in x.split(list(lengths), dim=1):
                output, carried = step(piece, carried)
                outputs.append(output)
            what = f"pieces of {tuple(lengths)} tokens"
            assert_close(torch.cat(outputs, dim=1), expected, what, atol=atol)


def assert_masked_ignored(
    fn: Callable[[Tensor, Tensor], Any],
    x: Tensor,
    mask: Tensor,
    *,
    output_mask: Tensor | None = None,
    parameters: Sequence[Tensor] = (),
    atol: float = 1e-10,
) -> None:
    """What a mask leaves out has no influence on outputs and gradients, NaN and infinity included.

    Args:
        fn: (x, mask) -> outputs, nested or not.
        x: (b, n, d) floats, or (b, n) tokens, which are replaced by other tokens.
        mask: (b, n) boolean with both values.
        output_mask: the outputs that count, over their first dimensions; `mask` unless given.
        parameters: tensors whose gradients must not see the masked places either.
        atol: what counts as no influence; floats are meant to be float64.

    Raises:
        AssertionError: masked places have an influence, their gradient is not zero, an output is
            not finite, or `x` has no influence at all.
    """
    if mask.dtype != torch.bool or bool(mask.all()) or not bool(mask.any()):
        raise ValueError("the mask must be boolean and hold both True and False")
    rows = mask if output_mask is None else output_mask
    leaves = [p for p in parameters if p.requires_grad]

    def run(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = x.detach().clone().requires_grad_(x.is_floating_point())
        outputs = [y[rows] for y in tensors(fn(x, mask))]
        wanted = ([x] if x.requires_grad else []) + leaves
        if not wanted:
            return outputs, []
        gradients = torch.autograd.grad(
            random_sum(outputs), wanted, allow_unused=True, materialize_grads=True
        )
        return outputs, list(gradients)

    before, gradients = run(x)
    if not all(bool(y.isfinite().all()) for y in before if y.is_floating_point()):
        raise AssertionError("an output is not finite")
    if x.is_floating_point() and bool(gradients[0][~mask].ne(0).any()):
        raise AssertionError("the gradient of a masked place is not zero")

    replacements: dict[str, Tensor] = {"other values": _other(x)}
    if x.is_floating_point():
        replacements |= {
            word: torch.full_like(x, float(word)) for word in ("1e4", "nan", "inf", "-inf")
        }
    places = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    for word, values in replacements.items():
        after, changed = run(torch.where(places, x, values))
        assert_close(after, before, f"output, {word} in masked places", atol=atol)
        if gradients:
            assert_close(changed, gradients, f"gradient, {word} in masked places", atol=atol)

    with torch.no_grad():
        moved = [y[rows] for y in tensors(fn(torch.where(places, _other(x), x), mask))]
    if all(torch.equal(a, b) for a, b in zip(moved, before, strict=True)):
        raise AssertionError("what the mask keeps has no influence either")


def assert_same_gradients(
    f: Callable[..., Any],
    g: Callable[..., Any],
    inputs: Sequence[Any],
    atol: float = 1e-10,
) -> None:
    """Two functions agree in their outputs and in the gradients of all their inputs, in float64.

    Args:
        f: inputs -> outputs, nested or not.
        g: the same another way, such as an oracle.
        inputs: positional arguments; floating-point tensors are taken in float64.
        atol: absolute tolerance.

    Raises:
        AssertionError: an output or a gradient differs, is not finite, or all gradients are zero.
    """
    results = []
    for function in (f, g):
        leaves = fresh_leaves(to_float(tuple(inputs), torch.float64))
        outputs = function(*leaves)
        wanted = [x for x in tensors(leaves) if x.requires_grad]
        gradients = torch.autograd.grad(
            random_sum(outputs), wanted, allow_unused=True, materialize_grads=True
        )
        results.append((tensors(outputs), gradients))
    (outputs, gradients), (other_outputs, other_gradients) = results
    assert_close(outputs, other_outputs, "outputs", atol=atol)
    if not any(bool(gradient.ne(0).any()) for gradient in gradients):
        raise AssertionError("every gradient is zero")
    assert_close(gradients, other_gradients, "gradients", atol=atol)


def _other(x: Tensor) -> Tensor:
    """Random values of the same kind, each different from that of `x`."""
    generator = torch.Generator().manual_seed(1)
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x + (noise + noise.sign()).to(x)
    largest = int(x.max())
    if largest < 1:
        raise ValueError("tokens that are all 0 cannot be replaced by others up to the largest")
    shift = torch.randint(1, largest + 1, x.shape, generator=generator)
    return (x + shift.to(x.device)) % (largest + 1)
