"""A small language model with memories in the place of some feed-forward layers.

Shapes: b batch, n tokens, t new tokens, d model width, h heads, d_h width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from product_key_memory.legacy import PKM_KEYS
from product_key_memory.model import PKM
from product_key_memory.state import State
from shared_core import (
    FeedForward,
    eval_mode,
    generate,
    next_token_pairs,
    register_key_map,
    stream,
    top_k,
)
from shared_core.checks import check_at_least, check_integers, check_probability

__all__ = ["Transformer", "top_k"]

KEYS = (
    (r"layers\.(\d+)\.0\.(.+)", r"layers.\1.attention.\2"),
    (r"layers\.(\d+)\.1\.0\.(.+)", r"layers.\1.norm.\2"),
    (r"layers\.(\d+)\.1\.1\.(.+)", r"layers.\1.body.inner.\2"),
    (r"layers\.(\d+)\.1\.3\.(.+)", r"layers.\1.body.outer.\2"),
    *((rf"layers\.(\d+)\.1\.{theirs}", rf"layers.\1.body.{ours}") for theirs, ours in PKM_KEYS),
    (r"layers\.(\d+)\.1\.(.+)", r"layers.\1.body.\2"),
    (r"to_logits\.0\.(.+)", r"norm.\1"),
    (r"to_logits\.1\.(.+)", r"to_logits.\1"),
)
"""How the reference names parameters that bear another name here."""


class _Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of new tokens to themselves and to those before.

        Args:
            x: (b, t, d).
            past: keys and values of the n tokens before, (b, h, n, d_h).

        Returns:
            (b, t, d), and keys and values of all tokens, (b, h, n + t, d_h).
        """
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None
        if past is not None:
            t, n = q.shape[2], past[0].shape[2]
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            if t > 1:
                mask = torch.ones(t, n + t, dtype=torch.bool, device=x.device).tril(n)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None)
        return self.to_out(out.transpose(1, 2).flatten(2)), k, v


class _Layer(nn.Module):
    """Attention, then a feed-forward layer or a memory, each with its norm before it."""

    def __init__(
        self, dim: int, attention: _Attention, body: FeedForward | PKM, legacy: bool
    ) -> None:
        super().__init__()
        self.attention = attention
        self.body = body
        learned = isinstance(body, FeedForward)
        self.attention_norm = _norm(dim, legacy)
        self.norm = nn.LayerNorm(dim) if learned else _norm(dim, legacy)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(b, t, d) -> the same, and what `_Attention.forward` returns besides."""
        out, keys, values = self.attention(self.attention_norm(x), past)
        x = x + out
        return x + self.body(self.norm(x)), keys, values


def _norm(dim: int, legacy: bool) -> nn.Module:
    """A norm without parameters, since the reference's checkpoints have none for it."""
    return nn.Identity() if legacy else nn.LayerNorm(dim, elementwise_affine=False)


