"""Autoregressive models: what they learn from, and what they generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .checks import check_at_least, check_integers
from .sampling import check_draw, check_filters, filter_logits, sample

State = TypeVar("State")


def next_token_pairs(
    x: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    pad_value: int = 0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Splits tokens into inputs (b, t-1), the tokens that follow them (b, t-1), and a mask or None.

    `x` is (b, t), or a list of sequences (t_i,), which are padded at their end with `pad_value` and
    masked. `mask` is boolean (b, t), True = a token; of t - 1 columns it is about the inputs, and
    the last token counts as the one before it does. Targets are int64, `ignore_index` where they
    are masked.

    Raises TypeError for tokens that are not integers and a mask that is not boolean, ValueError for
    other shapes, t < 2, a mask together with a list.
    """
    if not isinstance(x, Tensor):
        if mask is not None:
            raise ValueError("mask must be None for a list of sequences, which is masked by itself")
        x, mask = _pad_rows(x, pad_value)
    _check_integer_tokens("x", x, at_least=2)
    targets = x[:, 1:].long()
    if mask is None:
        return x[:, :-1], targets, None
    b, t = x.shape
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if mask.shape not in ((b, t), (b, t - 1)):
        raise ValueError(f"mask must be ({b}, {t}) or ({b}, {t - 1}), got {tuple(mask.shape)}")
    if mask.shape[1] < t:
        mask = torch.cat((mask, mask[:, -1:]), dim=1)
    return x[:, :-1], targets.masked_fill(~mask[:, 1:], ignore_index), mask[:, :-1]


def stream(
    step: Callable[[Tensor, State | None], tuple[Tensor, State]],
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    eos_token: int | None = None,
    pad_value: int = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    filter_fn: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Generates `length` tokens, (b,) int64 at a time, from a prompt (b, t) of integers, t >= 1.

    `step` takes (tokens (b, t), state) and returns (logits (b, t', V), state); only the last logits
    are used. It gets the prompt and None, then the newest tokens (b, 1) and its own state, without
    gradients; between tokens the caller's gradient mode holds. For dropout see `eval_mode`.

    The logits go through `filter_logits` with `top_k`, `top_p` and `min_p`, or through `filter_fn`,
    (b, V) -> (b, V), then through `sample`. A row that has drawn `eos_token` yields `pad_value`
    (`step` sees the end token again); when all rows have, the stream ends.

    Raises TypeError for a prompt or number that is not of integers, ValueError for another shape, a
    negative length, `filter_fn` together with another filter, and what `filter_logits` and `sample`
    refuse. The call raises, not the first `next`; logits of a wrong shape are refused as they come.
    """
    _check_integer_tokens("prompt", prompt, at_least=1)
    check_at_least(0, length=length)
    check_integers(eos_token=0 if eos_token is None else eos_token, pad_value=pad_value)
    check_draw(temperature, generator, prompt.device)
    check_filters(top_k, top_p, min_p)
    if filter_fn is None:
        filter_fn = partial(filter_logits, top_k=top_k, top_p=top_p, min_p=min_p)
    elif (top_k, top_p, min_p) != (None, None, None):
        raise ValueError(f"filter_fn excludes {top_k=}, {top_p=} and {min_p=}")

    def tokens() -> Iterator[Tensor]:
        fed, state = prompt, None
        ended = prompt.new_zeros(len(prompt), dtype=torch.bool)
        for _ in range(length):
            # Closed before each yield: between two tokens the gradient mode is the caller's.
            with torch.no_grad():
                logits, state = step(fed, state)
                if logits.ndim != 3 or len(logits) != len(prompt) or logits.shape[1] == 0:
                    shape = tuple(logits.shape)
                    raise ValueError(f"step must return logits ({len(prompt)}, t, V), got {shape}")
                last = filter_fn(logits[:, -1])
                token = drawn = sample(last, temperature=temperature, generator=generator)
                if eos_token is not None:
                    # The padding may lie outside the vocabulary, so it is not fed.
                    drawn = drawn.masked_fill(ended, eos_token)
                    token = drawn.masked_fill(ended, pad_value)
                    ended = ended | (drawn == eos_token)
                fed = drawn[:, None]
            yield token
            if eos_token is not None and bool(ended.all()):
                return

    return tokens()


def generate(
    step: Callable[[Tensor, State | None], tuple[Tensor, State]],
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    eos_token: int | None = None,
    pad_value: int = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    filter_fn: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """All tokens of `stream`, (b, length) int64, `pad_value` behind the end; raises the same."""
    tokens = stream(
        step,
        prompt,
        length,
        temperature=temperature,
        eos_token=eos_token,
        pad_value=pad_value,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        filter_fn=filter_fn,
        generator=generator,
    )
    out = prompt.new_full((prompt.shape[0], length), pad_value, dtype=torch.long)
    for column, token in enumerate(tokens):
        out[:, column] = token
    return out


def _check_integer_tokens(name: str, x: Tensor, *, at_least: int) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer tokens, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] < at_least:
        raise ValueError(f"{name} must be (b, t) with t >= {at_least}, got shape {tuple(x.shape)}")


def _pad_rows(rows: Sequence[Tensor], pad_value: int) -> tuple[Tensor, Tensor]:
    """Sequences (t_i,) -> tokens and mask, both (b, largest t_i)."""
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in rows]
    if not shapes or any(isinstance(shape, str) or len(shape) != 1 for shape in shapes):
        raise ValueError(f"x must hold at least one tensor, each (t,), got {shapes}")
    x = pad_sequence(list(rows), batch_first=True, padding_value=pad_value)
    lengths = torch.tensor([len(row) for row in rows], device=x.device)
    return x, torch.arange(x.shape[1], device=x.device) < lengths[:, None]