class Transformer(nn.Module):
    """A causal language model some of whose feed-forward layers are memories.

    Attention and memories are normalised at their input, which the reference leaves out; these
    norms learn nothing, so that its checkpoints fit.

    Args:
        dim: model width.
        num_tokens: size of the vocabulary.
        depth: layers.
        seq_len: positions. `forward` and `step` end there; `generate` goes on with the last
            `seq_len` tokens.
        pkm_layers: the layers which have a memory, one or several, the first being 1;
            depth // 2 by default, none at depth 1.
        dim_head: width of an attention head.
        heads: attention heads.
        pad_value: what `generate` writes behind the end of a row.
        pkm_kwargs: arguments of each `PKM`. A `MemoryPool` as `pool` makes them share a table.
        legacy: reproduce the numbers of product-key-memory 0.3.0, in the memories too.

    Raises:
        TypeError, ValueError: a number is out of range, or `PKM` refuses its arguments.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_tokens: int,
        depth: int,
        seq_len: int,
        pkm_layers: int | Sequence[int] | None = None,
        dim_head: int = 64,
        heads: int = 8,
        pad_value: int = 0,
        pkm_kwargs: Mapping[str, Any] = MappingProxyType({}),
        legacy: bool = False,
    ) -> None:
        check_at_least(
            1,
            dim=dim,
            num_tokens=num_tokens,
            depth=depth,
            seq_len=seq_len,
            dim_head=dim_head,
            heads=heads,
        )
        check_integers(pad_value=pad_value)
        with_memory = _memory_layers(pkm_layers, depth)
        super().__init__()
        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.pad_value = pad_value
        self.token_emb: nn.Embedding = nn.Embedding(num_tokens, dim)
        self.pos_emb: nn.Embedding = nn.Embedding(seq_len, dim)
        self.layers: nn.ModuleList = nn.ModuleList()
        for layer in range(1, depth + 1):
            attention = _Attention(dim, heads, dim_head)
            memory = layer in with_memory
            body = PKM(dim, **pkm_kwargs, legacy=legacy) if memory else FeedForward(dim)
            self.layers.append(_Layer(dim, attention, body, legacy))
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.to_logits: nn.Linear = nn.Linear(dim, num_tokens)
        register_key_map(self, KEYS)

    def forward(self, x: Tensor | Sequence[Tensor], return_loss: bool = True) -> Tensor:
        """The loss of predicting each token from those before it, or the logits.

        Args:
            x: (b, n) integer tokens; for the loss also a list of sequences (n_i,).
            return_loss: mean cross-entropy in nats, of n - 1 predictions a row.

        Returns:
            The loss (), or logits (b, n, num_tokens).

        Raises:
            TypeError: the tokens are not integers, or logits are asked of a list.
            ValueError: the shape is not (b, n), or there are more tokens than positions, or for
                the loss fewer than 2.
        """
        if not return_loss:
            if not isinstance(x, Tensor):
                raise TypeError(f"x must be a tensor for logits, got {type(x).__name__}")
            return self.step(x)[0]
        inputs, targets, _ = next_token_pairs(x)
        return F.cross_entropy(self.step(inputs)[0].transpose(1, 2), targets)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Continues sequences by t >= 1 tokens.

        Args:
            x: (b, t) integer tokens.
            state: from an earlier step; it stays valid. None where nothing came before.

        Returns:
            Logits (b, t, num_tokens), and the state after them.

        Raises:
            TypeError: the tokens are not integers.
            ValueError: a shape does not fit, or the sequence outgrows `seq_len`.
        """
        self._check(x, state)
        hidden, state = self._run(x, state)
        return self.to_logits(hidden), state

    def stream(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        eos_token: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields up to `seq_len` tokens (b,) one by one; arguments as `generate`."""
        return stream(
            self._advance,
            prompt,
            seq_len,
            temperature=temperature,
            eos_token=eos_token,
            pad_value=self.pad_value,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            filter_fn=_leave_out(filter_thres, top_k, top_p, min_p),
            generator=generator,
        )

    def generate(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        eos_token: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples a continuation, from keys and values kept, until all positions are taken.

        From then on the last `seq_len` tokens of the model are read anew for each token, since
        their positions move. Dropout is off meanwhile.

        Args:
            prompt: (b, t) tokens, t >= 1, of which the last `seq_len` of the model are read.
            seq_len: number of tokens to sample.
            temperature: of the softmax; 0 takes the most probable token.
            filter_thres: part of the vocabulary that is left out, the least probable one. It
                gives way to the other filters.
            eos_token: ends its row; the rest of the row is `pad_value`.
            top_k, top_p, min_p: keep the k most probable tokens; the most probable ones up to
                probability p; those of at least min_p times the highest probability.
            generator: source of randomness.

        Returns:
            (b, seq_len) the new tokens.

        Raises:
            TypeError, ValueError: as `shared_core.generate`.
        """
        with eval_mode(self):
            return generate(
                self._advance,
                prompt,
                seq_len,
                temperature=temperature,
                eos_token=eos_token,
                pad_value=self.pad_value,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                filter_fn=_leave_out(filter_thres, top_k, top_p, min_p),
                generator=generator,
            )

    def _advance(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """`step` for sampling: in evaluation, only the last logits (b, 1, num_tokens)."""
        if self.training:
            with eval_mode(self):
                return self._advance(tokens, state)
        if state is not None and state.length + tokens.shape[1] > self.seq_len:
            tokens, state = torch.cat((state.tokens, tokens), 1), None
        if state is None:
            tokens = tokens[:, -self.seq_len :]
        hidden, state = self._run(tokens, state)
        return self.to_logits(hidden[:, -1:]), state

    def _run(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """What the logits are made of, (b, t, d)."""
        start = 0 if state is None else state.length
        places = torch.arange(start, start + x.shape[1], device=x.device)
        hidden = self.token_emb(x) + self.pos_emb(places)
        keys, values = [], []
        for number, layer in enumerate(self.layers):
            past = None if state is None else (state.keys[number], state.values[number])
            hidden, k, v = layer(hidden, past)
            keys.append(k)
            values.append(v)
        tokens = x if state is None else torch.cat((state.tokens, x), 1)
        return self.norm(hidden), State(tokens, tuple(keys), tuple(values))

    def _check(self, x: Tensor, state: State | None) -> None:
        """Raises unless x is (b, t) integer tokens that fit the model and the state."""
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x must hold integer tokens, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] < 1:
            raise ValueError(f"x must be (b, n) with n >= 1, got shape {tuple(x.shape)}")
        seen = 0
        if state is not None:
            seen = state.length
            if len(state.keys) != len(self.layers) or len(state.tokens) != len(x):
                raise ValueError(
                    f"the state is of {len(state.keys)} layers and {len(state.tokens)} sequences, "
                    f"the model has {len(self.layers)} layers and x {len(x)} sequences"
                )
        if seen + x.shape[1] > self.seq_len:
            raise ValueError(
                f"{seen} tokens before and {x.shape[1]} new ones are more than "
                f"seq_len={self.seq_len}"
            )


def _memory_layers(pkm_layers: int | Sequence[int] | None, depth: int) -> set[int]:
    """Which of 1 to depth have a memory."""
    if pkm_layers is None:
        return {depth // 2}
    layers = {pkm_layers} if isinstance(pkm_layers, int) else set(pkm_layers)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"pkm_layers must be integers, got {layer!r}")
    if outside := sorted(layer for layer in layers if not 1 <= layer <= depth):
        raise ValueError(f"pkm_layers must be from 1 to depth={depth}, got {outside}")
    return layers


def _leave_out(share: float, *others: float | None) -> Callable[[Tensor], Tensor] | None:
    """The reference's filter, where no other is asked for."""
    check_probability(filter_thres=share)
    return partial(top_k, thres=share) if others == (None, None, None) else None
